"""Differentiable augmentation: one draw that moves every image of a step alike (Zhao and Bilen, ICML 2021)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Augmentation:
    """How far images are moved; each draw is uniform up to these.

    Args:
        shift: Part of the image's side.
        scale: 0.2 means between 1 / 1.2 and 1.2 times as large.
        degrees: Of rotation, to either side.
        flip: Whether to flip left and right, in half of the draws; wrong for digits.
    """

    shift: float = 0.125
    scale: float = 0.2
    degrees: float = 15.0
    flip: bool = False


def draw_augmentation(settings: Augmentation) -> Tensor:
    """One random affine map ``[2, 3]``, by the public stream."""
    unit = 2 * torch.rand(5) - 1
    angle, zoom = float(unit[0]) * math.radians(settings.degrees), (1 + settings.scale) ** float(unit[1])
    cosine, sine = math.cos(angle) / zoom, math.sin(angle) / zoom
    mirror = -1.0 if settings.flip and unit[4] < 0 else 1.0
    right, down = (2 * settings.shift * float(value) for value in unit[2:4])  # the image's sides are from -1 to 1
    return torch.tensor([[mirror * cosine, -sine, right], [mirror * sine, cosine, down]])


def augment(images: Tensor, draw: Tensor) -> Tensor:
    """Moves every image ``[N, C, H, W]`` by the same affine map, black beyond the border; differentiable, image by image."""
    grid = F.affine_grid(draw.to(images).expand(len(images), 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)
