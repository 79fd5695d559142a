"""What makes a Lightning strategy private: the hooks that single-device and multi-process strategies share."""

from __future__ import annotations

import logging
import os
import pickle
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import torch
from torch.utils.data import DataLoader

from lightning_dpgen._compat import pl, submodule
from lightning_dpgen._validate import non_negative, positive
from lightning_dpgen.privacy.budget import PrivacyBudget
from lightning_dpgen.privacy.ledger import PrivacyLedger
from lightning_dpgen.privacy.mechanism import GaussianMechanism
from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import FullPass, PoissonSampling, PrivacyPlan, Relation, Release
from lightning_dpgen.strategies.account import PrivacyAccount, Terms, releases_ahead
from lightning_dpgen.strategies.compatibility import (
    check_module,
    check_trainer,
    monitored,
    planned_steps,
    private_optimizer,
    private_roots,
    set_passes,
)
from lightning_dpgen.strategies.dp_sgd import DPSGD, GRADIENT_SUM
from lightning_dpgen.strategies.loaders import check_loader, fresh_randomness, private_loader
from lightning_dpgen.strategies.probe import check_collate

log = logging.getLogger(__name__)

ENDED_EARLY = "Training ended after"
UNENDED = (
    "The module had been trained by a fit that did not end, and went on without a checkpoint. The claim counts that fit's releases, and "
    "does not cover a moment of breaking off that records chose."
)


