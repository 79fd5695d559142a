"""Runs the row-independence probe on a user's module, on random inputs of its loader's shape."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_dpgen._compat import pl
from lightning_dpgen.privacy.probe import check_row_independence
from lightning_dpgen.strategies.engine import PerRecordEngine

LOT = 4


@contextmanager
def _undisturbed(module: pl.LightningModule) -> Iterator[None]:
    """Parameters, buffers, metrics, logging and the random state are as before afterwards."""
    state = {name: value.detach().clone() for name, value in module.state_dict(keep_vars=True).items() if torch.is_tensor(value)}
    names = ("log", "log_dict")
    for name in names:
        setattr(module, name, lambda *args, **kwargs: None)
    with torch.random.fork_rng():
        try:
            yield
        finally:
            for name in names:
                delattr(module, name)
            with torch.no_grad():
                for name, value in module.state_dict(keep_vars=True).items():
                    if torch.is_tensor(value) and not torch.equal(value, state[name]):
                        value.copy_(state[name])
            for child in module.modules():
                if isinstance(child, Metric):
                    child.reset()


def probe_module(
    trainer: pl.Trainer, module: pl.LightningModule, loader: DataLoader[Any], engine: PerRecordEngine, device: torch.device
) -> None:
    """Refuses a module in which a record's gradient depends on the other records of its lot.

    Args:
        trainer: The fitting trainer.
        module: The user's module, hooks attached.
        loader: The training loader; the structure of its records is copied, floats are replaced by random ones.
        engine: The engine whose rows are compared.
        device: Where the module lives.

    Privacy:
        Reads the structure and the integers (labels) of the first records; computes nothing that is kept.

    Raises:
        RowDependenceError: If rows mix records.
    """
    first = [loader.dataset[i % len(loader.dataset)] for i in range(LOT)]  # type: ignore[arg-type]
    leaves, structure = tree_flatten(loader.collate_fn(first))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == LOT]
    lot = [leaves[i] for i in places]

    def randomised() -> list[Tensor]:
        return [torch.rand_like(leaf) if leaf.is_floating_point() else leaf.clone() for leaf in lot]

    def rows(batch: Sequence[Tensor]) -> dict[str, Tensor]:
        filled = list(leaves)
        for place, value in zip(places, batch, strict=True):
            filled[place] = value
        moved = trainer.strategy.batch_to_device(tree_unflatten(filled, structure), device)
        torch.manual_seed(0)
        with trainer.precision_plugin.train_step_context():
            output: Any = module.training_step(*((moved, 0) if _takes_index(module) else (moved,)))
        loss = output["loss"] if isinstance(output, dict) else output
        if loss is None:
            return {name: value.new_zeros((len(batch[0]), *value.shape)) for name, value in engine.parameters.items()}
        loss.backward()
        return {name: value.clone() for name, value in engine.rows(len(batch[0])).items()}

    with _undisturbed(module):
        engine.clear()
        batch, other = randomised(), randomised()
        check_row_independence(rows, batch, other)
        engine.clear()


def _takes_index(module: pl.LightningModule) -> bool:
    import inspect

    return len(inspect.signature(module.training_step).parameters) > 1
