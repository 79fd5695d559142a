"""What is found before training: rows that other records reach, and public steps that records reach."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import Mlp, Module, fit, flat, trainer
from test_manual import Gan, gan_fit
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, default_collate
from torchmetrics import Accuracy

from lightning_dpgen import DPStrategy, PrivateSetGeneration
from lightning_dpgen.privacy import RowDependenceError

ENGINES = [{}, {"grad_sample": "ghost"}, {"grad_sample": "functional"}, {"physical_batch_size": 1}, {"physical_batch_size": 3}]


def repeated(records):
    return default_collate([record for record in records for _ in range(8)])


def centred(records):
    images, labels = default_collate(records)
    return images - images.mean(0), labels


def mixed(records):
    images, labels = default_collate(records)
    return images + images.flip(0), labels


@pytest.mark.parametrize("collate", [repeated, centred, mixed])
@pytest.mark.parametrize("options", ENGINES)
def test_a_collate_function_that_mixes_or_repeats_records_is_refused(tmp_path, digit_records, collate, options):
    module = Mlp()
    start = flat(module)
    with pytest.raises((RowDependenceError, RuntimeError, ValueError), match=r"other records of its lot|one row"):
        fit(tmp_path, module, digit_records, 16, DataLoader(digit_records, batch_size=16, collate_fn=collate), **options)
    assert torch.equal(flat(module), start)


@pytest.mark.parametrize("collate", [repeated, centred, mixed])
def test_also_where_a_module_makes_its_own_releases(tmp_path, digit_records, collate):
    module = PrivateSetGeneration(1, num_classes=10, image_shape=(1, 8, 8), schedule_overrides={"width": 4, "image_steps": 1})
    run = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=2)
    with pytest.raises((RowDependenceError, ValueError), match=r"other records of its lot|rows"):
        run.fit(module, DataLoader(digit_records, batch_size=16, collate_fn=collate))
    assert len(run.strategy.ledger) == 0


def test_a_first_tensor_that_is_not_of_records_is_refused(tmp_path, digits):
    def collate(records):
        return {"context": torch.ones(1, 2), "x": torch.stack([image for image, _ in records])}

    class Context(Mlp):
        def training_step(self, batch, batch_idx):
            return self.net(batch["x"]).square().mean() + batch["context"].sum()

    records = TensorDataset(digits[0][:16], digits[1][:16])
    for options in ENGINES:
        with pytest.raises((RowDependenceError, RuntimeError), match="first tensor of 1 rows"):
            fit(tmp_path, Context(), records, 16, DataLoader(records, batch_size=16, collate_fn=collate), **options)


def test_a_dependence_on_earlier_records_is_seen(tmp_path, digit_records):
    def loss(net, batch):
        x = batch[0].flatten(1)
        return net(torch.cat([x[:1], x[1:] - x.cumsum(0)[:-1]])).square().mean()

    with pytest.raises(RowDependenceError):
        fit(tmp_path, Module(nn.Linear(64, 3), loss), digit_records, 16)


def test_mixing_behind_a_layer_that_starts_at_zero_is_seen(tmp_path, digit_records):
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.zero, self.head = nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, 10)
            for layer in (self.zero, self.head):
                nn.init.zeros_(layer.weight)

        def forward(self, x):
            hidden = self.one(x.flatten(1))
            return self.head(self.zero(hidden - hidden.mean(0)))

    with pytest.raises(RowDependenceError):
        fit(tmp_path, Module(Branch()), digit_records, 16)


def test_a_mean_over_what_is_not_missing_is_seen(tmp_path, digits):
    images = digits[0][:32].clone()
    images[::3, :, :4] = -1.0  # a mark that random numbers in [0, 1) never carry

    def loss(net, batch):
        x = batch[0].flatten(1)
        mask = x >= 0
        return ((net(x) - x).square() * mask).sum() / mask.sum()

    with pytest.raises(RowDependenceError):
        fit(tmp_path, Module(nn.Linear(64, 64), loss), TensorDataset(images), 16)


class Every(Gan):
    """The generator steps once in ``period`` batches, and reads the records."""

    period = 5

    def generator_loss(self, real):
        return (self.generator(torch.ones(4, 3)).mean(0) - real.mean(0)).square().sum()

    def training_step(self, batch, batch_idx):
        real = batch[0].flatten(1)
        generator, discriminator = self.optimizers()
        discriminator.zero_grad()
        self.manual_backward(self.discriminator_loss(real))
        discriminator.step()
        if (batch_idx + 1) % self.period == 0:
            generator.zero_grad()
            self.manual_backward(self.generator_loss(real))
            generator.step()


def test_a_public_step_that_comes_later_is_checked_or_refused(tmp_path, digit_records):
    with pytest.raises(RuntimeError, match="changes with the records"):
        gan_fit(tmp_path, Every(), digit_records, 2, noise_multiplier=1.0, trainer_options={"max_steps": 60})
    module = Every()
    module.period = 20
    start = flat(module.generator)
    with pytest.raises(RuntimeError, match="within the first 16 batches"):
        gan_fit(tmp_path, module, digit_records, 2, noise_multiplier=1.0, trainer_options={"max_steps": 60})
    assert torch.equal(flat(module.generator), start)


def test_a_public_step_on_as_many_samples_as_the_lot_has_records_is_refused(tmp_path, digit_records):
    class Counts(Gan):
        def generator_loss(self, real):
            return F.softplus(-self.discriminator(self.generator(self.latents(len(real))))).sum()

    with pytest.raises(RuntimeError, match="draw a fixed number"):
        gan_fit(tmp_path, Counts(), digit_records, 16, trainer_options={"max_steps": 4})


def test_augmentation_leaves_the_public_random_state_alone(tmp_path, digits):
    class Noisy(TensorDataset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image + 0.01 * torch.randn_like(image), label

    class OnTransfer(Mlp):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return [batch[0] + 0.01 * torch.rand(len(batch[0]), 1, 1, 1), batch[1]]

    for build, records in ((Mlp, Noisy(digits[0][:64], digits[1][:64])), (OnTransfer, TensorDataset(digits[0][:64], digits[1][:64]))):
        after = []
        for _ in range(3):
            torch.manual_seed(0)
            fit(tmp_path, build(), records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 6})
            after.append(torch.rand(1))
        assert after[0] == after[1] == after[2]


def test_frozen_weights_may_be_loaded_before_the_first_lot(tmp_path, digit_records):
    class Loads(Mlp):
        def __init__(self):
            super().__init__()
            self.net[1].requires_grad_(False)

        def on_fit_start(self):
            self.net[1].weight.data.copy_(torch.ones(16, 64))

    run = fit(tmp_path, Loads(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 3})
    assert len(run.strategy.ledger) == 3


def test_weights_and_random_states_are_as_before(tmp_path, digit_records):
    module = Mlp(lr=0.0)
    start = flat(module)
    fit(tmp_path, module, digit_records, 16)
    assert torch.equal(flat(module), start)


def test_averages_of_weights_may_be_kept_in_frozen_copies(tmp_path, digit_records):
    class Averages(Mlp):
        def __init__(self):
            super().__init__()
            self.average = copy.deepcopy(self.net).requires_grad_(False)

        def on_train_batch_end(self, *_):
            for kept, new in zip(self.average.parameters(), self.net.parameters(), strict=True):
                kept.data.mul_(0.9).add_(new.data, alpha=0.1)

    run = fit(tmp_path, Averages(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 4})
    assert len(run.strategy.ledger) == 4


def test_a_weight_that_must_stay_in_its_range_is_left_there(tmp_path, digit_records):
    class Bounded(Mlp):
        def __init__(self):
            super().__init__(lr=0.0)
            self.gate = nn.Linear(1, 1, bias=False)
            nn.init.constant_(self.gate.weight, 0.98)

        def training_step(self, batch, batch_idx):
            prior = torch.distributions.Bernoulli(self.gate(torch.ones(len(batch[0]), 1)))
            return super().training_step(batch, batch_idx) - prior.log_prob(torch.ones(len(batch[0]), 1)).mean()

    fit(tmp_path, Bounded(), digit_records, 8, trainer_options={"max_steps": 2})


def test_a_schedule_by_the_trainer_s_own_count_goes_on_after_a_resume(tmp_path, digit_records):
    class Counted(Gan):
        def training_step(self, batch, batch_idx):
            real = batch[0].flatten(1)
            generator, discriminator = self.optimizers()
            discriminator.zero_grad()
            self.manual_backward(self.discriminator_loss(real))
            discriminator.step()
            if self.global_step % 5 in (0, 1):
                generator.zero_grad()
                self.manual_backward(self.generator_loss(real))
                generator.step()

    run = gan_fit(tmp_path, Counted(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 9})
    run.save_checkpoint(tmp_path / "some.ckpt")
    again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0, private_modules="discriminator"), max_steps=30)
    again.fit(Counted(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "some.ckpt")
    assert again.global_step >= 30


def test_rows_that_mix_records_are_refused_before_a_step(tmp_path, digit_records):
    class Weighted(Mlp):
        def training_step(self, batch, batch_idx):
            weights = torch.arange(1.0, 11.0)
            return F.cross_entropy(self.net(batch[0]), batch[1], weight=weights)

    class Repeats(Mlp):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0].repeat_interleave(4, 0)), batch[1].repeat_interleave(4, 0))

    for kind, message in ((Weighted, "exchanged|removed"), (Repeats, "16 gradient rows for a lot of 4")):
        module = kind()
        start = flat(module)
        with pytest.raises((RowDependenceError, RuntimeError), match=message):
            fit(tmp_path, module, digit_records, 16)
        assert torch.equal(flat(module), start)


def test_the_probe_finds_what_depends_on_labels_and_on_collation(tmp_path, digits):
    order = digits[1][:200].argsort(stable=True)
    by_label = TensorDataset(digits[0][:200][order], digits[1][:200][order])

    class Ignores(Mlp):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]), batch[1], ignore_index=7)

    class Weighs(Mlp):
        def training_step(self, batch, batch_idx):
            weight = torch.ones(10)
            weight[9] = 5.0
            return F.cross_entropy(self.net(batch[0]), batch[1], weight=weight)

    def mixup(records):
        images, labels = torch.utils.data.default_collate(records)
        return 0.5 * images + 0.5 * images.roll(1, 0), labels

    for kind, collate in ((Ignores, None), (Weighs, None), (Mlp, mixup)):
        for grad_sample in ("hooks", "functional") if collate else ("hooks",):
            with pytest.raises(RowDependenceError):
                fit(tmp_path, kind(), by_label, 16, DataLoader(by_label, batch_size=16, collate_fn=collate), grad_sample=grad_sample)


def test_random_modules_pass_the_probe_and_leave_the_public_stream_alone(tmp_path, digit_records):
    class Random(Mlp):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Dropout(0.5), nn.Tanh(), nn.Linear(16, 10))

        def training_step(self, batch, batch_idx):
            noisy = batch[0] + 0.1 * torch.randn_like(batch[0])
            return F.cross_entropy(self.net(noisy), batch[1])

    for options in ({}, {"grad_sample": "ghost"}, {"grad_sample": "functional"}, {"physical_batch_size": 1}):
        module = Random()
        torch.manual_seed(5)
        torch.rand(1)  # what the loader's iterator draws is the same for every data set
        run = fit(tmp_path, module, digit_records, 16, noise_multiplier=1.0, trainer_options={"max_steps": 3}, **options)
        assert len(run.strategy.ledger) == 3
        assert module.net[2].training


def test_the_probe_leaves_no_trace(tmp_path, digit_records):
    class Keeps(Mlp):
        def __init__(self):
            super().__init__()
            self.outputs, self.steps = [], 0
            self.accuracy = Accuracy("multiclass", num_classes=10)

        def training_step(self, batch, batch_idx):
            self.steps += 1
            logits = self.net(batch[0])
            self.accuracy.update(logits, batch[1])
            loss = F.cross_entropy(logits, batch[1])
            self.outputs.append(float(loss))
            return loss

    module = Keeps()
    fit(tmp_path, module, digit_records, 64, trainer_options={"max_steps": 2})
    assert module.steps == len(module.outputs) == 2
    assert int(module.accuracy.tp.sum() + module.accuracy.fn.sum()) == 128
