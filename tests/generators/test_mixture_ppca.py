"""The mixture: the seven tests for each of its statistics, its passes, its size, and what it tells its users."""

from __future__ import annotations

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_same, spied_noise, trainer, unrelated_release
from lightning_dpgen.callbacks import PrivacyBudgetStop, SampleGrid
from sklearn.linear_model import LogisticRegression
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import DigitsDataModule, DPStrategy, MixturePPCA, PrivacyBudget, calibrate_noise_multiplier
from lightning_dpgen.generators.mixture_ppca import MixtureSize, mixture_plan, mixture_size
from lightning_dpgen.privacy import GaussianMechanism
from lightning_dpgen.privacy.clipping import tensors_of
from lightning_dpgen.release.certificate import make_certificate

SHAPE = {"num_classes": 10, "image_shape": (1, 8, 8)}
PASSES = 7


def fitted(folder, records, batch_size=50, module=None, strategy=None, ckpt_path=None, **options):
    module = module or MixturePPCA(clusters=2, dimensions=6, **SHAPE)
    strategy = strategy or DPStrategy(noise_multiplier=0.05)
    run = trainer(folder, strategy, **{"max_steps": -1, **options})
    run.fit(module, records if isinstance(records, pl.LightningDataModule) else DataLoader(records, batch_size), ckpt_path=ckpt_path)
    return module, run


@pytest.fixture
def records(digits):
    return TensorDataset(digits[0][:300], digits[1][:300])


