"""DP-MERF: the seven tests, its one pass, and its generator."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_same, spied_noise, spied_sums, trainer, unrelated_release
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import DPMERF, DigitsDataModule, DPStrategy, SanitizedRelease, load_release, tstr
from lightning_dpgen.privacy import BudgetExhausted, FullPass, GaussianMechanism, PrivacyLedger
from lightning_dpgen.privacy.clipping import tensors_of
from lightning_dpgen.release import NotCertifiable
from lightning_dpgen.release.certificate import make_certificate

SHAPE = {"num_classes": 10, "image_shape": (1, 8, 8)}


def merf(**arguments) -> DPMERF:
    torch.manual_seed(0)
    return DPMERF(**{"num_frequencies": 100, "frequencies_per_step": 50, "generator_steps": 3, **SHAPE, **arguments})


def fitted(folder, records, module=None, strategy=None, batch_size=25, ckpt_path=None, **options):
    module = module or merf()
    run = trainer(folder, strategy or DPStrategy(noise_multiplier=0.05), **{"max_steps": -1, **options})
    run.fit(module, records if isinstance(records, pl.LightningDataModule) else DataLoader(records, batch_size), ckpt_path=ckpt_path)
    return module, run


@pytest.fixture
def records(digits):
    return TensorDataset(digits[0][:60], digits[1][:60])


def summed(module, images, labels):
    module._waves = module._frequencies()
    total = module.statistic("mean_embedding", images.flatten(1).double(), labels)
    return torch.cat([value.flatten() for value in tensors_of(total).values()]), total.clip_norm


def test_no_record_moves_the_sum_by_more_than_its_sensitivity(digits):
    module, images, labels = merf(), digits[0][:20], digits[1][:20]
    without, norm = summed(module, images[1:], labels[1:])
    moved = []
    torch.manual_seed(0)
    for image in (torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), 1e6 * torch.rand(1, 1, 8, 8), images[:1]):
        for label in range(10):
            with_it, _ = summed(module, torch.cat([image, images[1:]]), torch.cat([torch.tensor([label]), labels[1:]]))
            moved.append(with_it - without)
    rows = torch.stack(moved)
    assert norm == pytest.approx(1.09**0.5)
    assert rows.norm(dim=1).max() <= norm * (1 + 1e-9)
    assert rows.norm(dim=1).min() >= norm * (1 - 1e-6)  # every record's features have norm 1: the bound is met
    plan = module.configure_privacy(20, 1, 5)
    assert torch.cdist(rows, rows).max() <= norm * plan.releases[0].replace_one_factor * (1 + 1e-9)


def test_a_record_adds_the_same_whoever_else_is_there(digits):
    module, images, labels = merf(), digits[0][:21], digits[1][:21]
    added = []
    for others in (slice(1, 11), slice(11, 21)):
        with_it, _ = summed(module, torch.cat([images[:1], images[others]]), torch.cat([labels[:1], labels[others]]))
        added.append(with_it - summed(module, images[others], labels[others])[0])
    torch.testing.assert_close(*added, rtol=0, atol=1e-6)
    assert float(added[0].norm()) > 1


def test_one_pass_in_chunks_is_the_sum_over_records(tmp_path, monkeypatch, records):
    sums = spied_sums(monkeypatch)
    module, run = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=0.0))
    assert len(sums) == run.global_step == len(run.strategy.ledger) == 1
    images, labels = records.tensors
    expected = torch.zeros(10, 200, dtype=torch.float64)
    for image, label in zip(images, labels, strict=True):
        expected[label] += module.features(image.flatten()[None].double(), module._frequencies().double())[0]
    torch.testing.assert_close(sums[0]["sums"], expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(module.embedding.double(), expected / torch.bincount(labels)[:, None], rtol=1e-5, atol=1e-6)


def test_non_interference(tmp_path, monkeypatch, records):
    monkeypatch.setattr(GaussianMechanism, "release", unrelated_release(3))
    states = []
    for number, other in enumerate((records, TensorDataset(torch.rand(60, 1, 8, 8), torch.zeros(60).long()))):
        torch.manual_seed(0)
        module, run = fitted(tmp_path / str(number), other)
        states.append({**module.state_dict(), "stream": torch.get_rng_state(), "step": torch.tensor(run.global_step)})
        assert not run.callback_metrics.keys() - {"privacy/epsilon"}
    assert_same(*states)


def test_plan_is_ledger_and_the_noise_is_as_stated_and_fresh(tmp_path, monkeypatch, records):
    """2,010 normals: a deviation within 10 % but for a chance below 1e-9."""
    found = spied_noise(monkeypatch)
    for run in range(2):
        _, fit = fitted(tmp_path / str(run), records, strategy=DPStrategy(epsilon=3.0))
        assert fit.strategy.plan.sampling == FullPass(60)
        assert fit.strategy.ledger.event() == fit.strategy.plan.event(fit.strategy.noise_multiplier)
        assert 2.95 <= fit.strategy.epsilon_spent() <= 3.0
        assert float(found[run][1].std()) == pytest.approx(fit.strategy.noise_multiplier * 1.09**0.5, rel=0.1)
    assert not torch.equal(found[0][1], found[1][1])


def test_records_of_nans_leave_noise_alone(tmp_path):
    records = TensorDataset(torch.full((30, 1, 8, 8), float("nan")), torch.zeros(30, dtype=torch.int64))
    with pytest.raises(ValueError, match="finite"):  # for the owner, before training
        fitted(tmp_path, records)
    assert torch.count_nonzero(summed(merf(), *records.tensors)[0]) == 0


def test_it_teaches_and_its_release_says_what_it_is(tmp_path):
    data = DigitsDataModule(batch_size=500)
    module = merf(num_frequencies=1000, frequencies_per_step=300, generator_steps=300)
    _, run = fitted(tmp_path, data, module, DPStrategy(epsilon=10.0))
    table = tstr((module.sample(torch.arange(10).repeat_interleave(50)), torch.arange(10).repeat_interleave(50)), data.real_test(), 10,
                 "quick", [0], ["LogReg"], show_progress=False)  # fmt: skip
    assert table.mean("LogReg") > 70  # chance is 10
    SanitizedRelease.from_trainer(run, torch.arange(10).repeat_interleave(2)).save(tmp_path / "release")
    again = merf()
    again.load_public_state(load_release(tmp_path / "release").parameters)
    labels = torch.arange(10)
    images = [one.sample(labels, torch.Generator().manual_seed(1)) for one in (module, again)]
    torch.testing.assert_close(*images)
    knobs = load_release(tmp_path / "release").certificate["knobs"]
    assert knobs["num_frequencies"] == {"value": 1000, "origin": "set by the user"}


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_the_frequencies_are_the_same_at_every_precision(tmp_path, records, precision):
    module, _ = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1e-6), precision=precision)
    plain, _ = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1e-6))
    torch.testing.assert_close(module.embedding.float(), plain.embedding, rtol=1e-3, atol=1e-4)
    assert module.sample(torch.arange(10)).dtype == torch.float32


def test_it_trains_on_for_free_from_a_checkpoint_and_is_fitted_once(tmp_path, records):
    module, run = fitted(tmp_path, records)
    run.save_checkpoint(tmp_path / "done.ckpt")
    again = DPMERF.load_from_checkpoint(tmp_path / "done.ckpt", weights_only=False)
    before = {name: value.clone() for name, value in again.public_state().items()}
    again.train_generator(2)
    assert any(not torch.equal(value, before[name]) for name, value in again.public_state().items())
    assert again.knobs()["generator_steps"] == {"value": 5, "origin": "set by the user"}
    with pytest.raises(ValueError, match="fitted already"):
        fitted(tmp_path, records, module)
    with pytest.raises(RuntimeError, match="no embedding yet"):
        merf().train_generator(1)


def test_whatever_breaks_off_or_goes_on_the_ledger_holds_every_release(tmp_path, records):
    class Plug(pl.Callback):
        def on_train_epoch_end(self, trainer, module):  # callbacks come before the module's own training of its generator
            trainer.save_checkpoint(trainer.default_root_dir + "/bought.ckpt")
            raise RuntimeError("pulled the plug")

    for name, options in (("noise", {"noise_multiplier": 0.05}), ("budget", {"epsilon": 3.0})):
        with pytest.raises(RuntimeError, match="plug"):
            fitted(tmp_path / name, records, strategy=DPStrategy(**options), callbacks=[Plug()])
        (ledger,) = (tmp_path / name / "privacy").glob("*.jsonl")
        assert len(PrivacyLedger(ledger)) == 1
    with pytest.raises(BudgetExhausted, match="is spent"):
        fitted(tmp_path / "budget", records, strategy=DPStrategy(epsilon=3.0), ckpt_path=tmp_path / "budget" / "bought.ckpt")
    module, run = fitted(tmp_path / "noise", records, ckpt_path=tmp_path / "noise" / "bought.ckpt")
    assert len(run.strategy.ledger) == 1  # what was released before the end is not released again
    assert int(module.steps_made) == 0
    with pytest.raises(NotCertifiable, match="broken off"):
        make_certificate(run, 0)
    _, again = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=0.05, ledger=run.strategy.ledger.path))
    assert len(again.strategy.ledger) == 2
    assert again.strategy.epsilon_spent() > run.strategy.epsilon_spent()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_frequencies": 0}, "num_frequencies"), ({"images_per_class": 1}, "pairs"), ({"frequencies_per_step": 101}, "at most")],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        merf(**arguments)
