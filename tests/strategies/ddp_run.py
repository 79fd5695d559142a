"""What each process of the tests of DPDDPStrategy runs; results go to files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytorch_lightning as pl
import torch
from helpers import Mlp, Module, flat
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import DPDDPStrategy, MixturePPCA, PrivateGenerator, PrivateSetGeneration


class Keep(pl.Callback):
    """Which records each lot held."""

    def __init__(self) -> None:
        self.lots: list[list[int]] = []

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        self.lots.append(batch[-1].tolist())


class Indexed(Mlp):
    """Batches end with the records' numbers."""

    def training_step(self, batch, batch_idx):
        return super().training_step(batch[:2], batch_idx)


def main(folder: str, options: str) -> None:
    chosen = json.loads(options)
    generator = torch.Generator().manual_seed(0)
    count, world = chosen["records"], chosen.get("world", 2)
    records = TensorDataset(
        torch.rand(count, 1, 8, 8, generator=generator), torch.randint(10, (count,), generator=generator), torch.arange(count)
    )
    torch.manual_seed(0)
    module: pl.LightningModule
    kinds = {"mixture": MixturePPCA, "private_set": PrivateSetGeneration}
    if "generator" in chosen:
        records = TensorDataset(*records.tensors[:2])
        module = kinds[chosen["generator"]](num_classes=10, image_shape=(1, 8, 8))
    elif chosen.get("wide"):
        module = Module(nn.Linear(64, 64), lambda net, batch: net(batch[0].flatten(1)).sum(1).mean() * 0)
    else:
        module = Indexed()
    keep = Keep()
    trainer = pl.Trainer(
        max_steps=chosen["steps"],
        accelerator="cpu",
        devices=world,
        strategy=DPDDPStrategy(process_group_backend="gloo", **chosen["strategy"]),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=[keep],
    )
    start = flat(module)
    trainer.fit(module, DataLoader(records, batch_size=chosen["batch_size"], shuffle=True), ckpt_path=chosen.get("resume"))
    if chosen.get("save"):
        trainer.save_checkpoint(Path(folder, "last.ckpt"))
    strategy = trainer.strategy
    torch.save(
        {
            "moved": start - flat(module),
            "state": module.public_state() if isinstance(module, PrivateGenerator) else None,
            "lots": keep.lots,
            "releases": len(strategy.ledger),
            "epsilon": strategy.epsilon_spent(),
            "steps": trainer.global_step,
            "file": None if strategy.ledger.path is None else str(strategy.ledger.path),
        },
        Path(folder, f"rank{trainer.global_rank}.pt"),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
