"""DP-GAN and DP-CGAN: DP-SGD on a conditional discriminator; the generator sees nothing but the discriminator.

Xie, Lin, Wang, Wang and Zhou, "Differentially Private Generative Adversarial Network" (2018); the recipe is that of Bie, Kamath and
Zhang, "Private GANs, Revisited" (TMLR 2023). DP-CGAN: Torkzadehmahani, Kairouz and Paten (CVPR workshops 2019).
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lightning_dpgen._validate import fail, one_of, positive, positive_int
from lightning_dpgen.generators.base import AveragedGenerator
from lightning_dpgen.nn.critics import DISCRIMINATORS
from lightning_dpgen.nn.generators import GENERATORS


@dataclass(frozen=True)
class AdversarialSchedule:
    """Networks and rates of a DP-GAN.

    Args:
        generator: ``"plain"`` or ``"mlp"``: one without buffers, so that no generated image depends on the others.
        discriminator: ``"mlp"`` or ``"conv"``, with an output for each class, or ``"joined"``, with the class beside the pixels.
        latent_dim: Latent numbers.
        discriminator_steps: Lots, each a step of the discriminator, for each step of the generator.
        generator_batch: Images in a step of the generator.
        generator_lr: Adam's rate (betas 0.5, 0.999).
        discriminator_lr: Likewise.
        average: Decay of the average of generator weights that is published; 0 publishes the last weights.
        origin: Where these values come from, for the certificate.
    """

    generator: str
    discriminator: str
    latent_dim: int
    discriminator_steps: int
    generator_batch: int
    generator_lr: float
    discriminator_lr: float
    average: float
    origin: str

    def __post_init__(self) -> None:
        one_of("generator", self.generator, ("plain", "mlp"))
        one_of("discriminator", self.discriminator, tuple(DISCRIMINATORS))
        for name in ("latent_dim", "discriminator_steps", "generator_batch"):
            positive_int(name, getattr(self, name))
        for name in ("generator_lr", "discriminator_lr"):
            positive(name, getattr(self, name))
        if not 0 <= self.average < 1:
            raise fail("average", self.average, "at least 0 and below 1")


PRESETS = {
    "modern": AdversarialSchedule(
        generator="mlp",
        discriminator="mlp",
        latent_dim=32,
        discriminator_steps=5,
        generator_batch=200,
        generator_lr=1e-3,
        discriminator_lr=1e-3,
        average=0.95,
        origin="after Bie, Kamath and Zhang, TMLR 2023, with small networks; chosen on MNIST's training records (50,000 to train, 10,000 "
        "held out), not covered by the guarantee for MNIST",
    ),
    "dp-cgan": AdversarialSchedule(
        generator="mlp",
        discriminator="joined",
        latent_dim=100,
        discriminator_steps=1,
        generator_batch=600,
        generator_lr=1e-3,
        discriminator_lr=1e-3,
        average=0.95,
        origin="networks and one step each after Torkzadehmahani, Kairouz and Paten, CVPR workshops 2019; rates and average chosen on "
        "MNIST's training records, not covered by the guarantee for MNIST",
    ),
}
POOL = 1000
"""Generated images from which records' partners are drawn until the generator has changed."""