@pytest.fixture
def asked(tmp_path, records):
    """A fitted mixture and, for each statistic, the state in which the records were asked for it."""
    states = {}

    class Keep(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            states[module.schedule[trainer.global_step]] = {k: getattr(module, k).clone() for k in ("means", "basis", "centers")}

    torch.manual_seed(0)
    module, _ = fitted(tmp_path, records, callbacks=[Keep()])
    return module, states


def statistic(module, state, name, images, labels):
    for key, value in state.items():
        setattr(module, key, value)
    return module.statistic(name, images.flatten(1).double(), labels)


def flat(total):
    return torch.cat([value.flatten() for value in tensors_of(total).values()])


def test_no_record_moves_a_statistic_by_more_than_its_sensitivity(asked, records):
    """Zero-out and replace-one, by the worst of many neighbours, on images far from the data and of every class."""
    module, states = asked
    plan = mixture_plan(300, 64)
    images, labels = records.tensors
    torch.manual_seed(0)
    extremes = torch.cat([torch.zeros(1, 1, 8, 8), torch.ones(1, 1, 8, 8), torch.rand(6, 1, 8, 8).round(), images[:8]])
    for release in plan.releases:
        state, worst = states[release.name], {"zero-out": 0.0, "replace-one": 0.0}
        with_first = []
        without = flat(statistic(module, state, release.name, images[1:], labels[1:]))
        for image in extremes:
            for label in range(10):
                swapped = torch.cat([image[None], images[1:]]), torch.cat([torch.tensor([label]), labels[1:]])
                total = statistic(module, state, release.name, *swapped)
                assert total.clip_norm == release.clip_norm
                with_first.append(flat(total))
        rows = torch.stack(with_first)
        worst["zero-out"] = float((rows - without).norm(dim=1).max())
        worst["replace-one"] = float(torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").max())
        assert worst["zero-out"] <= release.clip_norm * (1 + 1e-9), release.name
        assert worst["replace-one"] <= release.replace_one_factor * release.clip_norm * (1 + 1e-9), release.name
        if release.name != "cluster_moments":  # and the bound is not idle: a white image reaches it
            assert worst["zero-out"] > 0.99 * release.clip_norm, release.name


def test_a_statistic_is_the_loop_over_records(asked, records):
    module, states = asked
    images, labels = (tensor[:40] for tensor in records.tensors)
    radii = [radius * 8 for radius in module.rules.radii]

    def clip(row, radius):
        return row * min(1.0, radius / max(float(row.norm()), 1e-30))

    def outer(row):
        full = torch.outer(row, row)
        return torch.cat([full[i, i:] * torch.tensor([1.0] + [2**0.5] * (len(row) - i - 1), dtype=torch.float64) for i in range(len(row))])

    for name, state in states.items():
        found = tensors_of(statistic(module, state, name, images, labels))
        expected = {key: torch.zeros_like(value) for key, value in found.items()}
        for image, label in zip(images.flatten(1).double(), labels, strict=True):
            if name == "class_sums":
                expected["sums"][label] += clip(image, radii[0])
                expected["counts"][label] += 0.3 * radii[0]
                continue
            around = image - state["means"][label].double()
            if name == "pooled_moment":
                expected["moments"][0] += outer(clip(around, radii[1]))
                continue
            point = state["basis"].double() @ around
            if name == "class_moments":
                expected["moments"][label] += outer(clip(point, radii[1]))
                continue
            centers = state["centers"][label].double()
            nearest = int((point - centers).norm(dim=1).argmin())
            cell = int(label) * 2 + nearest
            if name == "cluster_sums":
                expected["sums"][cell] += clip(point, radii[1])
                expected["counts"][cell] += 0.3 * radii[1]
            else:
                expected["moments"][cell] += outer(clip(point - centers[nearest], radii[2]))
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("batch_size", [300, 70])
def test_chunks_add_up_to_the_whole(tmp_path, records, batch_size):
    torch.manual_seed(0)
    whole, _ = fitted(tmp_path / "a", records, 300, strategy=DPStrategy(noise_multiplier=0.0))
    torch.manual_seed(0)
    parts, run = fitted(tmp_path / "b", records, batch_size, strategy=DPStrategy(noise_multiplier=0.0))
    assert run.global_step == run.current_epoch == PASSES
    for name, value in whole.public_state().items():
        torch.testing.assert_close(value, parts.public_state()[name], atol=1e-4, rtol=1e-4)


def test_non_interference(tmp_path, monkeypatch, digits):
    monkeypatch.setattr(GaussianMechanism, "release", unrelated_release(10))
    states = []
    for number, (images, labels) in enumerate(((digits[0][:60], digits[1][:60]), (torch.rand(60, 1, 8, 8), torch.zeros(60).long()))):
        torch.manual_seed(0)
        module, run = fitted(tmp_path / str(number), TensorDataset(images, labels), 25)
        state = {**module.state_dict(), "stream": torch.get_rng_state(), "sample": module.sample(torch.arange(10))}
        states.append((state, (run.global_step, len(run.strategy.ledger), {k: float(v) for k, v in run.callback_metrics.items()})))
    (one, counts), (other, other_counts) = states
    assert counts == other_counts
    assert_same(one, other)


def test_noise_is_what_the_plan_says_and_fresh_under_one_seed(tmp_path, monkeypatch, records):
    """Deviations of 800 and more normals: within 15 % but for a chance below 1e-8."""
    moved = spied_noise(monkeypatch)
    for run in range(2):
        torch.manual_seed(0)
        _, fit = fitted(tmp_path / str(run), records, module=MixturePPCA(clusters=12, dimensions=6, **SHAPE))
    assert len(moved) == 2 * PASSES
    for (name, noise), (_, again) in zip(moved[:PASSES], moved[PASSES:], strict=True):
        stated = fit.strategy.plan.release_event(name, fit.strategy.noise_multiplier).noise_std
        if len(noise) > 600:
            assert float(noise.std()) == pytest.approx(stated, rel=0.15), name
        assert not torch.equal(noise, again)


def test_plan_is_ledger_and_the_budget_is_met_once(tmp_path, records):
    module, run = fitted(tmp_path, records, strategy=DPStrategy(epsilon=10.0))
    strategy = run.strategy
    assert strategy.ledger.event() == strategy.plan.event(strategy.noise_multiplier)
    assert 9.9 <= float(run.callback_metrics["privacy/epsilon"]) <= 10.0
    assert [release.count for release in strategy.plan.releases] == [1, 1, 1, 3, 1]
    with pytest.raises(ValueError, match="fitted already"):
        trainer(tmp_path, DPStrategy(epsilon=20.0, ledger=strategy.ledger.path), max_steps=-1).fit(module, DataLoader(records, 50))


def test_a_resume_goes_on_between_passes_and_only_there(tmp_path, records):
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_top_k=-1, filename="{epoch}")

    class Cut(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (3, 1):
                trainer.save_checkpoint(tmp_path / "cut.ckpt")

    whole, _ = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1.0), callbacks=[keep, Cut()], enable_checkpointing=True)
    resumed, again = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1.0), ckpt_path=tmp_path / "epoch=4.ckpt")
    assert again.global_step == again.current_epoch == PASSES
    assert len(again.strategy.ledger) == PASSES + 2  # under the run's own ledger: what the first end released stays counted
    for name in ("means", "basis"):
        assert torch.equal(getattr(resumed, name), getattr(whole, name))
    assert not torch.equal(resumed.centers, whole.centers)  # fresh noise
    loaded = MixturePPCA.load_from_checkpoint(tmp_path / "epoch=6.ckpt")
    for name, value in whole.public_state().items():
        assert torch.equal(value, loaded.public_state()[name])
    with pytest.raises(ValueError, match="pass 4 goes on with chunk 3, and 0 chunks were added up"):
        fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1.0), ckpt_path=tmp_path / "cut.ckpt")


