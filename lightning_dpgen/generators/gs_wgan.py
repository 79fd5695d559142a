"""GS-WGAN with Poisson critics: a generator that learns from noised answers of critics that each know one shard.

Chen, Orekondy and Fritz, "GS-WGAN: A Gradient-Sanitized Approach for Learning Differentially Private Generators" (NeurIPS
2020), with an accounting that holds; ``docs/accounting-notes.md`` says what changed and why.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
from pathlib import Path
from typing import Any, cast

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor, nn
from torch.func import functional_call

from lightning_dpgen._validate import fail, non_negative, one_of, positive, positive_int
from lightning_dpgen.generators.base import AveragedGenerator, check_batch
from lightning_dpgen.generators.critic_ensemble import CriticEnsemble, PotentialCritics, Shards, fingerprints
from lightning_dpgen.nn.critics import CRITICS
from lightning_dpgen.nn.generators import GENERATORS
from lightning_dpgen.privacy.plan import DisjointShards, PrivacyPlan, Release
from lightning_dpgen.strategies.loaders import all_records, fresh_randomness

log = logging.getLogger(__name__)

ANSWER_SUM = "answer_sum"
POTENTIAL = "potential"
FAKES = 32
"""Images of each class that critics are trained against in one step."""
START_STEPS, START_IMAGES = 300, 64
"""Steps of a start from public images, and how many of each class one step looks at."""
TUNED = ("num_critics", "critics_per_sample", "batch_size", "critic", "basis", "generator_lr", "sharpness", "spread")
TUNED_ON = "tuned on MNIST's training records (50,000 to train, 10,000 held out); not covered by the guarantee for MNIST"
OF_POTENTIALS = ("sharpness", "iterations", "spread")
OF_NETWORKS = ("warm_up_steps", "refresh_every", "refresh_steps", "critic_lr", "gradient_penalty", "drift_penalty")
SILENT = ("origin", "warm_up_checkpoint")
"""Arguments that shape nothing."""


class GSWGAN(AveragedGenerator):
    """Learns a label-conditional generator from the answers of ``num_critics`` critics on disjoint shards.

    One trainer step is one step of the generator: for each of ``batch_size`` generated images, about ``critics_per_sample``
    critics say in which direction it should move, and the noised sum of their clipped directions is released. Critics are
    trained between steps. The data module's ``batch_size`` is that of a critic's minibatch.

    Args:
        num_critics: K, the number of shards.
        critics_per_sample: m, the expected number of critics that answer for one image; K asks all of them.
        batch_size: B, images generated in a step, in equal numbers from every class.
        critic: ``"potential"`` (exact potentials of Wasserstein-1, nothing to train), ``"mlp"``, ``"dcgan"`` (the paper's), or a
            network ``(images, labels) -> [N]`` without buffers.
        generator: ``"small"``, ``"dcgan"``, ``"resnet"`` (the paper's), or a network ``(latent, labels) -> [N, C, H, W]`` in [0, 1].
        latent_dim: Latent numbers.
        latent: ``"normal"``, or ``"bernoulli"`` for fair coins (the paper's).
        clip_norm: C of one critic's answer; critics are 1-Lipschitz, so 1 needs no search.
        basis: Side of the square of low frequencies (of the discrete cosine transform of each channel) in which answers are
            given and noised, at most the image's side; ``None`` for all pixels. The same C then falls on fewer numbers.
        generator_lr: Adam's rate (betas 0.5, 0.9), falling to 5 % as a half cosine over the planned steps.
        average: Decay of the average of generator weights that is published.
        sharpness: Entropy of the potentials, in units of distance.
        iterations: Sinkhorn iterations of the potentials.
        spread: Weight of the public term that keeps generated images apart; only with potentials, where 1 is the debiased distance.
        warm_up_steps: Critic steps before the first generator step.
        refresh_every: Generator steps between refreshes of all critics.
        refresh_steps: Critic steps in a refresh.
        critic_lr: Their rate.
        gradient_penalty: Weight of the gradient penalty.
        drift_penalty: Weight of the drift penalty.
        warm_up_checkpoint: Critic steps after which the warm-up writes ``warm-up.ckpt`` to the trainer's folder.
        num_classes: Number of classes; the data module's if not given.
        image_shape: ``(C, H, W)``; the data module's if not given.
        origin: Where the arguments' values come from, for the certificate; else "set by the user" for what is not a default.

    Privacy:
        Relation: zero-out, and the same figure for replace-one. Sampling: records are split once into K shards, by a SECRET
        permutation. For each generated image each critic is included independently and secretly with probability q = m / K.
        Released, once for each of the B images of a step: the sum of the included critics' answers, each clipped to C, plus
        N(0, (zC)²). Divided by the constant m.

        Argument: take two data sets that differ in one record, hence in one shard and one critic. All critics are trained on
        a schedule that does not depend on who was included, against generators that are functions of earlier releases. So,
        given the earlier releases and the other critics' inclusion, one image's release is (1-q)N(0)+qN(a) with the one data
        set and (1-q)N(0)+qN(b) with the other, |a|, |b| <= C, whatever the record did to its critic: a null record changes
        it as arbitrarily as another record does. (An answer depends on one critic and on what is public: networks are asked
        about one image at a time, potentials about the whole public batch.) The antipodal pair a = -b dominates at every
        order, and images and steps compose adaptively: B·T subsampled Gaussians, which is what the library's replace-one pair
        is. What is not included leaves no trace: asking a critic changes no state. With m = K nothing is secret, and each
        release is a Gaussian of sensitivity 2C. Everything after a release is post-processing.

    Raises:
        ValueError: For arguments out of range.
    """

    assignment: Tensor
    record_marks: Tensor
    warm_up_done: Tensor
    waves: Tensor

    def __init__(
        self,
        num_critics: int = 1000,
        critics_per_sample: int = 8,
        batch_size: int = 60,
        critic: str | nn.Module = POTENTIAL,
        generator: str | nn.Module = "small",
        latent_dim: int = 12,
        latent: str = "normal",
        clip_norm: float = 1.0,
        basis: int | None = 12,
        generator_lr: float = 1e-3,
        average: float = 0.99,
        sharpness: float = 0.3,
        iterations: int = 20,
        spread: float = 1.0,
        warm_up_steps: int = 100,
        refresh_every: int = 1,
        refresh_steps: int = 1,
        critic_lr: float = 1e-3,
        gradient_penalty: float = 10.0,
        drift_penalty: float = 1e-3,
        warm_up_checkpoint: int = 100,
        num_classes: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
        origin: str | None = None,
    ) -> None:
        super().__init__(num_classes, image_shape)
        self.save_hyperparameters(ignore=[n for n, v in (("critic", critic), ("generator", generator)) if isinstance(v, nn.Module)])
        self.automatic_optimization = False
        self.num_critics = positive_int("num_critics", num_critics)
        self.critics_per_sample = positive_int("critics_per_sample", critics_per_sample)
        if critics_per_sample > num_critics:
            raise fail("critics_per_sample", critics_per_sample, f"at most num_critics={num_critics}")
        self.batch_size = positive_int("batch_size", batch_size)
        if isinstance(critic, str):
            one_of("critic", critic, (POTENTIAL, *CRITICS))
        if isinstance(generator, str):
            one_of("generator", generator, tuple(GENERATORS))
        self._critic, self._generator = [critic], [generator]  # in lists, so that they are no submodules before build
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.latent = one_of("latent", latent, ("normal", "bernoulli"))
        self.clip_norm = positive("clip_norm", clip_norm)
        self.basis = None if basis is None else positive_int("basis", basis)
        self.generator_lr, self.critic_lr = positive("generator_lr", generator_lr), positive("critic_lr", critic_lr)
        if not 0 <= average < 1:
            raise fail("average", average, "at least 0 and below 1")
        self.average_decay = average
        self.sharpness, self.iterations = positive("sharpness", sharpness), positive_int("iterations", iterations)
        self.spread = non_negative("spread", spread)
        self.warm_up_steps = 0 if warm_up_steps == 0 else positive_int("warm_up_steps", warm_up_steps)
        self.refresh_every, self.refresh_steps = positive_int("refresh_every", refresh_every), positive_int("refresh_steps", refresh_steps)
        self.penalties = non_negative("gradient_penalty", gradient_penalty), non_negative("drift_penalty", drift_penalty)
        self.warm_up_checkpoint = positive_int("warm_up_checkpoint", warm_up_checkpoint)
        self.origin = origin
        self._minibatch: int | None = None
        if self.is_built:
            self.build()

    # What it is made of ---------------------------------------------------------------------------------------------

    def build(self) -> None:
        """Creates generator, its average, and critics."""
        generator, critic = self._generator[0], self._critic[0]
        if isinstance(generator, str):
            generator = GENERATORS[generator](self.num_classes, self.image_shape, self.latent_dim)
        _check_network("generator", generator, (torch.zeros(2, self.latent_dim),), (2, *self.image_shape), self.num_classes)
        self.generator = generator
        self.average = copy.deepcopy(generator).requires_grad_(False)
        if critic == POTENTIAL:
            if self.batch_size % self.num_classes:
                wanted = f"a multiple of the {self.num_classes} classes with critic='potential'"
                raise fail("GSWGAN's batch_size", self.batch_size, wanted)
            self.critics: CriticEnsemble | PotentialCritics = PotentialCritics(self.sharpness, self.iterations)
        else:
            network = CRITICS[critic](self.num_classes, self.image_shape) if isinstance(critic, str) else critic
            _check_network("critic", network, (torch.rand(2, *self.image_shape),), (2,), self.num_classes)
            self.critics = CriticEnsemble(network, self.num_critics, self.critic_lr, *self.penalties)
        self.register_buffer("waves", low_frequencies(self.image_shape, self.basis), persistent=False)
        self.register_buffer("assignment", torch.empty((0, 0), dtype=torch.int64))
        self.register_buffer("record_marks", torch.empty(0, dtype=torch.int64))
        self.register_buffer("warm_up_done", torch.tensor(0))

    def configure_privacy(self, records: int, steps: int, batch_size: int) -> PrivacyPlan:
        """``batch_size`` sums of answers a step; the loader's batch size is a critic's minibatch and releases nothing."""
        smallest = records // self.num_critics
        if smallest == 0:
            raise fail("num_critics", self.num_critics, f"at most the number of records, {records}")
        if batch_size > smallest and self._trains_critics:
            raise ValueError(
                f"the data module's batch_size={batch_size} is a critic's minibatch, and {records} records over num_critics="
                f"{self.num_critics} leave {smallest} for each. Use num_critics={max(1, records // batch_size)} or fewer, or a smaller "
                "batch_size in the data module."
            )
        sampling = DisjointShards(records, self.num_critics, self.critics_per_sample)
        return PrivacyPlan(sampling, (Release(ANSWER_SUM, self.clip_norm, steps * self.batch_size, zero_out_factor=2.0),))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam on the generator; the critics' optimizer is their own."""
        return torch.optim.Adam(self.generator.parameters(), self.generator_lr, betas=(0.5, 0.9))

    @property
    def _trains_critics(self) -> bool:
        return self._critic[0] != POTENTIAL

    # Shards and critics ---------------------------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Reads the records into their shards and warms the critics up, from where a checkpoint left off.

        Raises:
            ValueError: If the records are not images and labels, or not those, in that order, on which the critics were trained.
        """
        loader = cast(Any, self.trainer.train_dataloader)
        images, labels = self._read(all_records(loader, self.trainer.strategy.batch_to_device))
        marks = fingerprints(images, labels)
        if self.assignment.numel() == 0:
            self.assignment, self.record_marks = self.mechanism.assign_shards().to(self.device), marks
        self._check_same_records(marks)
        with fresh_randomness(self.device):
            self._shards = Shards(images, labels, self.assignment)
            if self._trains_critics:
                minibatch = int(loader.batch_sampler.minibatch)
                if self._minibatch not in (None, minibatch):
                    was = f"was {self._minibatch} and is {minibatch} here"
                    raise ValueError(f"the critics' minibatch, the data module's batch_size, {was}. Use the same.")
                self._minibatch = minibatch
                self._warm_up()
            else:
                self._by_class = self._shards.by_class(self.num_classes)
                self._record_points = self._points(images)

    def _read(self, records: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
        if len(records) != 2:
            raise ValueError(f"records must be (image, label); the loader gives {len(records)} tensors for each.")
        check_batch(*records, self.num_classes, self.image_shape)
        each = len(records[0]) // self.num_critics
        if each < 3 * self.num_classes:
            log.warning(
                "num_critics=%d leaves %d records for each critic, of %d classes: they can know little of a class. MNIST's 1,000 critics "
                "have 60 records each.",
                self.num_critics,
                each,
                self.num_classes,
            )
        return records[0].to(self.waves), records[1].to(self.device, torch.int64)

    def _check_same_records(self, marks: Tensor) -> None:
        if self.assignment.shape[0] != self.num_critics or len(self.record_marks) != len(marks):
            raise ValueError(
                f"these critics were trained on {len(self.record_marks)} records in {len(self.assignment)} shards; now there are "
                f"{len(marks)} in {self.num_critics}. A record may shape one critic only: start with a new module."
            )
        changed = int((marks != self.record_marks).sum()) if self._trains_critics else 0
        if changed:
            raise ValueError(
                f"{changed} of {len(marks)} records are not those, in that order, on which these critics were trained; a record may shape "
                "one critic only. Give the same records in the same order, without random transforms, or start with a new module."
            )

    def _warm_up(self) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, transient=True, disable=self.trainer.progress_bar_callback is None) as bar:
            task = bar.add_task(f"Warm-up of {self.num_critics} critics", total=self.warm_up_steps, completed=int(self.warm_up_done))
            path, kept = Path(self.trainer.default_root_dir) / "warm-up.ckpt", 0
            try:
                while int(self.warm_up_done) < self.warm_up_steps:
                    self._improve_critics()
                    self.warm_up_done += 1
                    bar.advance(task)
                    if int(self.warm_up_done) % self.warm_up_checkpoint == 0:
                        self.trainer.save_checkpoint(path, weights_only=False)
                        kept = int(self.warm_up_done)
            except KeyboardInterrupt:
                if kept:
                    log.warning("warm-up stopped; %d of %d steps are kept: resume with ckpt_path=%s", kept, self.warm_up_steps, path)
                raise

    def _improve_critics(self) -> None:
        real, labels = self._shards.minibatch(cast(int, self._minibatch))
        cast(CriticEnsemble, self.critics).improve(real, self._fakes(labels), labels)

    def _fakes(self, labels: Tensor) -> Tensor:
        """For each label one of ``FAKES`` images of its class, made by the generator as it is now; its running statistics stay."""
        state = {**dict(self.generator.named_parameters()), **{name: value.clone() for name, value in self.generator.named_buffers()}}
        of_class = torch.arange(self.num_classes, device=self.device).repeat_interleave(FAKES)
        self.generator.train()
        with torch.no_grad():
            pool = functional_call(self.generator, state, (self.latents(len(of_class)), of_class))
        return pool[labels * FAKES + torch.randint(FAKES, labels.shape, device=self.device)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps the critics' optimizer."""
        if isinstance(self.critics, CriticEnsemble):
            checkpoint["critics_optimizer"] = self.critics.optimizer.state_dict()
            checkpoint["critics_minibatch"] = self._minibatch

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the shard assignment and the critics' optimizer back.

        Raises:
            ValueError: If the checkpoint holds no assignment: a second one would let a record shape two critics.
        """
        super().on_load_checkpoint(checkpoint)
        if "assignment" not in checkpoint["state_dict"]:
            raise ValueError("the checkpoint holds no shard assignment; without it a record would shape two critics. Start a new run.")
        if self._trainer is not None and self.trainer.state.fn == "fit":
            old = checkpoint["hyper_parameters"]
            new = {name: value for name, value in self.hparams.items() if not name.startswith("_") and name not in SILENT}
            changed = [f"{name} was {old[name]} and is {value} here" for name, value in new.items() if name in old and old[name] != value]
            if changed:
                raise ValueError(f"the checkpoint is of another GSWGAN: {'; '.join(changed)}. Use the same, or start without ckpt_path.")
        for name in ("assignment", "record_marks"):
            setattr(self, name, torch.empty_like(checkpoint["state_dict"][name], device=self.device))
        if isinstance(self.critics, CriticEnsemble):
            self.critics.restore = checkpoint["critics_optimizer"]
            self._minibatch = checkpoint["critics_minibatch"]

    # Training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One generator step: refresh the critics where it is due, release their answers, follow them.

        Args:
            batch: Empty; critics read their shards by themselves.
            batch_idx: Not used.
        """
        step = self.trainer.global_step
        if self._trains_critics and step % self.refresh_every == 0:
            with fresh_randomness(self.device):
                for _ in range(self.refresh_steps):
                    self._improve_critics()
        labels = torch.arange(self.batch_size, device=self.device) * self.num_classes // self.batch_size
        images = self.generator(self.latents(self.batch_size), labels)
        sample, critic = (index.to(self.device) for index in self.mechanism.draw_answers(self.batch_size))
        with fresh_randomness(self.device):
            answers = self._answers(images.detach(), labels, sample, critic)
        direction = self.mechanism.release_answers(ANSWER_SUM, {"images": answers})["images"] / self.critics_per_sample
        if not self._trains_critics and self.spread:
            direction = direction - self.spread * self._away_from_each_other(cast(PotentialCritics, self.critics), images.detach(), labels)
        optimizer = cast(Any, self.optimizers())
        planned = self.mechanism.plan.release(ANSWER_SUM).count / self.batch_size
        rate = 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / planned)))
        optimizer.optimizer.param_groups[0]["lr"] = self.generator_lr * rate
        optimizer.zero_grad()
        self.manual_backward((images * self._pixels(direction)).sum() / self.batch_size)
        optimizer.step()
        self.update_average(self.average_decay)

    def images_to_start_from(self) -> int:
        """At least one."""
        return 1

    def take_start(self, images: Tensor, labels: Tensor) -> None:
        """Trains the generator for ``START_STEPS`` steps by the potentials between its images and these, which are public: no noise."""
        by_class = [self._points(images[labels == label].to(self.waves)) for label in range(self.num_classes)]
        critics, optimizer = PotentialCritics(self.sharpness, self.iterations), self.configure_optimizers()
        of_class = torch.arange(self.num_classes, device=self.device).repeat_interleave(FAKES)
        present = torch.ones((self.num_classes, START_IMAGES), dtype=torch.bool, device=self.device)
        for _ in track(range(START_STEPS), "Start from images", transient=True, disable=self.trainer.progress_bar_callback is None):
            made = self.generator(self.latents(len(of_class)), of_class)
            mine = self._points(made.detach()).view(self.num_classes, FAKES, -1)
            theirs = torch.stack([points[torch.randint(len(points), (START_IMAGES,), device=self.device)] for points in by_class])
            direction = critics.directions(mine, theirs, present).flatten(0, 1)
            direction = direction - self.spread * self._away_from_each_other(critics, made.detach(), of_class)
            optimizer.zero_grad()
            self.manual_backward((made * self._pixels(direction)).sum() / len(of_class))
            optimizer.step()
        optimizer.zero_grad()
        self.average.load_state_dict(self.generator.state_dict())

    def _answers(self, images: Tensor, labels: Tensor, sample: Tensor, critic: Tensor) -> Tensor:
        """One row a question, in the coordinates that are released."""
        if isinstance(self.critics, CriticEnsemble):
            answers = self.critics.answer(images, labels, sample, critic)
            return answers.flatten(1).double() @ self.waves.T.double()  # float64, since rounding follows the number of answers
        points = self._points(images).view(self.num_classes, -1, len(self.waves))
        return self.critics.answer(points, sample, critic, self._record_points, self._by_class)

    def _away_from_each_other(self, critics: PotentialCritics, images: Tensor, labels: Tensor) -> Tensor:
        """The same potentials between the batch and another: what a batch drawn from the generator itself would answer. Public."""
        with torch.no_grad():
            other = self.generator(self.latents(len(labels)), labels)
        mine, others = (self._points(part).view(self.num_classes, -1, len(self.waves)) for part in (images, other))
        present = torch.ones(others.shape[:2], dtype=torch.bool, device=others.device)
        return critics.directions(mine, others, present).flatten(0, 1)

    def _points(self, images: Tensor) -> Tensor:
        """Images ``[N, C, H, W]`` as coordinates ``[N, d]`` in the released basis."""
        return images.flatten(1) @ self.waves.T

    def _pixels(self, points: Tensor) -> Tensor:
        return (points.to(self.waves.dtype) @ self.waves).view(-1, *self.image_shape)

    def latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normal numbers or fair coins."""
        shape, device = (count, self.latent_dim), self.waves.device
        if self.latent == "normal":
            return torch.randn(shape, generator=generator, device=device).to(self.waves.dtype)
        return torch.randint(2, shape, generator=generator, device=device).to(self.waves.dtype)

    # What may be published ------------------------------------------------------------------------------------------

    def knobs(self) -> dict[str, dict[str, Any]]:
        """Every argument that shaped the result, and the critics' minibatch, each with its origin."""
        unused = OF_POTENTIALS if self._trains_critics else OF_NETWORKS
        values = {**self.hparams, "critic": _name(self._critic[0]), "generator": _name(self._generator[0])}
        found = {}
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name in values and name not in (*unused, *SILENT):
                default = TUNED_ON if name in TUNED else "the package's default"
                origin = default if values[name] == parameter.default else self.origin or "set by the user"
                found[name] = {"value": values[name], "origin": origin}
        for name in ("num_classes", "image_shape"):
            found[name] = {"value": getattr(self, name), "origin": "declared, never read from records"}
        if self._trains_critics:
            found["critic_minibatch"] = {"value": self._minibatch, "origin": self.origin or "set by the user"}
        return found


