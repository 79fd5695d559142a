"""Label-conditional generators: latent numbers and a class to an image in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

ImageShape = tuple[int, int, int]


def _joined(latent: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    return torch.cat([latent, F.one_hot(labels, num_classes).to(latent.dtype)], 1)


class SmallGenerator(nn.Module):
    """A linear layer and three convolutions over two enlargements, BatchNorm between: for a CPU.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the last enlargement.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 32) -> None:
        super().__init__()
        self.num_classes, self.image_shape = num_classes, image_shape
        self._start = (2 * width, -(-image_shape[1] // 4), -(-image_shape[2] // 4))
        places = self._start[0] * self._start[1] * self._start[2]
        self.start = nn.Sequential(nn.Linear(latent_dim + num_classes, places), nn.BatchNorm1d(places), nn.ReLU())
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(width, width // 2, 3, padding=1),
            nn.BatchNorm2d(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, image_shape[0], 3, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """``[N, latent_dim]`` and ``[N]`` to ``[N, C, H, W]``."""
        start = self.start(_joined(latent, labels, self.num_classes)).view(-1, *self._start)
        image: Tensor = self.body(start)[..., : self.image_shape[1], : self.image_shape[2]]
        return image


class DCGANGenerator(nn.Module):
    """Three transposed convolutions with BatchNorm (Radford, Metz and Chintala, ICLR 2016), as in GS-WGAN's code.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the last layer.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 64) -> None:
        super().__init__()
        self.num_classes, self.image_shape = num_classes, image_shape
        self._start = (4 * width, -(-image_shape[1] // 8), -(-image_shape[2] // 8))
        places = self._start[0] * self._start[1] * self._start[2]
        self.start = nn.Sequential(nn.Linear(latent_dim + num_classes, places), nn.ReLU())
        self.body = nn.Sequential(
            nn.ConvTranspose2d(4 * width, 2 * width, 4, stride=2, padding=1),
            nn.BatchNorm2d(2 * width),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * width, width, 4, stride=2, padding=1),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.ConvTranspose2d(width, image_shape[0], 4, stride=2, padding=1),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """``[N, latent_dim]`` and ``[N]`` to ``[N, C, H, W]``, the middle of what the layers make."""
        start = self.start(_joined(latent, labels, self.num_classes)).view(-1, *self._start)
        return _middle(self.body(start), self.image_shape)


class _PixelNorm(nn.Module):
    """Each place's channels divided by their root mean square (Karras et al., ICLR 2018)."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(1, keepdim=True) + 1e-8)


class _UpBlock(nn.Module):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__()
        self.main = nn.Sequential(
            _PixelNorm(),
            nn.ReLU(),
            nn.Upsample(scale_factor=2),
            spectral_norm(nn.Conv2d(inside, outside, 3, padding=1)),
            _PixelNorm(),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(outside, outside, 3, padding=1)),
        )
        self.side = nn.Sequential(nn.Upsample(scale_factor=2), spectral_norm(nn.Conv2d(inside, outside, 1)))

    def forward(self, values: Tensor) -> Tensor:
        total: Tensor = self.main(values) + self.side(values)
        return total


class ResNetGenerator(nn.Module):
    """Three residual up-blocks with spectral norm and pixel norm, the generator of GS-WGAN's paper.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the last layer.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 64) -> None:
        super().__init__()
        self.num_classes, self.image_shape = num_classes, image_shape
        self._start = (4 * width, -(-image_shape[1] // 8), -(-image_shape[2] // 8))
        places = self._start[0] * self._start[1] * self._start[2]
        self.start = spectral_norm(nn.Linear(latent_dim + num_classes, places))
        self.body = nn.Sequential(
            _UpBlock(4 * width, 4 * width),
            _UpBlock(4 * width, 2 * width),
            _UpBlock(2 * width, width),
            _PixelNorm(),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(width, image_shape[0], 3, padding=1)),
            nn.Sigmoid(),
        )

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """``[N, latent_dim]`` and ``[N]`` to ``[N, C, H, W]``, the middle of what the layers make."""
        start = self.start(_joined(latent, labels, self.num_classes)).view(-1, *self._start)
        return _middle(self.body(start), self.image_shape)


def _middle(images: Tensor, image_shape: ImageShape) -> Tensor:
    top, left = ((images.shape[axis] - image_shape[axis - 1]) // 2 for axis in (2, 3))
    return images[..., top : top + image_shape[1], left : left + image_shape[2]]


GENERATORS: dict[str, Callable[[int, ImageShape, int], nn.Module]] = {
    "small": SmallGenerator,
    "dcgan": DCGANGenerator,
    "resnet": ResNetGenerator,
}
"""By name, called with (number of classes, image shape, latent numbers)."""
