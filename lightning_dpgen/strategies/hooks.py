"""Per-record gradients by Opacus's hooks, without its wrapper."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from opacus.grad_sample import GradSampleHooks
from opacus.grad_sample.functorch import prepare_layer
from opacus.layers import DPGRU, DPLSTM, DPRNN
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_dpgen.strategies.engine import PerRecordEngine

_ATTRIBUTES = ("grad_sample", "_forward_counter", "_current_grad_sample")


class RecordHooks(GradSampleHooks):
    """Opacus's gradient code on tensor hooks, which bear in-place operations and networks that are frozen for a while."""

    def __init__(self, root: nn.Module) -> None:
        super().__init__(root, batch_first=True, loss_reduction="sum", strict=False)

    def add_hooks(self, *, loss_reduction: str = "sum", batch_first: bool = True, force_functorch: bool = False) -> None:
        """Puts a forward hook on every layer with parameters; the pass's own tensor hook follows from there."""
        handles: list[Any] = []
        self._module.autograd_grad_sample_hooks = handles
        self.autograd_grad_sample_hooks = handles
        for layer in self.iterate_submodules(self._module):
            if isinstance(layer, (DPRNN, DPLSTM, DPGRU)):  # made of linear layers, which have hooks of their own
                continue
            if type(layer) not in self.GRAD_SAMPLERS:
                prepare_layer(layer, batch_first=batch_first)
            handles.append(layer.register_forward_hook(self._after_forward))
        self.enable_hooks()

    def _after_forward(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        before = len(vars(layer).get("activations", ()))
        if before and torch._C._current_graph_task_id() != -1:
            return  # gradient checkpointing runs the layer again within the backward pass that the first run waits for
        with layer_named(layer):
            self.capture_activations_hook(layer, inputs, output)
        captured = vars(layer).get("activations", ())
        if len(captured) == before:  # frozen, in eval mode, or under no_grad
            return
        first = output if isinstance(output, Tensor) else next(leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor))
        first.register_hook(partial(self._after_backward, layer, captured[-1]))

    def _after_backward(self, layer: nn.Module, activations: list[Tensor], gradient: Tensor) -> None:
        if not any(parameter.requires_grad for parameter in layer.parameters(recurse=False)):
            return
        waiting = vars(layer).get("activations", [])
        place = next((i for i, one in enumerate(waiting) if one is activations), None)
        if place is None:
            raise RuntimeError(
                f"a backward pass went through {type(layer).__name__} twice, or through a forward pass of an earlier lot. Run each "
                "forward pass anew and backpropagate it once."
            )
        waiting.append(waiting.pop(place))
        with layer_named(layer):
            self.capture_backprops_hook(layer, None, (gradient,), loss_reduction=self.loss_reduction, batch_first=True)


