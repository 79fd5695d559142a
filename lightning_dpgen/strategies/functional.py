"""Per-record gradients of a user's training step by ``vmap(grad)``, without hooks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_dpgen._compat import pl
from lightning_dpgen.privacy.clipping import clipped_sum
from lightning_dpgen.strategies.engine import PerRecordEngine, record_count

Logged = dict[str, tuple[Tensor, dict[str, Any]]]
CHUNK = 64


class _TrainingStep(nn.Module):
    """The training step as a forward pass, so that ``functional_call`` can put other parameters under it."""

    def __init__(self, module: pl.LightningModule, step: Callable[..., Any]) -> None:
        super().__init__()
        self.user = module
        self._step = step

    def forward(self, batch: Any, *rest: Any) -> Any:
        return self._step(batch, *rest)


class FunctionalEngine(PerRecordEngine):
    """Each record's training step on a batch of that record alone, vectorised; needs no support from layers.

    What the step logs is averaged over the lot and logged once.
    """

    def rows_of(self, step: Callable[..., Any], batch: Any, *rest: Any) -> tuple[dict[str, Tensor], Tensor, Logged]:
        """The rows of a chunk.

        Args:
            step: The user's training step.
            batch: A chunk of the lot.
            rest: The step's other arguments.

        Returns:
            Rows ``[B, …]`` by parameter name, losses ``[B]``, and what was logged: means with the arguments of ``log``.

        Raises:
            RuntimeError: If the step cannot be vectorised; names the way out.
        """
        count = record_count(batch)
        leaves, structure = tree_flatten(batch)
        moving = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == count]
        module = self.module
        assert isinstance(module, pl.LightningModule)
        wrapped = _TrainingStep(module, step)
        arguments: dict[str, dict[str, Any]] = {}

        def loss_of(parameters: dict[str, Tensor], *record: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            filled = list(leaves)
            for place, value in zip(moving, record, strict=True):
                filled[place] = value[None]
            found: dict[str, Tensor] = {}

            def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
                arguments[name] = dict(zip(("prog_bar", "logger", "on_step", "on_epoch"), args, strict=False)) | kwargs
                found[name] = torch.as_tensor(value, dtype=torch.float32, device=parameters_device).detach()

            def log_dict(values: dict[str, Any], *args: Any, **kwargs: Any) -> None:
                for name, value in values.items():
                    log(name, value, *args, **kwargs)

            with _replaced(module, log=log, log_dict=log_dict):
                named = {f"user.{name}": value for name, value in parameters.items()}
                output = functional_call(wrapped, named, (tree_unflatten(filled, structure), *rest))
            loss = output["loss"] if isinstance(output, dict) else output
            return loss.sum(), found

        parameters = {name: p.detach() for name, p in self.parameters.items()}
        parameters_device = next(iter(parameters.values())).device
        in_dims = (None, *([0] * len(moving)))
        try:
            rows, (losses, logged) = vmap(grad_and_value(loss_of, has_aux=True), in_dims=in_dims, randomness="different")(
                parameters, *[leaves[i] for i in moving]
            )
        except Exception as error:
            raise RuntimeError(
                f"{type(module).__name__}.training_step cannot be vectorised over records ({type(error).__name__}: {error}). "
                "Usual causes: a torchmetrics object, .item(), a branch on a tensor's value, recurrent layers, gradient "
                "checkpointing, return None. Use grad_sample='hooks', or physical_batch_size=1."
            ) from error
        return rows, losses, {name: (value.mean(), arguments[name]) for name, value in logged.items()}

    def absorb_step(self, step: Callable[..., Any], batch: Any, *rest: Any) -> tuple[Tensor, Logged]:
        """Adds a chunk's clipped sum; returns its losses ``[B]`` and what it logged."""
        rows, losses, logged = self.rows_of(step, batch, *rest)
        total = clipped_sum({name: value.detach() for name, value in rows.items()}, self.clip_norm)
        self._total = total if self._total is None else self._total + total
        return losses.detach(), logged


class _replaced:
    """Attributes of a module replaced for a while, past ``nn.Module.__setattr__``."""

    def __init__(self, module: nn.Module, **attributes: Any) -> None:
        self._vars, self._new = vars(module), attributes

    def __enter__(self) -> None:
        self._old = {name: self._vars[name] for name in self._new if name in self._vars}
        self._vars.update(self._new)

    def __exit__(self, *_: object) -> None:
        for name in self._new:
            self._vars.pop(name, None)
        self._vars.update(self._old)
