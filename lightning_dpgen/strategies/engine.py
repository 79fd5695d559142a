"""Per-record gradients of a user's own module: Opacus's hooks without its wrapper."""

from __future__ import annotations

from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from torch import Tensor, nn

from lightning_dpgen.privacy.clipping import ClippedSum, clipped_sum, zero_sum


class PerRecordEngine:
    """Collects one gradient row a record during an ordinary forward and backward pass.

    Args:
        module: The module whose trainable parameters see records; its loss is a mean over the lot's records.
        clip_norm: C, over the whole gradient of a record.

    Privacy:
        Zero-out sensitivity C of :meth:`collect`'s sum, provided that a record's row depends on that record alone, which
        the strategy probes at set-up.
    """

    def __init__(self, module: nn.Module, clip_norm: float) -> None:
        self.module = module
        self.clip_norm = clip_norm
        self.stepping = False
        self._hooks: list[GradSampleHooks] = []
        for child in module.children():
            if any(parameter.requires_grad for parameter in child.parameters()):
                self._hooks.append(GradSampleHooks(child, batch_first=True, loss_reduction="mean", strict=False))
        self.parameters = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self._buffers = self._buffer_versions()

    def _buffer_versions(self) -> dict[str, tuple[int, int]]:
        return {name: (id(buffer), buffer._version) for name, buffer in self.module.named_buffers()}

    def guard(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises if ``optimizer`` steps anything that this engine does not clip; called before every step.

        Raises:
            RuntimeError: Says what changed, how many such parameters there are, or that the strategy was passed by.
        """
        if not self.stepping:
            raise RuntimeError(
                "the optimizer was stepped round DPStrategy, on a gradient that was neither clipped nor noised. Step it through "
                "Lightning: leave optimizer_step() to the Trainer."
            )
        self.check_unchanged()
        known = {id(parameter) for parameter in self.parameters.values()}
        strange = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad and id(p) not in known]
        if strange:
            raise RuntimeError(
                f"the optimizer holds {len(strange)} trainable parameters that are not the module's (shapes "
                f"{[tuple(p.shape) for p in strange[:4]]}): their gradients would not be clipped. Register them in a layer of the module."
            )

    def check_modes(self) -> None:
        """Raises if a layer with trainable parameters is in eval mode, where its per-record gradients are not recorded.

        Raises:
            RuntimeError: Names the layers.
        """
        layers = {name.rpartition(".")[0] for name in self.parameters}
        resting = sorted(name for name in layers if not self.module.get_submodule(name).training)
        if resting:
            raise RuntimeError(
                f"the layers {', '.join(resting[:6])} are in eval mode, where their per-record gradients are not recorded. Call "
                "train() on them, or freeze them with requires_grad_(False)."
            )

    def check_unchanged(self) -> None:
        """Raises if the trainable parameters or the buffers are no longer those of set-up.

        Raises:
            RuntimeError: Names what changed and what to do.
        """
        trainable = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        changed = sorted(trainable ^ self.parameters.keys())
        if changed:
            raise RuntimeError(
                f"the trainable parameters changed after set-up ({', '.join(changed[:6])}): their gradients would not be "
                "clipped. Freeze and unfreeze between fits, not within one."
            )
        versions = self._buffer_versions()
        moved = sorted(name for name in versions if versions[name] != self._buffers.get(name))
        if moved:
            raise RuntimeError(
                f"the buffers {', '.join(moved[:6])} changed during a training step: running statistics of records would "
                "leave without noise. Replace BatchNorm by GroupNorm, and keep metrics out of the module's buffers."
            )

    def rows(self, records: int) -> dict[str, Tensor]:
        """The rows ``[records, …]`` by parameter name gathered since the last call; forgets them.

        Raises:
            RuntimeError: If a parameter got an ordinary gradient but no rows, or another number of rows than records.
        """
        rows = {}
        for name, parameter in self.parameters.items():
            sample = getattr(parameter, "grad_sample", None)
            if getattr(parameter, "_forward_counter", 0):
                raise RuntimeError(
                    f"{name}: a forward pass in the training step was not followed by its backward pass, so activations and "
                    "gradients of records would be mixed up. Put extra forward passes under torch.no_grad()."
                )
            if sample is None:
                if parameter.grad is not None:
                    raise RuntimeError(
                        f"{name} got a gradient but no per-record gradient: it is used outside its layer's own forward. Call the "
                        "layer, or freeze it with requires_grad_(False)."
                    )
                rows[name] = parameter.new_zeros((records, *parameter.shape))
                continue
            if isinstance(sample, list):
                raise RuntimeError(
                    f"{name}: {len(sample)} backward passes before one optimizer step; one lot is one backward pass. Sum the "
                    "losses and call backward once."
                )
            if len(sample) != records:
                raise RuntimeError(
                    f"{name} has {len(sample)} gradient rows for a lot of {records} records. One record must be one row: do not "
                    "repeat or split records inside the training step."
                )
            rows[name] = sample
        self.clear()
        return rows

    def collect(self, records: int) -> ClippedSum:
        """The clipped sum over the lot; zero for an empty one."""
        if records == 0:
            self.clear()
            return zero_sum(self.parameters, self.clip_norm)
        return clipped_sum(self.rows(records), self.clip_norm)

    def clear(self) -> None:
        """Forgets the rows and the ordinary gradients."""
        for parameter in self.parameters.values():
            parameter.grad = None
            if hasattr(parameter, "grad_sample"):
                parameter.grad_sample = None

    def detach(self) -> None:
        """Removes every hook and attribute from the module."""
        for hooks in self._hooks:
            hooks.remove_hooks()
        for module in self.module.modules():
            for attribute in ("activations", "max_batch_len"):
                if attribute in vars(module):
                    delattr(module, attribute)
        for parameter in self.module.parameters():
            for attribute in ("grad_sample", "_forward_counter", "_current_grad_sample"):
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)


def lot_size(batch: Any) -> int:
    """The number of records in a collated batch: the length of its first tensor.

    Raises:
        ValueError: If the batch holds no tensor.
    """
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.dim() > 0:
            return len(leaf)
    raise ValueError(f"a batch of {type(batch).__name__} holds no tensor with a record dimension: collate records into tensors.")
