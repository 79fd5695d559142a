"""Rebuilds a user's ``DataLoader`` with the sampling that the plan is accounted for."""

# ruff: noqa: NPY002 -- data sets draw from numpy's global state, so that is what is seeded and put back

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Iterator, Sized
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, IterableDataset, RandomSampler, Sampler, SequentialSampler
from torch.utils.data.distributed import DistributedSampler

from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import FullPass, PoissonSampling, Sampling
from lightning_dpgen.privacy.sampling import FullPassChunks, NoRecords, PoissonLots
from lightning_dpgen.strategies.engine import record_count


@contextmanager
def fresh_randomness(device: torch.device) -> Iterator[None]:
    """The PRIVATE stream: what is drawn while records are looked at leaves the public random states as they were.

    Privacy:
        How much is drawn may depend on records; a public stream that went on from there would tell of it.
    """
    states = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        seed = secrets.randbits(63)
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for every accelerator, each time
        if device.type == "cuda":
            torch.cuda.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(states[0])
            random.setstate(states[1])


class PrivateLoader(DataLoader[Any]):
    """A ``DataLoader`` that fetches records under :func:`fresh_randomness`: augmentation draws as often as a lot has records."""

    def __iter__(self) -> Any:
        lots = super().__iter__()
        while True:
            with fresh_randomness(torch.device("cpu")):
                try:
                    lot = next(lots)
                except StopIteration:
                    return
            yield lot


def look_at_records(loader: DataLoader[Any], look: Callable[[Any], Any], chunk: int) -> None:
    """Shows every record behind a private loader to ``look``, in order; what is drawn leaves the public random states alone.

    Args:
        loader: A loader that :func:`private_loader` made.
        look: Called with each collated batch.
        chunk: Records that are collated at once.
    """
    collate = cast(EmptyAwareCollate, loader.collate_fn).collate
    with fresh_randomness(torch.device("cpu")):
        for batch in DataLoader(loader.dataset, batch_size=chunk, collate_fn=collate):
            look(batch)


def all_records(loader: DataLoader[Any], transfer: Callable[[Any], Any], chunk: int = 4) -> tuple[Any, ...]:
    """Every record behind a private loader, in order, as one batch; what a data set draws at random is drawn once.

    Args:
        loader: A loader that :func:`private_loader` made.
        transfer: What a batch goes through before a training step: device, ``on_after_batch_transfer``.
        chunk: Records that are collated at once; as many as the check of ``collate_fn`` looks at.

    Privacy:
        Private: the records themselves.

    Raises:
        ValueError: If a chunk comes out with another number of rows.
    """
    chunks: list[tuple[Any, ...]] = []
    look_at_records(loader, lambda batch: chunks.append(tuple(transfer(batch))), chunk)
    records = len(cast(Sized, loader.dataset))
    sizes = [min(chunk, records - start) for start in range(0, records, chunk)]
    for size, leaves in zip(sizes, chunks, strict=True):
        found = {len(leaf) for leaf in leaves}
        if found != {size}:
            raise ValueError(f"{size} records became {sorted(found)} rows on their way to the device: one record must be one row.")
    return tuple(torch.cat(leaves) for leaves in zip(*chunks, strict=True))


class EmptyAwareCollate:
    """The user's collate function, which also gives an empty lot the structure and dtypes of a full one.

    Args:
        collate: The loader's own function.
        dataset: Where the one record comes from whose structure an empty lot copies.
    """

    def __init__(self, collate: Callable[[Any], Any], dataset: Any) -> None:
        self.collate = collate
        self.dataset = dataset

    def __call__(self, records: Any) -> Any:
        """Collates records, or none.

        Raises:
            ValueError: If the user's function leaves a lot out, or makes several rows of a record.
        """
        if len(records):
            batch = self.collate(records)
            if batch is None:
                raise ValueError("collate_fn returned None: Lightning would skip the lot, which may tell of records. Return a batch.")
            found = record_count(batch)
            if found > (len(records[-1]) if isinstance(records, tuple) else len(records)):
                raise ValueError(f"collate_fn made {found} rows of {len(records)} records: one record must be one row.")
            return batch
        one = self.collate([self.dataset[0]])
        return torch.utils._pytree.tree_map(_empty, one)


