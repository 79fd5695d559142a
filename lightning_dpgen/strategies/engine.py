"""What every per-record engine is to the strategy, and the one that needs nothing but autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_dpgen.privacy.clipping import ClippedSum, clipped_sum, zero_sum

WATCHED = 16
"""Lots during which the numbers of frozen parameters are compared too, not only their versions."""


class PerRecordEngine:
    """Turns backward passes over chunks of a lot into one clipped sum.

    Args:
        module: The user's module.
        clip_norm: C, over the whole gradient of a record.
        roots: Paths of the submodules whose parameters see records; ``""`` is the whole module.

    Attributes:
        parameters: The private parameters, by name.
        stepping: Whether the optimizer step under way is the strategy's own.

    Privacy:
        Zero-out sensitivity C of the sum over :meth:`absorb`'s chunks, provided that a record's row depends on that record
        alone, which the strategy probes at set-up. Parameters and buffers may not be written from records on the way.
    """

    loss_reduction = "mean"

    def __init__(self, module: nn.Module, clip_norm: float, roots: tuple[str, ...] = ("",)) -> None:
        self.module = module
        self.clip_norm = clip_norm
        self.roots = roots
        self.stepping = False
        self.parameters = {name: p for name, p in module.named_parameters() if self.covers(name) and p.requires_grad}
        self._total: ClippedSum | None = None
        self.settle()

    def covers(self, name: str) -> bool:
        """Whether the parameter or layer of this name belongs to what sees records."""
        return any(root in ("", name) or name.startswith(root + ".") for root in self.roots)

    def settle(self) -> None:
        """Takes buffers and frozen parameters as they are now for those of set-up; before the first lot."""
        self._buffers = _versions(dict(self.module.named_buffers()))
        self._written = _versions(dict(self.module.named_parameters()))
        self._values = _checksums(dict(self.module.named_buffers()))
        self._frozen: dict[str, tuple[int, float, float]] = {}
        self._lots = 0

    # One lot: open, absorb each chunk after its backward pass, take ------------------------------------------------

    def open(self) -> None:
        """Begins a lot; refuses a module whose trainable parameters are no longer those of set-up."""
        self._check_trainable()
        self._written = _versions(dict(self.module.named_parameters()))
        self._frozen = _checksums(self._frozen_parameters()) if self._lots < WATCHED else {}
        self._lots += 1
        self._total = None
        self.clear()

    def absorb(self, records: int) -> None:
        """Adds the chunk of ``records`` records that was just backpropagated; forgets its rows."""
        if records:
            total = self.collect(records)
            self._total = total if self._total is None else self._total + total
        self.clear()

    def take(self) -> ClippedSum:
        """The lot's clipped sum; zero for an empty lot.

        Raises:
            RuntimeError: If parameters or buffers were written while the lot's records were looked at.
        """
        self.check_parameters()
        self.check_buffers()
        total = zero_sum(self.parameters, self.clip_norm) if self._total is None else self._total
        self._total = None
        return total

    def collect(self, records: int) -> ClippedSum:
        """The clipped sum of one chunk."""
        return clipped_sum(self.rows(records), self.clip_norm)

    def rows(self, records: int) -> dict[str, Tensor]:
        """The rows ``[records, …]`` of the chunk that was just backpropagated, by parameter name."""
        raise NotImplementedError

    def forget_rows(self) -> None:
        """Forgets the rows of backward passes so far, as ``zero_grad`` forgets ordinary gradients."""

    def clear(self) -> None:
        """Forgets rows and ordinary gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def attach(self) -> None:
        """Prepares the module, once."""

    def detach(self) -> None:
        """Leaves the module as it was."""
        self.clear()

    def stepped(self, optimizer: torch.optim.Optimizer) -> None:
        """Accepts what ``optimizer`` has just written, through the strategy."""
        own = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self._written |= _versions({n: p for n, p in self.module.named_parameters() if id(p) in own})

    # Guards -----------------------------------------------------------------------------------------------------------

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises if ``optimizer`` steps anything that this engine does not clip; called before every step of it.

        Raises:
            RuntimeError: Says what changed, how many such parameters there are, or that the strategy was passed by.
        """
        if not self.stepping:
            raise RuntimeError(
                "the optimizer was stepped round DPStrategy, on a gradient that was neither clipped nor noised. Step it through "
                "Lightning: leave optimizer_step() to the Trainer, or call step() on what self.optimizers() returns."
            )
        self._check_trainable()
        known = {id(parameter) for parameter in self.parameters.values()}
        others = [p for group in optimizer.param_groups for p in group["params"] if id(p) not in known]
        strange = [tuple(p.shape) for p in others if p.requires_grad]
        if strange:
            raise RuntimeError(
                f"the optimizer holds {len(strange)} trainable parameters that are not the module's or do not see records by name (shapes "
                f"{strange[:4]}): their gradients would not be clipped. Register them in a layer of the private modules."
            )
        for parameter in others:  # frozen now, but thawed for a backward pass it may have kept a raw gradient
            parameter.grad = None

    def check_modes(self) -> None:
        """Raises if a layer's mode hides its rows from this engine."""

    def check_parameters(self) -> None:
        """Raises if parameters were written during the training step otherwise than by an optimizer.

        Raises:
            RuntimeError: Names them.
        """
        moved = sorted(n for n, version in _versions(dict(self.module.named_parameters())).items() if version != self._written.get(n))
        if self._frozen:  # what is written through .data has no version
            moved += sorted(n for n, value in _checksums(self._frozen_parameters()).items() if value != self._frozen.get(n, value))
        if moved:
            raise RuntimeError(
                f"the parameters {', '.join(moved[:6])} were written during the training step, where records could shape them without "
                "noise. Write weights between lots, in on_train_batch_end."
            )

    def check_values(self) -> None:
        """Raises if buffers do not hold the numbers of set-up: what was written through ``.data`` has no version.

        Raises:
            RuntimeError: Names them.
        """
        values = _checksums(dict(self.module.named_buffers()))
        moved = sorted(name for name, value in values.items() if value != self._values.get(name, value))
        if moved:
            raise RuntimeError(
                f"the buffers {', '.join(moved[:6])} changed while training: records could have shaped them without noise. Do not write "
                "buffers within a fit."
            )

    def _frozen_parameters(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.module.named_parameters() if not p.requires_grad and self.covers(name)}

    def check_buffers(self) -> None:
        """Raises if the module's buffers are no longer those of set-up.

        Raises:
            RuntimeError: Names what changed and what to do.
        """
        versions = _versions(dict(self.module.named_buffers()))
        moved = sorted(name for name in versions if versions[name] != self._buffers.get(name))
        if moved:
            raise RuntimeError(
                f"the buffers {', '.join(moved[:6])} changed during a training step: running statistics of records would "
                "leave without noise. Replace BatchNorm by GroupNorm, and keep metrics out of the module's buffers."
            )

    def _check_trainable(self) -> None:
        trainable = {name for name, p in self.module.named_parameters() if self.covers(name) and p.requires_grad}
        changed = sorted(trainable ^ self.parameters.keys())
        if changed:
            raise RuntimeError(
                f"the trainable parameters changed after set-up ({', '.join(changed[:6])}): their gradients would not be "
                "clipped. Freeze and unfreeze between fits, not within one."
            )