class HooksEngine(PerRecordEngine):
    """Every record's gradient of every private parameter, gathered during an ordinary backward pass.

    Memory: as many copies of the parameters as the chunk has records.
    """

    def __init__(self, module: nn.Module, clip_norm: float, roots: tuple[str, ...] = ("",)) -> None:
        super().__init__(module, clip_norm, roots)
        self._hooks: list[GradSampleHooks] = []

    def attach(self) -> None:
        """Puts the hooks on.

        Raises:
            ValueError: If a private parameter belongs to the user's module itself, where no hook can see it.
        """
        own = [name for name in self.parameters if "." not in name]
        if own:
            raise ValueError(
                f"{type(self.module).__name__} holds the parameters {', '.join(own)} itself, outside a layer, so no hook can see their "
                "per-record gradient. Move them into an nn.Module of their own, or use grad_sample='functional'."
            )
        try:
            for root in self._hooked():
                self._hooks.append(self._hook(root))
        except BaseException:
            self.detach()
            raise
        self.set_reduction(self.loss_reduction)

    def _hooked(self) -> list[nn.Module]:
        tops = (
            [child for _, child in self.module.named_children()] if "" in self.roots else [self.module.get_submodule(r) for r in self.roots]
        )
        return [top for top in tops if any(p.requires_grad for p in top.parameters())]

    def _hook(self, root: nn.Module) -> GradSampleHooks:
        return RecordHooks(root)

    def set_reduction(self, reduction: str) -> None:
        """Says whether the loss is a ``"mean"`` or a ``"sum"`` over the records of a batch."""
        self.loss_reduction = reduction
        for hooks in self._hooks:
            hooks.loss_reduction = reduction

    def check_modes(self) -> None:
        """Raises if a layer with private parameters is in eval mode, where its rows are not recorded.

        Raises:
            RuntimeError: Names the layers.
        """
        layers = {name.rpartition(".")[0] for name in self.parameters}
        resting = sorted(name for name in layers if not self.module.get_submodule(name).training)
        if resting:
            raise RuntimeError(
                f"the layers {', '.join(resting[:6])} are in eval mode, where their per-record gradients are not recorded. Call "
                "train() on them, freeze them with requires_grad_(False), or use grad_sample='functional'."
            )

    def rows(self, records: int) -> dict[str, Tensor]:
        """The rows ``[records, …]`` by parameter name.

        Raises:
            RuntimeError: If a parameter got an ordinary gradient but no rows, or another number of rows than records.
        """
        rows = {}
        for name, parameter in self.parameters.items():
            sample = getattr(parameter, "grad_sample", None)
            check_passes(name, parameter)
            if sample is None:
                rows[name] = untouched(name, parameter, records)
                continue
            # Several backward passes before one step: a record's rows belong together, as in a pair of real and fake.
            parts = sample if isinstance(sample, list) else [sample]
            check_count(name, {len(part) for part in parts}, records)
            rows[name] = parts[0] if len(parts) == 1 else torch.stack(parts).sum(0)
        return rows

    def forget_rows(self) -> None:
        """Forgets rows, not the passes under way: what ``zero_grad`` does to ordinary gradients."""
        for parameter in self.parameters.values():
            if hasattr(parameter, "grad_sample"):
                parameter.grad_sample = None

    def clear(self) -> None:
        """Forgets rows, ordinary gradients and the activations of passes that were never backpropagated."""
        super().clear()
        self.forget_rows()
        for parameter in self.parameters.values():
            if getattr(parameter, "_forward_counter", 0):
                parameter._forward_counter = 0  # type: ignore[attr-defined]
            if hasattr(parameter, "_current_grad_sample"):
                del parameter._current_grad_sample
        for hooks in self._hooks:
            for layer in hooks._module.modules():
                vars(layer).pop("activations", None)
                vars(layer).pop("max_batch_len", None)

    def detach(self) -> None:
        """Removes every hook and attribute from the module, also those of hooks that could not be put on whole."""
        super().detach()
        for hooks in self._hooks:
            hooks.remove_hooks()
        for layer in self.module.modules():
            for handle in vars(layer).pop("autograd_grad_sample_hooks", []):
                handle.remove()
            for attribute in ("activations", "max_batch_len", "ft_compute_sample_grad"):
                vars(layer).pop(attribute, None)
        for parameter in self.module.parameters():
            for attribute in _ATTRIBUTES:
                if hasattr(parameter, attribute):
                    delattr(parameter, attribute)


@contextmanager
def layer_named(layer: nn.Module) -> Iterator[None]:
    """Names the layer in what goes wrong in Opacus's code for it.

    Raises:
        RuntimeError: With the way out.
    """
    try:
        yield
    except Exception as error:
        raise RuntimeError(
            f"Opacus's hooks cannot take {type(layer).__name__} ({type(error).__name__}: {error}). Use its counterpart in opacus.layers "
            "(DPLSTM, DPGRU, DPRNN, DPMultiheadAttention), grad_sample='functional', or physical_batch_size=1."
        ) from error


def check_count(name: str, found: set[int], records: int) -> None:
    """Raises unless every pass gave one row for each record.

    Raises:
        RuntimeError: Names the parameter or layer, with both numbers.
    """
    if found != {records}:
        raise RuntimeError(
            f"{name} has {' and '.join(str(n) for n in sorted(found))} gradient rows for a lot of {records} records. One record must be "
            "one row: do not repeat or split records inside the training step."
        )


def check_passes(name: str, parameter: Tensor) -> None:
    """Raises if a forward pass through the parameter's layer was never backpropagated.

    Raises:
        RuntimeError: Names the parameter.
    """
    if getattr(parameter, "_forward_counter", 0):
        raise RuntimeError(
            f"{name}: a forward pass in the training step was not followed by its backward pass, so activations and "
            "gradients of records would be mixed up. Put extra forward passes under torch.no_grad()."
        )


def untouched(name: str, parameter: nn.Parameter, records: int) -> Tensor:
    """The rows of a parameter that no hooked layer used: zero.

    Raises:
        RuntimeError: If it was used all the same, outside its layer's own forward.
    """
    if parameter.grad is not None and parameter.grad.count_nonzero():
        raise RuntimeError(
            f"{name} got a gradient but no per-record gradient: it is used outside its layer's own forward. Call the layer, freeze it "
            "with requires_grad_(False), or use grad_sample='functional'."
        )
    return parameter.new_zeros((records, *parameter.shape))
