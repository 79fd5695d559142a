"""Label-conditional generators: latent numbers and a class to an image in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

ImageShape = tuple[int, int, int]


class _Generator(nn.Module):
    """Latent numbers and class, a linear start at a few places, a body that enlarges, the middle of what it makes."""

    start: nn.Module
    body: nn.Module

    def __init__(self, num_classes: int, image_shape: ImageShape, channels: int, enlargement: int) -> None:
        super().__init__()
        self.num_classes, self.image_shape = num_classes, image_shape
        self._start = (channels, -(-image_shape[1] // enlargement), -(-image_shape[2] // enlargement))
        self.places = math.prod(self._start)

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """``[N, latent_dim]`` and ``[N]`` to ``[N, C, H, W]``."""
        joined = torch.cat([latent, F.one_hot(labels, self.num_classes).to(latent.dtype)], 1)
        images: Tensor = self.body(self.start(joined).view(-1, *self._start))
        top, left = ((images.shape[axis] - self.image_shape[axis - 1]) // 2 for axis in (2, 3))
        return images[..., top : top + self.image_shape[1], left : left + self.image_shape[2]]


class _PixelNorm(nn.Module):
    """Each place's channels divided by their root mean square (Karras et al., ICLR 2018)."""

    def forward(self, values: Tensor) -> Tensor:
        return values * torch.rsqrt(values.square().mean(1, keepdim=True) + 1e-8)


class SmallGenerator(_Generator):
    """A linear layer and three convolutions over two enlargements, normalised between: for a CPU.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the last enlargement.
        batch_norm: Whether by BatchNorm; else by pixel norm, with which no buffers are kept and no image depends on others.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 32, batch_norm: bool = True) -> None:
        super().__init__(num_classes, image_shape, 2 * width, enlargement=4)

        def norm(channels: int, flat: bool = False) -> nn.Module:
            return (nn.BatchNorm1d(channels) if flat else nn.BatchNorm2d(channels)) if batch_norm else _PixelNorm()

        self.start = nn.Sequential(nn.Linear(latent_dim + num_classes, self.places), norm(self.places, flat=True), nn.ReLU())
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2),
            nn.Conv2d(2 * width, width, 3, padding=1),
            norm(width),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(width, width // 2, 3, padding=1),
            norm(width // 2),
            nn.ReLU(),
            nn.Conv2d(width // 2, image_shape[0], 3, padding=1),
            nn.Sigmoid(),
        )


class TinyGenerator(_Generator):
    """A hidden layer and two 5 × 5 convolutions over two enlargements: DP-MERF's, with an eighth of :class:`SmallGenerator`'s products.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the first enlargement.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 16) -> None:
        super().__init__(num_classes, image_shape, width, enlargement=4)
        self.start = nn.Sequential(
            nn.Linear(latent_dim + num_classes, 200),
            nn.BatchNorm1d(200),
            nn.ReLU(),
            nn.Linear(200, self.places),
            nn.BatchNorm1d(self.places),
            nn.ReLU(),
        )
        self.body = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(width, width // 2, 5, padding=2),
            nn.ReLU(),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            nn.Conv2d(width // 2, image_shape[0], 5, padding=2),
            nn.Sigmoid(),
        )


class MLPGenerator(nn.Module):
    """Latent numbers and class → ``width`` → pixels: DP-CGAN's.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Numbers between.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 128) -> None:
        super().__init__()
        self.num_classes = num_classes
        layers = [nn.Linear(latent_dim + num_classes, width), nn.ReLU(), nn.Linear(width, math.prod(image_shape)), nn.Sigmoid()]
        self.body = nn.Sequential(*layers, nn.Unflatten(1, image_shape))

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """``[N, latent_dim]`` and ``[N]`` to ``[N, C, H, W]``."""
        images: Tensor = self.body(torch.cat([latent, F.one_hot(labels, self.num_classes).to(latent.dtype)], 1))
        return images


class DCGANGenerator(_Generator):
    """Three transposed convolutions with BatchNorm (Radford, Metz and Chintala, ICLR 2016).

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the last layer.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 64) -> None:
        super().__init__(num_classes, image_shape, 4 * width, enlargement=8)
        self.start = nn.Sequential(nn.Linear(latent_dim + num_classes, self.places), nn.ReLU())
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


class ResNetGenerator(_Generator):
    """Three residual up-blocks with spectral norm and pixel norm, the generator of GS-WGAN's paper.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        latent_dim: Latent numbers.
        width: Channels before the last layer.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, latent_dim: int, width: int = 64) -> None:
        super().__init__(num_classes, image_shape, 4 * width, enlargement=8)
        self.start = spectral_norm(nn.Linear(latent_dim + num_classes, self.places))
        self.body = nn.Sequential(
            _UpBlock(4 * width, 4 * width),
            _UpBlock(4 * width, 2 * width),
            _UpBlock(2 * width, width),
            _PixelNorm(),
            nn.ReLU(),
            spectral_norm(nn.Conv2d(width, image_shape[0], 3, padding=1)),
            nn.Sigmoid(),
        )


GENERATORS: dict[str, Callable[[int, ImageShape, int], nn.Module]] = {
    "small": SmallGenerator,
    "plain": partial(SmallGenerator, batch_norm=False),
    "tiny": TinyGenerator,
    "mlp": MLPGenerator,
    "dcgan": DCGANGenerator,
    "resnet": ResNetGenerator,
}
"""By name, called with (number of classes, image shape, latent numbers)."""
