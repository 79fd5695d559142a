"""The strategies that a user names: one device, or several processes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from lightning_dpgen._compat import pl, submodule
from lightning_dpgen.privacy.clipping import ClippedSum, sum_over_processes
from lightning_dpgen.privacy.plan import PrivacyPlan
from lightning_dpgen.strategies.private import PrivateTraining


class DPStrategy(PrivateTraining, pl.strategies.SingleDeviceStrategy):
    """Trains any LightningModule on one device under differential privacy.

    A module with ``configure_privacy(records, steps, batch_size) -> PrivacyPlan`` makes its own releases through
    ``self.mechanism``, which it is handed before ``on_fit_start``. Any other module is trained by DP-SGD (Abadi et al. 2016,
    Algorithm 1): per-record gradients, clipped, summed, noised, divided by the expected lot.

    Args:
        epsilon: Target ε, a hard cap for all fits under one ledger. Give this or ``noise_multiplier``.
        delta: δ.
        noise_multiplier: Noise standard deviation ÷ clip norm. No cap; 0 trains without privacy, for tests.
        clip_norm: C for modules without ``configure_privacy``; 1.0 if not given.
        grad_sample: How per-record gradients are made: ``"hooks"`` (Opacus's, layer by layer), ``"ghost"`` (the same, without
            holding them: least memory) or ``"functional"`` (``vmap`` over the training step: fastest for small networks, and
            for layers and losses that hooks do not know). The result is the same.
        physical_batch_size: Most records in one forward pass; a lot is taken in chunks of that size, one step a lot. 1 takes
            each record alone, which works for every layer.
        private_modules: Paths of the submodules that see records, for example ``"discriminator"``. Everything if not given;
            must be given, here or as a module attribute of this name, in manual optimization.
        ledger: Path of the ledger. ``None``: ``<default_root_dir>/privacy/<run id>.jsonl``. ``"new"``: a resume may start a
            new ledger where the old file is missing; what the lost part had planned then counts as released.
        secure_noise: Draw noise and masks from AES-CTR (extra ``secure``).
        accelerator: Filled by the Trainer.
        parallel_devices: Filled by the Trainer; the first one is used.
        checkpoint_io: As in Lightning.
        precision_plugin: As in Lightning.

    Privacy:
        Zero-out. The loader's batches become Poisson lots with q = batch_size / N (or what the module's plan says); its
        ``batch_size`` is the expected lot size and the constant divisor. Every lot releases once, also an empty one. The
        noise is calibrated from public constants before a record reaches a model; every release is in the ledger before
        its noise is drawn; no release beyond the plan is made when ε was given. What the user's own training step logs and
        what validation reads is outside the guarantee.

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
        grad_sample: str = "hooks",
        physical_batch_size: int | None = None,
        private_modules: str | list[str] | None = None,
        ledger: str | os.PathLike[str] | None = None,
        secure_noise: bool = False,
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
    ) -> None:
        super().__init__(accelerator=accelerator, checkpoint_io=checkpoint_io, precision_plugin=precision_plugin)
        self.parallel_devices = parallel_devices
        self._set_private_arguments(
            epsilon, delta, noise_multiplier, clip_norm, grad_sample, physical_batch_size, private_modules, ledger, secure_noise
        )

    @property
    def root_device(self) -> torch.device:
        """The first of the devices that the Trainer chose."""
        return self.parallel_devices[0] if self.parallel_devices else super().root_device

    def setup_environment(self) -> None:
        """Refuses several devices, then as in Lightning."""
        if self.parallel_devices and len(self.parallel_devices) > 1:
            raise ValueError(
                f"DPStrategy uses one device and was given {len(self.parallel_devices)}. Use Trainer(devices=1), or "
                "strategy=DPDDPStrategy(…) for several."
            )
        super().setup_environment()


class DPDDPStrategy(PrivateTraining, pl.strategies.DDPStrategy):
    """:class:`DPStrategy` in several processes, one device each; started as Lightning's ``DDPStrategy`` is.

    Takes the arguments of :class:`DPStrategy`, and ``process_group_backend``, ``timeout`` and the like as Lightning's
    ``DDPStrategy`` does; processes are started by the script itself or by torchrun, not forked. The loader's ``batch_size`` is
    the expected lot of all processes together.

    Privacy:
        As one device. Each process holds the records ``rank::world``, none twice, and draws its own masks; it clips and sums
        its part of the lot, the sums are added up, and the first process alone writes the ledger, draws the noise once and
        sends the result to the others.

    Raises:
        ValueError: For arguments out of range, before anything is read.
    """

    strategy_name = "dpddp"

    def __init__(
        self,
        epsilon: float | None = None,
        delta: float = 1e-5,
        noise_multiplier: float | None = None,
        clip_norm: float | None = None,
        grad_sample: str = "hooks",
        physical_batch_size: int | None = None,
        private_modules: str | list[str] | None = None,
        ledger: str | os.PathLike[str] | None = None,
        secure_noise: bool = False,
        **ddp: Any,
    ) -> None:
        if ddp.get("start_method", "popen") != "popen":
            raise ValueError(
                f"start_method={ddp['start_method']!r}: the process that calls fit would never see the ledger of those that "
                "train, and report epsilon 0. Leave it out, or use torchrun."
            )
        super().__init__(**ddp)
        self._set_private_arguments(
            epsilon, delta, noise_multiplier, clip_norm, grad_sample, physical_batch_size, private_modules, ledger, secure_noise
        )

    def setup_environment(self) -> None:
        """As in Lightning; then this process knows its place."""
        super().setup_environment()
        self.rank, self.world = self.global_rank, self.world_size

    def configure_ddp(self) -> None:
        """Makes the processes' weights equal; gradients are reduced by the strategy, after clipping."""
        submodule("overrides.distributed")._sync_module_states(self._module)

    def _begin(self, plan: PrivacyPlan, folder: Path, previous: dict[str, Any] | None, ahead: dict[str, int]) -> None:
        outcome: tuple[dict[str, Any] | None, dict[str, Any] | None, BaseException | None] = (None, None, None)
        if self.rank == 0:
            try:
                super()._begin(plan, folder, previous, ahead)
                outcome = (self.account.state(), self.plan.to_dict(), None)
            except Exception as error:  # the others must hear of it, or they would wait for ever
                outcome = (None, None, error)
        state, shape, problem = self.broadcast(outcome)
        if problem is not None:
            raise problem
        if self.rank > 0:
            assert state is not None
            assert shape is not None
            self.account.follow(state, PrivacyPlan.from_dict(shape))
        mechanism = self.account.ready()
        mechanism.add_up, mechanism.share = _add_up, _of_first_process

    def _average_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    torch.distributed.all_reduce(parameter.grad)
                    parameter.grad /= self.world


def _add_up(total: ClippedSum) -> ClippedSum:
    def add_up(value: Tensor) -> Tensor:
        torch.distributed.all_reduce(value)
        return value

    return sum_over_processes(total, add_up)


def _of_first_process(released: dict[str, Tensor]) -> dict[str, Tensor]:
    for name in sorted(released):
        torch.distributed.broadcast(released[name], src=0)
    return released
