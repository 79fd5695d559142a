"""Private set generation: learns a few synthetic images a class by matching gradients under DP-SGD's mechanism.

Chen, Kerkouche and Fritz, "Private Set Generation with Discriminative Information" (NeurIPS 2022), whose signal is that of
Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching" (ICLR 2021).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dpgen._validate import fail, one_of, positive, positive_int
from lightning_dpgen.generators.base import PrivateGenerator
from lightning_dpgen.nn.classifiers import ConvNet
from lightning_dpgen.privacy.clipping import clipped_gradient_sum
from lightning_dpgen.privacy.plan import PoissonSampling, PrivacyPlan, Release

GRADIENT_SUM = "gradient_sum"


@dataclass(frozen=True)
class MatchingSchedule:
    """The loops and rates of gradient matching; all of them post-processing but for ``width`` and ``clip_norm``.

    Args:
        width: Channels of the matching network.
        clip_norm: C of a record's whole gradient.
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
        origin: Where these values come from, for the certificate.
    """

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

    def __post_init__(self) -> None:
        for name in ("width", "rounds", "matches", "image_steps"):
            positive_int(name, getattr(self, name))
        for name in ("clip_norm", "network_lr", "image_lr"):
            positive(name, getattr(self, name))
        one_of("layers", self.layers, ("all", "head"))
        one_of("distance", self.distance, ("rows", "whole"))
        one_of("image_rule", self.image_rule, ("sgd", "pixels"))
        for name in ("image_momentum", "averaging"):
            if not 0 <= getattr(self, name) < 1:
                raise fail(name, getattr(self, name), "at least 0 and below 1")


_PUBLISHED_LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 50: (50, 10)}


def schedule(preset: str, images_per_class: int) -> MatchingSchedule:
    """The named schedule.

    Args:
        preset: ``"cpu"``, or ``"published"`` for the paper's loops (1,000 iterations of rounds × matches releases at an
            expected lot of 256: 10,000, 100,000 and 200,000 trainer steps for 1, 10 and 20 images a class).
        images_per_class: Images a class; the published loops exist for 1, 10, 20 and 50.

    Raises:
        ValueError: For an unknown name, or a number of images that the paper has no loops for.
    """
    if one_of("preset", preset, ("cpu", "published")) == "cpu":
        return CPU
    if images_per_class not in _PUBLISHED_LOOPS:
        raise fail("images_per_class", images_per_class, f"one of {tuple(_PUBLISHED_LOOPS)} in the published loops", "Use preset='cpu'.")
    rounds, epochs = _PUBLISHED_LOOPS[images_per_class]
    return MatchingSchedule(
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
        origin="Chen, Kerkouche and Fritz, NeurIPS 2022; chosen there by results on MNIST and FashionMNIST, outside the guarantee",
    )


CPU = MatchingSchedule(
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
"""A schedule for two CPU cores: few releases from large lots, each with a fresh network and several image steps."""


class PrivateSetGeneration(PrivateGenerator):
    """Learns ``images_per_class`` images for each class by private gradient matching.

    One trainer step is one Poisson lot and one release: the sum of the records' clipped gradients on a network that no
    record has shaped. The images then take ``image_steps`` steps towards it.

    Args:
        images_per_class: Images a class.
        preset: Named :class:`MatchingSchedule`: ``"cpu"`` or ``"published"``.
        num_classes: Number of classes; the data module's if not given.
        image_shape: ``(C, H, W)``, at least 8 × 8; the data module's if not given.
        chunk_size: Records whose gradients are held at once.
        schedule_overrides: Fields of :class:`MatchingSchedule` to change, for example ``{"image_lr": 100.0}``.

    Privacy:
        Relation: zero-out (replace-one beside it). Sampling: Poisson, q = batch_size / N. Released: once a trainer step, the
        sum over the lot of each record's gradient of its own cross-entropy on the current network, clipped to C as a whole,
        sensitivity C; noise N(0, (zC)²) on every number. The network's weights are random or trained on synthetic images
        only, so they are public. Everything after the release (matching, averaging, training the network) is
        post-processing. The divisor is the expected lot size, a constant.

    Raises:
        ValueError: For arguments out of range.
    """

    labels: Tensor
    average: Tensor
    network: ConvNet

    def __init__(
        self,
        images_per_class: int = 10,
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
        base = schedule(preset, images_per_class)
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
        self.images = nn.Parameter(torch.rand(count, channels, height, width))
        self.register_buffer("labels", torch.arange(self.num_classes).repeat_interleave(self.images_per_class))
        self.register_buffer("average", self.images.detach().clone())
        self.network = self._fresh_network()
        self._asked: list[tuple[dict[str, Tensor], dict[str, Tensor]]] = []

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the networks that were asked about and what was released of them, which later image steps go back to."""
        checkpoint["asked"] = self._asked

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes them back."""
        super().on_load_checkpoint(checkpoint)
        self._asked = checkpoint["asked"]

    def on_train_start(self) -> None:
        """Puts what a checkpoint held where the network is."""
        moved = [[{name: value.to(self.device) for name, value in part.items()} for part in pair] for pair in self._asked]
        self._asked = [(network, target) for network, target in moved]

    def configure_privacy(self, records: int, steps: int, batch_size: int) -> PrivacyPlan:
        """One clipped gradient sum a step, from a Poisson lot of expected size ``batch_size``."""
        sampling = PoissonSampling(records, batch_size)
        return PrivacyPlan(sampling, (Release(GRADIENT_SUM, self.schedule.clip_norm, steps),))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD on the images alone."""
        return torch.optim.SGD([self.images], lr=self.schedule.image_lr, momentum=self.schedule.image_momentum)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One lot: release its gradient sum, then move the images.

        Args:
            batch: Images ``[B, C, H, W]`` in [0, 1] and labels ``[B]`` of a Poisson lot; ``B`` may be 0.
            batch_idx: Not used.
        """
        self._advance_network()
        parameters = self.matched_parameters()
        total = clipped_gradient_sum(self._record_loss, parameters, tuple(batch), self.schedule.clip_norm, self.chunk_size)
        released = self.mechanism.release(GRADIENT_SUM, total)
        sampling = cast(PoissonSampling, self.mechanism.plan.sampling)
        target = {name: value / sampling.expected_batch_size for name, value in released.items()}
        latest = ({name: value.clone() for name, value in self.network.state_dict().items()}, target)
        if self.schedule.replay:
            self._asked.append(latest)
        optimizer = cast(Any, self.optimizers())
        self._set_rate(optimizer.optimizer)
        for step in range(self.schedule.image_steps):
            network, target = latest
            if self.schedule.replay and step:
                network, target = self._asked[int(torch.randint(len(self._asked), ()))]
            self.images.grad = self._image_gradient(network, target)
            # Lightning counts each step of its own optimizer: one trainer step is one release, so it sees the last one only.
            is_last = step == self.schedule.image_steps - 1
            (optimizer if is_last else optimizer.optimizer).step()
            if self.schedule.image_rule == "pixels":
                self.images.data.clamp_(0, 1)
            self.average.lerp_(self.images.detach(), 1 - self.schedule.averaging)

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

    def load_public_state(self, state: dict[str, Tensor]) -> None:
        """Takes the images from a release."""
        self.average.copy_(state["images"])
        self.images.data.copy_(state["images"])

    def knobs(self) -> dict[str, dict[str, Any]]:
        """The schedule's fields with their origin."""
        fields = asdict(self.schedule)
        origin = fields.pop("origin")
        named = {name: (value, "set by the user" if name in self._overridden else origin) for name, value in fields.items()}
        named["images_per_class"] = (self.images_per_class, "set by the user")
        return {name: {"value": value, "origin": where} for name, (value, where) in named.items()}

    def matched_parameters(self) -> dict[str, Tensor]:
        """The network's parameters whose gradient is released and matched, by name."""
        named = self.network.named_parameters()
        return {name: value.detach() for name, value in named if self.schedule.layers == "all" or name.startswith("head.")}

    def _set_rate(self, optimizer: torch.optim.Optimizer) -> None:
        if self.schedule.image_rule == "pixels":
            done = self.trainer.global_step / self.mechanism.plan.release(GRADIENT_SUM).count
            factor = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
            optimizer.param_groups[0]["lr"] = self.schedule.image_lr * factor

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

    def _image_gradient(self, network: dict[str, Tensor], target: dict[str, Tensor]) -> Tensor:
        variables = {name: network[name].detach().requires_grad_() for name in target}
        loss = F.cross_entropy(functional_call(self.network, {**network, **variables}, (self.images,)), self.labels)
        mine = torch.autograd.grad(loss, list(variables.values()), create_graph=True)
        distance = gradient_distance(dict(zip(variables, mine, strict=True)), target, self.schedule.distance)
        gradient = torch.autograd.grad(distance, self.images)[0]
        if self.schedule.image_rule == "pixels":
            gradient = gradient / gradient.square().mean().sqrt().clamp_min(1e-12)
        return gradient


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
