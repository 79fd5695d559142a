"""Evaluation protocols as data: which classifiers, trained how, at what cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_dpgen._validate import fail


@dataclass(frozen=True)
class Protocol:
    """How classifiers are trained on synthetic images.

    Args:
        name: As used in tables and on the command line.
        classifiers: Names in :data:`lightning_dpgen.nn.classifiers.CLASSIFIERS`.
        optimizer: ``"sgd"`` (momentum 0.9, weight decay 5e-4, ×0.1 at half) or ``"adam"``.
        lr: Learning rate.
        epochs: Passes over the set; ``None`` for no limit.
        max_updates: Optimizer steps; ``None`` for no limit. The smaller of the two limits holds.
        batch_size: Images an update.
        cost: Measured wall time on two CPU cores, in words.
        standardize: Whether images are shifted and scaled by the synthetic set's own mean and deviation of each channel, test images
            too. Networks without normalisation hardly begin to learn without it in a few hundred updates.
    """

    name: str
    classifiers: tuple[str, ...]
    optimizer: str
    lr: float
    epochs: int | None
    max_updates: int | None
    batch_size: int
    cost: str
    standardize: bool = False

    def updates(self, images: int) -> int:
        """Optimizer steps for a set of so many images."""
        batches = math.ceil(images / self.batch_size)
        limits = [self.epochs * batches if self.epochs else None, self.max_updates]
        return min(limit for limit in limits if limit is not None)


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            name="published",
            classifiers=("ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18", "MLP"),
            optimizer="sgd",
            lr=0.01,
            epochs=300,
            max_updates=None,
            batch_size=256,
            cost="about 70 minutes for 100 images of 28 x 28; use a GPU or a night",
            standardize=True,
        ),
        Protocol(
            name="quick",
            classifiers=("ConvNet32", "LeNet", "MLP", "LogReg"),
            optimizer="sgd",
            lr=0.01,
            epochs=300,
            max_updates=3000,
            batch_size=256,
            cost="about 90 seconds a seed for 100 images of 28 x 28",
        ),
        Protocol(
            name="common",
            classifiers=("CNN", "MLP", "LogReg"),
            optimizer="adam",
            lr=1e-3,
            epochs=None,
            max_updates=2000,
            batch_size=256,
            cost="about 10 minutes a seed for images of 28 x 28; for sets of thousands of images and for real records",
        ),
    )
}


def protocol_named(name: str) -> Protocol:
    """The protocol called ``name``.

    Raises:
        ValueError: If there is none.
    """
    if name not in PROTOCOLS:
        raise fail("protocol", name, "one of " + ", ".join(map(repr, PROTOCOLS)))
    return PROTOCOLS[name]
