"""DP-SGD of a user's own module: the tests of the mechanism, and what is refused."""

from __future__ import annotations

import math

import pytest
import pytorch_lightning as pl
import torch
from helpers import Mlp, fit, flat, noised, oracle, trainer
from lightning_dpgen.callbacks import PrivacyMonitor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset, WeightedRandomSampler

from lightning_dpgen import DPStrategy
from lightning_dpgen.privacy import PoissonSampling


@pytest.mark.parametrize("clip_norm", [0.05, 50.0])
def test_one_lot_of_everything_is_the_loop_over_records(tmp_path, digit_records, clip_norm):
    module = Mlp()
    start, expected = flat(module), oracle(module, digit_records, clip_norm)
    fit(tmp_path, module, digit_records, 64, clip_norm=clip_norm)
    torch.testing.assert_close((start - flat(module)) * 64, expected, atol=2e-5, rtol=1e-4)


def test_no_record_moves_the_released_sum_by_more_than_the_clip_norm(tmp_path, digit_records):
    images, labels = digit_records.tensors

    def released(images):
        module = Mlp()
        start = flat(module)
        fit(tmp_path, module, TensorDataset(images, labels), 64, clip_norm=0.1)
        return (start - flat(module)) * 64

    base = released(images)
    for poison in (1e4, -1e4, float("nan")):
        changed = images.clone()
        changed[7] = poison
        assert (released(changed) - base).norm() <= 2 * 0.1 * (1 + 1e-4)  # replaced: 2C


def test_noise_reaches_every_parameter_with_the_stated_deviation(tmp_path, digits):
    # 1,210 normals: the sample deviation is within 12 % but for a chance below 1e-8 (6 standard errors of 2 %).
    for records in (20, 23):
        module = Mlp(zero_loss=True)
        start = flat(module)
        fit(tmp_path, module, TensorDataset(digits[0][:records], digits[1][:records]), 4, noise_multiplier=2.0, clip_norm=0.5)
        moved = start - flat(module)
        assert float(moved.std()) == pytest.approx(2.0 * 0.5 / 4, rel=0.12)  # the expected lot divides, whatever N is
        assert noised(start, flat(module))


def test_the_loader_samples_at_the_accounted_rate_and_every_lot_counts(tmp_path, digits):
    records = TensorDataset(digits[0][:21], digits[1][:21])
    for drop_last, lots in ((False, 6), (True, 5)):
        loader = DataLoader(records, batch_size=4, drop_last=drop_last, shuffle=True)
        run = fit(tmp_path, Mlp(), records, 4, loader, trainer_options={"max_steps": -1, "max_epochs": 1}, noise_multiplier=1.0)
        assert run.strategy.plan.sampling == PoissonSampling(21, 4)
        assert len(run.strategy.ledger) == run.global_step == lots
        assert run.strategy.ledger.event() == run.strategy.plan.event(1.0)
    assert run.callback_metrics["privacy/epsilon"] == pytest.approx(run.strategy.plan.epsilon(1.0, 1e-5))


@pytest.mark.parametrize("workers", [0, 2])
def test_empty_lots_step_on_noise(tmp_path, digits, workers):
    class Watch(pl.Callback):
        def __init__(self):
            self.weights = []

        def on_train_batch_end(self, trainer, module, *args):
            self.weights.append(flat(module))

    watch = Watch()
    records = TensorDataset(digits[0][:3], digits[1][:3])
    options = {"max_steps": -1, "max_epochs": 14, "callbacks": [watch]}
    loader = DataLoader(records, batch_size=1, num_workers=workers)
    run = fit(tmp_path, Mlp(), records, 1, loader, trainer_options=options, noise_multiplier=1.0)
    assert len(run.strategy.ledger) == run.global_step == 42  # 30 % of the lots are empty; none in 42: 4e-7
    assert all(bool((a != b).any()) and bool(b.isfinite().all()) for a, b in zip(watch.weights, watch.weights[1:], strict=False))


