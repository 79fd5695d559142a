"""Private records as data modules."""

from lightning_dpgen.data.base import ImageRecords, PrivateDataModule
from lightning_dpgen.data.fetch import DataFileError
from lightning_dpgen.data.known import DigitsDataModule, FashionMNISTDataModule, MNISTDataModule
from lightning_dpgen.data.user_images import ImagesDataModule

__all__ = [
    "DataFileError",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImageRecords",
    "ImagesDataModule",
    "MNISTDataModule",
    "PrivateDataModule",
]
