"""``DPStrategy``: a Lightning strategy that makes a run differentially private."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import non_negative, positive
from lightning_dpgen.privacy.accounting import calibrate_noise_multiplier, epsilon
from lightning_dpgen.privacy.budget import PrivacyBudget
from lightning_dpgen.privacy.ledger import PrivacyLedger
from lightning_dpgen.privacy.mechanism import BudgetExhausted, GaussianMechanism
from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import PoissonSampling, PrivacyPlan, Relation, Release, ReleaseEvent
from lightning_dpgen.strategies.compatibility import check_optimizers, check_trainer, check_user_module, planned_steps
from lightning_dpgen.strategies.engine import PerRecordEngine, lot_size
from lightning_dpgen.strategies.loaders import check_loader, private_loader
from lightning_dpgen.strategies.probe import probe_module

log = logging.getLogger(__name__)

GRADIENT_SUM = "gradient_sum"
NEW_LEDGER = "new"


class DPStrategy(pl.strategies.SingleDeviceStrategy):
    """Trains any LightningModule on one device under differential privacy.

    A module with ``configure_privacy(records, steps, batch_size) -> PrivacyPlan`` makes its own releases through
    ``self.mechanism``, which it is handed before ``on_fit_start``. Any other module with automatic optimization is trained
    by DP-SGD (Abadi et al. 2016, Algorithm 1): per-record gradients, clipped, summed, noised, divided by the expected lot.

    Args:
        epsilon: Target ε, a hard cap for all fits under one ledger. Give this or ``noise_multiplier``.
        delta: δ.
        noise_multiplier: Noise standard deviation ÷ clip norm. No cap; 0 trains without privacy, for tests.
        clip_norm: C for modules without ``configure_privacy``; 1.0 if not given.
        ledger: Path of the ledger. ``None``: ``<default_root_dir>/privacy/<run id>.jsonl``. ``"new"``: a resume may start a
            new ledger where the old file is missing; what the checkpoint knows is carried over.
        secure_noise: Draw noise and masks from AES-CTR (extra ``secure``).
        accelerator: Filled by the Trainer.
        parallel_devices: Filled by the Trainer; the first one is used.
        checkpoint_io: As in Lightning.
        precision_plugin: As in Lightning.

    Privacy:
        Zero-out. The loader's batches become Poisson lots with q = batch_size / N (or what the module's plan says); its
        ``batch_size`` is the expected lot size and the constant divisor. Every lot releases once, also an empty one. The
        noise is calibrated from public constants before a record reaches a model; every release is in the ledger before
        its noise is drawn; no release beyond the plan is made when ε was given.

    Raises:
        ValueError: For arguments out of range, before anything is read.
    """

    strategy_name = "dpsgd"

    def __init__(
        self,
        epsilon: float | None = None,
        delta: float = 1e-5,
        noise_multiplier: float | None = None,
        clip_norm: float | None = None,
        ledger: str | os.PathLike[str] | None = None,
        secure_noise: bool = False,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        if (epsilon is None) == (noise_multiplier is None):
            raise ValueError(
                f"epsilon={epsilon}, noise_multiplier={noise_multiplier}: give exactly one of them, for example "
                "DPStrategy(epsilon=10, delta=1e-5)."
            )
        if noise_multiplier is not None:
            non_negative("noise_multiplier", noise_multiplier)
        self.budget = None if epsilon is None else PrivacyBudget(epsilon, delta)
        self.delta = PrivacyBudget(1.0, delta).delta
        if clip_norm is not None:
            positive("clip_norm", clip_norm)
        self._clip_norm = clip_norm
        self._given_noise = noise_multiplier
        self._ledger_argument = ledger
        self._stream = SecretStream(secure=secure_noise)
        self.parallel_devices = parallel_devices
        self.mechanism: GaussianMechanism | None = None
        self.open_ended = False
        self.notes: list[str] = []
        self._engine: PerRecordEngine | None = None
        self._records = 0
        self._batch_size = 0
        self._restored: dict[str, Any] | None = None
        self._prepared = False

    # What a run has spent ------------------------------------------------------------------------------------------

    @property
    def plan(self) -> PrivacyPlan:
        """The plan in force.

        Raises:
            RuntimeError: Before ``fit``.
        """
        return self._ready().plan

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation ÷ clip norm in force."""
        return self._ready().noise_multiplier

    @property
    def ledger(self) -> PrivacyLedger:
        """The ledger in force."""
        return self._ready().ledger

    @property
    def noise_source(self) -> str:
        """Where noise and masks come from, in words."""
        return self._stream.source

    def epsilon_spent(self, relation: Relation = Relation.ZERO_OUT) -> float:
        """ε at this strategy's δ of everything in the ledger so far; 0 before the first release."""
        return 0.0 if self.mechanism is None else self.ledger.epsilon(self.delta, relation).value

    def _ready(self) -> GaussianMechanism:
        if self.mechanism is None:
            raise RuntimeError("DPStrategy has no plan yet: it is made when Trainer.fit sets up the module and its data.")
        return self.mechanism

    # Lightning's hooks, in the order in which they are called -------------------------------------------------------

    @property
    def root_device(self) -> torch.device:
        """The first of the devices that the Trainer chose."""
        return self.parallel_devices[0] if self.parallel_devices else super().root_device

    def setup_environment(self) -> None:
        """Refuses several devices, then as in Lightning."""
        if self.parallel_devices and len(self.parallel_devices) > 1:
            raise ValueError(
                f"DPStrategy uses one device and was given {len(self.parallel_devices)}. Use Trainer(devices=1): with copies on "
                "several devices each would add its own noise."
            )
        super().setup_environment()

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the checkpoint and, when fitting, what its run had spent."""
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        if trainer.state.fn == "fit":
            if "privacy" not in checkpoint:
                raise ValueError(
                    f"{checkpoint_path} was written without DPStrategy: what its training released is not known, so it cannot be "
                    "continued privately. Start without ckpt_path, or load weights trained on public data yourself."
                )
            self._restored = checkpoint["privacy"]
        return checkpoint

    def setup(self, trainer: pl.Trainer) -> None:
        """Sets up as Lightning does; when fitting, also plans, calibrates and opens the ledger."""
        if trainer.state.fn != "fit":
            super().setup(trainer)
            return
        module = cast(pl.LightningModule, self.lightning_module)
        check_trainer(trainer, capped=self.budget is not None)
        if not self._owns_releases(module):
            check_user_module(module)
        elif module.automatic_optimization:
            raise ValueError(
                f"{type(module).__name__} has configure_privacy() and automatic optimization, which would step on raw gradients. Set "
                "automatic_optimization = False and step on what self.mechanism.release() returns."
            )
        super().setup(trainer)
        if not self._owns_releases(module):
            check_optimizers(self.optimizers, module)
        self._prepare(trainer, module)

    def process_dataloader(self, dataloader: object) -> object:
        """Replaces the training loader by one with the plan's sampling; leaves the others."""
        module = cast(pl.LightningModule, self.lightning_module)
        if not module.trainer.training:
            return dataloader
        loader = check_loader(dataloader)
        self._records = len(cast(Any, loader.dataset))
        self._batch_size = cast(int, loader.batch_size)
        sampling = self._plan_of(module, 1).sampling
        if self._prepared and sampling != self.plan.sampling:
            raise ValueError(
                f"the training loader changed within a fit: the plan is accounted for {self.plan.sampling}, the new loader is "
                f"{sampling}. Keep the data and batch_size (reload_dataloaders_every_n_epochs=0)."
            )
        return private_loader(loader, sampling, self._stream)

    def on_train_start(self) -> None:
        """Checks the loader once more and, for a user's module, that rows depend on their own records."""
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        loader = trainer.train_dataloader
        sampling = getattr(getattr(loader, "batch_sampler", None), "sampling", None)
        if not isinstance(loader, DataLoader) or sampling != self.plan.sampling:
            raise ValueError(
                f"the training data is a {type(loader).__name__} sampled by {sampling}; a private run needs exactly one DataLoader, "
                f"sampled as planned: {self.plan.sampling}."
            )
        if self._engine is not None:
            self._engine.check_modes()
            probe_module(trainer, cast(pl.LightningModule, self.lightning_module), loader, self._engine, self.root_device)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step; an empty lot of a user's module is not shown to it but still releases noise."""
        if self._engine is None:
            output = super().training_step(*args, **kwargs)
            self._stop_if_spent()
            return output
        self._lot = lot_size(args[0])
        self._engine.clear()
        self._engine.check_modes()
        if self._lot == 0:
            return cast(Tensor, sum(p.sum() * 0.0 for p in self._engine.parameters.values()))
        return super().training_step(*args, **kwargs)

    def optimizer_step(self, optimizer: Any, closure: Callable[[], Any], model: Any = None, **kwargs: Any) -> Any:
        """Steps; for a user's module on the released gradient in place of the raw one."""
        if self._engine is None:
            return super().optimizer_step(optimizer, closure, model, **kwargs)

        engine = self._engine

        def private_closure() -> Any:
            engine.stepping = False  # the hook has let this step pass; none may follow within the closure
            loss = closure()
            self._release_gradient(engine)
            return loss

        engine.stepping = True
        try:
            output = super().optimizer_step(optimizer, private_closure, model, **kwargs)
        finally:
            engine.stepping = False
        self._stop_if_spent()
        return output

    def on_train_end(self) -> None:
        """Puts the spent ε into ``trainer.callback_metrics``."""
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        trainer.callback_metrics["privacy/epsilon"] = torch.tensor(self.epsilon_spent())

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Adds plan, noise and spent releases to the checkpoint, which is private: it may hold optimizer and loop state."""
        if self.mechanism is not None:
            checkpoint["privacy"] = self._state()
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def teardown(self) -> None:
        """Leaves the module without hooks."""
        self._prepared = False
        if self._engine is not None:
            self._guard.remove()
            self._engine.detach()
            self._engine = None
        super().teardown()

    # Planning --------------------------------------------------------------------------------------------------------

    @staticmethod
    def _owns_releases(module: pl.LightningModule) -> bool:
        return callable(getattr(module, "configure_privacy", None))

    def _plan_of(self, module: pl.LightningModule, steps: int) -> PrivacyPlan:
        if self._owns_releases(module):
            return cast(Any, module).configure_privacy(records=self._records, steps=steps, batch_size=self._batch_size)
        sampling = PoissonSampling(self._records, self._batch_size)
        return PrivacyPlan(sampling, (Release(GRADIENT_SUM, self._clip_norm or 1.0, steps),))

    def _prepare(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        steps = planned_steps(trainer, module)
        self.open_ended = steps is None
        if self._records == 0:
            raise ValueError("Trainer.fit was given no training records (limit_train_batches=0?); nothing can be trained.")
        if self.delta >= 1 / self._records:
            log.warning(
                "delta=%g is not below 1/N = %g: such a guarantee allows publishing a record outright.", self.delta, 1 / self._records
            )
        plan = self._plan_of(module, steps or 1)
        if self._owns_releases(module) and self._clip_norm is not None:
            raise ValueError(
                f"DPStrategy(clip_norm={self._clip_norm}) beside {type(module).__name__}, whose configure_privacy() states "
                f"{', '.join(f'{r.name}: clip_norm={r.clip_norm}' for r in plan.releases)}. Set it in the module alone."
            )
        previous, self._restored = self._restored, None
        if self.mechanism is not None and self.budget is not None:
            plan = self._first_plan(plan)
        if previous is not None:
            self._check_same(previous, plan)
        if self.mechanism is not None:
            noise, ledger = self.mechanism.noise_multiplier, self.mechanism.ledger
        else:
            ledger = self._open_ledger(trainer, previous)
            noise = self._noise(plan, previous)
        if previous is not None:
            ledger.merge({ReleaseEvent.from_dict(event): count for event, count in previous["released"]})
        self.mechanism = GaussianMechanism(plan, noise, ledger, self._stream, capped=self.budget is not None)
        self._check_budget()
        self._prepared = True
        log.info(self.summary())
        if self._owns_releases(module):
            cast(Any, module).mechanism = self.mechanism
        else:
            self._engine = PerRecordEngine(module, plan.releases[0].clip_norm)
            engine, optimizer = self._engine, self.optimizers[0]
            self._guard = optimizer.register_step_pre_hook(lambda *_: engine.guard(optimizer))

    def _first_plan(self, plan: PrivacyPlan) -> PrivacyPlan:
        """The plan that this strategy's ε was calibrated for: a target ε is for all its fits together."""
        first = self._ready().plan
        uncounted = [replace(p, releases=tuple(replace(r, count=1) for r in p.releases)) for p in (first, plan)]
        if uncounted[0] != uncounted[1]:
            raise ValueError(
                f"this strategy's epsilon was calibrated for {first}; this fit plans {plan}. Use a DPStrategy of its own, with "
                "ledger=… the earlier ledger's path if the records are the same."
            )
        return first

    def _noise(self, plan: PrivacyPlan, previous: dict[str, Any] | None) -> float:
        if previous is not None:
            return float(previous["noise_multiplier"])
        if self.budget is None:
            return cast(float, self._given_noise)
        return calibrate_noise_multiplier(plan, self.budget)

    def _open_ledger(self, trainer: pl.Trainer, previous: dict[str, Any] | None) -> PrivacyLedger:
        argument = self._ledger_argument
        run = uuid.uuid4().hex[:12] if previous is None else str(previous["run"])
        given = argument is not None and argument != NEW_LEDGER
        path = Path(cast(str, argument)) if given else Path(trainer.default_root_dir) / "privacy" / f"{run}.jsonl"
        if previous is not None and not path.exists():
            if argument != NEW_LEDGER:
                raise ValueError(
                    f"the checkpoint's ledger {path} is missing: releases made after the checkpoint would be forgotten. Restore the "
                    f"file, give its place with DPStrategy(ledger=…), or accept a new one with DPStrategy(ledger={NEW_LEDGER!r}), "
                    "which the certificate will state."
                )
            self.notes.append("The ledger file of an earlier part of this run was lost; its checkpoint's counts were carried over.")
        ledger = PrivacyLedger(path, run)
        if previous is not None and ledger.run_id != run:
            raise ValueError(f"the checkpoint belongs to ledger {run}; {path} is ledger {ledger.run_id}. Give the path of ledger {run}.")
        return ledger

    def _check_same(self, previous: dict[str, Any], plan: PrivacyPlan) -> None:
        now = self._claims(plan)
        for name, value in now.items():
            if previous[name] != value:
                raise ValueError(
                    f"the checkpoint is of another plan: its {name} is {previous[name]}, this run's is {value}. Use the same epsilon, "
                    "delta, clip norm, batch size and steps, or start without ckpt_path."
                )

    def _claims(self, plan: PrivacyPlan) -> dict[str, Any]:
        shape = plan.to_dict()
        if self.budget is None:  # without a cap a run may be continued for more steps
            shape["releases"] = [{**release, "count": None} for release in shape["releases"]]
        return {
            "epsilon": None if self.budget is None else self.budget.epsilon,
            "delta": self.delta,
            "given_noise_multiplier": self._given_noise,
            "plan": shape,
        }

    def _state(self) -> dict[str, Any]:
        mechanism = self._ready()
        return {
            **self._claims(mechanism.plan),
            "noise_multiplier": mechanism.noise_multiplier,
            "run": mechanism.ledger.run_id,
            "released": [[event.to_dict(), count] for event, count in mechanism.ledger.counts.items()],
        }

    def _check_budget(self) -> None:
        mechanism = self._ready()
        if self.budget is None:
            return
        spent = mechanism.ledger.counts
        planned = mechanism.plan.events(mechanism.noise_multiplier)
        if all(spent.get(event, 0) >= count for event, count in planned):
            raise BudgetExhausted(
                f"epsilon={self.budget.epsilon:g} is spent: ledger {mechanism.ledger.run_id} holds {len(mechanism.ledger)} releases. "
                "What was trained may be used freely, but these records allow no more training under this budget."
            )
        total = {**spent, **{event: max(count, spent.get(event, 0)) for event, count in planned}}
        needed = epsilon(total.items(), self.delta).value
        if needed > self.budget.epsilon:
            raise BudgetExhausted(
                f"ledger {mechanism.ledger.run_id} already holds {len(mechanism.ledger)} releases; with this run's they come to "
                f"epsilon={needed:.3f}, above {self.budget.epsilon:g}. Use a larger budget or a ledger of other records."
            )

    def summary(self) -> str:
        """The plan in one line."""
        mechanism = self._ready()
        sampling = mechanism.plan.sampling
        rate = f", expected lot {sampling.expected_batch_size}" if isinstance(sampling, PoissonSampling) else ""
        counts = ", ".join(f"{r.count} x {r.name} (clip norm {r.clip_norm:g})" for r in mechanism.plan.releases)
        claim = mechanism.plan.epsilon(mechanism.noise_multiplier, self.delta)
        return (
            f"DPStrategy: {sampling.records} records, {type(sampling).__name__}{rate}; {counts}; noise multiplier "
            f"{mechanism.noise_multiplier:g}; epsilon {claim:.3f} at delta {self.delta:g}. Ledger: {mechanism.ledger.path}"
        )

    # DP-SGD ----------------------------------------------------------------------------------------------------------

    def _release_gradient(self, engine: PerRecordEngine) -> None:
        engine.check_unchanged()
        released = self._ready().release(GRADIENT_SUM, engine.collect(self._lot))
        divisor = cast(PoissonSampling, self.plan.sampling).expected_batch_size
        for name, parameter in engine.parameters.items():
            parameter.grad = (released[name] / divisor).to(parameter.dtype)

    def _stop_if_spent(self) -> None:
        mechanism = self._ready()
        if self.budget is None or any(mechanism.remaining(r.name) > 0 for r in mechanism.plan.releases):
            return
        trainer = cast(pl.LightningModule, self.lightning_module).trainer
        trainer.should_stop = True
        if not trainer.fit_loop._can_stop_early:
            log.warning("min_epochs/min_steps ask for more, but epsilon is spent: training stops here.")
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None
