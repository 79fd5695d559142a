"""Runs a user's module on random inputs of its loader's shape, once, and refuses what no list of refusals can foresee."""

# ruff: noqa: NPY002 -- users' steps draw from numpy's global state, so that is what is seeded and put back

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_dpgen._compat import pl
from lightning_dpgen.privacy.clipping import clipped_sum, tensors_of
from lightning_dpgen.privacy.probe import RowDependenceError, check_row_independence
from lightning_dpgen.strategies.engine import PerRecordEngine, SingleRecordEngine, part_of, record_count
from lightning_dpgen.strategies.functional import FunctionalEngine
from lightning_dpgen.strategies.hooks import HooksEngine
from lightning_dpgen.strategies.loaders import EmptyAwareCollate

if TYPE_CHECKING:
    from lightning_dpgen.strategies.dp_sgd import DPSGD

LOT = 4
MOST = 0.05
"""The largest tolerance: what mixes records moves rows by more."""
SCHEDULE = 16
"""Batches by whose ``batch_idx`` every optimizer of manual optimization must have stepped once."""
POOL = 32
"""Records whose integers (labels) the probe may borrow, spread over the data set."""


class Probe:
    """The check of one fit.

    Args:
        strategy: The strategy that fits.
        engine: The engine whose rows are compared, attached.
        loader: The training loader; the structure and the integers of its records are copied, floats are replaced.
        step: The user's training step under the precision plugin.

    Privacy:
        Reads the structure and the integers of some records; nothing that it computes is kept but a refusal, which is for the
        owner before training.
    """

    def __init__(self, strategy: DPSGD, engine: PerRecordEngine, loader: DataLoader[Any], step: Callable[..., Any]) -> None:
        self.strategy, self.engine, self.loader, self.step = strategy, engine, loader, step
        self.module = strategy._module
        reduced = "bf16" in str(self.module.trainer.precision)
        self.tolerance = 5e-2 if reduced else 1e-3
        self._rows: dict[str, Tensor] | None = None
        self._public: list[Tensor] = []
        self._widths: list[tuple[int, ...]] = []
        self.stepped: list[Any] = []
        self._count = 0
        self._has_loss = False

    def run(self) -> None:
        """Compares rows over exchanges of the other records.

        Raises:
            RowDependenceError: If rows mix records.
            RuntimeError: If the engine's rows are not the gradient, or a public optimizer's gradient depends on records.
        """
        with undisturbed(self.module, self.strategy):
            unsettle(self.engine.parameters)
            real = spread_records(self.loader.dataset)
            records, others = lots_of(real)
            self.tolerance = max(self.tolerance, min(MOST, 5 * self._rounding(records)))
            check = self._check_hooks if isinstance(self.engine, HooksEngine) else self._check_rows
            check(*randomised(records, others))
            check(records, others[:1])  # as they are: missing values and other marks steer losses too
            if not self.module.automatic_optimization:
                self._check_public(*randomised(records, others))
            elif not self._has_loss:
                raise RuntimeError(
                    f"{type(self.module).__name__}.training_step returned no loss on any of {1 + len(others)} lots: every step would "
                    "spend budget on noise alone. Return the loss (or {'loss': loss})."
                )
            self.engine.clear()

    def saw(self, is_private: bool, optimizer: Any) -> None:
        """What the strategy calls in place of a step in manual optimization."""
        if is_private:
            self._rows = self._of_engine()
            self.engine.clear()
        else:
            self.stepped.append(optimizer)
            self._public += [p.grad.clone() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._public += [torch.tensor(width) for width in self._widths]
        self._widths.clear()

    def _check_rows(self, records: list[Any], others: list[list[Any]]) -> None:
        check_row_independence(self._rows_of, records, others, self.tolerance)

    def _check_hooks(self, records: list[Any], others: list[list[Any]]) -> None:
        try:
            self._check_rows(records, others)
        except RowDependenceError as error:
            engine = cast(HooksEngine, self.engine)
            if engine.loss_reduction == "sum":
                raise
            engine.set_reduction("sum")  # a loss that is a sum over records, not a mean, has rows of its own
            try:
                self._check_rows(records, others)
            except RowDependenceError:
                raise error from None

    def _rounding(self, records: list[Any]) -> float:
        """How far rows move, of their largest number, when every weight moves in its last places: deep ReLU networks magnify it."""
        weights = list(self.engine.parameters.values())
        values = [weight.detach().clone() for weight in weights]
        before = self._rows_of(records, 0)
        _seed(0)
        with torch.no_grad():
            for weight in weights:
                weight.mul_(1 + 1e-6 * torch.randn_like(weight))
        after = self._rows_of(records, 0)
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)
        scale = _scale(*before.values())
        return max(_scale(before[name] - after[name]) for name in before) / scale if scale else 0.0

    def _rows_of(self, records: Sequence[Any], seed: int, batch_idx: int = 0) -> dict[str, Tensor]:
        batch = batch_of(self.strategy, self.loader, records, seed)
        self._count = record_count(batch)
        if self._count != len(records):
            raise RowDependenceError(
                f"a batch of {len(records)} records has a first tensor of {self._count} rows. One record must be one row of every tensor "
                "that has rows, the first one included: do not drop, repeat or split records in collate_fn."
            )
        if isinstance(self.engine, SingleRecordEngine):
            parts = [part_of(batch, i, i + 1, self._count) for i in range(self._count)]
            self._count = 1
            found = [self._rows_of_batch(part, seed, batch_idx) for part in parts]
            return {name: torch.cat([rows[name] for rows in found]) for name in found[0]}
        return self._rows_of_batch(batch, seed, batch_idx)

    def _rows_of_batch(self, batch: Any, seed: int, batch_idx: int) -> dict[str, Tensor]:
        self.engine.clear()
        _seed(seed)
        arguments = (batch, batch_idx)[: _arguments(self.module)]
        if isinstance(self.engine, FunctionalEngine):
            rows, _, _ = self.engine.rows_of(self.step, *arguments)
            self._has_loss = True
            return {name: value.detach() for name, value in rows.items()}
        output = self.step(*arguments)
        if self.module.automatic_optimization:
            loss = output.get("loss") if isinstance(output, dict) else output
            if loss is None:
                return {name: value.new_zeros((self._count, *value.shape)) for name, value in self.engine.parameters.items()}
            self._has_loss = True
            loss.backward()
            return self._of_engine()
        if self._rows is None:
            raise RuntimeError(
                f"{type(self.module).__name__}.training_step did not step its private optimizer. Step it once in every training_step."
            )
        rows, self._rows = self._rows, None
        return rows

    def _of_engine(self) -> dict[str, Tensor]:
        rows = {name: value.clone() for name, value in self.engine.rows(self._count).items()}
        self._check_gradient(rows)
        if type(self.engine).collect is not PerRecordEngine.collect:
            mine, theirs = tensors_of(self.engine.collect(self._count)), tensors_of(clipped_sum(rows, self.engine.clip_norm))
            wrong = _apart(mine, theirs, self.tolerance)
            if wrong:
                raise RuntimeError(f"the clipped sum of {', '.join(wrong[:6])} is not that of its rows. Use grad_sample='hooks'.")
        return rows

    def _check_gradient(self, rows: dict[str, Tensor]) -> None:
        """The rows' sum must be the ordinary gradient, or a layer was used in a way that its hook did not see."""
        if len({len(value) for value in rows.values()}) != 1 or isinstance(self.engine, SingleRecordEngine):
            return
        share = self._count if self.engine.loss_reduction == "mean" else 1
        plain = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in self.engine.parameters.items()}
        wrong = _apart({name: value.sum(0) / share for name, value in rows.items()}, plain, self.tolerance)
        if wrong:
            raise RowDependenceError(
                f"the per-record gradients of {', '.join(wrong[:6])} do not add up to its gradient: a weight that is also used outside its "
                "layer (tied by hand), an Embedding with padding_idx, or a layer that the hooks do not know. Use "
                "grad_sample='functional', physical_batch_size=1, or, for "
                "recurrent and attention layers, opacus.layers (DPLSTM, DPMultiheadAttention)."
            )

    def _check_public(self, records: list[Any], others: list[list[Any]]) -> None:
        """Public optimizers step on the same gradient whatever the records, and on as many samples however many there are."""
        handles = [
            layer.register_forward_hook(self._watch_width)
            for name, layer in self.module.named_modules()
            if name and not self.engine.covers(name) and not list(layer.children())
        ]
        try:
            for batch_idx in range(SCHEDULE):
                state, found = plain_attributes(self.module), []
                for lot in (records, others[0], records[:-1]):
                    vars(self.module).update(
                        {name: copy.copy(value) for name, value in state.items()}
                    )  # a counter of steps is the same for all three
                    found.append(self._public_gradients(lot, batch_idx))
                self._compare(found[0], found[1], "a gradient that changes with the records: it would carry them past the noise")
                wide, narrow = ([value for value in one if not value.is_floating_point()] for one in (found[0], found[2]))
                self._compare(wide, narrow, "as many samples as the lot has records, which is private: draw a fixed number of them")
        finally:
            for handle in handles:
                handle.remove()

    def _watch_width(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.requires_grad:
            output.register_hook(lambda gradient: self._widths.append(tuple(gradient.shape)))

    def _public_gradients(self, lot: list[Any], batch_idx: int) -> list[Tensor]:
        self._public = []
        self._widths.clear()
        self._rows_of(lot, 0, batch_idx)
        return self._public

    def _compare(self, one: list[Tensor], other: list[Tensor], problem: str) -> None:
        if len(one) != len(other) or not all(_close(a, b, self.tolerance) for a, b in zip(one, other, strict=True)):
            raise RuntimeError(
                f"an optimizer of {type(self.module).__name__} that is not private steps on {problem}. Let its loss read generated data "
                "and released weights only, or name its networks in private_modules."
            )


def check_collate(strategy: DPSGD, loader: DataLoader[Any]) -> None:
    """Refuses a ``collate_fn`` that mixes, drops or repeats records, where a module makes its own releases.

    Raises:
        RowDependenceError: Says so.
    """

    def rows(lot: Sequence[Any], seed: int) -> dict[str, Tensor]:
        leaves = [leaf for leaf in tree_leaves(batch_of(strategy, loader, lot, seed)) if isinstance(leaf, Tensor) and leaf.dim()]
        return {f"tensor {number} of the batch": leaf.double() for number, leaf in enumerate(leaves)}

    with undisturbed(strategy._module, strategy):
        records, others = lots_of(spread_records(loader.dataset))
        for lot, exchanged in (randomised(records, others), (records, others[:1])):
            check_row_independence(rows, lot, exchanged, 1e-6)


def batch_of(strategy: DPSGD, loader: DataLoader[Any], records: Sequence[Any], seed: int) -> Any:
    """What the training step would be given of these records."""
    _seed(seed)
    collated = cast(EmptyAwareCollate, loader.collate_fn).collate(list(records))
    move = pl.strategies.Strategy.batch_to_device  # ours draws afresh, and the probe compares like with like
    return move(strategy, strategy.precision_plugin.convert_input(collated), strategy.root_device)


def spread_records(data: Any) -> list[Any]:
    """Records spread over a data set, those of different labels in turn, so that any few differ; at least ``LOT``."""
    groups: dict[Any, list[Any]] = {}
    for place in np.unique(np.linspace(0, len(data) - 1, POOL).astype(int)):
        record = data[int(place)]
        groups.setdefault(tuple(_integers(leaf) for leaf in tree_leaves(record)), []).append(record)
    turns: list[Any] = []
    while any(groups.values()):
        turns += [group.pop(0) for group in groups.values() if group]
    while len(turns) < LOT:
        turns = turns + turns
    return turns


def lots_of(turns: list[Any]) -> tuple[list[Any], list[list[Any]]]:
    """A lot, and lots to exchange it with: one of other records, then one of each label."""
    labels = {tuple(_integers(leaf) for leaf in tree_leaves(record)): record for record in turns}
    return turns[:LOT], [turns[-LOT:][::-1], *([one] * LOT for one in labels.values())]


def randomised(records: list[Any], others: list[list[Any]]) -> tuple[list[Any], list[list[Any]]]:
    """The same lots with random numbers for floats."""
    _seed(0)
    found = [[tree_map(_randomised, record) for record in lot] for lot in (records, *others)]
    return found[0], found[1:]


def unsettle(parameters: dict[str, nn.Parameter]) -> None:
    """Moves weights that start at zero: behind a layer of them nothing could be seen."""
    _seed(0)
    with torch.no_grad():
        for parameter in parameters.values():
            if not parameter.any():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)


