"""Clipped sums without the rows: norms first, then one weighted sum a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import Tensor, nn

from lightning_dpgen.privacy.clipping import ClippedSum, ghost_clipped_sum, row_norms, weighted_rows
from lightning_dpgen.strategies.hooks import HooksEngine, RecordHooks, check_count, check_passes, layer_named, untouched

KEPT = 2**22
"""Numbers of a layer's rows up to which they are kept between norms and sum; more are made twice."""


@dataclass(frozen=True)
class _Pass:
    """What the gradient of one pass through one layer is made of; linear in ``backprops`` ``[B, …]``."""

    layer: nn.Module
    activations: list[Tensor]
    backprops: Tensor
    _rows: dict[Tensor, Tensor] = field(default_factory=dict)

    def rows(self) -> dict[Tensor, Tensor]:
        sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(self.layer), ft_compute_per_sample_gradient)
        with layer_named(self.layer):
            found: dict[Tensor, Tensor] = sampler(self.layer, self.activations, self.backprops)
        return found

    def square_norms(self) -> Tensor:
        """``[B]``, float64, over the layer's own parameters."""
        if self._is_linear():
            # Over a sequence the norm is a difference of large products: in float32 a large row could look small.
            sampler = GradSampleHooksFastGradientClipping.NORM_SAMPLERS[nn.Linear]
            norms = sampler(self.layer, [self.activations[0].double()], self.backprops.double())
            return torch.stack([value.square() for value in norms.values()]).sum(0)
        return row_norms({str(id(p)): value for p, value in self._kept_rows().items() if p.requires_grad}).square()

    def weighted(self, factors: Tensor) -> dict[Tensor, Tensor]:
        """The sum of ``factors[i]`` times row ``i``, float64, by parameter; of the very rows whose norms were taken."""
        if not self._is_linear():
            return {parameter: weighted_rows(value, factors) for parameter, value in self._kept_rows().items() if parameter.requires_grad}
        used = (factors > 0).view(-1, *[1] * (self.backprops.dim() - 1))
        scaled = torch.where(used, self.backprops, 0).double() * factors.double().view(used.shape)
        flat = scaled.flatten(0, -2)
        inputs = torch.where(used, self.activations[0], 0).double().flatten(0, -2)
        total: dict[Tensor, Tensor] = {self.layer.weight: flat.T @ inputs}  # type: ignore[dict-item]
        if self.layer.bias is not None:
            total[self.layer.bias] = flat.sum(0)  # type: ignore[index]
        return total

    def _is_linear(self) -> bool:
        return type(self.layer) is nn.Linear and self.backprops.dim() in (2, 3)

    def _kept_rows(self) -> dict[Tensor, Tensor]:
        """:meth:`rows`, kept from the norms for the sum where they are few."""
        if self._rows:
            return self._rows
        rows = self.rows()
        if sum(value.numel() for value in rows.values()) <= KEPT:
            self._rows.update(rows)
        return rows


class _Capture(RecordHooks):
    """Keeps what a layer's gradient is made of, in place of the gradient."""

    def __init__(self, root: nn.Module, captured: list[_Pass]) -> None:
        self.captured = captured
        super().__init__(root)

    def capture_backprops_hook(
        self, module: nn.Module, _forward_input: Any, forward_output: Any, loss_reduction: str, batch_first: bool
    ) -> None:
        if not self.hooks_enabled:
            return
        activations, backprops = self.rearrange_grad_samples(
            module=module, backprops=forward_output[0].detach(), loss_reduction=loss_reduction, batch_first=batch_first
        )
        with layer_named(module):
            wide = [t.float() if t.is_floating_point() else t for t in activations]
        self.captured.append(_Pass(module, wide, backprops.float()))
        for parameter in module.parameters(recurse=False):
            if parameter.requires_grad:
                parameter._forward_counter -= 1  # type: ignore[attr-defined]
        vars(module).pop("max_batch_len", None)


class GhostEngine(HooksEngine):
    """Norms layer by layer, then sums layer by layer, from one backward pass.

    A linear layer's norms come from its activations and backpropagated gradients alone (Goodfellow 2015, arXiv:1510.01799; Li
    et al. 2022, arXiv:2110.05679), and keeping both spares the second backward pass (Bu et al. 2023, "book-keeping",
    arXiv:2210.00038), in float64: norm and sum must be of the same numbers. Other layers make their rows one layer at a time;
    parameters that several passes share make them whole.
    """

    def __init__(self, module: nn.Module, clip_norm: float, roots: tuple[str, ...] = ("",)) -> None:
        super().__init__(module, clip_norm, roots)
        self._captured: list[_Pass] = []

    def _hook(self, root: nn.Module) -> GradSampleHooks:
        return _Capture(root, self._captured)

    def rows(self, records: int) -> dict[str, Tensor]:
        """The rows ``[records, …]`` by parameter name, made whole; for the probe."""
        return self._rows(self._captured, self.parameters, records)

    def collect(self, records: int) -> ClippedSum:
        """The clipped sum of one chunk."""
        passes: dict[int, int] = {}
        for one in self._captured:
            for parameter in one.layer.parameters(recurse=False):
                passes[id(parameter)] = passes.get(id(parameter), 0) + 1
        single = [one for one in self._captured if all(passes[id(p)] == 1 for p in one.layer.parameters(recurse=False))]
        for one in single:
            check_count(type(one.layer).__name__, {len(one.backprops)}, records)
        names = {id(parameter): name for name, parameter in self.parameters.items()}
        alone = {names[id(p)] for one in single for p in one.layer.parameters(recurse=False) if id(p) in names}
        others = [one for one in self._captured if not any(one is s for s in single)]
        shared = self._rows(others, {name: p for name, p in self.parameters.items() if name not in alone}, records)

        def weighted(factors: Tensor) -> dict[str, Tensor]:
            total = {name: weighted_rows(value, factors) for name, value in shared.items()}
            for one in single:
                total |= {names[id(p)]: value for p, value in one.weighted(factors).items() if id(p) in names}
            return {name: total[name] for name in self.parameters}  # in the order of an empty lot's sum, not of the backward pass

        squares = [row_norms(shared).square()] if shared else []
        with torch.autocast(next(iter(self.parameters.values())).device.type, enabled=False):
            squares += [one.square_norms() for one in single]
        return ghost_clipped_sum(torch.stack(squares).sum(0).sqrt(), weighted, self.clip_norm)

    def forget_rows(self) -> None:
        """Forgets what was captured."""
        self._captured.clear()

    def _rows(self, captured: list[_Pass], wanted: dict[str, nn.Parameter], records: int) -> dict[str, Tensor]:
        names = {id(parameter): name for name, parameter in wanted.items()}
        rows: dict[str, Tensor] = {}
        for one in captured:
            for parameter, value in one.rows().items():
                name = names.get(id(parameter))
                if name is not None:
                    check_count(name, {len(value)}, records)
                    rows[name] = rows[name] + value if name in rows else value
        for name, parameter in wanted.items():
            check_passes(name, parameter)
            if name not in rows:
                rows[name] = untouched(name, parameter, records)
        return rows
