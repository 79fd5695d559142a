"""What every data module of private records has in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lightning_dpgen._compat import pl
from lightning_dpgen._validate import positive_int

ImageShape = tuple[int, int, int]


class ImageRecords(Dataset[tuple[Tensor, Tensor]]):
    """Images and labels held as bytes, given out as floats in [0, 1].

    Args:
        images: uint8 ``[N, C, H, W]``.
        labels: int64 ``[N]``.

    Privacy:
        x / 255 and nothing else: no mean, deviation or other statistic of the records.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index].float() / 255, self.labels[index]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """A whole batch at once, which is faster than record by record."""
        return self.images[indices].float() / 255, self.labels[indices]

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All images as floats ``[N, C, H, W]`` and all labels ``[N]``."""
        return self.images.float() / 255, self.labels


def collate_records(records: Any) -> tuple[Tensor, Tensor]:
    """Stacks single records; a batch that is stacked already passes."""
    if isinstance(records, tuple):
        return records[0], records[1]
    return torch.stack([image for image, _ in records]), torch.stack([label for _, label in records])


class PrivateDataModule(pl.LightningDataModule):
    """Private records with what a person has declared about them.

    A subclass gives :meth:`load`.

    Args:
        num_classes: Number of classes, declared.
        image_shape: ``(C, H, W)``, declared.
        class_names: A name for each class.
        batch_size: Expected lot size.
        num_workers: Loader processes.
        origin: Where ``batch_size`` comes from, for the certificate.

    Privacy:
        N, ``num_classes``, ``class_names`` and ``image_shape`` are published; nothing else of the records is. The checks of
        :meth:`setup` look at contents and are for the owner: the guarantee is over data sets that pass them.
    """

    def __init__(
        self,
        num_classes: int,
        image_shape: ImageShape,
        class_names: tuple[str, ...],
        batch_size: int,
        num_workers: int = 0,
        origin: str = "set by the user",
    ) -> None:
        super().__init__()
        self.name: str = type(self).__name__.removesuffix("DataModule")
        self.num_classes = positive_int("num_classes", num_classes)
        self.image_shape = image_shape
        self.class_names = class_names
        self.batch_size = positive_int("batch_size", batch_size)
        self.num_workers = num_workers
        self.origin = origin
        self.train_records: ImageRecords | None = None
        self.test_records: ImageRecords | None = None

    def load(self) -> tuple[ImageRecords, ImageRecords | None]:
        """Reads training records and, where there are any, real test records."""
        raise NotImplementedError

    def setup(self, stage: str | None = None) -> None:
        """Reads and checks the records once.

        Raises:
            ValueError: If images or labels are not what was declared, or a class has no record.
        """
        if self.train_records is None:
            self.train_records, self.test_records = self.load()
            check_records(self.train_records, self.num_classes, self.image_shape, self.class_names, "training")
            if self.test_records is not None:
                check_records(self.test_records, self.num_classes, self.image_shape, self.class_names, "test")

    def train_dataloader(self) -> DataLoader[Any]:
        """The loader whose batches the strategy turns into lots."""
        if self.train_records is None:
            self.setup()
        return DataLoader(
            self.train_records,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            shuffle=True,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            collate_fn=collate_records,
        )

    def test_dataloader(self) -> DataLoader[Any]:
        """Real test records in order, for evaluation only.

        Raises:
            ValueError: If there are none.
        """
        self.real_test()
        return DataLoader(self.test_records, batch_size=1000, collate_fn=collate_records)  # type: ignore[arg-type]

    def real_test(self) -> tuple[Tensor, Tensor]:
        """Real test images ``[N, C, H, W]`` in [0, 1] and labels ``[N]``, for evaluation only.

        Raises:
            ValueError: If there are none.
        """
        self.setup()
        if self.test_records is None:
            raise ValueError(
                f"{self.name} has no test records to evaluate on; give it a test path, or remove TSTREvaluation from the callbacks."
            )
        return self.test_records.tensors()


def check_records(records: ImageRecords, num_classes: int, image_shape: ImageShape, names: tuple[str, ...], what: str) -> None:
    """Raises unless records are what was declared.

    Raises:
        ValueError: Says which set, what was found and what was declared.
    """
    images, labels = records.images, records.labels
    if images.dtype != torch.uint8 or images.dim() != 4 or tuple(images.shape[1:]) != tuple(image_shape):
        raise ValueError(
            f"the {what} images are {images.dtype} of shape {tuple(images.shape)}; declared is image_shape={image_shape}, as uint8 "
            "[N, C, H, W]."
        )
    if labels.shape != (len(images),):
        raise ValueError(f"there are {len(images)} {what} images and {tuple(labels.shape)} labels: one label an image is needed.")
    if len(labels) == 0:
        raise ValueError(f"there are no {what} records.")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(
            f"the {what} labels run from {int(labels.min())} to {int(labels.max())}; with {num_classes} declared classes they must "
            f"run from 0 to {num_classes - 1}."
        )
    counts = torch.bincount(labels, minlength=num_classes)
    if what == "training" and (counts == 0).any():
        empty = [names[i] if i < len(names) else str(i) for i in torch.nonzero(counts == 0).flatten().tolist()]
        raise ValueError(f"the declared classes {', '.join(empty)} have no {what} record. Declare only classes that have some.")


def uint8_images(images: Tensor, source: str) -> Tensor:
    """Images as uint8: bytes as they are, floats in [0, 1] times 255.

    Raises:
        ValueError: For NaN, values out of range or another type; names ``source``.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"{source} holds {images.dtype} images. Store them as uint8 (0 to 255) or as floats in [0, 1].")
    if not images.isfinite().all():
        bad = int((~images.flatten(1).isfinite().all(1)).sum())
        raise ValueError(f"{source}: {bad} images hold NaN or infinite pixels. Repair or remove them first.")
    if images.min() < 0 or images.max() > 1:
        raise ValueError(
            f"{source} holds float pixels outside [0, 1]. Divide by their public maximum (255 for bytes), not by one of the records."
        )
    return (images * 255).round().to(torch.uint8)
