"""Reports of how such code went wrong elsewhere, each with the right value or a refusal."""

from __future__ import annotations

import itertools
from collections import namedtuple

import pytest
import pytorch_lightning as pl
import torch
from helpers import Mlp, Module, fit, flat, noised, oracle, trainer
from lightning_dpgen.callbacks import PrivacyMonitor
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_dpgen import DPStrategy

Pair = namedtuple("Pair", ["x", "y"])


def test_a_layer_put_into_eval_mode_within_the_step(tmp_path, digit_records):
    class Evaluates(Mlp):
        def training_step(self, batch, batch_idx):
            self.net[1].eval()
            return F.cross_entropy(self.net(batch[0]), batch[1])

    for options in ({}, {"grad_sample": "ghost"}, {"grad_sample": "functional"}, {"physical_batch_size": 1}):
        module = Evaluates()
        start = flat(module)
        try:
            fit(tmp_path, module, digit_records, 64, clip_norm=0.05, **options)
        except RuntimeError as error:
            assert "net.1" in str(error)
            assert torch.equal(flat(module), start)
            continue
        expected = oracle(Module(Mlp().net), digit_records, 0.05)
        torch.testing.assert_close((start - flat(module)) * 64, expected, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("frozen", ["weight", "bias"])
@pytest.mark.parametrize("grad_sample", ["hooks", "ghost", "functional"])
def test_layers_that_are_frozen_in_part(tmp_path, digit_records, frozen, grad_sample):
    def build():
        module = Mlp()
        getattr(module.net[1], frozen).requires_grad_(False)
        return module

    module, start = build(), flat(build())
    fit(tmp_path, module, digit_records, 64, clip_norm=0.05, grad_sample=grad_sample)
    reference = build()
    reference.log = lambda *_: None
    torch.testing.assert_close((start - flat(module)) * 64, oracle(reference, digit_records, 0.05), atol=2e-5, rtol=1e-3)


class Structured(Dataset):
    """Three records of one of the structures that batches come in."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __len__(self):
        return 3

    def __getitem__(self, index):
        x = torch.full((64,), float(index))
        return {
            "tuple": (x, index),
            "dict": {"x": x, "meta": {"id": 3}},
            "nested": (x, (1, "a")),
            "named": Pair(x, index),
            "bytes": (x.to(torch.uint8), index),
        }[self.kind]


class Structures(Mlp):
    def training_step(self, batch, batch_idx):
        x = batch["x"] if isinstance(batch, dict) else batch[0]
        return self.net(x.float()).pow(2).mean()


def stacked(records):
    """A collate function of the user's own."""
    return torch.utils.data.default_collate(records)


@pytest.mark.parametrize("kind", ["tuple", "dict", "nested", "named", "bytes"])
@pytest.mark.parametrize("options", [{}, {"grad_sample": "functional"}, {"physical_batch_size": 1}])
def test_empty_lots_of_every_structure(tmp_path, kind, options):
    # P(no empty lot in 60) = 8e-10
    run = fit(
        tmp_path,
        Structures(lr=1e-3),
        None,
        1,
        DataLoader(Structured(kind), batch_size=1, collate_fn=stacked),
        trainer_options={"max_steps": 60},
        noise_multiplier=1.0,
        **options,
    )
    assert len(run.strategy.ledger) == run.global_step == 60
    assert flat(run.lightning_module).isfinite().all()


def test_empty_lots_from_spawned_workers(tmp_path):
    loader = DataLoader(
        Structured("dict"), batch_size=1, num_workers=1, multiprocessing_context="spawn", collate_fn=stacked, persistent_workers=True
    )
    run = fit(tmp_path, Structures(lr=1e-3), None, 1, loader, trainer_options={"max_steps": 20}, noise_multiplier=1.0)
    assert len(run.strategy.ledger) == 20


def test_a_lot_skipped_for_what_it_holds(tmp_path, digits):
    images = digits[0][:20].clone()
    images[4] = 9.0
    records = TensorDataset(images, digits[1][:20])

    class Returns(Mlp):
        def training_step(self, batch, batch_idx):
            return None if len(batch[0]) and batch[0].max() > 3 else super().training_step(batch, batch_idx)

    seen = []

    class Watch(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(flat(module))

    for options in ({}, {"physical_batch_size": 3}):
        seen.clear()
        run = fit(
            tmp_path, Returns(), records, 10, noise_multiplier=2.0, trainer_options={"max_steps": 40, "callbacks": [Watch()]}, **options
        )
        assert len(run.strategy.ledger) == len(seen) == 40
        assert all(noised(a, b) for a, b in itertools.pairwise(seen))

    class Skips(Mlp):
        def on_train_batch_start(self, batch, batch_idx):
            return -1 if batch_idx == 1 else None

    with pytest.raises(RuntimeError, match="2 lots were drawn and 1 not released"):
        fit(tmp_path, Skips(), records, 10, noise_multiplier=2.0, trainer_options={"max_steps": -1, "max_epochs": 1})


@pytest.mark.parametrize("limits", [{}, {"limit_train_batches": 3}, {"limit_train_batches": 0.5}, {"val_check_interval": 0.5}])
def test_micro_batches_change_nothing_that_is_counted(tmp_path, digits, limits):
    records = TensorDataset(digits[0][:256], digits[1][:256])
    found = []
    for physical in (None, 4):
        options = {"max_steps": -1, "max_epochs": 2, **limits}
        run = fit(tmp_path, Mlp(), records, 32, trainer_options=options, noise_multiplier=1.0, physical_batch_size=physical)
        found.append((run.global_step, len(run.strategy.ledger), run.strategy.epsilon_spent(), run.strategy.plan))
    assert found[0] == found[1]
    lots = {"limit_train_batches": {3: 6, 0.5: 8}}.get(next(iter(limits), ""), {}).get(next(iter(limits.values()), None), 16)
    assert found[0][:2] == (lots, lots)
    assert found[0][3].release("gradient_sum").count == lots


def test_reading_epsilon_has_no_effect_and_it_only_grows(tmp_path, digit_records):
    read = []

    class Reads(pl.Callback):
        def on_train_batch_end(self, trainer, module, *args):
            read.append([trainer.strategy.epsilon_spent() for _ in range(3)])

    stop = pl.callbacks.EarlyStopping("privacy/epsilon", patience=100, check_on_train_epoch_end=True)
    finals = []
    for callbacks in ([], [Reads(), PrivacyMonitor(1), stop]):
        strategy = DPStrategy(noise_multiplier=1.0)
        assert strategy.epsilon_spent() == 0.0
        run = trainer(tmp_path, strategy, max_steps=8, callbacks=callbacks)
        run.fit(Mlp(), DataLoader(digit_records, batch_size=8))
        finals.append((strategy.epsilon_spent(), len(strategy.ledger)))
    assert finals[0] == finals[1]
    assert finals[0][1] == 8
    assert all(len(set(step)) == 1 for step in read)
    values = [step[0] for step in read]
    assert all(b > a > 0 for a, b in itertools.pairwise(values))


def test_a_network_that_another_optimizer_form_would_leave_plain(tmp_path, digits):
    """Two parameter groups with rates of their own both step on noise."""

    class Two(Mlp):
        def configure_optimizers(self):
            return torch.optim.SGD([{"params": self.net[1].parameters(), "lr": 1.0}, {"params": self.net[3].parameters(), "lr": 0.5}])

    module = Two(zero_loss=True)
    start = [p.detach().clone() for p in module.parameters()]
    fit(tmp_path, module, TensorDataset(digits[0][:16], digits[1][:16]), 16, noise_multiplier=100.0)
    moved = [float((p - q).std()) for p, q in zip(module.parameters(), start, strict=True) if p.dim() > 1]
    # 1,024 and 160 normals: within 30 % but for a chance below 1e-7
    assert moved[0] == pytest.approx(100 / 16, rel=0.3)
    assert moved[1] == pytest.approx(50 / 16, rel=0.3)


def test_a_list_of_layers_kept_out_of_the_module_is_refused(tmp_path, digit_records):
    class Hidden(Mlp):
        def __init__(self):
            super().__init__()
            self.extra = [nn.Linear(64, 10)]

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0]) + self.extra[0](batch[0].flatten(1)), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD([*self.parameters(), *self.extra[0].parameters()], lr=1.0)

    with pytest.raises((RuntimeError, ValueError), match="not the module's"):
        fit(tmp_path, Hidden(), digit_records, 16)