def test_a_step_that_never_returns_a_loss_is_refused(tmp_path, digit_records):
    class Forgets(Mlp):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match="Return the loss"):
        fit(tmp_path, Forgets(), digit_records, 8, noise_multiplier=1.0)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_step_that_returns_nothing_is_released_as_noise(tmp_path, digit_records):
    class Skips(Mlp):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) if self.trainer.strategy._probe else None

    module = Skips()
    start = flat(module)
    run = fit(tmp_path, module, digit_records, 8, noise_multiplier=1.0)
    assert len(run.strategy.ledger) == 1
    assert noised(start, flat(module))


@pytest.mark.parametrize("options", [{}, {"grad_sample": "ghost"}, {"grad_sample": "functional"}, {"physical_batch_size": 2}])
def test_non_interference(tmp_path, released_stub, digits, options):
    """With a release that ignores its rows, two unrelated data sets leave the same public state, bit for bit."""
    states = []
    for images, labels in ((digits[0][:40], digits[1][:40]), (torch.rand(40, 1, 8, 8) * 100, torch.zeros(40, dtype=torch.int64))):
        torch.manual_seed(0)
        module = Mlp(lr=0.1)
        run = fit(tmp_path, module, TensorDataset(images, labels), 5, trainer_options={"max_steps": 12}, noise_multiplier=1.0, **options)
        optimizer = run.strategy.optimizers[0].state_dict() if run.strategy.optimizers else {}
        metrics = {k: float(v) for k, v in run.callback_metrics.items() if k != "loss"}  # the user's own metric is not covered
        states.append((flat(module), run.global_step, len(run.strategy.ledger), str(optimizer), metrics, torch.get_rng_state()))
    for one, other in zip(*states, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_lot_of_nan_keeps_the_public_state_finite(tmp_path, digits):
    module = Mlp()
    records = TensorDataset(torch.full((16, 1, 8, 8), float("nan")), digits[1][:16])
    run = fit(tmp_path, module, records, 16, noise_multiplier=1.0)
    assert flat(module).isfinite().all()
    assert len(run.strategy.ledger) == 1


def test_layers_in_eval_mode_and_batch_statistics_are_refused(tmp_path, digit_records):
    module = Mlp()
    module.net[1].eval()
    with pytest.raises(RuntimeError, match="eval mode"):
        fit(tmp_path, module, digit_records, 16)
    module = Mlp()
    module.net.insert(2, nn.BatchNorm1d(16))
    with pytest.raises(ValueError, match=r"net\.2 is BatchNorm1d.*GroupNorm"):
        fit(tmp_path, module, digit_records, 16)


def test_a_layer_that_thaws_is_refused(tmp_path, digit_records):
    class Thaws(Mlp):
        def __init__(self):
            super().__init__()
            self.net[1].requires_grad_(False)

        def on_train_batch_start(self, batch, batch_idx):
            if batch_idx == 1:
                self.net[1].requires_grad_(True)

    with pytest.raises(RuntimeError, match=r"net\.1\.bias.*changed|changed.*net\.1\.bias"):
        fit(tmp_path, Thaws(), digit_records, 16, trainer_options={"max_steps": 3})


def test_stepping_round_the_strategy_and_strange_parameters_are_refused(tmp_path, digit_records):
    class Round(Mlp):
        def on_train_batch_end(self, *args):
            self.optimizers(use_pl_optimizer=False).step()

    class Strange(Mlp):
        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), torch.ones(3, requires_grad=True)], lr=1.0)

    for kind, message in ((Round, "round DPStrategy"), (Strange, r"1 trainable parameters.*\(3,\)")):
        with pytest.raises(RuntimeError, match=message):
            fit(tmp_path, kind(), digit_records, 16)


def test_an_empty_lot_shows_nothing_of_the_record_that_its_structure_comes_from():
    from lightning_dpgen.strategies.loaders import EmptyAwareCollate

    records = [{"x": torch.ones(3), "meta": {"id": 7, "name": "secret"}}]
    empty = EmptyAwareCollate(torch.utils.data.default_collate, records)([])
    assert empty["x"].shape == (0, 3)
    assert empty["meta"]["id"].shape == (0,)
    assert "secret" not in str(empty)