def _integers(leaf: Any) -> Any:
    if isinstance(leaf, (Tensor, np.ndarray)):
        floating = leaf.is_floating_point() if isinstance(leaf, Tensor) else np.issubdtype(leaf.dtype, np.floating)
        return None if floating or int(np.prod(leaf.shape)) > 1 else int(leaf)
    return leaf if isinstance(leaf, (int, str)) else None


def _randomised(leaf: Any) -> Any:
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.rand_like(leaf)
    if isinstance(leaf, np.ndarray) and np.issubdtype(leaf.dtype, np.floating):
        return np.asarray(np.random.random_sample(leaf.shape), dtype=leaf.dtype)
    return random.random() if isinstance(leaf, float) else leaf


def _seed(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def _scale(*values: Tensor) -> float:
    return max((float(value.nan_to_num(posinf=0, neginf=0).abs().max()) for value in values if value.numel()), default=0.0)


def _apart(mine: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> list[str]:
    """Names whose tensors differ. A gradient that is zero but for rounding, as before an InstanceNorm, is held to the others' scale."""
    floor = 0.01 * _scale(*theirs.values())
    return [name for name, value in theirs.items() if not _close(mine[name], value, tolerance, floor)]


def _close(one: Tensor, other: Tensor, tolerance: float, floor: float = 0.0) -> bool:
    absolute = tolerance * max(floor, _scale(one, other)) + 1e-12
    return one.shape == other.shape and torch.allclose(one.float(), other.float(), rtol=tolerance, atol=absolute, equal_nan=True)


def _arguments(module: nn.Module) -> int:
    step: Any = module.training_step
    return 2 if step.__code__.co_argcount > 2 or step.__code__.co_flags & 0x04 else 1


def plain_attributes(module: Any) -> dict[str, Any]:
    """Copies of what a step may count or collect on the module."""
    return {k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (list, dict, set, int, float)) and not k.startswith("_")}


@contextmanager
def undisturbed(module: Any, strategy: DPSGD) -> Iterator[None]:
    """Weights, buffers, plain attributes, metrics, optimizers, schedulers, logging and random states are as before afterwards."""
    tensors = [*module.parameters(), *module.buffers()]
    values = [tensor.detach().clone() for tensor in tensors]
    plain = plain_attributes(module)
    schedulers = [(config.scheduler, copy.deepcopy(config.scheduler.state_dict())) for config in strategy.lr_scheduler_configs]
    groups = [[dict(group) for group in optimizer.param_groups] for optimizer in strategy.optimizers]
    metrics = [(m, copy.deepcopy(m._copy_state_dict()), m._update_count) for m in module.modules() if isinstance(m, Metric)]
    resting = [m for m in module.modules() if isinstance(m, _DropoutNd) and m.training]
    states = np.random.get_state(), random.getstate()
    for name in ("log", "log_dict"):
        vars(module)[name] = lambda *args, **kwargs: None
    for layer in resting:  # its draws differ with the number of records, which would hide a loss that depends on it
        layer.training = False
    try:
        with torch.random.fork_rng(devices=[strategy.root_device] if strategy.root_device.type == "cuda" else []):
            yield
    finally:
        for name in ("log", "log_dict"):
            vars(module).pop(name, None)
        vars(module).update(plain)
        for layer in resting:
            layer.training = True
        with torch.no_grad():
            for tensor, value in zip(tensors, values, strict=True):
                if not torch.equal(tensor, value):
                    tensor.copy_(value)
        for scheduler, state in schedulers:
            scheduler.load_state_dict(state)
        for optimizer, old in zip(strategy.optimizers, groups, strict=True):
            for group, before in zip(optimizer.param_groups, old, strict=True):
                group.update(before)
        for metric, cache, count in metrics:
            for name, value in cache.items():
                setattr(metric, name, value)
            metric._update_count, metric._computed = count, None
        np.random.set_state(states[0])
        random.setstate(states[1])
