"""Manual optimization: one private optimizer, public ones beside it."""

from __future__ import annotations

import itertools

import pytest
import pytorch_lightning as pl
import torch
from helpers import fit, flat
from torch import nn
from torch.nn.functional import softplus
from torch.utils.data import TensorDataset

from lightning_dpgen import DPStrategy
from lightning_dpgen.privacy import RowDependenceError


class Gan(pl.LightningModule):
    """The discriminator sees records, the generator sees the discriminator."""

    def __init__(self, fixed_fakes: bool = False, generator_lr: float = 0.1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.automatic_optimization = False
        self.generator, self.discriminator = nn.Linear(3, 64), nn.Sequential(nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 1))
        self.fixed_fakes, self.generator_lr = fixed_fakes, generator_lr

    def latents(self, count):
        return torch.ones(count, 3) if self.fixed_fakes else torch.randn(count, 3)

    def discriminator_loss(self, real):
        fake = self.generator(self.latents(len(real))).detach()
        return (softplus(-self.discriminator(real)) + softplus(self.discriminator(fake))).mean()

    def generator_loss(self, real):
        return softplus(-self.discriminator(self.generator(self.latents(5)))).mean()

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        generator, discriminator = self.optimizers()
        self.toggle_optimizer(generator)
        generator.zero_grad()
        self.manual_backward(self.generator_loss(real))
        generator.step()
        self.untoggle_optimizer(generator)
        discriminator.zero_grad()
        self.manual_backward(self.discriminator_loss(real))
        discriminator.step()

    def configure_optimizers(self):
        networks = ((self.generator, self.generator_lr), (self.discriminator, 1.0))
        return [torch.optim.SGD(network.parameters(), lr=lr) for network, lr in networks]


def gan_fit(folder, module, records, batch_size, **options):
    return fit(folder, module, records, batch_size, private_modules="discriminator", **options)


def pair_oracle(module, records, clip_norm) -> torch.Tensor:
    total = torch.zeros_like(flat(module.discriminator))
    for image, _ in records:
        module.zero_grad()
        module.discriminator_loss(image.flatten()[None]).backward()
        row = torch.cat([p.grad.flatten() for p in module.discriminator.parameters()])
        total += row * min(1.0, clip_norm / float(row.norm()))
    return total


@pytest.mark.parametrize("grad_sample", ["hooks", "ghost"])
@pytest.mark.parametrize("toggled", [True, False])
def test_a_record_and_its_fake_are_one_contribution(tmp_path, digit_records, grad_sample, toggled):
    class Untoggled(Gan):
        def toggle_optimizer(self, optimizer):
            pass

        def untoggle_optimizer(self, optimizer):
            pass

    module = (Gan if toggled else Untoggled)(fixed_fakes=True, generator_lr=0.0)
    start, expected = flat(module.discriminator), pair_oracle(Gan(fixed_fakes=True), digit_records, 0.05)
    run = gan_fit(tmp_path, module, digit_records, 64, clip_norm=0.05, grad_sample=grad_sample, trainer_options={"max_steps": 2})
    assert len(run.strategy.ledger) == 1  # the generator's steps are not charged
    torch.testing.assert_close((start - flat(module.discriminator)) * 64, expected, atol=2e-5, rtol=1e-3)


def test_two_backward_passes_before_one_step_add_up_within_the_clip_norm(tmp_path, digit_records):
    class Twice(Gan):
        def training_step(self, batch, batch_idx):
            real = batch[0].flatten(1)
            optimizer = self.optimizers()[1]
            fake = self.generator(self.latents(len(real))).detach()
            optimizer.zero_grad()
            self.manual_backward(softplus(-self.discriminator(real)).mean())
            self.manual_backward(softplus(self.discriminator(fake)).mean())
            optimizer.step()

    module = Twice(fixed_fakes=True)
    start, expected = flat(module.discriminator), pair_oracle(Gan(fixed_fakes=True), digit_records, 0.05)
    gan_fit(tmp_path, module, digit_records, 64, clip_norm=0.05)
    torch.testing.assert_close((start - flat(module.discriminator)) * 64, expected, atol=2e-5, rtol=1e-3)


