"""A grid of images as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torchvision.transforms.functional import to_pil_image
from torchvision.utils import make_grid

MARGIN = 80
"""Pixels to the right of the grid for a text beside each row."""


def save_grid(images: Tensor, path: Path, columns: int = 10, beside: Sequence[str] = ()) -> None:
    """Writes images as a grid, enlarged to at least 56 pixels a side so that people can see them.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        path: The PNG; its folder is made.
        columns: Images in a row.
        beside: A short text for each row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = max(1, -(-56 // min(images.shape[2:])))
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    picture = to_pil_image(make_grid(large, nrow=columns, padding=2, pad_value=0.5))
    if beside:
        grid, picture = picture, Image.new("RGB", (picture.width + MARGIN, picture.height), "white")
        picture.paste(grid)
        height = large.shape[2] + 2
        for row, text in enumerate(beside):
            ImageDraw.Draw(picture).text((grid.width + 8, (row + 0.5) * height), text, fill="black", anchor="lm")
    picture.save(path)


def first_of_each_class(labels: Tensor, per_class: int) -> Tensor:
    """Indices of the first ``per_class`` images of every class present, class by class."""
    return torch.cat([torch.nonzero(labels == label).flatten()[:per_class] for label in labels.unique()])