def test_a_loader_that_changes_within_a_fit_is_refused(tmp_path, digit_records):
    class Grows(Mlp):
        def train_dataloader(self):
            return DataLoader(digit_records, batch_size=8 if self.trainer.current_epoch == 0 else 16)

    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=-1, max_epochs=2, reload_dataloaders_every_n_epochs=1)
    with pytest.raises(ValueError, match="changed within a fit"):
        run.fit(Grows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gradient_clip_val": 1.0}, "gradient_clip_val=1.0.*clip_norm"),
        ({"accumulate_grad_batches": 2}, "accumulate_grad_batches=2.*batch_size"),
        ({"overfit_batches": 2}, "overfit_batches=2"),
        ({"max_steps": -1}, "neither max_steps nor max_epochs"),
        ({"callbacks": [pl.callbacks.LearningRateFinder()]}, "LearningRateFinder"),
    ],
)
def test_trainer_arguments_that_change_the_guarantee_are_refused(tmp_path, digit_records, options, message):
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, Mlp(), digit_records, 8, epsilon=3.0, trainer_options={"max_epochs": -1, **options})


def test_loaders_whose_sampling_would_be_replaced_are_refused(tmp_path, digit_records):
    loaders = {
        "WeightedRandomSampler": DataLoader(digit_records, batch_size=8, sampler=WeightedRandomSampler(torch.ones(64), 64)),
        "batch_sampler": DataLoader(digit_records, batch_sampler=[[0, 1], [2, 3]]),
        "RandomSampler": DataLoader(digit_records, batch_size=8, sampler=torch.utils.data.RandomSampler(digit_records, num_samples=8)),
    }
    for message, loader in loaders.items():
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, Mlp(), digit_records, 8, loader)
    with pytest.raises(ValueError, match=r"100.*64 records"):
        fit(tmp_path, Mlp(), digit_records, 100)
    with pytest.raises(ValueError, match="exactly one DataLoader|CombinedLoader"):
        fit(tmp_path, Mlp(), digit_records, 8, [DataLoader(digit_records, batch_size=8), DataLoader(digit_records, batch_size=8)])


@pytest.mark.parametrize(
    "arguments",
    [{}, {"epsilon": 1.0, "noise_multiplier": 1.0}, {"epsilon": 0}, {"epsilon": math.nan}, {"epsilon": 1, "delta": 1}]
    + [{"epsilon": 1, "clip_norm": value} for value in (0, -1, math.inf)]
    + [{"noise_multiplier": -1}],
)
def test_arguments_out_of_range_are_refused_at_once(arguments):
    with pytest.raises(ValueError, match=r"(epsilon|delta|clip_norm|noise_multiplier)="):
        DPStrategy(**arguments)


def test_nothing_is_left_on_the_module_and_the_registry_knows_the_strategy(tmp_path, digit_records):
    module = Mlp()
    run = fit(tmp_path, module, digit_records, 8, strategy="dpsgd")
    assert isinstance(run.strategy, DPStrategy)
    assert run.strategy.budget.epsilon == 3.0
    assert not any(hasattr(p, "grad_sample") for p in module.parameters())
    assert not any("activations" in vars(m) or m._forward_hooks or m._backward_hooks for m in module.modules())


def test_several_devices_are_refused_and_the_first_is_used():
    strategy = DPStrategy(epsilon=1.0)
    strategy.parallel_devices = [torch.device("cuda:0")]
    assert strategy.root_device == torch.device("cuda:0")
    strategy.parallel_devices = [torch.device("cuda:0"), torch.device("cuda:1")]
    with pytest.raises(ValueError, match="one device and was given 2"):
        strategy.setup_environment()