class PrivateTraining(DPSGD):
    """Mixed into a Lightning strategy; see :class:`~lightning_dpgen.strategies.DPStrategy` for arguments and guarantee."""

    rank, world = 0, 1

    def _set_private_arguments(
        self,
        epsilon: float | None,
        delta: float,
        noise_multiplier: float | None,
        clip_norm: float | None,
        grad_sample: str,
        physical_batch_size: int | None,
        private_modules: str | list[str] | None,
        ledger: str | os.PathLike[str] | None,
        secure_noise: bool,
    ) -> None:
        if (epsilon is None) == (noise_multiplier is None):
            raise ValueError(
                f"epsilon={epsilon}, noise_multiplier={noise_multiplier}: give exactly one of them, for example "
                f"{type(self).__name__}(epsilon=10, delta=1e-5)."
            )
        if noise_multiplier is not None:
            non_negative("noise_multiplier", noise_multiplier)
        if clip_norm is not None:
            positive("clip_norm", clip_norm)
        self.budget = None if epsilon is None else PrivacyBudget(epsilon, delta)
        self.delta = PrivacyBudget(1.0, delta).delta
        self._clip_norm = clip_norm
        self._set_engine_arguments(grad_sample, physical_batch_size)
        self._private_modules = private_modules
        self._stream = SecretStream(secure=secure_noise)
        self.account = PrivacyAccount(
            Terms(self.budget, self.delta, noise_multiplier, None if ledger is None else str(ledger)), self._stream
        )
        self.open_ended = False
        self.fit_mark, self.ended = "", False
        self._records = self._batch_size = 0
        self._restored: dict[str, Any] | None = None
        self._prepared = False
        self.ledger_checks: list[Callable[[PrivacyLedger], None]] = []
        self._users_epochs: int | None = None

    # What a run has spent ------------------------------------------------------------------------------------------

    @property
    def mechanism(self) -> GaussianMechanism | None:
        """The door of the current or last fit; ``None`` before the first."""
        return self.account.mechanism

    @property
    def plan(self) -> PrivacyPlan:
        """The plan in force.

        Raises:
            RuntimeError: Before ``fit``.
        """
        return self.account.ready().plan

    @property
    def noise_multiplier(self) -> float:
        """Noise standard deviation ÷ clip norm in force."""
        return self.account.ready().noise_multiplier

    @property
    def ledger(self) -> PrivacyLedger:
        """The ledger in force."""
        return self.account.ready().ledger

    @property
    def noise_source(self) -> str:
        """Where noise and masks come from, in words."""
        return self._stream.source(self.root_device)

    def epsilon_spent(self, relation: Relation = Relation.ZERO_OUT) -> float:
        """ε at this strategy's δ of everything in the ledger so far; 0 before the first release."""
        return self.account.epsilon_spent(relation)

    def trained_last(self, module: pl.LightningModule) -> bool:
        """Whether the weights are as this strategy's last fit left them: no other fit, and no load, came after."""
        return getattr(module, "fit_mark", None) == self.fit_mark

    def knobs(self) -> dict[str, dict[str, Any]]:
        """DP-SGD's clip norm, with where its value came from; a module that makes its own releases says it itself."""
        if self._owns_releases:
            return {}
        origin = "the package's default" if self._clip_norm is None else "set by the user"
        return {"clip_norm": {"value": self.plan.releases[0].clip_norm, "origin": origin}}

    def continue_ledger(self, path: Path) -> None:
        """Puts the coming fit under an existing ledger, where no ledger was given.

        Args:
            path: The ledger's file.
        """
        if self.account.terms.ledger is None and self.mechanism is None:
            self.account.terms = replace(self.account.terms, ledger=str(path))

    # Lightning's hooks, in the order in which they are called -------------------------------------------------------

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Reads the checkpoint and, when fitting, what its run had spent."""
        try:
            checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        except FileNotFoundError:
            raise
        except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"{checkpoint_path} cannot be read as a checkpoint ({type(error).__name__}: {error}); it may be cut short. Give an "
                "earlier one: what was released since is in the ledger, and counts."
            ) from error
        if self._module.trainer.state.fn == "fit":
            if "privacy" not in checkpoint:
                raise ValueError(
                    f"{checkpoint_path} was written without DPStrategy: what its training released is not known, so it cannot be "
                    "continued privately. Start without ckpt_path, or load weights trained on public data yourself."
                )
            self._restored = {**checkpoint["privacy"], "global_step": checkpoint["global_step"]}
        return checkpoint

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """As in Lightning; the weights are from then on those of the fit that wrote the checkpoint, also if this fit is refused."""
        mine = vars(self._module)
        mine["fit_mark"] = None
        super().load_model_state_dict(checkpoint, strict)
        mine["fit_mark"] = checkpoint.get("privacy", {}).get("fit_mark")

    def setup(self, trainer: pl.Trainer) -> None:
        """Sets up as Lightning does; when fitting, also plans, calibrates and opens the ledger."""
        if trainer.state.fn != "fit":
            super().setup(trainer)
            return
        module = self._module
        check_trainer(trainer)
        roots: tuple[str, ...] = ()
        if self._owns_releases:
            self._check_own_releases(module)
        else:
            roots = private_roots(module, self._private_modules)
            check_module(module, roots, self._grad_sample, self._physical)
        super().setup(trainer)
        if not self._owns_releases:
            self._private = private_optimizer(self.optimizers, module, roots)
        had_ended = self.ended or bool(self._restored and self._restored.get("ended"))
        self._prepare(trainer, module)
        self.ended = had_ended and not self.account.ahead.total()  # with nothing left to do, the weights stay as they are
        self.fit_mark = self.broadcast(uuid4().hex)
        vars(module)["fit_mark"] = self.fit_mark
        if self._owns_releases:
            self._check_sampling(trainer)
            check_collate(self, cast(Any, trainer.train_dataloader))  # before the module can read a record
            cast(Any, module).mechanism = self.mechanism
        else:
            self._attach(module, roots)

    def process_dataloader(self, dataloader: object) -> object:
        """Replaces the training loader by one with the plan's sampling; leaves the others."""
        if not self._module.trainer.training:
            return dataloader
        loader = check_loader(dataloader, self.world)
        self._records = len(cast(Any, loader.dataset))
        self._batch_size = cast(int, loader.batch_size)
        sampling = self._plan_of(1).sampling
        if self._prepared and sampling != self.plan.sampling:
            raise ValueError(
                f"the training loader changed within a fit: the plan is accounted for {self.plan.sampling}, the new loader is "
                f"{sampling}. Keep the data and batch_size (reload_dataloaders_every_n_epochs=0)."
            )
        return private_loader(loader, sampling, self._stream, self.rank, self.world)

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """As in Lightning; what ``on_after_batch_transfer`` draws for the records of a lot leaves the public random states alone."""
        if not self._module.trainer.training:
            return super().batch_to_device(batch, device, dataloader_idx)
        with fresh_randomness(self.root_device):
            return super().batch_to_device(batch, device, dataloader_idx)

    def on_train_start(self) -> None:
        """Checks the loader once more and, for a user's module, that rows depend on their own records."""
        super().on_train_start()
        loader = self._check_sampling(self._module.trainer)
        if self._engine is not None:
            self._check_engine(self._engine, loader)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """A lot begins: it must be released, and once."""
        super().on_train_batch_start(batch, batch_idx)
        self.account.promise()
        vars(self._module).update(trained_under=self.ledger.run_id, is_mid_fit=True)
        self.account.ready().next_lot()

    def on_train_end(self) -> None:
        """Puts the spent ε into ``trainer.callback_metrics`` and says it."""
        super().on_train_end()
        self._check_end()
        self._note_early_end()
        self._end()
        self._module.trainer.callback_metrics["privacy/epsilon"] = torch.tensor(self.epsilon_spent())
        submodule("utilities").rank_zero_info(self.report())

    def on_exception(self, exception: BaseException) -> None:
        """A run that had released all that it planned, and worked on no lot, has ended: what came after cannot tell of a record."""
        super().on_exception(exception)
        progress = self._module.trainer.fit_loop.epoch_loop.batch_progress.total
        if self._prepared and self.account.made.total() >= self.account.ahead.total() and progress.ready == progress.completed:
            with suppress(RuntimeError):  # which the run is ending with, or would have ended with
                self._check_end()
                self._end()

    def _end(self) -> None:
        self.ended = True
        vars(self._module)["is_mid_fit"] = False

    def _check_end(self) -> None:
        self.account.ready().end_lot()
        if self._engine is not None:
            self._engine.check_buffers()
            self._engine.check_values()

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Adds plan, noise and spent releases to the checkpoint, which is private: it may hold optimizer and loop state."""
        if self._engine is not None:
            self._engine.check_values()
        if self.mechanism is not None:
            if not self.trained_last(self._module):
                raise ValueError(
                    f"{filepath} is not written: this {type(self._module).__name__} is not as this trainer's last fit left it (another "
                    "trained it, or weights were loaded since), so this trainer does not know what it cost. Save it by the trainer that "
                    "trained it, or its weights alone with torch.save(module.state_dict(), …)."
                )
            self.account.promise()  # a resume asks for the ledger, also where no lot was drawn yet
            started = getattr(self._module, "started_from", None)
            own = {"probed": self._probed_before, "started_from": started, "fit_mark": self.fit_mark, "ended": self.ended}
            checkpoint["privacy"] = {**self.account.state(), **own}
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def teardown(self) -> None:
        """Leaves the module without hooks."""
        self._prepared, self._restored = False, None
        self.ledger_checks.clear()
        if self._users_epochs is not None:
            self._module.trainer.fit_loop.max_epochs, self._users_epochs = self._users_epochs, None
        self._detach()
        super().teardown()

    # What several processes do otherwise ------------------------------------------------------------------------------

    def _begin(self, plan: PrivacyPlan, folder: Path, previous: dict[str, Any] | None, ahead: dict[str, int]) -> None:
        def check(ledger: PrivacyLedger) -> None:
            for one in (self._check_history, *self.ledger_checks):
                one(ledger)

        self.account.begin(plan, folder, previous, ahead, check)

    # Planning --------------------------------------------------------------------------------------------------------

    def _check_sampling(self, trainer: pl.Trainer) -> DataLoader[Any]:
        loader = trainer.train_dataloader
        sampling = getattr(getattr(loader, "batch_sampler", None), "sampling", None)
        if not isinstance(loader, DataLoader) or sampling != self.plan.sampling:
            raise ValueError(
                f"the training data is a {type(loader).__name__} sampled by {sampling}; a private run needs exactly one DataLoader, "
                f"sampled as planned: {self.plan.sampling}."
            )
        return loader

    def _check_own_releases(self, module: pl.LightningModule) -> None:
        name = type(module).__name__
        if module.automatic_optimization:
            raise ValueError(
                f"{name} has configure_privacy() and automatic optimization, which would step on raw gradients. Set "
                "automatic_optimization = False and step on what self.mechanism.release() returns."
            )
        given = {"private_modules": self._private_modules, "physical_batch_size": self._physical}
        for argument, value in given.items():
            if value is not None:
                raise ValueError(f"{argument}={value!r} beside {name}, which makes its own releases and has no use for it. Leave it out.")

    def _plan_of(self, steps: int) -> PrivacyPlan:
        if self._owns_releases:
            module = cast(Any, self._module)
            return cast(PrivacyPlan, module.configure_privacy(records=self._records, steps=steps, batch_size=self._batch_size))
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
        longer = {release.name: release.count for release in self._plan_of((steps or 1) + 1).releases}
        plan = self._plan_of(steps or 1)
        counts_lots = module.automatic_optimization or self._owns_releases or getattr(module, "one_step_is_one_lot", False)
        previous, self._restored = self._restored, None
        done = (trainer.global_step if previous is None else int(previous["global_step"])) if counts_lots else 0
        if isinstance(plan.sampling, FullPass):
            self._users_epochs = trainer.max_epochs
            steps, self.open_ended = set_passes(trainer, plan, done), False
        elif steps is None and self.budget is not None:
            raise ValueError(
                "neither max_steps nor max_epochs is set, so there is no number of releases to fit into epsilon. Set one (max_time may "
                "stop earlier), or give DPStrategy(noise_multiplier=…) for a run without a claim."
            )
        self.account.per_step = {r.name: max(1, longer.get(r.name, 0) - r.count) for r in plan.releases}
        if self._owns_releases and self._clip_norm is not None:
            raise ValueError(
                f"DPStrategy(clip_norm={self._clip_norm}) beside {type(module).__name__}, whose configure_privacy() states "
                f"{', '.join(f'{r.name}: clip_norm={r.clip_norm}' for r in plan.releases)}. Set it in the module alone."
            )
        self._probed_before = previous is not None and bool(previous["probed"])
        if self._owns_releases and self.world > 1 and not getattr(module, "adds_up_over_processes", False):
            raise ValueError(
                f"{type(module).__name__} makes its own releases, on one device. Use Trainer(devices=1, strategy=DPStrategy(…))."
            )
        self._begin(plan, Path(trainer.default_root_dir) / "privacy", previous, releases_ahead(plan, steps or 1, done))
        self._prepared, self._private_keys = True, set()
        if previous is None and getattr(module, "is_mid_fit", False):
            self.account.note(UNENDED)
        self._note_monitors(trainer)
        submodule("utilities").rank_zero_info(self.summary())

    def _check_history(self, ledger: PrivacyLedger) -> None:
        """One module's weights may rest on one ledger only, or its certificate would leave the others out."""
        earlier = getattr(self._module, "trained_under", ledger.run_id)
        if earlier != ledger.run_id:
            raise ValueError(
                f"this {type(self._module).__name__} was trained before, under ledger {earlier}; a second ledger ({ledger.run_id}) would "
                "account for a part of what its weights were made from. Give that ledger, DPStrategy(ledger='….jsonl'), or start from a "
                "new module (load weights that cost nothing with load_state_dict)."
            )

    def _note_monitors(self, trainer: pl.Trainer) -> None:
        for user, key in monitored(trainer, self.lr_scheduler_configs):
            if key in ("step", "epoch"):  # Lightning's own counts, unless a training step logs under their name
                continue
            note = f"{user} followed {key!r}, a number that was not released under differential privacy."
            if self.account.note(note):
                log.warning("%s What it chooses is outside the guarantee unless that number is from public data.", note)

    def _note_early_end(self) -> None:
        self.account.notes = [note for note in self.account.notes if not note.startswith(ENDED_EARLY)]
        made, planned = self.account.made.total(), self.account.ahead.total()
        if made < planned and not self.open_ended:
            note = (
                f"{ENDED_EARLY} {made} of {planned} planned releases; the claim counts them all. That covers the moment of "
                "stopping only if it was chosen by released numbers, the clock or chance, not by records."
            )
            self.account.note(note)
            log.warning(note)

    def summary(self) -> str:
        """The plan in one line."""
        mechanism = self.account.ready()
        sampling = mechanism.plan.sampling
        rate = f", expected lot {sampling.expected_batch_size}" if isinstance(sampling, PoissonSampling) else ""
        counts = ", ".join(f"{r.count} x {r.name} (clip norm {r.clip_norm:g})" for r in mechanism.plan.releases)
        claim, together = mechanism.plan.epsilon(mechanism.noise_multiplier, self.delta), self.account.epsilon_planned()
        earlier = f" ({together:.3f} with what its ledger holds)" if together > 1.001 * claim else ""
        return (
            f"DPStrategy: {sampling.records} records, {type(sampling).__name__}{rate}; {counts}; noise multiplier "
            f"{mechanism.noise_multiplier:g}; epsilon {claim:.3f}{earlier} at delta {self.delta:g}. Ledger: {mechanism.ledger.path}"
        )

    def report(self) -> str:
        """What has been spent, in one line."""
        return (
            f"Privacy spent: epsilon = {self.epsilon_spent():.3f} at delta = {self.delta:g} (zero-out), {len(self.ledger)} releases, noise "
            f"multiplier {self.noise_multiplier:g}. Ledger: {self.ledger.path}"
        )
