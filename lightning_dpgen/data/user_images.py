"""A user's own images: a folder for each class, or an ``.npz`` file."""

from __future__ import annotations

import os
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lightning_dpgen._validate import fail
from lightning_dpgen.data.base import ImageRecords, ImageShape, PrivateDataModule, uint8_images

_MODES = {1: "L", 3: "RGB"}
_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".gif"}


class ImagesDataModule(PrivateDataModule):
    """The user's own labelled images.

    Args:
        path: A folder with one folder of images for each class, named like the class; or an ``.npz`` file with ``images``
            (``[N, H, W]``, ``[N, H, W, C]``; uint8, or floats in [0, 1]) and ``labels`` (``[N]``, whole numbers, or class names).
        classes: The class names in order, or a text file with one name a line. Label i is the i-th name.
        image_shape: ``(C, H, W)``, C 1 or 3. Images of another size or mode are refused, not converted.
        test_path: Real test images in the same form, for evaluation.
        batch_size: Expected lot size.
        num_workers: Loader processes.
        origin: Where ``batch_size`` comes from, for the certificate.

    Privacy:
        Classes and shape are declared by the user and published; they are not read from the records.

    Raises:
        ValueError: If what is found is not what was declared; names the first file or the array.
    """

    def __init__(
        self,
        path: str,
        classes: list[str | int] | str,
        image_shape: tuple[int, int, int],
        test_path: str | None = None,
        batch_size: int = 256,
        num_workers: int = 0,
        origin: str = "set by the user",
    ) -> None:
        names = _class_names(classes)
        if len(image_shape) != 3 or image_shape[0] not in _MODES or min(image_shape) < 1:
            raise fail("image_shape", image_shape, "(channels, height, width) with 1 or 3 channels")
        super().__init__(len(names), (image_shape[0], image_shape[1], image_shape[2]), names, batch_size, num_workers, origin)
        self.path = path
        self.test_path = test_path

    def load(self) -> tuple[ImageRecords, ImageRecords | None]:
        """Reads all images into memory."""
        train = self._read(Path(self.path), "path")
        return train, None if self.test_path is None else self._read(Path(self.test_path), "test_path")

    def _read(self, path: Path, argument: str) -> ImageRecords:
        if path.is_dir():
            return read_folder(path, self.class_names, self.image_shape)
        if path.suffix == ".npz" and path.exists():
            return read_npz(path, self.class_names, self.image_shape)
        advice = (
            "" if argument == "path" else "Without test images leave test_path out (null) and remove TSTREvaluation from the callbacks."
        )
        raise fail(argument, str(path), "a folder with one folder for each class, or an .npz file, that exists", advice)


def _class_names(classes: list[str | int] | str) -> tuple[str, ...]:
    if isinstance(classes, str):
        if not Path(classes).is_file():
            raise fail("classes", classes, "a list of class names or a text file with one name a line")
        classes = [line.strip() for line in Path(classes).read_text(encoding="utf-8").splitlines() if line.strip()]
    names = tuple(str(name) for name in classes)  # a folder that is called 0 is a number on the command line
    if not names or len(set(names)) < len(names):
        raise fail("classes", classes, "at least one class name, each different")
    return names


def read_folder(path: Path, names: tuple[str, ...], image_shape: ImageShape) -> ImageRecords:
    """Reads ``path/<class>/<image>``; images are turned by their EXIF orientation.

    Raises:
        ValueError: For a missing or undeclared class folder, or an image of another mode or size; names it.
    """
    folders = {entry.name for entry in path.iterdir() if entry.is_dir()}
    if folders != set(names):
        missing, extra = sorted(set(names) - folders), sorted(folders - set(names))
        raise ValueError(
            f"{path} must hold one folder for each declared class. Missing: {', '.join(missing) or 'none'}. Not declared: "
            f"{', '.join(extra) or 'none'}."
        )
    images: list[Tensor] = []
    labels: list[int] = []
    for label, name in enumerate(names):
        for file in sorted((path / name).iterdir()):
            if file.suffix.lower() in _SUFFIXES:
                images.append(_read_image(file, image_shape))
                labels.append(label)
    stacked = torch.stack(images) if images else torch.zeros((0, *image_shape), dtype=torch.uint8)
    return ImageRecords(stacked, torch.tensor(labels, dtype=torch.int64))


def _read_image(file: Path, image_shape: ImageShape) -> Tensor:
    channels, height, width = image_shape
    try:
        with Image.open(file) as opened:
            image = ImageOps.exif_transpose(opened)
            mode, transparent = opened.mode, "transparency" in opened.info
            if mode == "P" and not transparent and channels == 3:
                image, mode = image.convert("RGB"), "RGB"
            pixels = np.array(image)
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{file} cannot be read as an image: {error}") from error
    if mode != _MODES[channels] or transparent:
        raise ValueError(
            f"{file} has mode {mode}{' with transparency' if transparent else ''}; declared is image_shape={image_shape}, which is mode "
            f"{_MODES[channels]} (8 bits a channel). Convert it first, for example with Pillow's Image.convert({_MODES[channels]!r})."
        )
    if pixels.shape[:2] != (height, width):
        raise ValueError(
            f"{file} is {pixels.shape[0]} x {pixels.shape[1]} (height x width); declared is {height} x {width}. Resize all images "
            "to the declared size first."
        )
    return torch.from_numpy(pixels.reshape(height, width, channels)).permute(2, 0, 1)


def read_npz(path: str | os.PathLike[str], names: tuple[str, ...], image_shape: ImageShape) -> ImageRecords:
    """Reads ``images`` and ``labels`` from an ``.npz`` file, without unpickling anything.

    Raises:
        ValueError: If the file is damaged, an array is missing, holds objects, or has another shape or type.
    """
    arrays = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = {"images", "labels"} - set(file.files)
            if missing:
                raise ValueError(f"{path} has the arrays {file.files}; {' and '.join(sorted(missing))} missing.")
            for key, wanted in (("images", "uint8 or float"), ("labels", "integers or strings")):
                try:
                    arrays[key] = file[key]
                except ValueError as error:
                    raise ValueError(
                        f"{path}: the array {key!r} cannot be read safely ({error}). Save it as {wanted}, for example with "
                        "np.asarray(list_of_images, dtype=np.uint8); arrays of Python objects are refused: loading them may run code."
                    ) from error
    except (BadZipFile, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a readable .npz file: {error}") from error
    images = arrays["images"]
    channels, height, width = image_shape
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[1:] != (height, width, channels):
        raise ValueError(
            f"{path}: images have shape {arrays['images'].shape}; declared is image_shape={image_shape}, which is [N, {height}, {width}] "
            f"or [N, {height}, {width}, {channels}]."
        )
    tensor = uint8_images(torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2), f"{path}, array 'images'")
    return ImageRecords(tensor.contiguous(), _labels(arrays["labels"], names, path))


def _labels(labels: np.ndarray, names: tuple[str, ...], path: str | os.PathLike[str]) -> Tensor:
    if labels.dtype.kind in "US":
        index = {name: i for i, name in enumerate(names)}
        unknown = sorted({str(label) for label in labels.tolist()} - index.keys())
        if unknown:
            raise ValueError(f"{path}: the labels {', '.join(unknown[:5])} are not declared classes ({', '.join(names)}).")
        return torch.tensor([index[str(label)] for label in labels.tolist()], dtype=torch.int64)
    if labels.dtype.kind not in "iu":
        raise ValueError(f"{path}: labels are {labels.dtype}; save whole numbers from 0, or class names.")
    return torch.from_numpy(labels.astype(np.int64))
