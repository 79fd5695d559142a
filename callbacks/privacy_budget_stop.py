"""Stops a run before the budget does."""

from __future__ import annotations

from typing import Any, cast

from rich.console import Console

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import positive, positive_int
from lightning_dpgen.strategies.private import PrivateTraining


class PrivacyBudgetStop(pl.Callback):
    """Stops at the last step at which ε so far is not above ``epsilon``.

    Args:
        epsilon: Where to stop; below the strategy's own ε.
        every_n_steps: How often to compose ε; every step is exact and takes up to some seconds each.

    Privacy:
        ε so far is a function of public constants and counts, so that stopping by it costs nothing. A certificate still claims
        what the plan would have spent: the noise was calibrated for the whole plan.
    """

    def __init__(self, epsilon: float, every_n_steps: int = 1) -> None:
        self.epsilon = positive("epsilon", epsilon)
        self.every_n_steps = positive_int("every_n_steps", every_n_steps)
        self._steps = 0

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses a Trainer without a private strategy, and an ε at which it stops anyway.

        Raises:
            ValueError: Says which.
        """
        strategy = trainer.strategy
        if stage != "fit":
            return
        if not isinstance(strategy, PrivateTraining):
            raise ValueError(f"PrivacyBudgetStop needs DPStrategy; the Trainer has {type(strategy).__name__}.")
        if strategy.budget is not None and self.epsilon >= strategy.budget.epsilon:
            raise ValueError(
                f"PrivacyBudgetStop(epsilon={self.epsilon:g}) is not below the strategy's epsilon={strategy.budget.epsilon:g}, at which "
                "training stops anyway. Lower it, or remove the callback."
            )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Refuses an ε that the first steps would pass.

        Raises:
            ValueError: With what they come to.
        """
        self._steps = 0
        first = cast(PrivateTraining, trainer.strategy).account.epsilon_after(self.every_n_steps)
        if first > self.epsilon:
            raise ValueError(
                f"PrivacyBudgetStop(epsilon={self.epsilon:g}, every_n_steps={self.every_n_steps}): the first {self.every_n_steps} steps "
                f"come to epsilon={first:.3f} already. Raise it, look more often, or train with more noise."
            )

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Stops if as many further steps would pass ``epsilon``."""
        self._steps += 1
        if self._steps % self.every_n_steps:
            return
        strategy = cast(PrivateTraining, trainer.strategy)
        if strategy.account.epsilon_after(self.every_n_steps) > self.epsilon:
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = 0
            trainer.fit_loop.epoch_loop.min_steps = None  # type: ignore[assignment]
            Console().print(
                f"Stopped at epsilon = {strategy.epsilon_spent():.3f}, before {self.epsilon:g}. A certificate claims the plan's epsilon.",
                highlight=False,
            )
