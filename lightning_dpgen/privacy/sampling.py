"""Which records enter which batch: Poisson lots, disjoint shards, full passes.

All three are batch samplers for a ``DataLoader``: they yield lists of record indices. Their randomness is SECRET.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from lightning_dpgen._validate import positive_int
from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import DisjointShards, FullPass, PoissonSampling


class PoissonLots(Sampler[list[int]]):
    """Lots in which every record is included independently with the same probability.

    Args:
        sampling: N and the expected lot size.
        lots: Number of lots in one pass of the loader.
        stream: The SECRET stream.
        rank: Of several processes, which one this is; it holds the records ``rank``, ``rank + world``, … and no other.
        world: Number of processes.

    Privacy:
        A fresh mask for every lot, also across epochs, independent between processes. Lots may be empty, and an empty lot is
        a lot. The processes' records are disjoint and none is repeated to even them out.
    """

    def __init__(self, sampling: PoissonSampling, lots: int, stream: SecretStream, rank: int = 0, world: int = 1) -> None:
        self.sampling = sampling
        self.lots = positive_int("lots", lots)
        self._records = np.arange(rank, sampling.records, world)
        self._stream = stream

    def __len__(self) -> int:
        return self.lots

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.lots):
            included = self._stream.uniform(len(self._records)) < self.sampling.rate
            yield self._records[included].tolist()


class FullPassChunks(Sampler[list[int]]):
    """Every record exactly once, in order, in chunks.

    Args:
        sampling: N.
        chunk_size: Records in a chunk; the last one is smaller rather than dropped or padded.

    Privacy:
        Deterministic: each record contributes to exactly one chunk, and the chunks' clipped sums are released as one.
    """

    def __init__(self, sampling: FullPass, chunk_size: int) -> None:
        self.sampling = sampling
        self.chunk_size = positive_int("chunk_size", chunk_size)

    def __len__(self) -> int:
        return -(-self.sampling.records // self.chunk_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.sampling.records, self.chunk_size):
            yield list(range(start, min(start + self.chunk_size, self.sampling.records)))


class ShardBatches(Sampler[list[int]]):
    """The records of each shard as one batch, shard after shard.

    Args:
        sampling: N and the number of shards.
        stream: The SECRET stream that draws the assignment.
        assignment: Shard of each record ``[N]``, from a checkpoint. A shard assignment is drawn once and never again: a
            second draw would let a record shape two networks.

    Attributes:
        assignment: Shard of each record ``[N]``; private, kept in the private checkpoint.

    Privacy:
        Shards are disjoint, equal in size to within one record, and independent of what the records hold.

    Raises:
        ValueError: If ``assignment`` does not have one shard number for each record.
    """

    def __init__(self, sampling: DisjointShards, stream: SecretStream, assignment: NDArray[np.int64] | None = None) -> None:
        self.sampling = sampling
        if assignment is None:
            assignment = np.empty(sampling.records, dtype=np.int64)
            assignment[stream.permutation(sampling.records)] = np.arange(sampling.records) % sampling.count
        if assignment.shape != (sampling.records,) or assignment.min() < 0 or assignment.max() >= sampling.count:
            raise ValueError(
                f"the shard assignment has shape {assignment.shape}; it must hold one shard from 0 to {sampling.count - 1} for "
                f"each of the {sampling.records} records."
            )
        self.assignment = assignment

    def __len__(self) -> int:
        return self.sampling.count

    def __iter__(self) -> Iterator[list[int]]:
        order = np.argsort(self.assignment, kind="stable")
        ends = np.cumsum(np.bincount(self.assignment, minlength=self.sampling.count))
        for shard in np.split(order, ends[:-1]):
            yield shard.tolist()