def test_what_records_could_write_past_the_door_is_refused(tmp_path, digit_records):
    class Frozen(Mlp):
        def __init__(self):
            super().__init__()
            self.memory = nn.Linear(64, 1).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.memory.weight.data.copy_(batch[0].flatten(1).sum(0, keepdim=True))
            self.memory.weight.add_(0.0)
            return super().training_step(batch, batch_idx)

    class Trainable(Mlp):
        def on_after_backward(self):
            with torch.no_grad():
                self.net[1].weight.add_(self.net[1].weight.grad)

    class Buffer(Mlp):
        def __init__(self):
            super().__init__()
            self.register_buffer("mean", torch.zeros(64))

        def on_train_batch_end(self, outputs, batch, batch_idx):
            if batch_idx == self.trainer.max_steps - 1:
                self.mean += batch[0].flatten(1).sum(0)

    for kind, message in (
        (Frozen, "memory.weight were written"),
        (Trainable, "net.1.weight were written"),
        (Buffer, "buffers mean changed"),
    ):
        with pytest.raises(RuntimeError, match=message):
            fit(tmp_path, kind(), digit_records, 16, trainer_options={"max_steps": 2}, noise_multiplier=1.0)


def test_a_parameter_that_thaws_for_one_backward_pass_keeps_no_raw_gradient(tmp_path, digit_records):
    class Flickers(Mlp):
        def __init__(self):
            super().__init__()
            self.extra = nn.Linear(64, 10).requires_grad_(False)

        def training_step(self, batch, batch_idx):
            self.extra.requires_grad_(True)
            loss = F.cross_entropy(self.net(batch[0]) + self.extra(batch[0].flatten(1)), batch[1])
            self.raw = loss
            return loss

        def on_after_backward(self):
            self.extra.requires_grad_(False)

    module = Flickers()
    start = module.extra.weight.clone()
    with pytest.raises(RuntimeError, match="trainable parameters changed"):
        fit(tmp_path, module, digit_records, 16, noise_multiplier=1.0)
    assert torch.equal(module.extra.weight, start)


def test_monitors_of_numbers_without_noise_are_noted_or_refused(tmp_path, digit_records, caplog):
    class Validated(Mlp):
        def validation_step(self, batch, batch_idx):
            self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    stop = pl.callbacks.EarlyStopping("val_loss")
    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_epochs=1, max_steps=-1, callbacks=[stop])
    run.fit(Validated(), DataLoader(digit_records, batch_size=16), DataLoader(digit_records, batch_size=64))
    assert run.strategy.account.notes == ["EarlyStopping followed 'val_loss', a number that was not released under differential privacy."]
    assert "outside the guarantee" in caplog.text
    assert "logs loss" in caplog.text

    class Plateau(Mlp):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "loss"}}

    for module, callbacks in ((Plateau(), []), (Mlp(), [pl.callbacks.EarlyStopping("loss")])):
        with pytest.raises(ValueError, match="(ReduceLROnPlateau|EarlyStopping) follows 'loss'"):
            fit(tmp_path, module, digit_records, 16, noise_multiplier=1.0, trainer_options={"max_steps": 3, "callbacks": callbacks})
    epsilon = pl.callbacks.EarlyStopping("privacy/epsilon", check_on_train_epoch_end=True)
    run = fit(tmp_path, Mlp(), digit_records, 16, noise_multiplier=1.0, trainer_options={"callbacks": [PrivacyMonitor(1), epsilon]})
    assert run.strategy.account.notes == []


@pytest.mark.parametrize("form", ["optimizer", "list", "lists", "dict", "groups"])
def test_noise_reaches_every_parameter_in_every_form_of_configure_optimizers(tmp_path, digits, form):
    # 64 * 16 numbers and more a layer: a deviation of 12 % is 5 standard errors of the smallest layer of 320.
    class Forms(Mlp):
        def __init__(self):
            super().__init__(zero_loss=True)
            self.unused = nn.Linear(40, 8)

        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), lr=1.0)
            if form == "groups":
                return torch.optim.SGD([{"params": self.net.parameters()}, {"params": self.unused.parameters()}], lr=1.0)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 100)
            return {
                "optimizer": optimizer,
                "list": [optimizer],
                "lists": ([optimizer], [scheduler]),
                "dict": {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}},
            }[form]

    module = Forms()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    fit(tmp_path, module, TensorDataset(digits[0][:16], digits[1][:16]), 16, noise_multiplier=1000.0)
    for name, p in module.named_parameters():
        if p.numel() >= 160:
            assert float((p - before[name]).std()) == pytest.approx(62.5, rel=0.25)
        assert ((p - before[name]) != 0).all()