def test_what_an_interrupted_pass_left_on_the_module_is_never_added_to(tmp_path, records):
    class Stop(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if (trainer.current_epoch, batch_idx) == (1, 3):
                trainer.save_checkpoint(tmp_path / "cut.ckpt")
                raise RuntimeError("pulled the plug")

    module = MixturePPCA(clusters=2, dimensions=6, **SHAPE)
    with pytest.raises(RuntimeError, match="plug"):
        fitted(tmp_path, records, module=module, callbacks=[Stop()])
    with pytest.raises(ValueError, match="pass 2 goes on with chunk 4, and 0 chunks"):
        fitted(tmp_path, records, module=module, ckpt_path=tmp_path / "cut.ckpt")


def test_without_a_budget_a_resumed_mixture_claims_what_it_released(tmp_path, records):
    class Stop(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            trainer.should_stop = trainer.current_epoch == 2

    keep = pl.callbacks.ModelCheckpoint(tmp_path, filename="three")
    _, first = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1.0), callbacks=[Stop(), keep], enable_checkpointing=True)
    assert any("after 3 of 7" in note for note in first.strategy.account.notes)
    _, run = fitted(tmp_path, records, strategy=DPStrategy(noise_multiplier=1.0), ckpt_path=tmp_path / "three.ckpt")
    certificate = make_certificate(run, 10)
    assert len(run.strategy.ledger) == PASSES
    assert certificate["claim"]["epsilon"] == pytest.approx(run.strategy.epsilon_spent())
    (note,) = certificate["notes"]
    assert note.startswith("Resumed from a checkpoint of 3 releases, when the ledger held 3.")
    assert "steps" not in certificate["knobs"]


def test_the_trainer_keeps_the_users_own_limit_and_budget_stops_look_at_the_next_release(tmp_path, records):
    whole, run = fitted(tmp_path / "a", records, strategy=DPStrategy(noise_multiplier=1.0), max_epochs=50)
    assert run.max_epochs == 50
    assert whole.is_fitted
    total = run.strategy.epsilon_spent()
    same, _ = fitted(tmp_path / "b", records, strategy=DPStrategy(noise_multiplier=1.0), callbacks=[PrivacyBudgetStop(total * 1.01)])
    assert same.is_fitted


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_epochs": 3}, "max_epochs=3.*7 releases"),
        ({"max_steps": 5}, "max_steps=5.*7 releases"),
        ({"limit_train_batches": 2}, "limit_train_batches=2.*2 of 6 chunks"),
    ],
)
def test_limits_that_leave_out_a_pass_or_a_part_are_refused_before_anything_is_charged(tmp_path, records, options, message):
    with pytest.raises(ValueError, match=message):
        fitted(tmp_path, records, **options)
    assert not list(tmp_path.glob("privacy/*.jsonl"))


@pytest.mark.parametrize("value", [float("nan"), 7.0, -0.1])
def test_records_that_are_no_images_are_refused_before_a_release(tmp_path, digits, value):
    images = digits[0][:40].clone()
    images[30] = value
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        fitted(tmp_path, TensorDataset(images, digits[1][:40]), 20)
    assert all(len(file.read_text().splitlines()) <= 2 for file in tmp_path.glob("privacy/*.jsonl"))  # header and plan


def test_images_of_another_shape_are_refused_before_a_release(tmp_path, records):
    module = MixturePPCA(num_classes=10, image_shape=(1, 28, 28))
    with pytest.raises(ValueError, match=r"\(50, 1, 8, 8\).*\(1, 28, 28\)"):
        fitted(tmp_path, records, module=module)


def test_size_follows_signal_and_stays_in_bounds():
    known = {
        eps: mixture_size(60_000, 10, 784, calibrate_noise_multiplier(mixture_plan(60_000, 784), PrivacyBudget(eps, 1e-5)) * 2.4)
        for eps in (0.1, 1.0, 10.0, 20.0)
    }
    assert [size.clusters for size in known.values()] == sorted(size.clusters for size in known.values())
    assert [size.dimensions for size in known.values()] == sorted(size.dimensions for size in known.values())
    assert mixture_size(1000, 10, 784, 1e6) == MixtureSize(1, 2)
    assert mixture_size(10**9, 1, 64, 0.0) == MixtureSize(40, 64)


