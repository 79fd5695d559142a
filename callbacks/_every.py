"""What callbacks that look at a generator from time to time share."""

from __future__ import annotations

from typing import Any

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import positive_int


class LooksAtGenerator(pl.Callback):
    """Calls :meth:`look` every so many steps of a run.

    Args:
        every_n_steps: How many; only a subclass's look at the end if not given.
    """

    def __init__(self, every_n_steps: int | None) -> None:
        self.every_n_steps = None if every_n_steps is None else positive_int("every_n_steps", every_n_steps)
        self._seen = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Waits for the next step."""
        self._seen = trainer.global_step

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Looks every so many steps."""
        if self.every_n_steps and trainer.global_step > self._seen and trainer.global_step % self.every_n_steps == 0:
            self._seen = trainer.global_step  # a pass over all records is many batches and one step
            self.look(trainer, pl_module)

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> Any:
        """What a subclass does."""
        raise NotImplementedError
