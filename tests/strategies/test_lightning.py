"""Lightning's own demo modules and habits under DPStrategy: trained, or refused with the way out."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from helpers import Mlp, fit, flat, noised, oracle, trainer
from lightning_dpgen.callbacks import PrivacyBudgetStop, PrivacyMonitor
from pytorch_lightning.demos.boring_classes import BoringDataModule, BoringModel, ManualOptimBoringModel
from pytorch_lightning.demos.lstm import SimpleLSTM
from pytorch_lightning.demos.transformer import Transformer
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import Accuracy
from torchvision.models import resnet18

from lightning_dpgen import DPStrategy


def test_the_boring_model_fits_validates_and_tests(tmp_path):
    run = trainer(tmp_path, DPStrategy(epsilon=3.0), max_steps=-1, max_epochs=1)
    module, data = BoringModel(), BoringDataModule()
    start = flat(module)
    run.fit(module, data)
    assert noised(start, flat(module))
    assert len(run.strategy.ledger) == run.global_step == 64
    run.validate(module, data, verbose=False)
    run.test(module, data, verbose=False)
    assert run.strategy.epsilon_spent() <= 3.0


def test_the_manual_boring_model_wants_a_name(tmp_path):
    data = BoringDataModule()
    with pytest.raises(ValueError, match="manual optimization.*private_modules"):
        trainer(tmp_path, DPStrategy(epsilon=3.0)).fit(ManualOptimBoringModel(), data)
    run = trainer(tmp_path, DPStrategy(epsilon=3.0, private_modules="layer"), max_steps=4)
    run.fit(ManualOptimBoringModel(), data)
    assert len(run.strategy.ledger) == 4


class Sequences(pl.LightningModule):
    """A demo network of next-token prediction on pairs of token sequences."""

    def __init__(self, network, forward) -> None:
        super().__init__()
        self.network, self.call = network, forward

    def training_step(self, batch, batch_idx):
        return self.call(self.network, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def lstm(network, tokens, target):
    logits, _ = network(tokens, network.init_hidden(tokens.size(0)))
    return F.nll_loss(logits, target.flatten())


def transformer(network, tokens, target):
    output = network(tokens, target)
    return F.nll_loss(output.flatten(0, -2), target.flatten())


@pytest.mark.parametrize(
    ("build", "call"),
    [
        (lambda: SimpleLSTM(vocab_size=20, ninp=8, nhid=8, nlayers=1, dropout=0.0), lstm),
        (lambda: Transformer(vocab_size=20, ninp=8, nhead=2, nhid=8, nlayers=1, dropout=0.0), transformer),
    ],
)
@pytest.mark.parametrize("options", [{}, {"grad_sample": "functional"}, {"physical_batch_size": 1}])
def test_the_sequence_demos_train_or_name_the_way_out(tmp_path, build, call, options):
    generator = torch.Generator().manual_seed(0)
    records = TensorDataset(*(torch.randint(20, (12, 5), generator=generator) for _ in range(2)))
    module = Sequences(build(), call)
    start = flat(module)
    try:
        run = fit(tmp_path, module, records, 4, noise_multiplier=1.0, trainer_options={"max_steps": 3}, **options)
    except (RuntimeError, ValueError) as error:
        assert "physical_batch_size=1" in str(error) or "functional" in str(error)
        assert "physical_batch_size" not in options
        assert torch.equal(flat(module), start)
        return
    assert len(run.strategy.ledger) == 3
    assert (flat(module) != start).any()


def test_an_autoencoder_trains_under_every_engine(tmp_path, digits):
    class Autoencoder(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.encoder, self.decoder = nn.Linear(64, 8), nn.Sequential(nn.Linear(8, 64), nn.Sigmoid())

        def training_step(self, batch, batch_idx):
            pixels = batch[0].flatten(1)
            return F.mse_loss(self.decoder(torch.relu(self.encoder(pixels))), pixels)

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    for options in ({}, {"grad_sample": "ghost"}, {"grad_sample": "functional"}):
        fit(tmp_path, Autoencoder(), TensorDataset(digits[0][:64]), 16, noise_multiplier=1.0, trainer_options={"max_steps": 3}, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"grad_sample": "ghost"},
        pytest.param({"physical_batch_size": 2}, marks=pytest.mark.slow),
        pytest.param({"grad_sample": "functional"}, marks=pytest.mark.slow),
    ],
)
def test_a_residual_network_with_group_norm_is_the_loop_over_records(tmp_path, digits, options):
    class Residual(Mlp):
        def __init__(self):
            super().__init__()
            self.net = resnet18(num_classes=10, norm_layer=lambda channels: nn.GroupNorm(min(32, channels), channels))

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self.net(batch[0].repeat(1, 3, 4, 4)), batch[1])

    records = TensorDataset(digits[0][:4], digits[1][:4])
    module = Residual()
    start = flat(module)
    fit(tmp_path, module, records, 4, clip_norm=0.1, **options)
    torch.testing.assert_close((start - flat(module)) * 4, oracle(Residual(), records, 0.1), atol=1e-5, rtol=1e-2)


def test_callbacks_metrics_and_schedulers_work_as_usual(tmp_path, digit_records):
    class Full(Mlp):
        def __init__(self):
            super().__init__()
            self.accuracy = Accuracy("multiclass", num_classes=10)

        def validation_step(self, batch, batch_idx):
            self.accuracy(self.net(batch[0]), batch[1])
            self.log("accuracy", self.accuracy)

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]

    callbacks = [
        pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", save_last=True),
        pl.callbacks.LearningRateMonitor("step"),
        pl.callbacks.EMAWeightAveraging() if hasattr(pl.callbacks, "EMAWeightAveraging") else pl.callbacks.Timer(),
        PrivacyMonitor(1),
    ]
    options = {"max_steps": -1, "max_epochs": 2, "enable_checkpointing": True, "callbacks": callbacks, "logger": True}
    run = trainer(tmp_path, DPStrategy(epsilon=3.0), **options)
    loader = DataLoader(digit_records, batch_size=16, shuffle=True)
    run.fit(Full(), loader, DataLoader(digit_records, batch_size=64))
    assert len(run.strategy.ledger) == run.global_step == 8
    assert 0 < float(run.callback_metrics["privacy/epsilon"]) <= 3.0
    assert "accuracy" in run.callback_metrics
    assert (tmp_path / "ckpt" / "last.ckpt").exists()
    again = trainer(tmp_path, DPStrategy(epsilon=3.0), max_steps=-1, max_epochs=2)
    again.test(Sized(Full()), DataLoader(digit_records, batch_size=64), verbose=False)


class Sized(pl.LightningModule):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def test_step(self, batch, batch_idx):
        self.inner.net(batch[0])


def test_the_budget_stop_ends_below_its_epsilon(tmp_path, digit_records):
    strategy = DPStrategy(noise_multiplier=1.0)
    run = trainer(tmp_path, strategy, max_steps=40, min_steps=40, callbacks=[PrivacyBudgetStop(4.36)])
    run.fit(Mlp(), DataLoader(digit_records, batch_size=8))
    assert run.global_step in (19, 20)  # 20 lots come to 4.36
    assert strategy.epsilon_spent() <= 4.36 < strategy.account.epsilon_after(1)
    with pytest.raises(ValueError, match="is not below the strategy's epsilon=3"):
        trainer(tmp_path, DPStrategy(epsilon=3.0), callbacks=[PrivacyBudgetStop(3.0)]).fit(Mlp(), DataLoader(digit_records, batch_size=8))
    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), callbacks=[PrivacyBudgetStop(0.01)])
    with pytest.raises(ValueError, match="the first 1 steps come to epsilon="):
        run.fit(Mlp(), DataLoader(digit_records, batch_size=8))
    assert len(run.strategy.ledger) == 0
