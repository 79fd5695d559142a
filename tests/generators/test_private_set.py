"""Private set generation: the seven tests, its loops, and what it tells its users."""

from __future__ import annotations

from itertools import pairwise

import helpers
import pytest
import pytorch_lightning as pl
import torch
from helpers import assert_bounded, assert_same, spied_sums, unrelated_release
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import DigitsDataModule, DPStrategy, PrivateSetGeneration
from lightning_dpgen.generators import private_set
from lightning_dpgen.generators.matching import centred_feature_sums, class_features, features_of, gradient_distance, schedule
from lightning_dpgen.nn.augmentation import augment
from lightning_dpgen.privacy import GaussianMechanism, PoissonSampling, RowDependenceError, check_row_independence
from lightning_dpgen.privacy.clipping import per_record_gradients, tensors_of

SMALL = {"width": 4}
SHAPE = {"num_classes": 10, "image_shape": (1, 8, 8)}


def generator(**arguments) -> PrivateSetGeneration:
    overrides = {**SMALL, **arguments.pop("schedule_overrides", {})}
    return PrivateSetGeneration(**{"images_per_class": 2, **SHAPE, **arguments}, schedule_overrides=overrides)


def trainer(tmp_path, steps=4, strategy=None, **options) -> pl.Trainer:
    return helpers.trainer(tmp_path, strategy or DPStrategy(noise_multiplier=1.0), max_steps=steps, **options)


class KeepMomentum(pl.Callback):
    def on_train_end(self, trainer, module):
        states = trainer.optimizers[0].state_dict()["state"].values()
        self.momentum = torch.cat([value.flatten() for state in states for value in state.values() if value is not None]).clone()


