"""Shows ε while a run spends it."""

from __future__ import annotations

from typing import Any

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import positive_int
from lightning_dpgen.strategies.private import PrivateTraining


class PrivacyMonitor(pl.Callback):
    """Logs ε so far as ``privacy/epsilon``: progress bar, logger and ``trainer.callback_metrics``.

    Args:
        every_n_steps: How often to compute it; the Trainer's ``log_every_n_steps`` if not given. Composing the losses takes
            up to some seconds.

    Privacy:
        ε is a function of the plan's constants and the number of releases, so showing it costs nothing. What a run that was
        stopped by hand may *claim* is the plan's ε, not the ε so far.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        self.every_n_steps = None if every_n_steps is None else positive_int("every_n_steps", every_n_steps)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a Trainer without a private strategy.

        Raises:
            ValueError: If there is nothing to monitor.
        """
        if stage == "fit" and not isinstance(trainer.strategy, PrivateTraining):
            raise ValueError(
                f"PrivacyMonitor needs DPStrategy; the Trainer has {type(trainer.strategy).__name__}. Add "
                "strategy=DPStrategy(epsilon=…, delta=…), or remove the callback."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Logs ε every so many steps."""
        interval = self.every_n_steps or max(1, trainer.log_every_n_steps)
        if trainer.global_step % interval == 0:
            strategy: Any = trainer.strategy
            pl_module.log("privacy/epsilon", strategy.epsilon_spent(), prog_bar=True, on_step=True, batch_size=1)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Logs what the run spent."""
        strategy: Any = trainer.strategy
        for logger in trainer.loggers:
            logger.log_metrics({"privacy/epsilon": strategy.epsilon_spent()}, step=trainer.global_step)