def low_frequencies(image_shape: tuple[int, int, int], side: int | None) -> Tensor:
    """An orthonormal basis of images: products of the ``side`` lowest cosines of each axis, for each channel.

    Args:
        image_shape: ``(C, H, W)``.
        side: Cosines an axis, at most the axis; ``None`` for all.

    Returns:
        ``[d, C·H·W]``, d = C·side².
    """
    axes = []
    for size in image_shape[1:]:
        place, frequency = torch.arange(size) + 0.5, torch.arange(min(size, side or size))[:, None]
        wave = torch.cos(math.pi * place * frequency / size) * math.sqrt(2 / size)
        axes.append(torch.cat([wave[:1] / math.sqrt(2), wave[1:]]))
    return torch.kron(torch.eye(image_shape[0]), torch.kron(axes[0], axes[1]))


def _name(network: str | nn.Module) -> str:
    return network if isinstance(network, str) else type(network).__name__


def _check_network(what: str, network: nn.Module, inputs: tuple[Tensor, ...], shape: tuple[int, ...], num_classes: int) -> None:
    """Raises unless a network is called as said and gives what is said."""
    wanted = "(latent, labels) -> images [N, C, H, W] in [0, 1]" if what == "generator" else "(images, labels) -> [N], a number an image"
    try:
        with torch.no_grad():
            found = copy.deepcopy(network).eval()(*inputs, torch.arange(2) % num_classes)
    except (TypeError, RuntimeError, IndexError) as error:
        raise ValueError(f"{what} {type(network).__name__} cannot be called as {wanted}: {error}") from error
    if tuple(found.shape) != shape or (what == "generator" and not (found.min() >= 0 and found.max() <= 1)):
        raise ValueError(f"{what} {type(network).__name__} gives {tuple(found.shape)} for 2 images; it must be {wanted}.")
