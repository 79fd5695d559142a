"""Clipped sums without the rows: norms first, then one weighted sum a layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import ft_compute_per_sample_gradient
from opacus.grad_sample.grad_sample_module_fast_gradient_clipping import GradSampleHooksFastGradientClipping
from torch import Tensor, nn
from torch.nn import grad as layer_gradients

from lightning_dpgen.privacy.clipping import ClippedSum, as_matrix, ghost_clipped_sum
from lightning_dpgen.strategies.hooks import HooksEngine, RecordHooks, check_count, check_passes, layer_named, untouched

_CONVOLUTIONS: dict[type[nn.Module], Any] = {
    nn.Conv1d: layer_gradients.conv1d_weight,
    nn.Conv2d: layer_gradients.conv2d_weight,
    nn.Conv3d: layer_gradients.conv3d_weight,
}


@dataclass(frozen=True)
class _Pass:
    """What the gradient of one pass through one layer is made of; linear in ``backprops`` ``[B, …]``."""

    layer: nn.Module
    activations: list[Tensor]
    backprops: Tensor

    def rows(self, backprops: Tensor | None = None) -> dict[Tensor, Tensor]:
        sampler = GradSampleHooks.GRAD_SAMPLERS.get(type(self.layer), ft_compute_per_sample_gradient)
        with layer_named(self.layer):
            found: dict[Tensor, Tensor] = sampler(self.layer, self.activations, self.backprops if backprops is None else backprops)
        return found

    def square_norms(self) -> Tensor:
        """``[B]``, over the layer's own parameters."""
        if type(self.layer) is nn.Linear and self.backprops.dim() in (2, 3):
            norms = GradSampleHooksFastGradientClipping.NORM_SAMPLERS[nn.Linear](self.layer, self.activations, self.backprops)
            return torch.stack([value.square() for value in norms.values()]).sum(0)
        return torch.stack([as_matrix(value).square().sum(1) for p, value in self.rows().items() if p.requires_grad]).sum(0)

    def weighted(self, factors: Tensor) -> dict[Tensor, Tensor]:
        """The sum of ``factors[i]`` times row ``i``, by parameter."""
        layer, used = self.layer, self._where(factors > 0)
        scaled = used.backprops * factors.view(-1, *[1] * (used.backprops.dim() - 1))
        total: dict[Tensor, Tensor] = {}
        if type(layer) is nn.Linear:
            flat = scaled.flatten(0, -2)
            total[layer.weight] = flat.T @ used.activations[0].flatten(0, -2)
        elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and type(layer) in _CONVOLUTIONS and _is_plain(layer, scaled):
            gradient = _CONVOLUTIONS[type(layer)]
            total[layer.weight] = gradient(
                used.activations[0], layer.weight.shape, scaled, layer.stride, layer.padding, layer.dilation, layer.groups
            )
            flat = scaled.flatten(2).movedim(1, -1).flatten(0, 1)
        else:
            return {parameter: value.sum(0) for parameter, value in used.rows(scaled).items()}
        if layer.bias is not None:
            total[layer.bias] = flat.sum(0)
        return total

    def _where(self, used: Tensor) -> _Pass:
        if used.all():
            return self
        masked = [
            torch.where(used.view(-1, *[1] * (t.dim() - 1)), t, 0) if len(t) == len(used) else t
            for t in (self.backprops, *self.activations)
        ]
        return _Pass(self.layer, masked[1:], masked[0])


def _is_plain(layer: nn.Conv1d | nn.Conv2d | nn.Conv3d, backprops: Tensor) -> bool:
    """Whether the library's own weight gradient fits, and is computed in full float32."""
    return not isinstance(layer.padding, str) and layer.padding_mode == "zeros" and not backprops.is_cuda


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
    arXiv:2210.00038). Other layers make their rows one layer at a time; parameters that several passes share make them whole.
    """

    def __init__(self, module: nn.Module, clip_norm: float, roots: tuple[str, ...] = ("",)) -> None:
        super().__init__(module, clip_norm, roots)
        self._captured: list[_Pass] = []

    def attach(self) -> None:
        """Puts the hooks on.

        Raises:
            ValueError: If products of float32 matrices are set to a lower precision, which could lift a record above C.
        """
        if torch.get_float32_matmul_precision() != "highest":
            raise ValueError(
                f"grad_sample='ghost' sums by matrix products, and float32 matrix precision is {torch.get_float32_matmul_precision()!r}: "
                "rounding could lift a record above the clip norm. Call torch.set_float32_matmul_precision('highest') or use "
                "grad_sample='hooks'."
            )
        super().attach()

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
            used = factors > 0
            total = {}
            for name, value in shared.items():
                flat = torch.where(used[:, None], as_matrix(value).float(), 0.0)
                total[name] = (factors @ flat).view(value.shape[1:])
            for one in single:
                total |= {names[id(p)]: value for p, value in one.weighted(factors).items() if id(p) in names}
            return total

        squares = [as_matrix(value).float().square().sum(1) for value in shared.values()]
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