def test_one_record_more_moves_the_sum_by_at_most_the_clip_norm(tmp_path, digits):
    released = []
    for images in (digits[0][:16], torch.cat([digits[0][:15], torch.full((1, 1, 8, 8), 1e3)])):
        module = Gan(fixed_fakes=True, generator_lr=0.0)
        start = flat(module.discriminator)
        gan_fit(tmp_path, module, TensorDataset(images, digits[1][:16]), 16, clip_norm=0.1)
        released.append((start - flat(module.discriminator)) * 16)
    assert (released[0] - released[1]).norm() <= 2 * 0.1 * (1 + 1e-4)  # one replaced


def test_noise_reaches_the_discriminator_alone_also_on_empty_lots(tmp_path, digits):
    records = TensorDataset(digits[0][:3], digits[1][:3])
    watched = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            watched.append(flat(module.discriminator))

    run = gan_fit(
        tmp_path, Gan(), records, 1, noise_multiplier=1.0, trainer_options={"max_steps": -1, "max_epochs": 14, "callbacks": [Watch()]}
    )
    assert len(run.strategy.ledger) == 42  # none empty in 42: 4e-7
    assert all((a != b).any() and b.isfinite().all() for a, b in itertools.pairwise(watched))
    assert run.strategy.ledger.event() == run.strategy.plan.event(1.0)


def test_a_generator_that_reads_records_is_refused(tmp_path, digit_records):
    class Reads(Gan):
        def generator_loss(self, real):
            return (self.generator(self.latents(len(real))) - real).pow(2).mean()

    with pytest.raises(RuntimeError, match="changes with the records"):
        gan_fit(tmp_path, Reads(), digit_records, 16)


def test_what_manual_optimization_must_not_do_is_refused(tmp_path, digit_records):
    class Critic(Gan):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            super().training_step(batch, batch_idx)

    class Sometimes(Gan):
        def training_step(self, batch, batch_idx):
            if self.trainer.sanity_checking or batch_idx == 0 or not self.trainer.training:
                super().training_step(batch, batch_idx)

    class Round(Gan):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.optimizers(use_pl_optimizer=False)[1].step()

    class Mixed(Gan):
        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=1.0)

    class MoreFakes(Gan):
        def discriminator_loss(self, real):
            return softplus(-self.discriminator(real)).mean() + softplus(self.discriminator(self.latents(8) @ torch.ones(3, 64))).mean()

    cases = (
        (Critic, {}, "released already"),
        (Round, {}, "round DPStrategy"),
        (Mixed, {}, "steps parameters of discriminator and others"),
        (MoreFakes, {}, "rows"),
        (Gan, {"physical_batch_size": 4}, "physical_batch_size=4 with manual"),
        (Gan, {"grad_sample": "functional"}, "functional.*manual"),
    )
    for kind, options, message in cases:
        with pytest.raises((RuntimeError, ValueError, RowDependenceError), match=message):
            gan_fit(tmp_path, kind(), digit_records, 16, noise_multiplier=1.0, trainer_options={"max_steps": 8}, **options)
    with pytest.raises(RuntimeError, match="did not step its private optimizer"):
        gan_fit(tmp_path, Sometimes(), digit_records, 16, trainer_options={"max_steps": 8})
    with pytest.raises(ValueError, match="manual optimization.*private_modules"):
        fit(tmp_path, Gan(), digit_records, 16)
    with pytest.raises(ValueError, match=r"no submodule \['critic'\].*generator, discriminator"):
        fit(tmp_path, Gan(), digit_records, 16, private_modules="critic")


def test_the_private_modules_may_be_named_by_the_module(tmp_path, digit_records):
    module = Gan()
    module.private_modules = "discriminator"
    run = fit(tmp_path, module, digit_records, 16, strategy=DPStrategy(epsilon=3.0), trainer_options={"max_steps": 6})
    assert run.strategy.epsilon_spent() <= 3.0


def test_public_state_is_the_same_for_unrelated_records(tmp_path, digits, released_stub):
    states = []
    for images in (digits[0][:40], torch.rand(40, 1, 8, 8) * 100):
        torch.manual_seed(0)
        module = Gan()
        torch.manual_seed(1)
        run = gan_fit(tmp_path, module, TensorDataset(images, digits[1][:40]), 5, noise_multiplier=1.0, trainer_options={"max_steps": 24})
        states.append((flat(module.discriminator), len(run.strategy.ledger), run.global_step, torch.get_rng_state()))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