@pytest.mark.parametrize("moved", [False, True])
def test_the_released_sum_is_the_loop_over_records(tmp_path, monkeypatch, digit_records, moved):
    sums = spied_sums(monkeypatch)
    module = generator(chunk_size=7, schedule_overrides={"augment": moved})
    run = trainer(tmp_path, 1, DPStrategy(noise_multiplier=0.0))
    run.fit(module, DataLoader(digit_records, batch_size=64))  # q = 1: every record
    network, clip_norm = module.network.requires_grad_(True), module.schedule.clip_norm
    expected: dict[str, torch.Tensor] = {}
    names = list(sums[0])
    for image, label in digit_records:
        network.zero_grad()
        seen = augment(image[None], module._drawn) if moved else image[None]
        F.cross_entropy(network(seen), label[None]).backward()
        row = {name: network.get_parameter(name).grad for name in names}
        norm = torch.sqrt(sum(value.square().sum() for value in row.values()))
        for name, value in row.items():
            expected[name] = expected.get(name, 0) + value * min(1.0, clip_norm / float(norm))
    for name, value in expected.items():
        torch.testing.assert_close(sums[0][name], value.double(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("moved", [False, True])
def test_released_features_are_the_loop_over_records(tmp_path, monkeypatch, digit_records, moved):
    spied = spied_sums(monkeypatch)
    module = generator(matching="features", chunk_size=7, schedule_overrides={"clip_norm": 0.3, "augment": moved})
    start = module.images.detach().clone()
    run = trainer(tmp_path, 1, DPStrategy(noise_multiplier=0.0))
    run.fit(module, DataLoader(digit_records, batch_size=64))  # q = 1: every record
    network = module.network.features
    centers = features_of(network, augment(start, module._drawn) if moved else start).view(10, 2, -1).mean(1)
    sums, counts = torch.zeros_like(centers, dtype=torch.float64), torch.zeros(10, dtype=torch.float64)
    for image, label in digit_records:
        seen = augment(image[None], module._drawn) if moved else image[None]
        row = features_of(network, seen)[0] - centers[label]
        sums[label] += row * min(1.0, 0.3 / float(row.norm()))
        counts[label] += 0.3 * 0.3
    torch.testing.assert_close(spied[0]["sums"], sums, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(spied[0]["counts"], counts, atol=1e-5, rtol=1e-4)
    assert run.strategy.plan.releases[0].clip_norm == pytest.approx(0.3 * 1.09**0.5)
    # The images are matched to the classes' mean features, whatever the sizes of the classes.
    expected = centers + sums.float() / torch.bincount(digit_records.tensors[1], minlength=10)[:, None]
    torch.testing.assert_close(module._asked[0][1]["features"], expected, atol=1e-5, rtol=1e-4)


def test_no_record_moves_the_feature_sums_by_more_than_their_sensitivity(digits):
    """Zero-out and replace-one over records of every class, also absurd ones."""
    torch.manual_seed(0)
    network, radius = generator().network.features, 0.2
    centers = class_features(network, torch.rand(20, 1, 8, 8), 2)
    images, labels = digits[0][:16], digits[1][:16]

    def total(images, labels):
        return torch.cat(
            [value.flatten() for value in tensors_of(centred_feature_sums(network, (images, labels), centers, radius, 5)).values()]
        )

    without, rows = total(images[1:], labels[1:]), []
    for extreme in (torch.zeros(1, 8, 8), 1e4 * torch.rand(1, 8, 8), torch.full((1, 8, 8), float("nan")), digits[0][20]):
        rows += [total(torch.cat([extreme[None], images[1:]]), torch.cat([torch.tensor([label]), labels[1:]])) for label in range(10)]
    moved = torch.stack(rows)
    zero_out = float((moved - without).norm(dim=1).max())
    assert 0.99 * radius < zero_out <= radius * 1.09**0.5 * (1 + 1e-5)
    assert float(torch.cdist(moved, moved).max()) <= 2 * radius * (1 + 1e-5)


@pytest.mark.parametrize("augmented", [False, True])
def test_no_record_moves_the_released_sum_by_more_than_the_clip_norm(tmp_path, monkeypatch, digits, augmented):
    sums = spied_sums(monkeypatch)
    for poison in (float("nan"), None, 0.0, 1e4, -1e4):  # the first is a null record
        torch.manual_seed(0)
        images, labels = digits[0][:32].clone(), digits[1][:32].clone()
        if poison is not None:
            images[3], labels[3] = poison, 9 - labels[3]
        module = generator(schedule_overrides={"augment": augmented})  # the seed gives every run the same draw
        trainer(tmp_path, 1).fit(module, DataLoader(TensorDataset(images, labels), batch_size=32))
    assert_bounded(sums, module.schedule.clip_norm, 1e-5)


@pytest.mark.parametrize("matching", ["gradients", "features"])
def test_augmentation_moves_records_and_images_by_the_draw_of_their_release(tmp_path, monkeypatch, digit_records, matching):
    draws = {64: [], 20: []}  # by how many are moved: the lot, which is every record, and the set

    def spy(images, draw):
        draws[len(images)].append(draw.clone())
        return augment(images, draw)

    monkeypatch.setattr(private_set, "augment", spy)
    overrides = {"augment": True, "image_steps": 1, "replay": False}
    trainer(tmp_path, 3).fit(generator(matching=matching, schedule_overrides=overrides), DataLoader(digit_records, batch_size=64))
    uses = 1 if matching == "gradients" else 2  # features: the centres too
    assert len(draws[20]) == 3 * uses
    for step, draw in enumerate(draws[64]):
        assert all(torch.equal(draw, of_set) for of_set in draws[20][uses * step : uses * (step + 1)])
    assert len({tuple(draw.flatten().tolist()) for draw in draws[64]}) == 3


@pytest.mark.parametrize("images", [1, 10, 20, 50])
@pytest.mark.parametrize("preset", ["cpu", "published", "published-prior"])
def test_every_size_of_every_preset_trains(tmp_path, digit_records, preset, images):
    module = generator(images_per_class=images, preset=preset, schedule_overrides={"network_epochs": 1})
    start = module.average.clone()
    run = trainer(tmp_path, 12)  # published: a round and a bit
    run.fit(module, DataLoader(digit_records, batch_size=16))
    assert len(run.strategy.ledger) == 12
    assert module.sample(module.release_labels()).shape == (10 * images, 1, 8, 8)
    assert not torch.equal(module.average, start)


def test_rows_do_not_mix_records(digits):
    module = generator()
    parameters = module.matched_parameters()

    def rows(records, seed):
        return per_record_gradients(module._record_loss, parameters, tuple(torch.stack(leaf) for leaf in zip(*records, strict=True)))

    def mixed(records, seed):
        mean = torch.stack([image for image, _ in records]).mean(0)
        return rows([(image - mean, label) for image, label in records], seed)

    lots = [[(torch.rand(1, 8, 8), label) for label in digits[1][start : start + 4]] for start in (0, 4)]
    check_row_independence(rows, lots[0], lots[1:])
    with pytest.raises(RowDependenceError):
        check_row_independence(mixed, lots[0], lots[1:])


@pytest.mark.parametrize(
    ("preset", "matching"),
    [("cpu", "gradients"), ("published", "gradients"), ("cpu", "features"), ("published-prior", "gradients")],
)
@pytest.mark.parametrize("augment", [False, True])
def test_non_interference(tmp_path, monkeypatch, digits, preset, matching, augment):
    """With a release that ignores its rows, two unrelated data sets leave the same public state, bit for bit."""

    monkeypatch.setattr(GaussianMechanism, "release", unrelated_release())
    states = []
    for images, labels in ((digits[0][:60], digits[1][:60]), (torch.rand(60, 1, 8, 8) * 100, torch.zeros(60, dtype=torch.int64))):
        torch.manual_seed(0)
        overrides = {"rounds": 2, "matches": 3, "augment": augment}
        module = generator(preset=preset, matching=matching, images_per_class=1, schedule_overrides=overrides)
        run = trainer(tmp_path, 14)
        keep = KeepMomentum()
        run.callbacks.append(keep)
        run.fit(module, DataLoader(TensorDataset(images, labels), batch_size=5))
        states.append(
            (
                {**module.state_dict(), "momentum": keep.momentum, "stream": torch.get_rng_state()},
                (run.global_step, len(run.strategy.ledger), {k: float(v) for k, v in run.callback_metrics.items()}),
            )
        )
    (one, counts), (other, other_counts) = states
    assert counts == other_counts
    assert_same(one, other)


def test_plan_equals_ledger_and_one_step_is_one_release(tmp_path, digit_records):
    run = trainer(tmp_path, 6, DPStrategy(epsilon=10.0))
    run.fit(generator(), DataLoader(digit_records, batch_size=16))
    strategy = run.strategy
    assert strategy.plan.sampling == PoissonSampling(64, 16)
    assert run.global_step == len(strategy.ledger) == 6
    assert strategy.ledger.event() == strategy.plan.event(strategy.noise_multiplier)
    assert 9.8 <= float(run.callback_metrics["privacy/epsilon"]) <= 10.0


def test_nan_records_and_empty_lots_release_noise_and_keep_images_finite(tmp_path, digits):
    for images, lot in ((torch.full((16, 1, 8, 8), float("nan")), 16), (digits[0][:3], 1)):
        module = generator()
        before = module.images.detach().clone()
        run = trainer(tmp_path, 20)
        run.fit(module, DataLoader(TensorDataset(images, digits[1][: len(images)]), batch_size=lot))
        assert len(run.strategy.ledger) == 20
        assert module.images.isfinite().all()
        assert module.average.isfinite().all()
        assert not torch.equal(module.images, before)


@pytest.mark.parametrize(
    ("matching", "steps", "overrides"),
    [
        ("gradients", 60, {"width": 16}),
        ("features", 60, {"width": 16}),
        ("gradients", 20, {"width": 8, "prior": "generator", "image_steps": 10}),
    ],
)
def test_matching_without_noise_makes_images_that_teach(tmp_path, digits, matching, steps, overrides):
    """A hundred images learned from 1,437 without noise: far above chance on the real test records."""
    data = DigitsDataModule(batch_size=512)
    torch.manual_seed(0)
    module = PrivateSetGeneration(images_per_class=5, matching=matching, schedule_overrides=overrides)
    trainer(tmp_path, steps, DPStrategy(noise_multiplier=0.0)).fit(module, data)
    from lightning_dpgen import tstr

    labels = module.release_labels()
    table = tstr((module.sample(labels).detach(), labels), data.real_test(), 10, "quick", [0], ["ConvNet32"], show_progress=False)
    assert table.mean("ConvNet32") > 60


@pytest.mark.parametrize("prior", ["none", "generator"])
def test_resume_continues_images_network_and_ledger(tmp_path, digit_records, prior):
    options = {"enable_checkpointing": True}
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    overrides = {"rounds": 2, "matches": 4, "prior": prior}
    first = trainer(tmp_path, 6, callbacks=[keep], **options)
    module = generator(schedule_overrides=overrides)
    first.fit(module, DataLoader(digit_records, batch_size=16))
    resumed = trainer(tmp_path, 6, **options)
    again = generator(schedule_overrides=overrides)
    resumed.fit(again, DataLoader(digit_records, batch_size=16), ckpt_path=tmp_path / "step=6.ckpt")
    for name, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
    resumed = trainer(tmp_path, 8, **options)
    resumed.fit(generator(schedule_overrides=overrides), DataLoader(digit_records, batch_size=16), ckpt_path=tmp_path / "step=3.ckpt")
    assert len(resumed.strategy.ledger) == 6 + 5
    loaded = PrivateSetGeneration.load_from_checkpoint(tmp_path / "step=6.ckpt")
    assert torch.equal(loaded.average, module.average)


def test_the_sample_is_the_learned_set_in_the_order_of_labels():
    module = generator(images_per_class=3)
    labels = torch.tensor([2, 0, 2, 2, 2, 9])
    images = module.sample(labels)
    picked = [6, 0, 7, 8, 6, 27]
    assert torch.equal(images, module.average[picked].clamp(0, 1))
    assert torch.equal(module.sample(module.release_labels()), module.average.clamp(0, 1))
    assert images.min() >= 0
    assert images.max() <= 1


def test_the_published_loops_are_the_papers():
    for images, (rounds, epochs) in {1: (1, 1), 10: (10, 50), 20: (20, 25), 50: (50, 10)}.items():
        loops = schedule("gradients", "published", images)
        assert (loops.rounds, loops.matches, loops.network_epochs) == (rounds, 10, epochs)
        assert (loops.width, loops.clip_norm, loops.distance, loops.image_lr, loops.layers) == (128, 0.1, "rows", 0.1, "all")
    with pytest.raises(ValueError, match="images_per_class=7"):
        schedule("gradients", "published", 7)
    with pytest.raises(ValueError, match="preset='gpu'"):
        schedule("gradients", "gpu", 10)
    few, many = schedule("features", "cpu", 10), schedule("features", "cpu", 50)
    assert (few.signal, few.clip_norm, few.image_steps) == ("features", 0.4, 40)
    assert many.image_steps < few.image_steps  # each costs five times as much
    with pytest.raises(ValueError, match="matching='moments'"):
        schedule("moments", "cpu", 10)
    with pytest.raises(ValueError, match="preset='published'"):  # the paper matched gradients
        schedule("features", "published", 10)


def test_networks_are_fresh_each_cycle_and_trained_between_rounds(tmp_path, digit_records):
    weights = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            weights.append(torch.cat([p.flatten().clone() for p in module.network.parameters()]))

    overrides = {"rounds": 2, "matches": 2, "network_epochs": 1}
    trainer(tmp_path, 8, callbacks=[Keep()]).fit(generator(schedule_overrides=overrides), DataLoader(digit_records, batch_size=16))
    same = [torch.equal(a, b) for a, b in pairwise(weights)]
    assert same == [True, False, True, False, True, False, True]
    trained, fresh = (weights[2] - weights[1]).norm(), (weights[4] - weights[3]).norm()
    assert trained < 0.3 * fresh


def test_distances():
    torch.manual_seed(0)
    mine = {"weight": torch.randn(3, 4), "bias": torch.randn(3)}
    for kind in ("rows", "whole"):
        assert float(gradient_distance(mine, mine, kind)) == pytest.approx(0, abs=1e-5)
        assert float(gradient_distance(mine, {k: 3 * v for k, v in mine.items()}, kind)) == pytest.approx(0, abs=1e-5)
    opposite = {k: -v for k, v in mine.items()}
    assert float(gradient_distance(mine, opposite, "rows")) == pytest.approx(6, abs=1e-4)  # three rows, the bias ignored
    assert float(gradient_distance(mine, opposite, "whole")) == pytest.approx(2, abs=1e-5)


def test_a_trainer_without_the_strategy_gets_the_line_to_add(digit_records):
    plain = pl.Trainer(max_steps=1, logger=False, enable_checkpointing=False, accelerator="cpu", enable_progress_bar=False)
    with pytest.raises(ValueError, match=r"strategy=lightning_dpgen\.DPStrategy\(epsilon=10"):
        plain.fit(generator(), DataLoader(digit_records, batch_size=16))


def test_a_clip_norm_beside_the_modules_own_is_refused_with_both(tmp_path, digit_records):
    run = trainer(tmp_path, 1, DPStrategy(epsilon=1.0, clip_norm=3.0))
    with pytest.raises(ValueError, match=r"clip_norm=3\.0.*clip_norm=0\.1"):
        run.fit(generator(), DataLoader(digit_records, batch_size=16))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images_per_class": 0}, "images_per_class=0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"image_shape": (1, 4, 4)}, "8 x 8"),
        ({"schedule_overrides": {"learning_rate": 1.0}}, "learning_rate.*image_lr"),
        ({"schedule_overrides": {"distance": "l2"}}, "distance='l2'"),
        ({"schedule_overrides": {"averaging": 1.0}}, "averaging=1.0"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        generator(**arguments)


def test_classes_and_shape_come_from_the_data_module_or_are_asked_for(tmp_path, digit_records):
    with pytest.raises(ValueError, match="num_classes=… and image_shape"):
        trainer(tmp_path).fit(PrivateSetGeneration(), DataLoader(digit_records, batch_size=16))
    with pytest.raises(ValueError, match="num_classes=3, the data module declares 10"):
        trainer(tmp_path).fit(generator(num_classes=3), DigitsDataModule())


def test_image_steps_go_back_to_earlier_releases_also_after_a_resume(tmp_path, digit_records, monkeypatch):
    overrides = {"image_steps": 8, "replay": True}
    run, first = trainer(tmp_path, 6), generator(schedule_overrides=overrides)
    stop = pl.callbacks.LambdaCallback(on_train_batch_end=lambda run, *_: setattr(run, "should_stop", run.global_step == 3))
    run.callbacks.append(stop)
    run.fit(first, DataLoader(digit_records, batch_size=16))
    run.save_checkpoint(tmp_path / "three.ckpt")
    asked = []
    original = PrivateSetGeneration._set_gradient

    def spy(self, network, target):
        asked.append(float(next(iter(target.values())).sum()))
        return original(self, network, target)

    monkeypatch.setattr(PrivateSetGeneration, "_set_gradient", spy)
    again = generator(schedule_overrides=overrides)
    resumed = trainer(tmp_path, 6)
    resumed.fit(again, DataLoader(digit_records, batch_size=16), ckpt_path=tmp_path / "three.ckpt")
    assert len(again._asked) == len(resumed.strategy.ledger) == 6
    earlier = {float(next(iter(target.values())).sum()) for _, target in first._asked}
    assert earlier & set(asked)  # none of the three in 21 draws of 4 to 6: below 1e-5
    assert len(asked) == 3 * 8
    for (_, mine), (_, theirs) in zip(again._asked, first._asked, strict=False):
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