class SingleRecordEngine(PerRecordEngine):
    """One record a backward pass: its ordinary gradient is its row. Slow, and right for every layer and loss."""

    def rows(self, records: int) -> dict[str, Tensor]:
        """The gradient of the one record.

        Raises:
            RuntimeError: If the chunk held several records.
        """
        if records != 1:
            raise RuntimeError(f"{records} records in one backward pass of the engine that takes each record alone.")
        return {n: (torch.zeros_like(p) if p.grad is None else p.grad.detach())[None].clone() for n, p in self.parameters.items()}


def _versions(tensors: dict[str, Tensor]) -> dict[str, tuple[int, int]]:
    return {name: (id(tensor), tensor._version) for name, tensor in tensors.items()}


def _checksums(tensors: dict[str, Tensor]) -> dict[str, tuple[int, float, float]]:
    sums = {}
    for name, tensor in tensors.items():
        wide = tensor.detach().double() if not tensor.is_complex() else torch.view_as_real(tensor.detach()).double()
        sums[name] = (id(tensor), float(wide.nan_to_num().sum()), float(wide.nan_to_num().square().sum()))
    return sums


def record_count(batch: Any) -> int:
    """The number of records in a collated batch: the length of its first tensor.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"a batch of {type(batch).__name__} holds no tensor with a record dimension: collate records into tensors.")


def part_of(batch: Any, start: int, end: int, count: int) -> Any:
    """Records ``start … end - 1`` of a collated batch of ``count``, in the batch's own structure."""
    if isinstance(batch, Tensor):
        return batch[start:end] if batch.dim() and len(batch) == count else batch
    if isinstance(batch, dict):
        return type(batch)((key, part_of(value, start, end, count)) for key, value in batch.items())  # type: ignore[call-arg]
    if isinstance(batch, (list, tuple)):
        if len(batch) == count and batch and not any(isinstance(item, (Tensor, dict, list, tuple)) for item in batch):
            return batch[start:end]
        parts = [part_of(item, start, end, count) for item in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    return batch
