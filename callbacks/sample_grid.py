"""Pictures of what a generator makes, while it learns."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from lightning_dpgen.callbacks._every import LooksAtGenerator

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import positive_int
from lightning_dpgen.generators.base import as_generator, looking_at
from lightning_dpgen.release.preview import save_grid

log = logging.getLogger(__name__)

COLLAPSED = 0.02
"""Mean deviation of a pixel over samples, of 1, below which a class has one image only."""


class SampleGrid(LooksAtGenerator):
    """Writes a PNG with a row of samples for each class and their diversity beside it; warns of classes that look alike.

    Diversity is the deviation of a pixel over the samples of a class, averaged over pixels: 0 for one image, 0.09 to 0.27 for
    the classes of MNIST's and FashionMNIST's real images.

    Args:
        every_n_steps: Also while training, every so many steps; only at the end if not given.
        per_class: Images in a row, at least 2 to see diversity.
        folder: Where to; ``<default_root_dir>/samples`` if not given.

    Privacy:
        Shows released images only.
    """

    def __init__(self, every_n_steps: int | None = None, per_class: int = 10, folder: str | None = None) -> None:
        super().__init__(every_n_steps)
        self.per_class = positive_int("per_class", per_class)
        self.folder = folder

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draws the last state and says where the samples are too much alike."""
        images, diversity = self.look(trainer, pl_module)
        alike = [label for label, value in enumerate(diversity) if value < COLLAPSED]
        spread = float(images.std(0).mean())
        if alike or spread < COLLAPSED:
            log.warning(
                "the samples %s differ by less than %g a pixel, of 1: the generator has collapsed to one image there. Look at the "
                "pictures; usual causes are a learning rate or a noise multiplier that is too large, or critics that stand still.",
                "of all classes" if spread < COLLAPSED else f"of class {', '.join(map(str, alike))}",
                COLLAPSED,
            )

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> tuple[torch.Tensor, list[float]]:
        """The samples, and each class's diversity unless it has one image by design."""
        generator = as_generator(pl_module, self)
        published = int(torch.bincount(generator.release_labels(), minlength=generator.num_classes).min())
        labels = torch.arange(generator.num_classes).repeat_interleave(self.per_class)
        with looking_at(generator):
            images = generator.sample(labels.to(generator.device), torch.Generator(generator.device).manual_seed(0)).cpu()
        rows = images.unflatten(0, (generator.num_classes, self.per_class))
        diversity = rows.std(1).flatten(1).mean(1).tolist() if min(published, self.per_class) > 1 else []
        folder = Path(self.folder or Path(trainer.default_root_dir) / "samples")
        beside = [f"{label}: {value:.3f}" for label, value in enumerate(diversity)]
        save_grid(images, folder / f"step-{trainer.global_step:06d}.png", columns=self.per_class, beside=beside)
        return images, diversity
