"""What several test files build: a quiet trainer, a module that knows nothing of privacy, the slow oracle."""

from __future__ import annotations

from collections.abc import Callable

import pytorch_lightning as pl
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_dpgen import DPStrategy
from lightning_dpgen.privacy import GaussianMechanism
from lightning_dpgen.privacy.clipping import ClippedSum, clipped_sum, tensors_of


class Module(pl.LightningModule):
    """A LightningModule of a network and a loss of (network, batch)."""

    def __init__(self, net, loss=lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), lr: float = 1.0) -> None:
        super().__init__()
        self.net, self.loss, self.lr = net, loss, lr

    def training_step(self, batch, batch_idx):
        return self.loss(self.net, batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


class Mlp(pl.LightningModule):
    """A classifier of 8 x 8 images that logs its loss."""

    def __init__(self, lr: float = 1.0, zero_loss: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10))
        self.lr, self.zero_loss = lr, zero_loss

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        if self.zero_loss:
            loss = loss * 0
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def trainer(folder, strategy, **options) -> pl.Trainer:
    """A trainer that prints and keeps nothing."""
    defaults = {"max_steps": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return pl.Trainer(strategy=strategy, default_root_dir=folder, enable_model_summary=False, **{**defaults, **options})


def fit(folder, module, records, batch_size, loader=None, strategy=None, trainer_options=None, **options):
    """Fits, noise-free unless an argument says otherwise; returns the trainer."""
    strategy = strategy or DPStrategy(**(options if "epsilon" in options else {"noise_multiplier": 0.0, **options}))
    run = trainer(folder, strategy, **(trainer_options or {}))
    run.fit(module, loader or DataLoader(records, batch_size=batch_size))
    return run


def flat(module) -> torch.Tensor:
    """All parameters as one vector."""
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def noised(before, after) -> bool:
    """Whether noise moved every number, but for the few (below 1 in a million each) that float32 rounds back."""
    return float((before != after).double().mean()) > 0.99


def oracle(module, records, clip_norm) -> torch.Tensor:
    """The sum of the clipped gradients of each record's own training step."""
    total = torch.zeros_like(flat(module))
    for record in records:
        module.zero_grad()
        loss = module.training_step(torch.utils.data.default_collate([record]), 0)
        loss.backward()
        row = torch.cat([torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in module.parameters()])
        total += row * min(1.0, clip_norm / float(row.norm()))
    module.zero_grad()
    return total


def unrelated_release(scale: float = 1.0):
    """A stand-in for ``GaussianMechanism.release`` that charges, and answers by the number of the call and the shapes alone."""

    def release(self, name, contribution):
        self.ledger.charge(self.plan.release_event(name, self.noise_multiplier))
        noise = torch.Generator().manual_seed(len(self.ledger))
        shapes = tensors_of(contribution if isinstance(contribution, ClippedSum) else clipped_sum(contribution, 1.0))
        return {key: scale * torch.randn(value.shape, generator=noise) for key, value in shapes.items()}

    return release


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def _spied(monkeypatch, keep: Callable) -> list:
    """A list to which ``keep(name, sums, released)`` is added for every sum that goes through the door."""
    found = []
    release = GaussianMechanism.release

    def spy(mechanism, name, contribution):
        sums = {key: value.clone() for key, value in tensors_of(contribution).items()}
        released = release(mechanism, name, contribution)
        found.append(keep(name, sums, released))
        return released

    monkeypatch.setattr(GaussianMechanism, "release", spy)
    return found


def spied_sums(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """A list to which every sum is added that goes through the door."""
    return _spied(monkeypatch, lambda name, sums, released: sums)


def spied_noise(monkeypatch) -> list[tuple[str, torch.Tensor]]:
    """A list to which every release's name and noise is added: all that came out less all that went in."""
    return _spied(monkeypatch, lambda name, sums, out: (name, torch.cat([(out[key].double() - sums[key]).flatten() for key in sums])))


def assert_bounded(sums: list[dict[str, torch.Tensor]], clip_norm: float, tolerance: float) -> None:
    """The sums differ in one record, which is null in the first: zero-out meets ``clip_norm`` and nothing passes its bound."""
    rows = torch.stack([torch.cat([value.flatten() for value in one.values()]).double() for one in sums])
    assert 0.99 * clip_norm < float((rows[1:] - rows[0]).norm(dim=1).max()) <= clip_norm * (1 + tolerance)
    assert float(torch.cdist(rows[1:], rows[1:]).max()) <= 2 * clip_norm * (1 + tolerance)
