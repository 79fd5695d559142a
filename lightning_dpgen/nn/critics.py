"""Label-conditional critics: an image and a class to one number.

Critics are stacked in training: their layers are products of a weight with a matrix, so that ``vmap`` over K weights becomes batched
matrix products on every device; ``Conv2d`` would become a convolution in K groups, which no library runs well. Discriminators are
alone, and made of ordinary layers, whose per-record gradients every engine knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ImageShape = tuple[int, int, int]


class UnfoldedConv(nn.Module):
    """A strided 5 × 5 convolution as one matrix product.

    Args:
        inside: Channels in.
        outside: Channels out.
        spectral: Whether the weight is divided by its largest singular value, from four steps of power iteration that start at
            a fixed vector: no state that training would have to keep for each of K critics (Miyato et al., ICLR 2018).
    """

    def __init__(self, inside: int, outside: int, spectral: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outside, inside * 25) / math.sqrt(inside * 25))
        self.bias = nn.Parameter(torch.zeros(outside, 1))
        self.spectral = spectral

    def forward(self, images: Tensor) -> Tensor:
        """``[N, inside, H, W]`` to ``[N, outside, ⌈H / 2⌉, ⌈W / 2⌉]``."""
        count, _, height, width = images.shape
        places = F.unfold(images, 5, padding=2, stride=2).transpose(0, 1).flatten(1)
        weight = self.weight / largest_singular_value(self.weight) if self.spectral else self.weight
        outside = weight @ places + self.bias
        return outside.view(len(self.weight), count, -(-height // 2), -(-width // 2)).transpose(0, 1)


def largest_singular_value(weight: Tensor, steps: int = 4) -> Tensor:
    """The spectral norm of ``[A, B]``, to a few percent, differentiable in the weight alone."""
    with torch.no_grad():
        right = torch.ones_like(weight[0])
        for _ in range(steps):
            left = F.normalize(weight @ right, dim=0)
            right = F.normalize(weight.T @ left, dim=0)
    return left @ weight @ right


class _Critic(nn.Module):
    """Features, then a number for all classes and one for the image's own (a projection critic, Miyato and Koyama, ICLR 2018)."""

    def __init__(self, features: nn.Module, size: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Linear(size, 1)
        self.of_class = nn.Parameter(torch.randn(num_classes, size) / math.sqrt(size))

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """``[N, C, H, W]`` in [0, 1] and ``[N]`` to ``[N]``."""
        features = self.features(images - 0.5).flatten(1)
        chosen = F.one_hot(labels, len(self.of_class)).to(features.dtype) @ self.of_class
        return self.head(features)[:, 0] + (features * chosen).sum(1)


class MLPCritic(_Critic):
    """Pixels → 128 → 64 → 1: the cheap one, for a CPU.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        layers = [nn.Flatten(), nn.Linear(math.prod(image_shape), 128), nn.LeakyReLU(0.2), nn.Linear(128, 64), nn.LeakyReLU(0.2)]
        super().__init__(nn.Sequential(*layers), 64, num_classes)


class ConvCritic(_Critic):
    """Three strided 5 × 5 convolutions of width, 2 and 4 times the width, with spectral norm: GS-WGAN's at width 64.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        width: Channels of the first.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, width: int = 64) -> None:
        layers: list[nn.Module] = []
        for inside, outside in ((image_shape[0], width), (width, 2 * width), (2 * width, 4 * width)):
            layers += [UnfoldedConv(inside, outside, spectral=True), nn.LeakyReLU(0.2)]
        places = math.prod(-(-side // 8) for side in image_shape[1:])
        super().__init__(nn.Sequential(*layers), 4 * width * places, num_classes)


class _Discriminator(nn.Module):
    """A number for each class, of which the image's own counts: layers that every per-record engine knows, no parameter of its own."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """``[N, C, H, W]`` in [0, 1] and ``[N]`` to ``[N]``."""
        scores: Tensor = self.body(2 * images - 1)
        return scores.gather(-1, labels[..., None])[..., 0]

    def pairs(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """What :meth:`forward` says of each record's two images, ``one`` and ``other``."""
        return self(*one), self(*other)


class MLPDiscriminator(_Discriminator):
    """Pixels → 128 → a number for each class.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        width: Numbers between.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, width: int = 128) -> None:
        layers = [nn.Linear(math.prod(image_shape), width), nn.LeakyReLU(0.2), nn.Linear(width, num_classes)]
        super().__init__(nn.Sequential(nn.Flatten(-3), *layers))

    def pairs(self, one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """In one pass, ``[B, 2, …]``, in which a record's gradient needs no second look at the layers."""
        images, labels = (torch.stack(both, 1) for both in zip(one, other, strict=True))
        found = self(images, labels)
        return found[:, 0], found[:, 1]


class JoinedDiscriminator(MLPDiscriminator):
    """Pixels and class → 128 → 1: DP-CGAN's.

    The class's input is a third of all pixels' norm, √(C·H·W) / 3. As 1, it is lost among them: noise drowns its weights before they
    have grown, and every class gets the same images.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(1, (math.prod(image_shape) + num_classes, 1, 1))
        self.num_classes = num_classes
        self.of_class = math.sqrt(math.prod(image_shape)) / 3

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """``[N, C, H, W]`` in [0, 1] and ``[N]`` to ``[N]``."""
        which = self.of_class * F.one_hot(labels, self.num_classes).to(images.dtype)
        joined = torch.cat([(2 * images - 1).flatten(-3), which], -1)
        score: Tensor = self.body(joined[..., None, None])
        return score[..., 0]


class ConvDiscriminator(_Discriminator):
    """Two strided 4 × 4 convolutions and a linear layer, no normalisation.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``.
        width: Channels of the first convolution; the second has twice as many.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, width: int = 32) -> None:
        places = math.prod(side // 2 // 2 for side in image_shape[1:])
        layers = [
            nn.Conv2d(image_shape[0], width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 2 * width, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
            nn.Flatten(),
            nn.Linear(2 * width * places, num_classes),
        ]
        super().__init__(nn.Sequential(*layers))


DISCRIMINATORS: dict[str, Callable[[int, ImageShape], _Discriminator]] = {
    "mlp": MLPDiscriminator,
    "joined": JoinedDiscriminator,
    "conv": ConvDiscriminator,
}
"""By name, called with (number of classes, image shape)."""

CRITICS: dict[str, Callable[[int, ImageShape], nn.Module]] = {"mlp": MLPCritic, "dcgan": ConvCritic}
"""By name, called with (number of classes, image shape)."""
