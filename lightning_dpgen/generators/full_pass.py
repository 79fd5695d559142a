"""Generators that ask once: a few statistics, each of all records, each released at the end of one full pass."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_dpgen.generators.base import PrivateGenerator, check_batch
from lightning_dpgen.privacy.clipping import ClippedSum


class FullPassGenerator(PrivateGenerator):
    """A generator whose every release is a sum over all records, built up chunk by chunk: one epoch a release.

    A subclass fills in :meth:`statistic` and :meth:`learn`, states a plan of :class:`.plan.FullPass` in ``configure_privacy``, and
    calls this class's ``build``.

    Privacy:
        A pass adds each record once (the loader's part; several processes read disjoint parts) and is released when its last
        chunk was added. What an interrupted pass had added up is not in checkpoints and not released; after an error it stays in the
        owner's memory until the next fit.
    """

    adds_up_over_processes = True

    def __init__(self, num_classes: int | None = None, image_shape: tuple[int, int, int] | None = None) -> None:
        super().__init__(num_classes, image_shape)
        self.automatic_optimization = False
        self._total: ClippedSum | None = None
        self._chunks = 0

    def build(self) -> None:
        """Creates what counts the passes."""
        self.passes = nn.Parameter(torch.zeros(()))  # Lightning counts its optimizer's steps, and writes a checkpoint for new ones

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One that moves nothing: its steps count the releases."""
        return torch.optim.SGD([self.passes], lr=0.0)

    @property
    def is_fitted(self) -> bool:
        """Whether every statistic was released."""
        raise NotImplementedError

    def statistic(self, name: str, images: Tensor, labels: Tensor) -> ClippedSum:
        """What the records of one chunk add to a release.

        Args:
            name: Of the release.
            images: ``[B, C·H·W]``, float64.
            labels: ``[B]``.
        """
        raise NotImplementedError

    def learn(self, name: str, released: dict[str, Tensor]) -> None:
        """Takes a released statistic, with numbers in float64, into the model: post-processing."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """As every generator's.

        Raises:
            ValueError: Also if this generator is fitted already: its statistics are released once.
        """
        super().setup(stage)
        if stage == "fit" and self.is_fitted and self.trainer.ckpt_path is None:
            name = type(self).__name__
            raise ValueError(f"this {name} is fitted already; another fit would pay for its statistics again. Start a new one.")

    def on_train_start(self) -> None:
        """An interrupted fit may have left its part of a pass."""
        self._total, self._chunks = None, 0

    def on_train_end(self) -> None:
        """Lets go of what an unfinished pass has added up."""
        self._total = None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One chunk of a pass; with the last one the pass's statistic is released.

        Args:
            batch: Images ``[B, C, H, W]`` in [0, 1] and labels ``[B]``.
            batch_idx: Number of the chunk in its pass.

        Raises:
            ValueError: If a resumed pass would lack its first chunks, or records are not images and labels as said.
        """
        done = self.trainer.global_step
        name = self.schedule[done]
        if batch_idx == 0:
            self._total, self._chunks = None, 0
        if batch_idx != self._chunks:
            raise ValueError(
                f"pass {done + 1} goes on with chunk {batch_idx + 1}, and {self._chunks} chunks were added up: the checkpoint was "
                "written within a pass, whose first chunks are not kept. Resume from one that was written between passes, as "
                "ModelCheckpoint does by default."
            )
        images, labels = batch
        if done == 0:
            check_batch(images, labels, self.num_classes, self.image_shape)
        statistic = self.statistic(name, images.flatten(1).double(), labels)
        self._total = statistic if self._total is None else self._total + statistic
        self._chunks += 1
        if self._chunks == self.trainer.num_training_batches:
            released = {key: value.double() for key, value in self.mechanism.release(name, self._total).items()}
            self._total = None
            self.learn(name, released)
            cast(Any, self.optimizers()).step()

    @property
    def schedule(self) -> list[str]:
        """The name of each pass's release."""
        return [release.name for release in self.mechanism.plan.releases for _ in range(release.count)]
