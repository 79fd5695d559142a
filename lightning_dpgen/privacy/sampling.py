"""Which records enter which batch: Poisson lots, full passes, disjoint shards.

The classes are batch samplers for a ``DataLoader``: they yield lists of record indices. All randomness here is SECRET.
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
        chunk_size: Records in a chunk of all processes together; the last one is smaller rather than dropped or padded.
        rank: Of several processes, which one this is; it holds the records ``rank``, ``rank + world``, … and no other.
        world: Number of processes, which all get the same number of chunks.

    Privacy:
        Deterministic: each record contributes to exactly one chunk, and the chunks' clipped sums are released as one.
    """

    def __init__(self, sampling: FullPass, chunk_size: int, rank: int = 0, world: int = 1) -> None:
        self.sampling = sampling
        self.chunk_size = positive_int("chunk_size", chunk_size)
        self._rank, self._world = rank, world

    def __len__(self) -> int:
        return -(-self.sampling.records // self.chunk_size)

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, self.sampling.records, self.chunk_size):
            first = start + (self._rank - start) % self._world
            yield list(range(first, min(start + self.chunk_size, self.sampling.records), self._world))


class NoRecords(Sampler[list[int]]):
    """Empty lots: steps of a method whose networks read their own shards.

    Args:
        sampling: The shards.
        lots: Steps in one pass of the loader.
        minibatch: The loader's batch size: records that one network sees at once.
    """

    def __init__(self, sampling: DisjointShards, lots: int, minibatch: int) -> None:
        self.sampling = sampling
        self.lots = positive_int("lots", lots)
        self.minibatch = positive_int("minibatch", minibatch)

    def __len__(self) -> int:
        return self.lots

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(self.lots):
            yield []


def assign_shards(sampling: DisjointShards, stream: SecretStream) -> NDArray[np.int64]:
    """Splits the records over the shards.

    Args:
        sampling: N and the number of shards K.
        stream: The SECRET stream.

    Returns:
        Record indices ``[K, ⌈N / K⌉]``; where N is not a multiple of K, the shorter shards end with -1.

    Privacy:
        Shards are disjoint, equal in size to within one record, and independent of what the records hold. An assignment is
        private, drawn once and kept: a second one would let a record shape two networks.
    """
    rows = -(-sampling.records // sampling.count)
    table = np.full(rows * sampling.count, -1, dtype=np.int64)
    table[: sampling.records] = stream.permutation(sampling.records)
    return np.ascontiguousarray(table.reshape(rows, sampling.count).T)


def draw_answers(sampling: DisjointShards, rows: int, stream: SecretStream) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Which shard's network answers for which released row: each pair independently with probability asked / count.

    Args:
        sampling: K and the expected number m of answers.
        rows: Number of rows.
        stream: The SECRET stream.

    Returns:
        Row and shard of each answer, ordered by shard. All pairs where ``asked == count``.

    Privacy:
        Fresh at every call and never published: the amplification by m / K rests on it.
    """
    shape = (sampling.count, rows)
    if sampling.asked == sampling.count:
        included = np.ones(shape, dtype=bool)
    else:
        included = stream.uniform(rows * sampling.count).reshape(shape) < sampling.asked / sampling.count
    shard, row = np.nonzero(included)
    return row.astype(np.int64), shard.astype(np.int64)
