"""One DP-SGD step: this package's strategy beside Opacus's own loop and beside the module without privacy.

    python benchmarks/dp_step.py

Lots of 256 drawn in advance, medians of 50 alternating steps, one run. Every loop does the whole step: forward, backward,
clipping, noise, optimizer; ours also writes the ledger to disk.
"""

from __future__ import annotations

import argparse
import logging
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import pytorch_lightning as pl
import torch
from opacus import PrivacyEngine
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models.resnet import BasicBlock, ResNet

from lightning_dpgen import DPStrategy
from lightning_dpgen.nn.classifiers import CLASSIFIERS

LOT = 256


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(min(32, channels), channels)


class Block(BasicBlock):
    """torchvision's without its addition in place, which Opacus's wrapper cannot take (this package's hooks can)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """As torchvision's."""
        out = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        return torch.relu(out + (x if self.downsample is None else self.downsample(x)))


def residual() -> nn.Module:
    network = ResNet(Block, [2, 2, 2, 2], num_classes=10, norm_layer=group_norm)
    for layer in network.modules():
        if isinstance(layer, nn.ReLU):
            layer.inplace = False
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int], int]] = {
    "MLP": (lambda: CLASSIFIERS["MLP"](10, (1, 28, 28)), (1, 28, 28), LOT),
    "ConvNet32": (lambda: CLASSIFIERS["ConvNet32"](10, (1, 28, 28)), (1, 28, 28), LOT),
    "ResNet18-GN": (residual, (3, 32, 32), 16),
}


class Module(pl.LightningModule):
    """A classifier."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def training_step(self, batch, batch_idx):
        """The mean cross-entropy."""
        return F.cross_entropy(self.network(batch[0]), batch[1])

    def configure_optimizers(self):
        """SGD."""
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Timed(pl.Callback):
    """Hands each step over to whoever waits for it: one step runs at a time, whichever loop it belongs to."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_start(self, *_: object) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *_: object) -> None:
        self.times.append(time.perf_counter() - self.start)


def records(shape: tuple[int, int, int], lot: int) -> TensorDataset:
    return TensorDataset(torch.rand(lot, *shape), torch.randint(10, (lot,)))


def lightning(network: nn.Module, data: TensorDataset, steps: int, strategy: object) -> list[float]:
    timed = Timed()
    with tempfile.TemporaryDirectory() as folder:
        trainer = pl.Trainer(
            max_steps=steps,
            accelerator="cpu",
            strategy=strategy,
            callbacks=[timed],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=folder,
        )
        trainer.fit(Module(network), DataLoader(data, batch_size=len(data)))
    return timed.times


def opacus(network: nn.Module, data: TensorDataset, steps: int, mode: str) -> list[float]:
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    made = PrivacyEngine().make_private(
        module=network,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=len(data)),
        criterion=nn.CrossEntropyLoss(),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
        poisson_sampling=False,
        grad_sample_mode=mode,
    )
    network, optimizer = made[0], made[1]
    criterion = made[2] if mode == "ghost" else nn.CrossEntropyLoss()
    images, labels = data.tensors
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        criterion(network(images), labels).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return times


def loops(name: str) -> dict[str, Callable[[int], list[float]]]:
    build, shape, lot = NETWORKS[name]
    data = records(shape, lot)

    def ours(mode: str) -> Callable[[int], list[float]]:
        return lambda steps: lightning(build(), data, steps, DPStrategy(noise_multiplier=1.0, grad_sample=mode))

    return {
        "without privacy": lambda steps: lightning(build(), data, steps, "auto"),
        "Opacus, hooks": lambda steps: opacus(build(), data, steps, "hooks"),
        "ours, hooks": ours("hooks"),
        "Opacus, ghost": lambda steps: opacus(build(), data, steps, "ghost"),
        "ours, ghost": ours("ghost"),
        "ours, functional": ours("functional"),
    }


def peak_of(run: Callable[[], object]) -> int:
    """MiB that ``run`` adds to the resident size at its highest (Linux)."""

    def status(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = status("VmRSS")
    run()
    return (status("VmHWM") - before) // 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS))
    parser.add_argument("--memory", nargs=2, metavar=("NETWORK", "LOOP"), help="Print the peak MiB of one loop and end.")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    for logger in ("pytorch_lightning", "lightning_dpgen"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    torch.manual_seed(0)
    if options.memory:
        run = loops(options.memory[0])[options.memory[1]]
        print(peak_of(lambda: run(2)))
        return
    print("| network (lot) | loop | ms a step | ratio to no privacy | records a second | peak MiB |\n|---|---|---|---|---|---|")
    for name in options.networks:
        lot = NETWORKS[name][2]
        runs = loops(name)
        times: dict[str, list[float]] = {loop: [] for loop in runs}
        rounds = 5  # alternating: a slow moment of the machine falls on all of them
        for _ in range(rounds):
            for loop, run in runs.items():
                times[loop] += run(options.steps // rounds + 1)[1:]
        base = statistics.median(times["without privacy"])
        for loop, found in times.items():
            median = statistics.median(found)
            memory = subprocess.run([sys.executable, __file__, "--memory", name, loop], capture_output=True, text=True).stdout.strip()
            print(f"| {name} ({lot}) | {loop} | {1e3 * median:.1f} | {median / base:.2f} | {lot / median:,.0f} | {memory} |", flush=True)


if __name__ == "__main__":
    main()