@pytest.mark.parametrize("epsilon", [0.1, 1.0, 20.0])
def test_any_budget_gives_finite_images(tmp_path, digits, epsilon):
    module, _ = fitted(tmp_path, TensorDataset(*digits), 500, module=MixturePPCA(**SHAPE), strategy=DPStrategy(epsilon=epsilon))
    images = module.sample(torch.arange(10).repeat(5))
    assert images.isfinite().all()
    assert images.min() >= 0
    assert images.max() <= 1


def test_an_empty_class_and_no_classes_at_all_work(tmp_path, digits):
    images, labels = digits[0][:200], digits[1][:200]
    module, _ = fitted(tmp_path / "empty", TensorDataset(images[labels > 2], labels[labels > 2]))
    assert module.sample(torch.arange(10)).isfinite().all()
    alone = MixturePPCA(clusters=4, dimensions=10, num_classes=1, image_shape=(1, 8, 8))
    fitted(tmp_path / "alone", TensorDataset(images, torch.zeros_like(labels)), module=alone)
    assert alone.sample(torch.zeros(5, dtype=torch.int64)).shape == (5, 1, 8, 8)


def test_colour_images_keep_their_shape(tmp_path, digits):
    colour = digits[0][:200, :, :6].expand(-1, 3, -1, -1)
    module = MixturePPCA(clusters=2, dimensions=5, num_classes=10, image_shape=(3, 6, 8))
    fitted(tmp_path, TensorDataset(colour, digits[1][:200]), module=module)
    images = module.sample(torch.arange(10))
    assert images.shape == (10, 3, 6, 8)
    assert float((images[:, 0] - images[:, 1]).abs().mean()) < 0.2  # the channels of these records are equal


def test_samples_without_noise_teach_a_classifier(tmp_path):
    data = DigitsDataModule(batch_size=500)
    torch.manual_seed(0)
    module, _ = fitted(tmp_path, data, module=MixturePPCA(), strategy=DPStrategy(noise_multiplier=0.0))
    labels = torch.arange(10).repeat_interleave(200)
    images, real = module.sample(labels).flatten(1).numpy(), data.real_test()
    found = LogisticRegression(max_iter=300).fit(images, labels.numpy()).score(real[0].flatten(1).numpy(), real[1].numpy())
    assert found > 0.85


def test_clusters_are_drawn_by_their_weights(asked):
    """1,000 draws with weights 1 and 3: within 0.07 of 3/4 but for a chance below 1e-6."""
    module, _ = asked
    module.weights = torch.tensor([[1.0, 3.0]]).repeat(10, 1)
    module.centers = torch.stack([torch.zeros(10, 6), torch.full((10, 6), 50.0)], 1)
    module.factors = torch.zeros(10, 2, 6, 6)
    images = module.sample(torch.zeros(1000, dtype=torch.int64), torch.Generator().manual_seed(1)).flatten(1)
    far = (images - module.means[0].clamp(0, 1)).abs().sum(1) > 1e-3
    assert abs(float(far.double().mean()) - 0.75) < 0.07


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clusters": 0}, "clusters=0"),
        ({"dimensions": 65, **SHAPE}, "dimensions=65.*64 numbers"),
        ({"iterations": 0}, "iterations=0"),
        ({"num_classes": 2, "image_shape": (3, 64, 64)}, "12288.*smaller"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        MixturePPCA(**arguments)


def test_before_the_last_pass_there_are_means_and_before_the_first_nothing(tmp_path, records):
    with pytest.raises(RuntimeError, match="nothing to sample"):
        MixturePPCA(**SHAPE).sample(torch.arange(3))
    stop = pl.callbacks.LambdaCallback(on_train_epoch_end=lambda run, *_: setattr(run, "should_stop", run.current_epoch == 1))
    module, _ = fitted(tmp_path, records, callbacks=[stop, SampleGrid(every_n_steps=1, folder=str(tmp_path))])
    assert not module.is_fitted
    assert torch.equal(module.sample(torch.tensor([4]))[0, 0], module.means[4].float().view(8, 8))
    assert len(list(tmp_path.glob("*.png"))) == 2


def test_knobs_name_their_origin(asked):
    module, _ = asked
    knobs = module.knobs()
    assert knobs["clusters"] == {"value": 2, "origin": "set by the user"}
    assert "MNIST" in knobs["radii"]["origin"]
    assert np.isclose(sum(share for _, share in knobs["shares"]["value"]), 1.0)