def _empty(leaf: Any) -> Any:
    """Nothing of a leaf but its type: the record that the structure is copied from was not sampled."""
    if isinstance(leaf, (torch.Tensor, np.ndarray)):
        return leaf[:0] if leaf.ndim else leaf * 0
    return type(leaf)() if isinstance(leaf, (str, bytes, int, float)) else None


def check_loader(loader: object, world: int = 1) -> DataLoader[Any]:
    """Returns ``loader`` if its sampling can be replaced without changing what the user meant.

    Args:
        loader: What the user gave the Trainer.
        world: Number of processes; with several, Lightning has already put its own distributed sampler in.

    Raises:
        ValueError: Says which loader is wanted instead.
    """
    wanted = "Give the Trainer a DataLoader(dataset, batch_size=B, shuffle=True); B becomes the expected lot size."
    if not isinstance(loader, DataLoader):
        raise ValueError(f"the training data is a {type(loader).__name__}, which cannot be Poisson-sampled. {wanted}")
    if isinstance(loader.dataset, IterableDataset) or not isinstance(loader.dataset, Sized):
        raise ValueError(f"an IterableDataset has no length and no index, so lots cannot be sampled from it. {wanted}")
    if loader.batch_size is None:
        raise ValueError(f"the DataLoader has a batch_sampler or batch_size=None, whose sampling would be replaced. {wanted}")
    sampler = loader.sampler
    plain = type(sampler) is SequentialSampler or (
        type(sampler) is RandomSampler and not sampler.replacement and sampler._num_samples is None
    )
    plain = plain or (world > 1 and isinstance(sampler, DistributedSampler))
    if not plain:
        raise ValueError(
            f"the DataLoader's sampler is a {type(sampler).__name__} that decides which records are drawn; the accounting needs "
            f"Poisson sampling. {wanted}"
        )
    if len(loader.dataset) == 0:
        raise ValueError("the training data set holds no records.")
    return loader


def private_loader(loader: DataLoader[Any], sampling: Sampling, stream: SecretStream, rank: int = 0, world: int = 1) -> DataLoader[Any]:
    """``loader`` with the plan's sampling; as many lots in an epoch as N records fill batches, with ``drop_last`` whole ones.

    Args:
        loader: A loader that passed :func:`check_loader`.
        sampling: Poisson lots; a full pass in chunks of the loader's batch size; shards, which networks read by themselves, so that
            a lot holds no record.
        stream: The SECRET stream.
        rank: Which of several processes this is.
        world: Number of processes; the loader's batch size is that of all of them together.

    Privacy:
        The sampler is the one that the plan is accounted for; lots may be empty and are never padded or dropped.
    """
    batch_sampler: Sampler[list[int]]
    whole, rest = divmod(sampling.records, cast(int, loader.batch_size))
    lots = whole if loader.drop_last else whole + bool(rest)
    if isinstance(sampling, PoissonSampling):
        batch_sampler = PoissonLots(sampling, lots, stream, rank, world)
    elif isinstance(sampling, FullPass):
        batch_sampler = FullPassChunks(sampling, cast(int, loader.batch_size), rank, world)
    else:
        batch_sampler = NoRecords(sampling, lots, cast(int, loader.batch_size))
    options: dict[str, Any] = {
        "num_workers": loader.num_workers,
        "pin_memory": loader.pin_memory,
        "timeout": loader.timeout,
        "worker_init_fn": loader.worker_init_fn,
        "multiprocessing_context": loader.multiprocessing_context,
        "generator": loader.generator,
        "persistent_workers": loader.persistent_workers,
    }
    if loader.num_workers:
        options["prefetch_factor"] = loader.prefetch_factor
    collate = EmptyAwareCollate(loader.collate_fn, loader.dataset)
    return PrivateLoader(loader.dataset, batch_sampler=batch_sampler, collate_fn=collate, **options)
