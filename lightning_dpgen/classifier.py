"""A classifier to train privately, for the command line and as a first example."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import between, one_of, positive, positive_int
from lightning_dpgen.nn.classifiers import CLASSIFIERS


class Classifier(pl.LightningModule):
    """Cross-entropy and SGD on a network; it knows nothing of privacy.

    Args:
        network: A name of ``lightning_dpgen.nn.classifiers.CLASSIFIERS``, for example ``"TanhCNN"``, or a network from images
            ``[N, C, H, W]`` to logits ``[N, num_classes]``.
        num_classes: Number of classes; the data module's if not given.
        lr: Learning rate.
        momentum: Momentum.
        image_shape: ``(C, H, W)`` for a named network; the data module's if not given.

    Privacy:
        Under :class:`~lightning_dpgen.DPStrategy` its weights may be published with the plan's ε. ``test/accuracy`` is measured
        on real records and is outside the guarantee.

    Raises:
        ValueError: For an unknown name or arguments out of range.
    """

    def __init__(
        self,
        network: str | nn.Module = "TanhCNN",
        num_classes: int | None = None,
        lr: float = 1.0,
        momentum: float = 0.9,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["network"] if isinstance(network, nn.Module) else [])
        self.num_classes = None if num_classes is None else positive_int("num_classes", num_classes)
        self.image_shape = image_shape
        self.lr = positive("lr", lr)
        self.momentum = 0.0 if momentum == 0 else between("momentum", momentum, 0, 1)
        self.name = None if isinstance(network, nn.Module) else one_of("network", network, tuple(CLASSIFIERS))
        self.network: Any = network if isinstance(network, nn.Module) else None

    def configure_model(self) -> None:
        """Builds a named network, once classes and shape are known.

        Raises:
            ValueError: If they are not.
        """
        if self.network is not None:
            return
        data = getattr(self.trainer, "datamodule", None) if self._trainer is not None else None
        classes, shape = self.num_classes or getattr(data, "num_classes", None), self.image_shape or getattr(data, "image_shape", None)
        if classes is None or shape is None or self.name is None:
            raise ValueError(
                f"Classifier({self.name!r}) does not know its classes and image shape: give num_classes=… and image_shape=(C, H, "
                "W), or use "
                "one of lightning_dpgen.data's data modules."
            )
        self.network = CLASSIFIERS[self.name](classes, shape)

    def forward(self, images: Tensor) -> Tensor:
        """Logits ``[N, num_classes]`` of images ``[N, C, H, W]``."""
        logits: Tensor = self.network(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The mean cross-entropy; not logged, since it is computed from records."""
        return F.cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``test/accuracy``, in percent."""
        correct = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("test/accuracy", 100 * correct, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=self.momentum)
