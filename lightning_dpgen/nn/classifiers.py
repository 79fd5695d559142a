"""The six classifiers that the field evaluates synthetic data with, and the small ones of the quick protocols.

Shapes follow Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021), whose networks the private
set papers use: instance normalisation (``GroupNorm`` with one channel a group) in place of BatchNorm, so that none of them
mixes the images of a batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

ImageShape = tuple[int, int, int]


def _features(network: nn.Module, image_shape: ImageShape) -> int:
    with torch.no_grad():
        return network(torch.zeros(1, *image_shape)).flatten(1).shape[1]


def _first_padding(image_shape: ImageShape) -> int:
    """28 × 28 images are padded to 32 × 32 by the first convolution, as published."""
    return 3 if image_shape[1] == 28 else 1


class _Classifier(nn.Module):
    """Features, flattened, then a head."""

    memory_format = torch.contiguous_format
    """Of convolutions and images: ``channels_last`` puts a pixel's channels side by side, where that is faster on a CPU."""

    def __init__(self, features: nn.Module, head: Callable[[int], nn.Module], image_shape: ImageShape) -> None:
        super().__init__()
        self.features = features
        self.head = head(_features(features, image_shape))
        self.to(memory_format=self.memory_format)  # type: ignore[call-overload]

    def forward(self, images: Tensor) -> Tensor:
        """``[N, C, H, W]`` images in [0, 1] to ``[N, num_classes]`` logits."""
        return self.head(self.features(images.contiguous(memory_format=self.memory_format)).flatten(1))


class ConvNet(_Classifier):
    """Blocks of 3 × 3 convolution, instance norm, ReLU, average pooling; a linear head.

    Three blocks, as published, for images from 28 × 28; two from 16 × 16 and one from 8 × 8, so that at least 4 × 4 places are
    left to the head.

    Args:
        num_classes: Number of classes.
        image_shape: ``(C, H, W)``, at least 8 × 8.
        width: Channels of each convolution; 128 as published, 32 in the quick protocol.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape, width: int = 128) -> None:
        layers: list[nn.Module] = []
        channels, padding = image_shape[0], _first_padding(image_shape)
        for _ in range(3 if min(image_shape[1:]) >= 28 else 2 if min(image_shape[1:]) >= 16 else 1):
            layers += [
                nn.Conv2d(channels, width, 3, padding=padding),
                nn.GroupNorm(width, width),
                nn.ReLU(),
                nn.AvgPool2d(2),
            ]
            channels, padding = width, 1
        super().__init__(nn.Sequential(*layers), lambda n: nn.Linear(n, num_classes), image_shape)


class LeNet(_Classifier):
    """LeNet-5 with ReLU and max pooling."""

    memory_format = torch.channels_last

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        padding = 2 if image_shape[1] <= 28 else 0
        features = nn.Sequential(
            nn.Conv2d(image_shape[0], 6, 5, padding=padding),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 16, 5, padding=0 if image_shape[1] >= 20 else 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        super().__init__(
            features,
            lambda n: nn.Sequential(nn.Linear(n, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, num_classes)),
            image_shape,
        )


class AlexNet(_Classifier):
    """The small AlexNet of the condensation papers: five convolutions, one linear head."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        features = nn.Sequential(
            nn.Conv2d(image_shape[0], 128, 5, padding=4 if image_shape[1] == 28 else 2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(128, 192, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(192, 256, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(256, 192, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(192, 192, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        super().__init__(features, lambda n: nn.Linear(n, num_classes), image_shape)


class VGG11(_Classifier):
    """VGG-11 with instance norm; pooling stops when the feature map is one pixel."""

    _PLAN = (64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M")

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        layers: list[nn.Module] = []
        channels, padding = image_shape[0], _first_padding(image_shape)
        side = min(image_shape[1:]) + 2 * (padding - 1)
        for item in self._PLAN:
            if isinstance(item, int):
                layers += [nn.Conv2d(channels, item, 3, padding=padding), _instance_norm(item, side), nn.ReLU()]
                channels, padding = item, 1
            elif side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        super().__init__(nn.Sequential(*layers), lambda n: nn.Linear(n, num_classes), image_shape)


def _instance_norm(channels: int, side: int) -> nn.Module:
    # A one-pixel map normalised over itself would be zero.
    return nn.GroupNorm(channels, channels) if side > 1 else nn.Identity()


class _ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, side: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _instance_norm(out, side)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = _instance_norm(out, side)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride=stride, bias=False), _instance_norm(out, side))

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


class ResNet18(_Classifier):
    """ResNet-18 for small images (3 × 3 stem, no first pooling) with instance norm."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        layers: list[nn.Module] = [nn.Conv2d(image_shape[0], 64, 3, padding=1, bias=False), nn.GroupNorm(64, 64), nn.ReLU()]
        channels, side = 64, min(image_shape[1:])
        for out, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
            side = -(-side // stride)
            layers += [_ResidualBlock(channels, out, stride, side), _ResidualBlock(out, out, 1, side)]
            channels = out
        layers.append(nn.AdaptiveAvgPool2d(1))
        super().__init__(nn.Sequential(*layers), lambda n: nn.Linear(n, num_classes), image_shape)


class MLP(_Classifier):
    """Two hidden layers of 128 with ReLU."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(
            nn.Flatten(),
            lambda n: nn.Sequential(nn.Linear(n, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, num_classes)),
            image_shape,
        )


class LogisticRegression(_Classifier):
    """One linear layer on pixels."""

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        super().__init__(nn.Flatten(), lambda n: nn.Linear(n, num_classes), image_shape)


class CNN(_Classifier):
    """Three blocks of 3 × 3 convolution, ReLU, max pooling (32, 64, 128 channels), dropout, a linear head."""

    memory_format = torch.channels_last

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        layers: list[nn.Module] = []
        channels = image_shape[0]
        for out in (32, 64, 128):
            layers += [nn.Conv2d(channels, out, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
            channels = out
        layers.append(nn.Dropout(0.5))
        super().__init__(nn.Sequential(*layers), lambda n: nn.Linear(n, num_classes), image_shape)


class TanhCNN(_Classifier):
    """Two convolutions and two linear layers with tanh: 26,010 parameters on MNIST.

    Papernot, Thakurta, Song, Chien and Erlingsson, "Tempered Sigmoid Activations for Deep Learning with Differential Privacy"
    (AAAI 2021), table 1; smaller kernels below 16 × 16 pixels.
    """

    def __init__(self, num_classes: int, image_shape: ImageShape) -> None:
        small = min(image_shape[1:]) < 16
        features = nn.Sequential(
            nn.Conv2d(image_shape[0], 16, 4 if small else 8, stride=1 if small else 2, padding=1 if small else 2),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
            nn.Conv2d(16, 32, 3 if small else 4, stride=2),
            nn.Tanh(),
            nn.MaxPool2d(2, 1),
        )
        super().__init__(features, lambda n: nn.Sequential(nn.Linear(n, 32), nn.Tanh(), nn.Linear(32, num_classes)), image_shape)


CLASSIFIERS: dict[str, Callable[[int, ImageShape], nn.Module]] = {
    "ConvNet": ConvNet,
    "ConvNet32": lambda num_classes, image_shape: ConvNet(num_classes, image_shape, width=32),
    "LeNet": LeNet,
    "AlexNet": AlexNet,
    "VGG11": VGG11,
    "ResNet18": ResNet18,
    "MLP": MLP,
    "LogReg": LogisticRegression,
    "CNN": CNN,
    "TanhCNN": TanhCNN,
}
"""Classifiers by the names that protocols and tables use."""
