"""What a private set is matched by: the signal that is released of a lot, and how far the images are from it.

Gradients: Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021), as made private by Chen, Kerkouche and
Fritz (NeurIPS 2022). Features: Zhao and Bilen, "Dataset Condensation with Distribution Matching" (WACV 2023), as made private by
Zheng and Li, "Differentially Private Dataset Condensation" (2023); what is released here is centred on the synthetic set.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_dpgen._validate import fail, one_of, positive, positive_int
from lightning_dpgen.privacy.clipping import ClippedSum, cell_sums

GRADIENT_SUM = "gradient_sum"


@dataclass(frozen=True)
class MatchingSchedule:
    """The loops and rates of matching.

    All of them are post-processing but for ``signal``, ``width``, ``layers``, ``clip_norm`` and ``augment``.

    Args:
        signal: What is released of a lot: ``"gradients"`` or ``"features"``.
        width: Channels of the matching network.
        clip_norm: C of a record's whole gradient; of features, the radius R of a record's difference from its class's mean.
        layers: Whose gradient is released and matched: ``"all"`` (published), or ``"head"``: the last layer alone, for which
            a record's row needs no backward pass and the noise has fewer numbers to fall on.
        distance: ``"rows"``: 1 − cosine for each output row, summed (published). ``"whole"``: 1 − cosine of the whole
            gradient, in which noise weighs as little as it does in the sum.
        rounds: Times that one network is matched before a fresh one is drawn.
        matches: Releases in a round.
        network_epochs: Steps of SGD on the synthetic set between rounds.
        network_lr: Their learning rate.
        image_steps: Image steps for each release.
        replay: Whether all image steps but the first go back to a random earlier release and its network: what was paid for
            once is matched many times.
        image_rule: ``"sgd"`` (published): plain SGD on unbounded images. ``"pixels"``: the gradient is scaled to a root mean
            square of 1, so that ``image_lr`` is in pixel values whatever the data; the rate falls to 2 % as a half cosine over
            the planned steps; after each step the images are projected to [0, 1], where they will be published.
        image_lr: Learning rate of the images.
        image_momentum: Their momentum.
        averaging: Decay of the average over image steps that is published; 0 publishes the last images.
        augment: Whether records and synthetic images are moved alike before the network, by one public draw a release (DSA).
        prior: ``"none"``: the images themselves are learned. ``"generator"``: a DCGAN generator of fixed latent numbers is, by
            Adam, and the images are what it makes of them.
        prior_lr: Adam's rate then.
        origin: Where these values come from, for the certificate.
    """

    signal: str
    width: int
    clip_norm: float
    layers: str
    distance: str
    rounds: int
    matches: int
    network_epochs: int
    network_lr: float
    image_steps: int
    replay: bool
    image_rule: str
    image_lr: float
    image_momentum: float
    averaging: float
    origin: str
    augment: bool = False
    prior: str = "none"
    prior_lr: float = 0.01

    def __post_init__(self) -> None:
        for name in ("width", "rounds", "matches", "image_steps"):
            positive_int(name, getattr(self, name))
        for name in ("clip_norm", "network_lr", "image_lr", "prior_lr"):
            positive(name, getattr(self, name))
        one_of("signal", self.signal, ("gradients", "features"))
        one_of("layers", self.layers, ("all", "head"))
        one_of("distance", self.distance, ("rows", "whole"))
        one_of("image_rule", self.image_rule, ("sgd", "pixels"))
        one_of("prior", self.prior, ("none", "generator"))
        for name in ("image_momentum", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise fail(name, getattr(self, name), "at least 0 and below 1")


PRESETS = ("cpu", "published", "published-prior")
_PUBLISHED_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 50: (50, 10)}


def schedule(matching: str, preset: str, images_per_class: int) -> MatchingSchedule:
    """The named schedule.

    Args:
        matching: ``"gradients"`` or ``"features"``.
        preset: ``"cpu"``, or for gradients ``"published"``, the paper's loops (1,000 iterations of rounds × matches releases at an
            expected lot of 256: 10,000, 100,000 and 200,000 trainer steps for 1, 10 and 20 images a class), or
            ``"published-prior"``, those of its generator prior (20,000 trainer steps), with this package's DCGAN in place of its own.
        images_per_class: Images a class; the published loops exist for 1, 10, 20 and 50.

    Raises:
        ValueError: For an unknown name, or a number of images that the paper has no loops for.
    """
    one_of("preset", preset, PRESETS if one_of("matching", matching, tuple(_CPU)) == "gradients" else ("cpu",))
    if preset == "cpu" and matching == "features" and images_per_class > 10:  # an image step costs as many times more
        return replace(_CPU[matching], image_steps=15, image_lr=0.01)
    if preset == "cpu":
        return _CPU[matching]
    prior = preset == "published-prior"
    if images_per_class not in _PUBLISHED_LOOPS and not prior:
        raise fail("images_per_class", images_per_class, f"one of {tuple(_PUBLISHED_LOOPS)} in the published loops", "Use preset='cpu'.")
    rounds, epochs = (2, 10) if prior else _PUBLISHED_LOOPS[images_per_class]
    return MatchingSchedule(
        signal="gradients",
        width=128,
        clip_norm=0.1,
        layers="all",
        distance="rows",
        rounds=rounds,
        matches=10,
        network_epochs=epochs,
        network_lr=0.01,
        image_steps=1,
        replay=False,
        image_rule="sgd",
        image_lr=0.1,
        image_momentum=0.5,
        averaging=0.0,
        prior="generator" if prior else "none",
        origin="Chen, Kerkouche and Fritz, NeurIPS 2022; chosen there by results on MNIST and FashionMNIST, outside the guarantee",
    )


_GRADIENTS = MatchingSchedule(
    signal="gradients",
    width=32,
    clip_norm=0.1,
    layers="head",
    distance="whole",
    rounds=1,
    matches=1,
    network_epochs=1,
    network_lr=0.01,
    image_steps=20,
    replay=True,
    image_rule="pixels",
    image_lr=0.02,
    image_momentum=0.5,
    averaging=0.0,
    origin="tuned, with lots of 2,048 and 120 steps, on MNIST's training records (50,000 to train, 10,000 held out); not covered by "
    "the guarantee for MNIST",
)
_CPU = {
    "gradients": _GRADIENTS,
    "features": replace(
        _GRADIENTS,
        signal="features",
        width=16,
        clip_norm=0.4,
        image_steps=40,
        origin="tuned, with lots of 8,192 and 100 steps, on MNIST's and FashionMNIST's training records (50,000 to train, 10,000 held "
        "out); not covered by the guarantee for these two",
    ),
}
"""Schedules for two CPU cores: few releases from large lots, each with a fresh network and several image steps."""


def gradient_distance(mine: dict[str, Tensor], target: dict[str, Tensor], kind: str) -> Tensor:
    """How far two gradients point apart.

    Args:
        mine: Gradient by parameter name.
        target: Gradient by parameter name.
        kind: ``"rows"``: Σ over layers and output rows of 1 − cos, 1-D parameters ignored (Zhao et al., equation 10).
            ``"whole"``: 1 − cos of the concatenated gradients.

    Returns:
        A scalar, at least 0.
    """
    if kind == "whole":
        one, other = (torch.cat([g[name].flatten() for name in mine]) for g in (mine, target))
        return 1 - F.cosine_similarity(one, other, dim=0)
    pairs = [(mine[name].flatten(1), target[name].flatten(1)) for name in mine if mine[name].dim() > 1]
    return torch.stack([(1 - F.cosine_similarity(one, other, dim=1)).sum() for one, other in pairs]).sum()


def features_of(network: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """What a random network makes of images, ``[B, D]``, with a norm of about 1.

    Args:
        network: One with instance norm and ReLU before its last pooling, whose outputs have a mean square of about 0.35 whatever
            the images: a constant of the architecture, not of the records.
        images: ``[B, C, H, W]``.
    """
    features = network(images).flatten(1)
    return features / math.sqrt(0.35 * features.shape[1])


def class_features(network: Callable[[Tensor], Tensor], images: Tensor, per_class: int) -> Tensor:
    """The mean features ``[classes, D]`` of a set with ``per_class`` images of each class, in the order of classes."""
    features = features_of(network, images)
    return features.view(-1, per_class, features.shape[1]).mean(1)


@torch.no_grad()
def centred_feature_sums(
    network: Callable[[Tensor], Tensor], records: tuple[Tensor, Tensor], centers: Tensor, radius: float, chunk_size: int
) -> ClippedSum:
    """By class, the sum of the records' clipped differences from a centre, and a count.

    Args:
        network: As in :func:`features_of`; public, and of one image at a time.
        records: Images ``[B, C, H, W]`` and labels ``[B]``; ``B`` may be 0.
        centers: ``[classes, D]``, public.
        radius: R.
        chunk_size: Images in one forward pass; the last is filled up, so that who else is in a lot does not change rounding.

    Privacy:
        :func:`.clipping.cell_sums` with one row a record: sensitivity √1.09 R.
    """
    images, labels = records
    total = cell_sums(centers[:0], labels[:0], len(centers), radius)
    for part, label in zip(images.split(chunk_size), labels.split(chunk_size), strict=True):
        if len(part):
            filled = torch.cat([part, part.new_zeros((chunk_size - len(part), *part.shape[1:]))])
            rows = features_of(network, filled)[: len(part)] - centers[label]
            total = total + cell_sums(rows, label, len(centers), radius)
    return total