def test_closures_and_optimizers_that_ask_twice_are_refused(tmp_path, digit_records):
    class AsksTwice(torch.optim.SGD):
        def step(self, closure=None):
            closure()
            closure()

    class Twice(Mlp):
        def configure_optimizers(self):
            return AsksTwice(self.parameters(), lr=1.0)

    module = Twice()
    start = flat(module)
    with pytest.raises(RuntimeError, match="released already"):
        fit(tmp_path, module, digit_records, 16, noise_multiplier=1.0)
    assert torch.equal(flat(module), start)


def test_a_lot_is_released_once_however_its_step_is_written(tmp_path, digit_records):
    class Twice(Mlp):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            optimizer.step(closure=closure)
            optimizer.step(closure=closure)

    class Sometimes(Mlp):
        def optimizer_step(self, epoch, batch_idx, optimizer, closure):
            if batch_idx % 2 == 0:
                optimizer.step(closure=closure)
            else:
                closure()

    with pytest.raises(RuntimeError, match="released already"):
        fit(tmp_path, Twice(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 4})
    with pytest.raises(RuntimeError, match="2 lots were drawn and 1 not released"):
        fit(tmp_path, Sometimes(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 4})


def test_the_optimizer_is_not_told_the_loss(tmp_path, digit_records):
    told = []

    class Polyak(torch.optim.SGD):
        @torch.no_grad()
        def step(self, closure=None):
            with torch.enable_grad():
                told.append(float(closure()))
            for parameter in self.param_groups[0]["params"]:
                parameter -= 0.1 * parameter.grad

    class Greedy(Mlp):
        def configure_optimizers(self):
            return Polyak(self.parameters(), lr=0.1)

    fit(tmp_path, Greedy(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 3})
    assert told == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("target", ["prototype", "statistic"])
def test_what_is_written_through_data_is_seen_at_the_end(tmp_path, digit_records, target):
    class Writes(Mlp):
        def __init__(self):
            super().__init__()
            self.prototype = nn.Parameter(torch.zeros(64), requires_grad=False)
            self.register_buffer("statistic", torch.zeros(64))

        def training_step(self, batch, batch_idx):
            if batch_idx > 1:
                getattr(self, target).data.mul_(0.9).add_(0.1 * batch[0].flatten(1).mean(0))
            return super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=target):
        fit(tmp_path, Writes(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 8})


def test_numbers_that_training_logs_may_not_steer_it(tmp_path, digit_records):
    class Epoch(Mlp):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("train_loss_epoch", loss)
            return loss

    class Late(Mlp):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            self.log("late", outputs["loss"])

    class Disguised(Mlp):
        def training_step(self, batch, batch_idx):
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.log("step", loss)
            return loss

    class Public(Mlp):
        def on_train_epoch_end(self):
            self.log("score", 1.0)

    stop = pl.callbacks.EarlyStopping("score", check_on_train_epoch_end=True, patience=5)
    options = {"max_steps": -1, "max_epochs": 2, "callbacks": [stop]}
    run = fit(tmp_path, Public(), digit_records, 8, noise_multiplier=1.0, trainer_options=options)
    assert any("followed 'score'" in note for note in run.strategy.account.notes)
    for module, key in ((Epoch(), "train_loss_epoch"), (Late(), "late"), (Disguised(), "step")):
        stop = pl.callbacks.EarlyStopping(key, check_on_train_epoch_end=True)
        options = {"max_steps": -1, "max_epochs": 3, "callbacks": [stop]}
        with pytest.raises(ValueError, match=f"EarlyStopping follows '{key}'"):
            fit(tmp_path, module, digit_records, 8, noise_multiplier=1.0, trainer_options=options)
