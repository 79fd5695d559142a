"""DP-MERF: a generator that matches the classes' mean random features, which are released once.

Harder, Adamczewski and Park, "DP-MERF: Differentially Private Mean Embeddings with Random Features for Practical
Privacy-Preserving Data Generation" (AISTATS 2021).
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from lightning_dpgen._validate import fail, one_of, positive, positive_int
from lightning_dpgen.generators.full_pass import FullPassGenerator
from lightning_dpgen.nn.generators import GENERATORS
from lightning_dpgen.privacy.clipping import CELL_SUMS_REPLACED, ClippedSum, cell_sums, cell_sums_norm, records_in_cells
from lightning_dpgen.privacy.plan import FullPass, PrivacyPlan, Release

EMBEDDING = "mean_embedding"
RULE = "a rule in the image dimension; its constant was chosen on MNIST's and FashionMNIST's training records, and is not covered for these"
TUNED = "tuned on MNIST's and FashionMNIST's training records (50,000 to train, 10,000 held out); not covered for these two"
SCALE = 7.0
"""Pixels for each unit of the kernel's squared length."""


class DPMERF(FullPassGenerator):
    """Releases each class's mean random Fourier features once, then trains a generator to have the same.

    One pass over the records; the generator's training is post-processing, after it. If it is broken off, :meth:`train_generator` goes on.

    Args:
        num_frequencies: n, random frequencies ω ~ N(0, I / s), s = C·H·W / 7; an image has 2n features. The paper has 5,000.
        generator: Name in :data:`.nn.generators.GENERATORS`: ``"mlp"`` is the fastest, ``"tiny"`` the paper's.
        latent_dim: Latent numbers.
        generator_steps: Steps of the generator's training.
        images_per_class: Generated images of each class in a step.
        frequencies_per_step: Frequencies that a step looks at, drawn anew each time; all of them is the paper's way.
        lr: Adam's rate, falling to 2 % as a half cosine.
        num_classes: Number of classes; the data module's if not given. With 1 the generator is unconditional.
        image_shape: ``(C, H, W)``; the data module's if not given.

    Privacy:
        Relation: zero-out (replace-one beside it). Sampling: one full pass. Released, once: every record adds (φ(x), 0.3) to its
        class, φ(x) = [cos ωᵀx, sin ωᵀx] / √n, whose norm is 1 whatever the record; sensitivity C = √1.09, replaced 2. Noise
        N(0, (zC)²) on every number. For images the paper releases the sum alone and takes classes to be equally large; here the
        noisy counts, which cost 4 % more noise, are the divisor. The frequencies are drawn before a record is read, by the public
        stream. Everything after the release is post-processing.

    Raises:
        ValueError: For arguments out of range.
    """

    embedding: Tensor
    frequency_seed: Tensor
    steps_made: Tensor

    def __init__(
        self,
        num_frequencies: int = 2000,
        generator: str = "mlp",
        latent_dim: int = 5,
        generator_steps: int = 2000,
        images_per_class: int = 20,
        frequencies_per_step: int = 1000,
        lr: float = 0.01,
        num_classes: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(num_classes, image_shape)
        self.save_hyperparameters()
        self.num_frequencies = positive_int("num_frequencies", num_frequencies)
        self._generator = one_of("generator", generator, tuple(GENERATORS))
        self.latent_dim = positive_int("latent_dim", latent_dim)
        self.generator_steps = positive_int("generator_steps", generator_steps)
        self.images_per_class = positive_int("images_per_class", images_per_class)
        if images_per_class < 2:
            raise fail("images_per_class", images_per_class, "at least 2: the distance needs pairs of images")
        self.frequencies_per_step = positive_int("frequencies_per_step", frequencies_per_step)
        if frequencies_per_step > num_frequencies:
            raise fail("frequencies_per_step", frequencies_per_step, f"at most num_frequencies={num_frequencies}")
        self.lr = positive("lr", lr)
        if self.is_built:
            self.build()

    def build(self) -> None:
        """Creates the generator and draws the frequencies' seed."""
        super().build()
        self.generator = GENERATORS[self._generator](self.num_classes, self.image_shape, self.latent_dim)
        self.register_buffer("frequency_seed", torch.randint(2**62, ()))
        self.register_buffer("embedding", torch.zeros(0))
        self.register_buffer("steps_made", torch.tensor(0))

    def configure_privacy(self, records: int, steps: int, batch_size: int) -> PrivacyPlan:
        """One sum over all records, whatever the number of steps."""
        release = Release(EMBEDDING, cell_sums_norm(1.0), 1, replace_one_factor=CELL_SUMS_REPLACED)
        return PrivacyPlan(FullPass(records), (release,))

    def on_train_start(self) -> None:
        """Draws the frequencies, before a record is read."""
        super().on_train_start()
        self._waves = self._frequencies()

    @property
    def is_fitted(self) -> bool:
        """Whether the embedding was released."""
        return self.embedding.numel() > 0

    def statistic(self, name: str, images: Tensor, labels: Tensor) -> ClippedSum:
        """The classes' sums of features, and counts; features in float32, norms and sums in float64."""
        with torch.autocast(images.device.type, enabled=False):
            return cell_sums(self.features(images.float(), self._waves), labels, self.num_classes, 1.0)

    def learn(self, name: str, released: dict[str, Tensor]) -> None:
        """Keeps the classes' mean features."""
        records = self.mechanism.plan.sampling.records
        counts = records_in_cells(released["counts"], 1.0).clamp_min(0.1 * records / self.num_classes)
        self.embedding = (released["sums"] / counts[:, None]).float()

    def on_train_epoch_end(self) -> None:
        """Trains the generator, when the only pass is over: whatever breaks it off, the budget has bought the embedding."""
        if self.is_fitted and int(self.steps_made) == 0:
            self.train_generator(self.generator_steps)

    def features(self, images: Tensor, frequencies: Tensor) -> Tensor:
        """Random Fourier features ``[B, 2n]`` of norm 1 (Rahimi and Recht, NeurIPS 2007).

        Args:
            images: ``[B, C·H·W]``.
            frequencies: ``[n, C·H·W]``.
        """
        angles = images @ frequencies.T
        return torch.cat([angles.cos(), angles.sin()], 1) / math.sqrt(len(frequencies))

    def train_generator(self, steps: int) -> None:
        """Trains the generator on the released embedding: post-processing, as long as one likes.

        Args:
            steps: Of Adam.

        Raises:
            RuntimeError: Before the embedding was released.
        """
        if not self.is_fitted:
            raise RuntimeError("this DPMERF has released no embedding yet: fit it first.")
        optimizer = torch.optim.Adam(self.generator.parameters(), self.lr)
        decay = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))
        labels = torch.arange(self.num_classes, device=self.embedding.device).repeat_interleave(self.images_per_class)
        frequencies = self._frequencies().to(next(self.generator.parameters()).dtype)
        silent = self._trainer is None or self.trainer.progress_bar_callback is None
        self.generator.train()
        with torch.random.fork_rng(), torch.enable_grad():
            torch.manual_seed(int(self.frequency_seed) + 1)  # every process of several trains the same generator
            for _ in track(range(steps), "Generator", transient=True, disable=silent):
                chosen = torch.randperm(self.num_frequencies, device=labels.device)[: self.frequencies_per_step]
                optimizer.zero_grad()
                self._distance(self._images(labels), frequencies, chosen).backward()
                optimizer.step()
                decay.step()
                self.steps_made += 1

    def _distance(self, images: Tensor, frequencies: Tensor, chosen: Tensor) -> Tensor:
        """The squared distance of mean features, summed over classes, without what does not depend on the images.

        A generated image's product with itself is left out, so that its expectation is that of endlessly many images.
        """
        count, scale = self.images_per_class, self.num_frequencies / len(chosen)
        mean = self.features(images.flatten(1), frequencies[chosen]).view(self.num_classes, count, -1).mean(1)
        target = self.embedding[:, torch.cat([chosen, chosen + self.num_frequencies])] * math.sqrt(scale)
        return count / (count - 1) * mean.square().sum() - 2 * (mean * target).sum()

    def _images(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        kind = next(self.generator.parameters()).dtype
        latent = torch.randn((len(labels), self.latent_dim), generator=generator, device=labels.device, dtype=kind)
        images: Tensor = self.generator(latent, labels)
        return images

    def _frequencies(self) -> Tensor:
        """``[n, C·H·W]``, the same at every call."""
        pixels = math.prod(self.image_shape)
        draw = torch.Generator().manual_seed(int(self.frequency_seed))
        waves = torch.randn((self.num_frequencies, pixels), generator=draw, dtype=torch.float32) / math.sqrt(pixels / SCALE)
        return waves.to(self.frequency_seed.device)

    def sample(self, labels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The generator's images, a latent of its own for each label."""
        self.generator.eval()
        with torch.no_grad():
            parts = labels.to(self.frequency_seed.device).split(1000)
            return torch.cat([self._images(part, generator) for part in parts]).float().clamp(0, 1)

    def public_state(self) -> dict[str, Tensor]:
        """The generator."""
        return dict(self.generator.state_dict())

    def take_public_state(self, state: dict[str, Tensor]) -> None:
        """What :meth:`load_public_state` does."""
        self.generator.load_state_dict(state)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Makes room for the embedding."""
        super().on_load_checkpoint(checkpoint)
        self.embedding = torch.empty_like(checkpoint["state_dict"]["embedding"], device=self.frequency_seed.device)

    def knobs(self) -> dict[str, dict[str, Any]]:
        """The arguments, each with its origin."""
        found = {
            name: {"value": self.hparams[name], "origin": TUNED if self.hparams[name] == parameter.default else "set by the user"}
            for name, parameter in inspect.signature(type(self).__init__).parameters.items()
            if name in self.hparams and name not in ("num_classes", "image_shape")
        }
        if int(self.steps_made) != self.generator_steps:
            found["generator_steps"] = {"value": int(self.steps_made), "origin": "set by the user"}
        return {**found, "kernel_length": {"value": math.prod(self.image_shape) / SCALE, "origin": RULE}}
