"""DP-SGD within a strategy: the step of one lot, from its records' gradients to what the private optimizer gets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import one_of, positive_int
from lightning_dpgen.privacy.plan import PoissonSampling
from lightning_dpgen.strategies.account import PrivacyAccount
from lightning_dpgen.strategies.compatibility import monitored
from lightning_dpgen.strategies.engine import PerRecordEngine, SingleRecordEngine, part_of, record_count
from lightning_dpgen.strategies.functional import CHUNK, FunctionalEngine
from lightning_dpgen.strategies.ghost import GhostEngine
from lightning_dpgen.strategies.hooks import HooksEngine
from lightning_dpgen.strategies.loaders import fresh_randomness
from lightning_dpgen.strategies.probe import SCHEDULE, Probe

log = logging.getLogger(__name__)

GRADIENT_SUM = "gradient_sum"


ENGINES: dict[str, type[PerRecordEngine]] = {"hooks": HooksEngine, "ghost": GhostEngine, "functional": FunctionalEngine}


class DPSGD(pl.strategies.Strategy):
    """The part of a private strategy that trains a user's module; it has no engine where a module makes its own releases.

    Privacy:
        Of a lot's records only the clipped sum of their gradients reaches the private optimizer, through the account's
        mechanism, once a lot. Every other optimizer is let step only if the check before training, or before that of the run
        that is resumed, saw its gradient not depend on records.
    """

    account: PrivacyAccount

    def _set_engine_arguments(self, grad_sample: str, physical_batch_size: int | None) -> None:
        self._grad_sample = one_of("grad_sample", grad_sample, tuple(ENGINES))
        self._physical = None if physical_batch_size is None else positive_int("physical_batch_size", physical_batch_size)
        self._engine: PerRecordEngine | None = None
        self._probe: Probe | None = None
        self._private: torch.optim.Optimizer | None = None
        self._guards: list[Any] = []
        self._probed: list[Any] = []
        self._probed_before = self._lot_is_open = False
        self._pending = 0
        self._private_keys: set[str] = set()

    @property
    def _module(self) -> pl.LightningModule:
        return cast(pl.LightningModule, self.lightning_module)

    @property
    def _owns_releases(self) -> bool:
        return callable(getattr(self._module, "configure_privacy", None))

    def _attach(self, module: pl.LightningModule, roots: tuple[str, ...]) -> None:
        kind = SingleRecordEngine if self._physical == 1 else ENGINES[self._grad_sample]
        engine = kind(module, self.account.ready().plan.releases[0].clip_norm, roots)
        engine.attach()
        self._engine = engine
        private = self._private
        assert private is not None
        self._guards.append(private.register_step_pre_hook(lambda *_: engine.guard(private)))

    def _check_engine(self, engine: PerRecordEngine, loader: DataLoader[Any]) -> None:
        engine.settle()
        engine.check_modes()
        self._probe = Probe(self, engine, loader, super().training_step)
        try:
            self._probe.run()
            self._probed = [self._private, *self._probe.stepped]
            self._probed_before |= all(any(one is seen for seen in self._probed) for one in self.optimizers)
        finally:
            self._probe = None

    def _detach(self) -> None:
        self._private = None
        for guard in self._guards:
            guard.remove()
        self._guards.clear()
        if self._engine is not None:
            self._engine.detach()
            self._engine = None

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step: on chunks of the lot, and not at all on the records of an empty one."""
        engine = self._engine
        if engine is None:
            output = super().training_step(*args, **kwargs)
            self._stop_if_spent()
            return output
        with fresh_randomness(self.root_device):
            return self._engine_step(engine, args[0], args[1:])

    def _engine_step(self, engine: PerRecordEngine, batch: Any, rest: tuple[Any, ...]) -> Any:
        count = record_count(batch)
        engine.open()
        engine.check_modes()
        if not self._module.automatic_optimization:
            return self._manual_step(engine, batch, count, rest)
        self._pending = 0
        if count == 0:
            return self._zero_loss(engine)
        if isinstance(engine, FunctionalEngine):
            return self._functional_step(engine, batch, count, rest)
        output, losses = None, []
        size = self._physical or count
        for start in range(0, count, size):
            engine.absorb(self._pending)
            end = min(count, start + size)
            output = super().training_step(part_of(batch, start, end, count) if size < count else batch, *rest)
            loss = loss_of(output)
            self._pending = 0 if loss is None else end - start
            if loss is not None:
                losses.append(loss.detach() * (end - start))
            if loss is None:
                engine.clear()
            elif end < count:
                self.backward(loss, self._private)
        loss = loss_of(output)
        if loss is None or size >= count:
            return output if losses or loss is not None else None
        mean = torch.stack(losses).sum() / count
        return with_loss(output, loss + (mean - loss).detach())

    def backward(self, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """As in Lightning; rows of what ``zero_grad`` has wiped since are forgotten first."""
        engine = self._engine
        if engine is not None and all(parameter.grad is None for parameter in engine.parameters.values()):
            engine.forget_rows()
        return super().backward(closure_loss, optimizer, *args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Steps; the optimizer of what sees records on the released gradient in place of the raw one."""
        engine = self._engine
        if engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)
        if self._probe is not None:
            closure()
            self._probe.saw(optimizer is self._private, optimizer)
            return None
        if self._private is None or optimizer is not self._private:
            return self._public_step(engine, optimizer, closure, model, **kwargs)

        def private_closure() -> Tensor:
            engine.stepping = False  # the hook has let this step pass; none may follow within the closure
            closure()
            engine.absorb(self._pending)
            self._pending = 0
            self._release(engine)
            return torch.zeros((), device=self.root_device)  # not the loss, which an optimizer could step by

        engine.stepping = True
        try:
            output = super().optimizer_step(optimizer, private_closure, model, **kwargs)
        finally:
            engine.stepping = False
        engine.stepped(optimizer)
        self._lot_is_open = False
        self._stop_if_spent()
        return output

    def _average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Averages the gradients of a public optimizer over processes."""

    def _manual_step(self, engine: PerRecordEngine, batch: Any, count: int, rest: tuple[Any, ...]) -> Any:
        self._pending, self._lot_is_open = count, True
        output = super().training_step(batch if count else one_blank_record(batch), *rest)
        engine.check_parameters()
        if self._lot_is_open:
            raise RuntimeError(
                f"{type(self._module).__name__}.training_step did not step its private optimizer on this lot. Every lot must "
                "release, since "
                "which lots do not may tell of records: step it once in every training_step, and the others as often as you like."
            )
        return output

    def _functional_step(self, engine: FunctionalEngine, batch: Any, count: int, rest: tuple[Any, ...]) -> Tensor:
        size, losses, logged = self._physical or CHUNK, [], []
        for start in range(0, count, size):
            end = min(count, start + size)
            chunk_losses, chunk_logged = engine.absorb_step(super().training_step, part_of(batch, start, end, count), *rest)
            losses.append(chunk_losses)
            logged.append((end - start, chunk_logged))
        for name, (_, arguments) in logged[0][1].items():
            mean = sum(n * values[name][0] for n, values in logged) / count
            self._module.log(name, mean, **{"batch_size": count, **arguments})
        return self._zero_loss(engine) + torch.cat(losses).mean()

    @staticmethod
    def _zero_loss(engine: PerRecordEngine) -> Tensor:
        return cast(Tensor, sum(parameter.sum() * 0.0 for parameter in engine.parameters.values()))

    def _public_step(self, engine: PerRecordEngine, optimizer: Any, closure: Callable[[], Any], model: Any, **kwargs: Any) -> Any:
        if not self._probed_before and not any(optimizer is one for one in self._probed):
            raise RuntimeError(
                f"a {type(optimizer).__name__} that is not private steps now and did not in the check before training, so it is not "
                f"known whether its gradient depends on records. Step it once within the first {SCHEDULE} batches, by batch_idx or a "
                "counter of the module's own; trainer.global_step stands still during the check."
            )

        def public_closure() -> Any:
            loss = closure()
            self._average_gradients(optimizer)
            return loss

        private = {id(parameter) for parameter in engine.parameters.values()}
        if any(id(parameter) in private for group in optimizer.param_groups for parameter in group["params"]):
            raise RuntimeError(f"a {type(optimizer).__name__} holds parameters that see records and is not the private optimizer.")
        output = super().optimizer_step(optimizer, public_closure, model, **kwargs)
        engine.stepped(optimizer)
        return output

    def _release(self, engine: PerRecordEngine) -> None:
        released = self.account.ready().release(GRADIENT_SUM, engine.take())
        divisor = cast(PoissonSampling, self.account.ready().plan.sampling).expected_batch_size
        for name, parameter in engine.parameters.items():
            parameter.grad = (released[name] / divisor).to(parameter.dtype)

    def _stop_if_spent(self) -> None:
        trainer = self._module.trainer
        self._note_logged(trainer)
        if not self.account.is_spent():
            return
        trainer.should_stop = True
        if not trainer.fit_loop._can_stop_early:
            log.warning("min_epochs/min_steps ask for more, but epsilon is spent: training stops here.")
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None

    def _note_logged(self, trainer: pl.Trainer) -> None:
        """Says once which of the user's numbers from training lots are outside the guarantee; refuses choices made by them."""
        if self._owns_releases:
            return
        handed = ("training_step", "on_train_batch_start", "on_train_batch_end")  # hooks that are handed records
        names = {metric.meta.name for metric in trainer.fit_loop._results.values() if metric.meta.fx in handed} - {"privacy/epsilon"}
        new = sorted(names - self._private_keys)
        if new:
            self._private_keys |= names
            log.warning("training logs %s: not released under differential privacy, for the owner's eyes only.", ", ".join(new))
        for user, key in monitored(trainer, self.lr_scheduler_configs):
            if {key, key.removesuffix("_step"), key.removesuffix("_epoch")} & names:
                raise ValueError(
                    f"{user} follows {key!r}, logged by a hook that is handed records, without noise: what it chooses would leave with the "
                    "weights. Monitor 'privacy/epsilon', or a number from public data that on_train_epoch_end or validation logs."
                )


def loss_of(output: Any) -> Tensor | None:
    """The loss in what a training step returned."""
    return cast("Tensor | None", output.get("loss") if isinstance(output, dict) else output)


def with_loss(output: Any, loss: Tensor) -> Any:
    """What a training step returned, with another loss."""
    return {**output, "loss": loss} if isinstance(output, dict) else loss


def one_blank_record(batch: Any) -> Any:
    """An empty batch with one record of zeros in it, for a step that could not run on none."""

    def filled(leaf: Any) -> Any:
        return leaf.new_zeros((1, *leaf.shape[1:])) if isinstance(leaf, Tensor) and leaf.dim() and len(leaf) == 0 else leaf

    return torch.utils._pytree.tree_map(filled, batch)
