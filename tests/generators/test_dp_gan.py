"""DP-GAN: the seven tests of what its discriminator releases, and that its generator sees nothing else."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_bounded, assert_same, spied_noise, spied_sums, trainer, unrelated_release
from torch.nn.functional import softplus
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import DPGAN, DPStrategy, SanitizedRelease, load_release
from lightning_dpgen.privacy import GaussianMechanism, PoissonSampling
from lightning_dpgen.release.certificate import make_certificate

SHAPE = {"num_classes": 10, "image_shape": (1, 8, 8)}
PRESETS = ["modern", "dp-cgan"]
ENGINES = ["hooks", "ghost"]  # those that manual optimization has


def gan(preset="modern", **overrides) -> DPGAN:
    torch.manual_seed(0)
    return DPGAN(preset, {"discriminator_steps": 3, "generator_batch": 8, **overrides}, **SHAPE)


def fitted(folder, records, module, batch_size=16, strategy=None, ckpt_path=None, **options):
    run = trainer(folder, strategy or DPStrategy(noise_multiplier=1.0), **{"max_steps": 7, "max_epochs": -1, **options})
    run.fit(module, DataLoader(records, batch_size=batch_size), ckpt_path=ckpt_path)
    return run


class Fixed:
    """In place of random numbers: every fake is the same one, so that a loop over records can draw it too."""

    def __init__(self, monkeypatch):
        def images(module, count):
            labels = torch.full((count,), 3)
            return module.generator(torch.ones(count, module.schedule.latent_dim), labels), labels

        monkeypatch.setattr(DPGAN, "_images", images)


@pytest.mark.parametrize("networks", [{}, {"generator": "plain", "discriminator": "conv"}])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("grad_sample", ENGINES)
def test_a_record_and_its_fake_are_clipped_as_one(tmp_path, monkeypatch, digit_records, preset, grad_sample, networks):
    Fixed(monkeypatch)
    sums = spied_sums(monkeypatch)
    module, clip = gan(preset, **networks), 0.05
    before = {name: value.clone() for name, value in module.state_dict().items()}
    strategy = DPStrategy(noise_multiplier=0.0, clip_norm=clip, grad_sample=grad_sample)
    fitted(tmp_path, digit_records, module, len(digit_records), strategy, max_steps=1)
    oracle = gan(preset, **networks)
    oracle.load_state_dict(before)
    expected = {name: torch.zeros_like(value) for name, value in oracle.discriminator.named_parameters()}
    for image, label in digit_records:
        oracle.discriminator.zero_grad()
        fake, of_class = oracle._images(1)
        loss = softplus(-oracle.discriminator(image[None], label[None])) + softplus(oracle.discriminator(fake.detach(), of_class))
        loss.sum().backward()
        norm = torch.stack([value.grad.norm() for value in oracle.discriminator.parameters()]).norm()
        for name, value in oracle.discriminator.named_parameters():
            expected[name] += value.grad * min(1.0, clip / float(norm))
    for name, value in expected.items():
        torch.testing.assert_close(sums[0][f"discriminator.{name}"].float(), value, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("grad_sample", ENGINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_no_record_moves_the_sum_by_more_than_the_clip_norm(tmp_path, monkeypatch, digits, preset, grad_sample):
    """Zero-out by a record that is null (all NaN), replace-one by every pair, among them absurd records."""
    Fixed(monkeypatch)
    sums, clip = spied_sums(monkeypatch), 0.05
    for image, label in ((float("nan"), 0), (0.0, 0), (1.0, 9), (1e4, 3), (-1e4, 3)):
        images, labels = digits[0][:16].clone(), digits[1][:16].clone()
        images[5], labels[5] = image, label
        strategy = DPStrategy(noise_multiplier=0.0, clip_norm=clip, grad_sample=grad_sample)
        fitted(tmp_path, TensorDataset(images, labels), gan(preset), 16, strategy, max_steps=1)
    assert_bounded(sums, clip, 1e-4)


@pytest.mark.parametrize("grad_sample", ENGINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_the_noise_is_as_stated_and_fresh(tmp_path, monkeypatch, digit_records, preset, grad_sample):
    """More than 5,000 normals: a deviation within 10 % but for a chance below 1e-20."""
    found = spied_noise(monkeypatch)
    strategy = DPStrategy(noise_multiplier=3.0, clip_norm=0.2, grad_sample=grad_sample)
    fitted(tmp_path, digit_records, gan(preset), strategy=strategy, max_steps=2)
    for _, noise in found:
        assert len(noise) > 5000
        assert float(noise.std()) == pytest.approx(3.0 * 0.2, rel=0.1)
        assert (noise != 0).all()
    assert not torch.equal(found[0][1], found[1][1])


@pytest.mark.parametrize("grad_sample", ENGINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_non_interference(tmp_path, monkeypatch, digits, preset, grad_sample):
    monkeypatch.setattr(GaussianMechanism, "release", unrelated_release())
    states = []
    for number, other in enumerate(
        (TensorDataset(digits[0][:60], digits[1][:60]), TensorDataset(torch.rand(60, 1, 8, 8), torch.zeros(60, dtype=torch.int64)))
    ):
        module = gan(preset)
        optimizers = []
        keep = pl.callbacks.LambdaCallback(
            on_train_end=lambda run, _, kept=optimizers: kept.extend(
                value.clone() for one in run.optimizers for state in one.state_dict()["state"].values() for value in state.values()
            )
        )
        strategy = DPStrategy(noise_multiplier=1.0, grad_sample=grad_sample)
        run = fitted(tmp_path / str(number), other, module, 5, strategy, callbacks=[keep])
        state = {**module.state_dict(), "stream": torch.get_rng_state(), "steps": torch.tensor([run.global_step, len(run.strategy.ledger)])}
        states.append({**state, **{f"optimizer {index}": value for index, value in enumerate(optimizers)}})
        assert not run.callback_metrics.keys() - {"privacy/epsilon"}
    assert_same(*states)


@pytest.mark.parametrize("preset", PRESETS)
def test_one_step_is_one_release_and_the_generator_moves_between_lots(tmp_path, digit_records, preset):
    module = gan(preset)
    before = {name: value.clone() for name, value in module.generator.state_dict().items()}
    moved = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            moved.append(any(not torch.equal(v, before[n]) for n, v in module.generator.state_dict().items()))

    run = fitted(tmp_path, digit_records, module, strategy=DPStrategy(epsilon=10.0), callbacks=[Watch()])
    assert run.strategy.plan.sampling == PoissonSampling(64, 16)
    assert run.global_step == len(run.strategy.ledger) == 7
    assert run.strategy.ledger.event() == run.strategy.plan.event(run.strategy.noise_multiplier)
    assert moved[-1]
    assert not moved[1]  # callbacks come before the module's own hook: two lots, no step yet


@pytest.mark.parametrize("grad_sample", ENGINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_lots_that_are_empty_or_of_nans_are_released(tmp_path, preset, grad_sample):
    for images, lot in ((torch.full((16, 1, 8, 8), float("nan")), 16), (torch.rand(3, 1, 8, 8), 1)):
        module = gan(preset)
        records, strategy = (
            TensorDataset(images, torch.zeros(len(images)).long()),
            DPStrategy(noise_multiplier=1.0, grad_sample=grad_sample),
        )
        run = fitted(tmp_path, records, module, lot, strategy, max_steps=12)
        assert len(run.strategy.ledger) == 12
        assert all(value.isfinite().all() for value in module.state_dict().values())


def test_a_resumed_run_goes_on(tmp_path, digit_records):
    run = fitted(tmp_path, digit_records, gan(), max_steps=4)
    run.save_checkpoint(tmp_path / "four.ckpt")
    again = gan()
    resumed = fitted(tmp_path, digit_records, again, max_steps=7, ckpt_path=tmp_path / "four.ckpt")
    assert resumed.global_step == len(resumed.strategy.ledger) == 7
    certificate = make_certificate(resumed, 0)
    assert [note[:39] for note in certificate["notes"]] == ["Resumed from a checkpoint of 4 releases"]
    assert certificate["claim"]["epsilon"] == pytest.approx(resumed.strategy.epsilon_spent())  # seven lots, planned and made


def test_its_release_holds_the_average_and_nothing_of_the_discriminator(tmp_path, digit_records):
    module = gan()
    run = fitted(tmp_path, digit_records, module, strategy=DPStrategy(epsilon=10.0))
    SanitizedRelease.from_trainer(run, torch.arange(10)).save(tmp_path / "release")
    loaded = load_release(tmp_path / "release")
    assert loaded.parameters.keys() == module.average.state_dict().keys()
    again = gan()
    again.load_public_state(loaded.parameters)
    images = [one.sample(torch.arange(10), torch.Generator().manual_seed(1)) for one in (module, again)]
    torch.testing.assert_close(*images)
    assert loaded.certificate["knobs"]["discriminator_steps"] == {"value": 3, "origin": "set by the user"}


@pytest.mark.parametrize("grad_sample", ENGINES)
def test_one_nan_record_spoils_no_other(tmp_path, monkeypatch, digit_records, grad_sample):
    Fixed(monkeypatch)
    sums = spied_sums(monkeypatch)
    images, labels = digit_records.tensors
    spoilt = images.clone()
    spoilt[0] = float("nan")
    for records in (TensorDataset(spoilt, labels), TensorDataset(images[1:], labels[1:])):
        fitted(tmp_path, records, gan(), len(records), DPStrategy(noise_multiplier=0.0, grad_sample=grad_sample), max_steps=1)
    for name, value in sums[0].items():
        torch.testing.assert_close(value, sums[1][name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_other_precisions_train_and_sample(tmp_path, digit_records, precision):
    module = gan()
    fitted(tmp_path, _as(digit_records, precision), module, precision=precision)
    assert module.sample(torch.arange(10)).dtype == torch.float32


def _as(records, precision):
    images, labels = records.tensors
    return TensorDataset(images.double() if precision == "64-true" else images, labels)


def test_arguments_out_of_range_are_refused():
    with pytest.raises(ValueError, match="overrides"):
        DPGAN(overrides={"speed": 1})
    with pytest.raises(ValueError, match="without buffers|'plain', 'mlp'"):
        DPGAN(overrides={"generator": "dcgan"})
    with pytest.raises(ValueError, match="preset"):
        DPGAN("original")