class DPGAN(AveragedGenerator):
    """A conditional GAN whose discriminator alone sees records, by DP-SGD; the strategy clips, sums and noises.

    One trainer step is one Poisson lot and one step of the discriminator. After every ``discriminator_steps`` of them the generator
    takes a step, between lots. The clip norm is the strategy's.

    Args:
        preset: ``"modern"``, or ``"dp-cgan"``: networks and single steps after that paper, whose lots are of 600 and whose C is
            1.1. Its code clips real and generated images' gradients apart and reuses the records' labels; here a pair is clipped as
            one and labels of generated images are uniform. Adam, its rates, the average and the weight of the class beside the
            pixels are the package's.
        overrides: Fields of :class:`AdversarialSchedule` to change, for example ``{"discriminator_steps": 50}``.
        num_classes: Number of classes; the data module's if not given.
        image_shape: ``(C, H, W)``, at least 8 × 8; the data module's if not given.

    Privacy:
        Relation: zero-out (replace-one beside it). Sampling: Poisson, q = batch_size / N. Released: once a trainer step, the sum
        of the lot's clipped gradients of the discriminator, sensitivity C, with noise N(0, (zC)²) on every number; the divisor is
        the expected lot size. One record's gradient is that of its own loss and of the loss of *one* generated image beside it,
        drawn for it alone from a public pool that the generator made of uniform labels: the pair is clipped as one, and depends
        on the record and on fresh randomness alone. The generator has no buffers and learns from latent numbers,
        uniform labels and the released discriminator: post-processing, as is its average.

    Raises:
        ValueError: For arguments out of range.
    """

    private_modules = "discriminator"
    one_step_is_one_lot = True  # the generator's steps are not Lightning's

    def __init__(
        self,
        preset: str = "modern",
        overrides: dict[str, Any] | None = None,
        num_classes: int | None = None,
        image_shape: tuple[int, int, int] | None = None,
    ) -> None:
        super().__init__(num_classes, image_shape)
        self.save_hyperparameters()
        self.automatic_optimization = False
        base = PRESETS[one_of("preset", preset, tuple(PRESETS))]
        unknown = sorted(set(overrides or {}) - set(asdict(base)))
        if unknown:
            raise fail("overrides", unknown, f"fields of AdversarialSchedule: {', '.join(asdict(base))}")
        self.schedule = replace(base, **(overrides or {}))
        self._overridden = set(overrides or {})
        if self.is_built:
            self.build()

    def build(self) -> None:
        """Creates discriminator, generator and the generator's average."""
        if min(self.image_shape[1:]) < 8:
            raise fail("image_shape", self.image_shape, "at least 8 x 8 pixels")
        self.discriminator = DISCRIMINATORS[self.schedule.discriminator](self.num_classes, self.image_shape)
        self.generator = GENERATORS[self.schedule.generator](self.num_classes, self.image_shape, self.schedule.latent_dim)
        self.average = copy.deepcopy(self.generator).requires_grad_(False)

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """Adam for the discriminator, which the strategy steps, and for the generator."""
        rates = ((self.discriminator, self.schedule.discriminator_lr), (self.generator, self.schedule.generator_lr))
        return [torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.999)) for network, rate in rates]

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """One lot: a step of the discriminator on records, each with a generated image beside it.

        Args:
            batch: Images ``[B, C, H, W]`` in [0, 1] and labels ``[B]`` of a Poisson lot.
            batch_idx: Not used.
        """
        optimizer = self._optimizers()[0]
        chosen = torch.randint(len(self._pool[1]), (len(batch[0]),), device=self.device)
        of_real, of_fake = self.discriminator.pairs((batch[0], batch[1]), (self._pool[0][chosen], self._pool[1][chosen]))
        losses = softplus(-of_real) + softplus(of_fake)
        optimizer.zero_grad()
        self.manual_backward(losses.mean())
        optimizer.step()

    def on_train_start(self) -> None:
        """Makes images for the first lots.

        Raises:
            ValueError: In several processes, each of which would train a generator of its own; for a label out of range.
        """
        if self.trainer.world_size > 1:
            raise ValueError("DPGAN trains on one device. Use Trainer(devices=1, strategy=DPStrategy(…)).")
        self.check_all_labels()
        self._fill_pool()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Between lots: where it is due, a step of the generator against the released discriminator."""
        if self.trainer.global_step % self.schedule.discriminator_steps == 0:
            optimizer = self._optimizers()[1]
            self.toggle_optimizer(optimizer)  # the discriminator is frozen, so that nothing of it is kept for a record's row
            optimizer.zero_grad()
            fake, labels = self._images(self.schedule.generator_batch)
            self.manual_backward(softplus(-self.discriminator(fake, labels)).mean())
            optimizer.optimizer.step()  # not through Lightning, which would count it: one trainer step is one release
            self.untoggle_optimizer(optimizer)
            self.update_average(self.schedule.average)
            self._fill_pool()

    @torch.no_grad()
    def _fill_pool(self) -> None:
        self._pool = self._images(POOL)

    def _optimizers(self) -> list[Any]:
        return cast("list[Any]", self.optimizers())

    def _images(self, count: int) -> tuple[Tensor, Tensor]:
        """Generated images of uniform labels, each drawn by itself."""
        labels = torch.randint(self.num_classes, (count,), device=self.device)
        return self.generator(self.latents(count), labels), labels

    def latents(self, count: int, generator: torch.Generator | None = None) -> Tensor:
        """Normal numbers."""
        kind = next(self.generator.parameters()).dtype
        return torch.randn((count, self.schedule.latent_dim), generator=generator, device=self.device, dtype=kind)

    def knobs(self) -> dict[str, dict[str, Any]]:
        """The schedule's fields with their origin."""
        fields = asdict(self.schedule)
        origin = fields.pop("origin")
        return {n: {"value": v, "origin": "set by the user" if n in self._overridden else origin} for n, v in fields.items()}
