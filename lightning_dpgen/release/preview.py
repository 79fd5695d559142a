"""A grid of images as a PNG."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision.utils import make_grid, save_image


def save_grid(images: Tensor, path: Path, columns: int = 10) -> None:
    """Writes images as a grid, enlarged to at least 56 pixels a side so that people can see them.

    Args:
        images: ``[N, C, H, W]`` in [0, 1].
        path: The PNG; its folder is made.
        columns: Images in a row.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    factor = max(1, -(-56 // min(images.shape[2:])))
    large = images.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    save_image(make_grid(large, nrow=columns, padding=2, pad_value=0.5), path)


def first_of_each_class(labels: Tensor, per_class: int) -> Tensor:
    """Indices of the first ``per_class`` images of every class present, class by class."""
    return torch.cat([torch.nonzero(labels == label).flatten()[:per_class] for label in labels.unique()])
