"""A class-conditional mixture of probabilistic PCA from a few statistics, each released once.

The model is that of Tipping and Bishop, "Mixtures of Probabilistic Principal Component Analysers" (Neural Computation 1999),
fitted by k-means in a released basis: ask once, and everything after is free.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_dpgen._validate import fail, positive_int
from lightning_dpgen.generators.full_pass import FullPassGenerator
from lightning_dpgen.privacy.clipping import (
    CELL_MOMENTS_REPLACED,
    CELL_SUMS_REPLACED,
    ClippedSum,
    cell_moments,
    cell_sums,
    cell_sums_norm,
    moment_matrices,
    records_in_cells,
)
from lightning_dpgen.privacy.plan import FullPass, PrivacyPlan, Release

log = logging.getLogger(__name__)

CLASS_SUMS, POOLED_MOMENT, CLASS_MOMENTS = "class_sums", "pooled_moment", "class_moments"
CLUSTER_SUMS, CLUSTER_MOMENTS = "cluster_sums", "cluster_moments"
ITERATIONS = 3
MAX_PIXELS = 4096
"""Largest C·H·W: the second moment has half its square in numbers, and a basis costs its cube."""


PUBLIC = ("means", "basis", "centers", "weights", "factors")


@dataclass(frozen=True)
class MixtureRules:
    """What the mixture's size and its use of the budget follow from; functions of public constants only.

    Args:
        shares: Part of the budget of each release, in units of 1 / (noise multiplier)², which add up for Gaussians.
        radii: Clip radii of images, of images around their class mean, and of images around their cluster's centre, each in
            units of √(C·H·W).
        center_variance: Expected variance of a coordinate between the cluster centres of two iterations, in units of
            (C·H·W) / 784: what a noisy centre is shrunk by.
        base: Records that a class's covariance counts as in each of its clusters' covariances.
        cut: Eigenvalues of a cluster's covariance below this many of their noise's are set to 0.
        origin: Where these values come from, for the certificate.
    """

    shares: tuple[tuple[str, float], ...]
    radii: tuple[float, float, float]
    center_variance: float
    base: float
    cut: float
    origin: str


RULES = MixtureRules(
    shares=((CLASS_SUMS, 0.043), (POOLED_MOMENT, 0.17), (CLASS_MOMENTS, 0.043), (CLUSTER_SUMS, 0.513), (CLUSTER_MOMENTS, 0.231)),
    radii=(0.5, 2 / 7, 3 / 14),
    center_variance=0.15,
    base=300.0,
    cut=0.6,
    origin="the package's rules; their constants were chosen on MNIST's and FashionMNIST's training records (50,000 to train, 10,000 held "
    "out), and are not covered by the guarantee for these two",
)


@dataclass(frozen=True)
class MixtureSize:
    """How large a mixture the noise allows.

    Args:
        clusters: K, clusters a class.
        dimensions: d, numbers that describe an image.
    """

    clusters: int
    dimensions: int


def mixture_size(records: int, num_classes: int, pixels: int, noise_multiplier: float) -> MixtureSize:
    """K and d for the signal that there is: ρ = N / (classes · z), records a class over the noise multiplier of the cluster sums.

    Args:
        records: N.
        num_classes: Number of classes.
        pixels: C·H·W.
        noise_multiplier: z of the cluster sums; 0 counts as 10⁻³.

    Returns:
        K = 0.24 ρ^0.6, between 1 and 40; d = 1.5 ρ^0.48, between 2 and 120.
    """
    signal = records / (num_classes * max(noise_multiplier, 1e-3))
    clusters = min(40, max(1, round(0.24 * signal**0.6)))
    dimensions = min(120, pixels, max(2, round(1.5 * signal**0.48)))
    return MixtureSize(clusters, dimensions)


def clip_radii(pixels: int, rules: MixtureRules) -> tuple[float, ...]:
    """R₀, R₁ and R₂ for images of so many numbers."""
    return tuple(radius * math.sqrt(pixels) for radius in rules.radii)


def mixture_plan(records: int, pixels: int, iterations: int = ITERATIONS, rules: MixtureRules = RULES) -> PrivacyPlan:
    """The releases of a mixture; :class:`MixturePPCA` says what they are.

    Args:
        records: N.
        pixels: C·H·W.
        iterations: Of k-means.
        rules: Shares and radii.

    Raises:
        ValueError: If images are too large.
    """
    _check_pixels(pixels)
    images, residuals, remainders = clip_radii(pixels, rules)
    counts = {CLUSTER_SUMS: iterations}
    kinds = {
        CLASS_SUMS: (cell_sums_norm(images), CELL_SUMS_REPLACED),
        POOLED_MOMENT: (residuals**2, CELL_MOMENTS_REPLACED),
        CLASS_MOMENTS: (residuals**2, CELL_MOMENTS_REPLACED),
        CLUSTER_SUMS: (cell_sums_norm(residuals), CELL_SUMS_REPLACED),
        CLUSTER_MOMENTS: (remainders**2, CELL_MOMENTS_REPLACED),
    }
    releases = []
    for name, share in rules.shares:
        clip_norm, replaced = kinds[name]
        count = counts.get(name, 1)
        releases.append(Release(name, clip_norm, count, math.sqrt(count / share), replace_one_factor=replaced))
    return PrivacyPlan(FullPass(records), tuple(releases))


def _check_pixels(pixels: int) -> None:
    if pixels > MAX_PIXELS:
        raise ValueError(
            f"images of {pixels} numbers (channels x height x width): a mixture takes at most {MAX_PIXELS}, since it releases a "
            "second moment of half their square. Make the images smaller, for example 3 x 32 x 32, or use PrivateSetGeneration or GSWGAN."
        )


class MixturePPCA(FullPassGenerator):
    """A mixture of Gaussians for each class, in a basis of principal components: fitted in seconds, sampled without end.

    One epoch is one pass over all records, in chunks of the loader's ``batch_size``, and one release. The strategy runs as many
    epochs as there are releases. The passes:

    1. sums and counts of the classes: their means;
    2. the second moment of all images around their class's mean: its first d eigenvectors are the basis;
    3. the same for each class, in the basis: where k-means starts;
    4. ``iterations`` times, sums and counts of the clusters: their centres and weights;
    5. second moments of the clusters around their centres: their covariances.

    Args:
        clusters: K, clusters a class; by :func:`mixture_size` if not given.
        dimensions: d; likewise.
        iterations: Of k-means.
        num_classes: Number of classes; the data module's if not given. With 1 the mixture is unconditional.
        image_shape: ``(C, H, W)``, at most 4,096 numbers; the data module's if not given.

    Privacy:
        Relation: zero-out (replace-one beside it). Sampling: full passes, each record once in each. Released, once each: (1)
        every record adds (x clipped to R₀, 0.3 R₀) to its class, sensitivity √1.09 R₀; (2) zzᵀ of z = x − its class's released
        mean, clipped to R₁, sensitivity R₁²; (3) the same in the released basis, added to its class, R₁²; (4) ``iterations``
        times, (z in the basis, 0.3 R₁) added to the nearest of the class's released centres, √1.09 R₁; (5) rrᵀ of the
        remainder r around the released centre, clipped to R₂, added to its cluster, R₂². Noise N(0, (zC)²) on every number, z by
        the release's share of the budget. Radii are multiples of √(C·H·W); K and d follow from N, the number of classes and the
        noise. Labels place records, so a record's label is as private as its image. All else is post-processing.

    Raises:
        ValueError: For arguments out of range, or larger images.
    """

    generator_seed: Tensor
    means: Tensor
    basis: Tensor
    centers: Tensor
    weights: Tensor
    factors: Tensor
    class_counts: Tensor

    def __init__(
        self,
        clusters: int | None = None,
        dimensions: int | None = None,
        iterations: int = ITERATIONS,
        num_classes: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(num_classes, image_shape)
        self.save_hyperparameters()
        self.clusters = None if clusters is None else positive_int("clusters", clusters)
        self.dimensions = None if dimensions is None else positive_int("dimensions", dimensions)
        self.iterations = positive_int("iterations", iterations)
        self.rules = RULES
        if self.is_built:
            self.build()

    def build(self) -> None:
        """Creates an empty mixture."""
        pixels = math.prod(self.image_shape)
        if self.dimensions is not None and self.dimensions > pixels:
            raise fail("dimensions", self.dimensions, f"at most the {pixels} numbers of an image")
        _check_pixels(pixels)
        super().build()
        self.register_buffer("generator_seed", torch.randint(2**62, ()))
        for name in (*PUBLIC, "class_counts"):
            self.register_buffer(name, torch.zeros(0))

    def configure_privacy(self, records: int, steps: int, batch_size: int) -> PrivacyPlan:
        """Full passes, whatever the number of steps."""
        return mixture_plan(records, math.prod(self.image_shape), self.iterations, self.rules)

    def on_train_start(self) -> None:
        """Settles K and d, now that the noise is known, and says them."""
        super().on_train_start()
        if self.trainer.global_step == 0:
            plan = self.mechanism.plan
            noise = self.mechanism.noise_multiplier * plan.release(CLUSTER_SUMS).relative_noise
            size = mixture_size(plan.sampling.records, self.num_classes, math.prod(self.image_shape), noise)
            self.size = MixtureSize(self.clusters or size.clusters, self.dimensions or size.dimensions)
            log.info("MixturePPCA: %d clusters a class in %d dimensions.", self.size.clusters, self.size.dimensions)

    @property
    def is_fitted(self) -> bool:
        """Whether every statistic was released."""
        return self.factors.numel() > 0

    # One pass: a statistic -------------------------------------------------------------------------------------------

    def _radii(self) -> tuple[float, ...]:
        return clip_radii(math.prod(self.image_shape), self.rules)

    def statistic(self, name: str, images: Tensor, labels: Tensor) -> ClippedSum:
        """What the records of one chunk add to a release."""
        whole, residual, remainder = self._radii()
        if name == CLASS_SUMS:
            return cell_sums(images, labels, self.num_classes, whole)
        around = images - self.means.double()[labels]
        if name == POOLED_MOMENT:
            return cell_moments(around, torch.zeros_like(labels), 1, residual)
        points = around @ self.basis.double().T
        if name == CLASS_MOMENTS:
            return cell_moments(points, labels, self.num_classes, residual)
        centers = self.centers.double()
        cells = self._nearest(points, labels, centers)
        if name == CLUSTER_SUMS:
            return cell_sums(points, cells, self.num_classes * self.size.clusters, residual)
        return cell_moments(points - centers.flatten(0, 1)[cells], cells, self.num_classes * self.size.clusters, remainder)

    def _nearest(self, points: Tensor, labels: Tensor, centers: Tensor) -> Tensor:
        """The cell ``[B]`` of each point: its class's nearest center."""
        products = (points @ centers.flatten(0, 1).T).view(len(points), *centers.shape[:2])
        of_class = products[torch.arange(len(points), device=points.device), labels]
        far = centers.square().sum(2)[labels] - 2 * of_class
        return labels * self.size.clusters + far.argmin(1)

    # What is made of released statistics: public ------------------------------------------------------------------------

    def learn(self, name: str, released: dict[str, Tensor]) -> None:
        """Takes a released statistic, with numbers in float64, into the model."""
        if name == CLASS_SUMS:
            records = records_in_cells(released["counts"], self._radii()[0])
            self.class_counts = records.clamp_min(1.0)
            self.means = (released["sums"] / self.class_counts[:, None]).clamp(0, 1)
        elif name == POOLED_MOMENT:
            self._choose_basis(moment_matrices(released["moments"][0], math.prod(self.image_shape)))
        elif name == CLASS_MOMENTS:
            self._start_clusters(moment_matrices(released["moments"], self.size.dimensions))
        elif name == CLUSTER_SUMS:
            self._move_centers(released)
        else:
            self._shape_clusters(moment_matrices(released["moments"], self.size.dimensions))

    def _noise_of(self, name: str) -> float:
        """Standard deviation of the noise on each number of a release."""
        return self.mechanism.plan.release_event(name, self.mechanism.noise_multiplier).noise_std

    def _choose_basis(self, moment: Tensor) -> None:
        """The principal components; the classes' means lose what the noise on them is larger than."""
        values, vectors = torch.linalg.eigh(moment)
        self.basis = vectors.flip(1).T[: self.size.dimensions].contiguous()
        average = (self.class_counts[:, None] * self.means).sum(0) / self.class_counts.sum()
        expected = values.clamp_min(0) / self.class_counts.sum()
        noise = (self._noise_of(CLASS_SUMS) / self.class_counts[:, None]).square()
        kept = expected / (expected + noise).clamp_min(1e-30)
        self.means = (average + ((self.means - average) @ vectors * kept) @ vectors.T).clamp(0, 1)

    def _start_clusters(self, moments: Tensor) -> None:
        """Centers drawn from a Gaussian of each class's covariance."""
        values, vectors = torch.linalg.eigh(moments / self.class_counts[:, None, None])
        spread = vectors * values.clamp_min(0).sqrt()[:, None, :]
        draw = torch.Generator().manual_seed(int(self.generator_seed))
        shape = (self.num_classes, self.size.clusters, self.size.dimensions)
        start = torch.randn(shape, generator=draw, dtype=torch.float64).to(spread.device)
        self.centers = start @ spread.transpose(1, 2)

    def _move_centers(self, released: dict[str, Tensor]) -> None:
        """The clusters' noisy means, shrunk to the centers before by their noise."""
        counts = records_in_cells(released["counts"], self._radii()[1]).view(self.centers.shape[:2])
        noise = self._noise_of(CLUSTER_SUMS) / counts.clamp_min(1.0)
        expected = self.rules.center_variance * math.prod(self.image_shape) / 784
        kept = (expected / (expected + noise.square()))[:, :, None]
        moved = released["sums"].view(self.centers.shape) / counts.clamp_min(1.0)[:, :, None]
        self.centers = kept * moved + (1 - kept) * self.centers
        self.weights = counts.clamp_min(0.0)

    def _shape_clusters(self, moments: Tensor) -> None:
        """Covariances, each drawn to its class's, without the directions that are noise."""
        moments = moments.view(*self.centers.shape, -1)
        records, base = self.weights, self.rules.base
        pooled = moments.sum(1) / records.sum(1).clamp_min(1.0)[:, None, None]
        covariances = (moments + base * pooled[:, None]) / (records + base)[:, :, None, None]
        noise = self._noise_of(CLUSTER_MOMENTS) * math.sqrt(2 * self.size.dimensions) / (records + base)
        values, vectors = torch.linalg.eigh(covariances)
        kept = torch.where(values > self.rules.cut * noise[:, :, None], values, 0.0).sqrt()
        self.factors = (vectors * kept[:, :, None, :]).float()
        for name in ("means", "basis", "centers", "weights"):
            setattr(self, name, getattr(self, name).float())

    # What may be published ------------------------------------------------------------------------------------------

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images of each label: a cluster by its weight, a Gaussian around its center, pixels cut to [0, 1].

        Between its first and its last pass the mixture gives the classes' means.

        Raises:
            RuntimeError: Before the first pass.
        """
        labels = labels.to(self.means.device)
        if self.means.numel() == 0:
            raise RuntimeError("this MixturePPCA has not seen a record: there is nothing to sample yet.")
        if not self.is_fitted:
            return self.means[labels].float().view(-1, *self.image_shape)
        weights = self.weights + torch.where(self.weights.sum(1, keepdim=True) > 0, 0.0, 1.0)
        images = []
        for part in labels.split(1000):
            cluster = torch.multinomial(weights[part], 1, generator=generator)[:, 0]
            noise = torch.randn((len(part), self.factors.shape[-1], 1), generator=generator, device=labels.device)
            points = self.centers[part, cluster] + (self.factors[part, cluster] @ noise)[:, :, 0]
            images.append((self.means[part] + points @ self.basis).clamp(0, 1))
        return torch.cat(images).view(-1, *self.image_shape)

    def public_state(self) -> dict[str, Tensor]:
        """Means, basis, centers, weights and factors of the covariances."""
        return {name: getattr(self, name).detach().contiguous() for name in PUBLIC}

    def take_public_state(self, state: dict[str, Tensor]) -> None:
        """What :meth:`load_public_state` does."""
        for name in PUBLIC:
            setattr(self, name, state[name].to(self.passes.device))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes back how large the mixture is.

        Raises:
            ValueError: If it is not as large as this one was asked to be.
        """
        super().on_load_checkpoint(checkpoint)
        self.size = MixtureSize(*checkpoint["mixture_size"])
        for name, given in (("clusters", self.clusters), ("dimensions", self.dimensions)):
            if given not in (None, getattr(self.size, name)):
                raise ValueError(f"{name}={given}, and the checkpoint's mixture has {getattr(self.size, name)}. Use the same.")
        for name in (*PUBLIC, "class_counts"):
            setattr(self, name, torch.empty_like(checkpoint["state_dict"][name], device=self.passes.device))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps how large the mixture is."""
        checkpoint["mixture_size"] = (self.size.clusters, self.size.dimensions)

    def knobs(self) -> dict[str, dict[str, Any]]:
        """Size, iterations and rules, each with its origin."""
        fields = asdict(self.rules)
        origin = fields.pop("origin")
        found = {name: {"value": value, "origin": origin} for name, value in fields.items()}
        size = {"clusters": self.clusters, "dimensions": self.dimensions}
        for name, given in size.items():
            rule = f"from N, classes and noise by {origin}"
            found[name] = {"value": getattr(self.size, name), "origin": rule if given is None else "set by the user"}
        found["iterations"] = {"value": self.iterations, "origin": origin if self.iterations == ITERATIONS else "set by the user"}
        return found
