"""MNIST, FashionMNIST and scikit-learn's digits as data modules."""

from __future__ import annotations

import os

import torch
from sklearn.datasets import load_digits
from torchvision import datasets

from lightning_dpgen.data.base import ImageRecords, PrivateDataModule
from lightning_dpgen.data.fetch import check_files

_DIGITS = tuple(str(digit) for digit in range(10))
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")


class _IdxDataModule(PrivateDataModule):
    """A data set of 28 × 28 images in torchvision's IDX files, digests checked before a record is used.

    Args:
        root: Data folder; files in ``root/<name>/raw``. ``make data`` puts them into ``data``.
        batch_size: Expected lot size.
        num_workers: Loader processes.
        origin: Where batch size and number of steps come from, for the certificate.
    """

    names: tuple[str, ...]

    def __init__(
        self, root: str | os.PathLike[str] = "data", batch_size: int = 256, num_workers: int = 0, origin: str = "set by the user"
    ) -> None:
        super().__init__(10, (1, 28, 28), self.names, batch_size, num_workers, origin)
        self.root = str(root)

    def load(self) -> tuple[ImageRecords, ImageRecords]:
        """Reads the four files under ``root``.

        Raises:
            DataFileError: If one is missing or is not the published one.
        """
        check_files(self.root, self.name)
        parts = [getattr(datasets, self.name)(self.root, train=train) for train in (True, False)]
        train, test = (ImageRecords(part.data[:, None], part.targets) for part in parts)
        return train, test


class MNISTDataModule(_IdxDataModule):
    """MNIST: 60,000 training and 10,000 test images of handwritten digits, ``[1, 28, 28]``; files in ``root/MNIST/raw``."""

    names = _DIGITS


class FashionMNISTDataModule(_IdxDataModule):
    """FashionMNIST: 60,000 training and 10,000 test images of clothes, ``[1, 28, 28]``; files in ``root/FashionMNIST/raw``."""

    names = _FASHION


class DigitsDataModule(PrivateDataModule):
    """scikit-learn's 1,797 real scans of handwritten digits, ``[1, 8, 8]``; no download.

    The first 1,437 (80 %) are for training, the rest for tests, by their public order in the file.

    Args:
        batch_size: Expected lot size.
        num_workers: Loader processes.
        origin: Where ``batch_size`` comes from, for the certificate.
    """

    def __init__(self, batch_size: int = 128, num_workers: int = 0, origin: str = "set by the user") -> None:
        super().__init__(10, (1, 8, 8), _DIGITS, batch_size, num_workers, origin)

    def load(self) -> tuple[ImageRecords, ImageRecords]:
        """Reads the scans; their 17 grey levels (0 to 16) become 0 to 255."""
        digits = load_digits()
        images = (torch.from_numpy(digits.images)[:, None] * (255 / 16)).round().to(torch.uint8)
        labels = torch.from_numpy(digits.target).long()
        split = len(images) * 4 // 5
        return ImageRecords(images[:split], labels[:split]), ImageRecords(images[split:], labels[split:])
