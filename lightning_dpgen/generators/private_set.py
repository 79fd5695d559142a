"""Private set generation: learns a few synthetic images a class that look like the records to random networks.

Chen, Kerkouche and Fritz, "Private Set Generation with Discriminative Information" (NeurIPS 2022); ``matching.py`` has what is
matched.
"""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dpgen._validate import fail, positive_int
from lightning_dpgen.generators.base import PrivateGenerator
from lightning_dpgen.generators.matching import centred_feature_sums, class_features, gradient_distance, schedule
from lightning_dpgen.nn.augmentation import Augmentation, augment, draw_augmentation
from lightning_dpgen.nn.classifiers import ConvNet
from lightning_dpgen.nn.generators import DCGANGenerator
from lightning_dpgen.privacy.clipping import cell_sums_norm, clipped_gradient_sum, records_in_cells
from lightning_dpgen.privacy.plan import PoissonSampling, PrivacyPlan, Release

GRADIENT_SUM, FEATURE_SUMS = "gradient_sum", "feature_sums"
LATENT = 10
"""Latent numbers of the generator prior."""
AUGMENTATION, DEFAULT = Augmentation(), "the package's default"
DRAW = "draw"
"""Where a target keeps the augmentation under which it was released."""


class PrivateSetGeneration(PrivateGenerator):
    """Learns ``images_per_class`` images for each class by private matching.

    One trainer step is one Poisson lot and one release, of what the records are to a network that no record has shaped: the sum of
    their clipped gradients, or by class of their clipped features. The images then take ``image_steps`` steps towards it.

    Args:
        images_per_class: Images a class.
        matching: ``"gradients"`` (published), or ``"features"``, which learns more from the same budget.
        preset: Named :class:`MatchingSchedule`: ``"cpu"`` or, for gradients, ``"published"`` or ``"published-prior"``.
        num_classes: Number of classes; the data module's if not given.
        image_shape: ``(C, H, W)``, at least 8 × 8; the data module's if not given.
        chunk_size: Records whose gradients are held at once.
        schedule_overrides: Fields of :class:`MatchingSchedule` to change, for example ``{"image_lr": 100.0}``.

    Privacy:
        Relation: zero-out (replace-one beside it). Sampling: Poisson, q = batch_size / N. Released: once a trainer step, a sum over
        the lot, with noise N(0, (zC)²) on every number. Of gradients: each record's gradient of its own cross-entropy (of the record
        as moved by a public draw, with ``augment``) on the current network, clipped to C as a whole, sensitivity C; the divisor is
        the expected lot size, a constant. Of features: each record adds (r, 0.3 R) to its class, r its features' difference from the
        mean features of the class's synthetic images, clipped to R; sensitivity C = √1.09 R; the divisors are the released counts.
        The network's weights are random or trained on synthetic images only, and the synthetic images are made of released sums, so
        both are public. Everything after the release (matching, averaging, training the network) is post-processing.

    Raises:
        ValueError: For arguments out of range.
    """

    labels: Tensor
    average: Tensor
    counted: Tensor
    network: ConvNet

    def __init__(
        self,
        images_per_class: int = 10,
        matching: str = "gradients",
        preset: str = "cpu",
        num_classes: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
        chunk_size: int = 64,
        schedule_overrides: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(num_classes, image_shape)
        self.save_hyperparameters()
        self.automatic_optimization = False
        self.images_per_class = positive_int("images_per_class", images_per_class)
        self.chunk_size = positive_int("chunk_size", chunk_size)
        base = schedule(matching, preset, images_per_class)
        unknown = sorted(set(schedule_overrides or {}) - set(asdict(base)))
        if unknown:
            raise fail("schedule_overrides", unknown, f"fields of MatchingSchedule: {', '.join(asdict(base))}")
        self.schedule = replace(base, **(schedule_overrides or {}))
        self._overridden = set(schedule_overrides or {})
        if self.is_built:
            self.build()

    def build(self) -> None:
        """Creates uniform random images, their labels, their average and the matching network."""
        channels, height, width = self.image_shape
        if height < 8 or width < 8:
            raise fail("image_shape", self.image_shape, "at least 8 x 8 pixels")
        count = self.num_classes * self.images_per_class
        self.register_buffer("labels", torch.arange(self.num_classes).repeat_interleave(self.images_per_class))
        if self.schedule.prior == "generator":
            self.generator: nn.Module | None = DCGANGenerator(self.num_classes, self.image_shape, LATENT)
            self.register_buffer("latent", torch.randn(count, LATENT))
            self.register_buffer("images", self.generator(self.latent, self.labels).detach())
        else:
            self.generator = None
            self.images = nn.Parameter(torch.rand(count, channels, height, width))
        self.register_buffer("average", self.images.detach().clone())
        self.register_buffer("counted", torch.zeros(self.num_classes, dtype=torch.float64))
        self.network = self._fresh_network()
        self._asked: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []
        self._drawn = torch.eye(2, 3)

    def images_to_start_from(self) -> int | None:
        """As many as the set has; a generator prior starts from none."""
        return None if self.schedule.prior == "generator" else self.images_per_class

    @torch.no_grad()
    def take_start(self, images: Tensor, labels: Tensor) -> None:
        """Takes the first ``images_per_class`` images of each class in place of random ones."""
        chosen = torch.cat([torch.nonzero(labels == label)[: self.images_per_class, 0] for label in range(self.num_classes)])
        self.images.copy_(images[chosen])
        self.average.copy_(self.images)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the networks that were asked about and what was released of them, which later image steps go back to."""
        checkpoint["asked"] = self._asked

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        self._asked = checkpoint["asked"]

    def on_train_start(self) -> None:
        """Checks the labels; puts what a checkpoint held where the network is; counts lots anew in a new fit."""
        self.check_all_labels()
        if self.trainer.global_step == 0:
            self.counted.zero_()
        moved = [[{name: value.to(self.device) for name, value in part.items()} for part in pair] for pair in self._asked]
        self._asked = [(network, target) for network, target in moved]

    def configure_privacy(self, records: int, steps: int, batch_size: int) -> PrivacyPlan:
        """One clipped sum a step, from a Poisson lot of expected size ``batch_size``."""
        if self.schedule.signal == "features":
            release = Release(FEATURE_SUMS, cell_sums_norm(self.schedule.clip_norm), steps)
        else:
            release = Release(GRADIENT_SUM, self.schedule.clip_norm, steps)
        return PrivacyPlan(PoissonSampling(records, batch_size), (release,))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on the images alone, or Adam on the generator that makes them."""
        if self.generator is not None:
            return torch.optim.Adam(self.generator.parameters(), self.schedule.prior_lr)
        return torch.optim.SGD([self.images], lr=self.schedule.image_lr, momentum=self.schedule.image_momentum)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One lot: release its sum, then move the images.

        Args:
            batch: Images ``[B, C, H, W]`` in [0, 1] and labels ``[B]`` of a Poisson lot; ``B`` may be 0.
            batch_idx: Not used.
        """
        self._advance_network()
        if self.schedule.augment:
            self._drawn = draw_augmentation(AUGMENTATION)
            batch = augment(batch[0], self._drawn) if len(batch[0]) else batch[0], batch[1]
        target = self._features(batch) if self.schedule.signal == "features" else self._gradients(batch)
        latest = ({name: value.clone() for name, value in self.network.state_dict().items()}, {**target, DRAW: self._drawn})
        if self.schedule.replay:
            self._asked.append(latest)
        optimizer = cast(Any, self.optimizers())
        self._set_rate(optimizer.optimizer)
        for step in range(self.schedule.image_steps):
            network, target = latest
            if self.schedule.replay and step:
                network, target = self._asked[int(torch.randint(len(self._asked), ()))]
            self._set_gradient(network, target)
            # Lightning counts each step of its own optimizer: one trainer step is one release, so it sees the last one only.
            is_last = step == self.schedule.image_steps - 1
            (optimizer if is_last else optimizer.optimizer).step()
            if self.generator is not None:
                with torch.no_grad():
                    self.images = self.generator(self.latent, self.labels)
            elif self.schedule.image_rule == "pixels":
                self.images.data.clamp_(0, 1)
            self.average.lerp_(self.images.detach(), 1 - self.schedule.averaging)

    def _gradients(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The lot's released mean gradient, by parameter."""
        parameters = self.matched_parameters()
        total = clipped_gradient_sum(self._record_loss, parameters, tuple(batch), self.schedule.clip_norm, self.chunk_size)
        released = self.mechanism.release(GRADIENT_SUM, total)
        return {name: value / self._expected_lot for name, value in released.items()}

    def _features(self, batch: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        """The classes' mean features: those of the synthetic set, and how far the lot's released ones are from them."""
        with torch.no_grad():
            mine = augment(self.images, self._drawn) if self.schedule.augment else self.images
            centers = class_features(self.network.features, mine, self.images_per_class)
        radius = self.schedule.clip_norm
        released = self.mechanism.release(
            FEATURE_SUMS, centred_feature_sums(self.network.features, batch, centers, radius, self.chunk_size)
        )
        self.counted += records_in_cells(released["counts"], radius)
        expected = (self.counted / (self.trainer.global_step + 1)).clamp_min(0.1 * self._expected_lot / self.num_classes)
        return {"features": centers + released["sums"] / expected[:, None].to(centers.dtype)}

    @property
    def _expected_lot(self) -> int:
        return cast(PoissonSampling, self.mechanism.plan.sampling).expected_batch_size

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The learned images of each label, in turn; the set has ``images_per_class`` of each and then repeats."""
        labels = labels.to(self.average.device)
        same = labels[:, None] == labels[None, :]
        earlier = torch.tril(same, diagonal=-1).sum(1)
        return self.average[labels * self.images_per_class + earlier % self.images_per_class].clamp(0, 1)

    def release_labels(self) -> Tensor:
        """Each image's label, once."""
        return self.labels.clone()

    def public_state(self) -> dict[str, Tensor]:
        """The images, which are the whole generator."""
        return {"images": self.average.clamp(0, 1), "labels": self.labels}

    def take_public_state(self, state: dict[str, Tensor]) -> None:
        """What :meth:`load_public_state` does."""
        self.average.copy_(state["images"])
        self.images.data.copy_(state["images"])

    def knobs(self) -> dict[str, dict[str, Any]]:
        """The schedule's fields with their origin."""
        fields = asdict(self.schedule)
        origin = fields.pop("origin")
        unused = ("image_lr", "image_momentum") if self.generator is not None else ("prior_lr",)
        origins = {"augment": DEFAULT, "prior_lr": "Chen, Kerkouche and Fritz, NeurIPS 2022"}
        if self.generator is None:
            origins["prior"] = DEFAULT
        named = {
            name: (value, "set by the user" if name in self._overridden else origins.get(name, origin))
            for name, value in fields.items()
            if name not in unused
        }
        named["images_per_class"] = (self.images_per_class, "set by the user")
        return {name: {"value": value, "origin": where} for name, (value, where) in named.items()}

    def matched_parameters(self) -> dict[str, Tensor]:
        """The network's parameters whose gradient is released and matched, by name."""
        named = self.network.named_parameters()
        return {name: value.detach() for name, value in named if self.schedule.layers == "all" or name.startswith("head.")}

    def _set_rate(self, optimizer: torch.optim.Optimizer) -> None:
        if self.schedule.image_rule == "pixels":
            done = self.trainer.global_step / self.mechanism.plan.releases[0].count
            factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            rate = self.schedule.image_lr if self.generator is None else self.schedule.prior_lr
            optimizer.param_groups[0]["lr"] = rate * factor

    def _fresh_network(self) -> ConvNet:
        return ConvNet(self.num_classes, self.image_shape, width=self.schedule.width).requires_grad_(False)

    def _advance_network(self) -> None:
        """A fresh network at the start of a cycle, synthetic training between its rounds."""
        step = self.trainer.global_step % (self.schedule.rounds * self.schedule.matches)
        if step == 0:
            self.network.load_state_dict(self._fresh_network().to(self.device).state_dict())
        elif step % self.schedule.matches == 0:
            self._train_network()

    def _train_network(self) -> None:
        images = self.images.detach()
        self.network.requires_grad_(True)
        optimizer = torch.optim.SGD(self.network.parameters(), lr=self.schedule.network_lr, momentum=0.5)
        for _ in range(self.schedule.network_epochs):
            for index in torch.randperm(len(images), device=images.device).split(256):
                optimizer.zero_grad()
                F.cross_entropy(self.network(images[index]), self.labels[index]).backward()
                optimizer.step()
        self.network.requires_grad_(False)

    def _record_loss(self, parameters: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(self.network, parameters, (image[None],))
        return F.cross_entropy(logits, label[None])

    def _set_gradient(self, network: dict[str, Tensor], target: dict[str, Tensor]) -> None:
        """Leaves the distance's gradient where the optimizer steps: at the images, or at the generator that makes them."""
        target = dict(target)
        draw = target.pop(DRAW)
        images = self.images if self.generator is None else self.generator(self.latent, self.labels)
        moved = augment(images, draw) if self.schedule.augment else images
        of = self._feature_distance if self.schedule.signal == "features" else self._distance
        gradient = torch.autograd.grad(of(moved, network, target), images, retain_graph=self.generator is not None)[0]
        if self.generator is not None:
            self.generator.zero_grad()
            images.backward(gradient)
            return
        if self.schedule.image_rule == "pixels":
            gradient = gradient / gradient.square().mean().sqrt().clamp_min(1e-12)
        self.images.grad = gradient

    def _distance(self, images: Tensor, network: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        variables = {name: network[name].detach().requires_grad_() for name in target}
        loss = F.cross_entropy(functional_call(self.network, {**network, **variables}, (images,)), self.labels)
        mine = torch.autograd.grad(loss, list(variables.values()), create_graph=True)
        return gradient_distance(dict(zip(variables, mine, strict=True)), target, self.schedule.distance)

    def _feature_distance(self, images: Tensor, network: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        def features(of: Tensor) -> Tensor:
            named = {name.removeprefix("features."): value for name, value in network.items() if name.startswith("features.")}
            return functional_call(self.network.features, named, (of,))

        return (class_features(features, images, self.images_per_class) - target["features"]).square().sum()
