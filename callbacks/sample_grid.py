"""Pictures of what a generator makes, while it learns."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import positive_int
from lightning_dpgen.generators.base import as_generator, looking_at
from lightning_dpgen.release.preview import save_grid

log = logging.getLogger(__name__)

COLLAPSED = 0.02
"""Mean deviation of a pixel over samples, of 1, below which a generator makes one image only."""


class SampleGrid(pl.Callback):
    """Writes a PNG with a row of samples for each class; warns at the end if all samples look alike.

    Args:
        every_n_steps: Also while training, every so many steps; only at the end if not given.
        per_class: Images in a row.
        folder: Where to; ``<default_root_dir>/samples`` if not given.

    Privacy:
        Shows released images only.
    """

    def __init__(self, every_n_steps: int | None = None, per_class: int = 10, folder: str | None = None) -> None:
        self.every_n_steps = None if every_n_steps is None else positive_int("every_n_steps", every_n_steps)
        self.per_class = positive_int("per_class", per_class)
        self.folder = folder

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *args: Any) -> None:
        """Draws every so many steps."""
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self._draw(trainer, pl_module)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the last state."""
        spread = float(self._draw(trainer, pl_module).std(0).mean())
        if spread < COLLAPSED:
            log.warning(
                "the samples differ by %.4f a pixel only, of 1: the generator has collapsed to one image or to none. Look at the pictures; "
                "usual causes are a learning rate or a noise multiplier that is too large.",
                spread,
            )

    def _draw(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> torch.Tensor:
        generator = as_generator(pl_module, self)
        labels = torch.arange(generator.num_classes).repeat_interleave(self.per_class)
        with looking_at(generator):
            images = generator.sample(labels.to(generator.device), torch.Generator(generator.device).manual_seed(0))
        folder = Path(self.folder or Path(trainer.default_root_dir) / "samples")
        save_grid(images.cpu(), folder / f"step-{trainer.global_step:06d}.png", columns=self.per_class)
        return images
