"""The cells of the table and of the convergence figure: which methods on which data, and what trains each at which scale."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_dpgen import (
    DPGAN,
    DPMERF,
    GSWGAN,
    DigitsDataModule,
    FashionMNISTDataModule,
    MixturePPCA,
    MNISTDataModule,
    PrivateGenerator,
    PrivateSetGeneration,
)

SCALES = ("cpu-small", "cpu", "gpu-paper")
METHODS = ("Real", "DP-CGAN", "DP-GAN", "GS-WGAN", "DP-MERF", "PSG 10", "PSG 20", "mixture", "set 10")
AT_ONE = ("DP-MERF", "PSG 10", "mixture", "set 10")
LONGER = "DP-GAN hour"
"""What more time gives: listed under the table."""
NETWORKS = Path(__file__).parents[1] / "examples" / "configs" / "gs_wgan_paper.yaml"
SIZED = "sized for the time that it takes and tried on MNIST's training records; not covered by the guarantee for MNIST"
TUNED = {
    "PSG": "tuned on MNIST's training records (50,000 to train, 10,000 held out); not covered by the guarantee for MNIST",
    "set": "tuned on MNIST's and FashionMNIST's training records (50,000 to train, 10,000 held out); not covered for these",
}
PAPERS = "after the papers, which chose by results on MNIST and FashionMNIST, outside the guarantee"
DATA = {"MNIST": MNISTDataModule, "FashionMNIST": FashionMNISTDataModule}


@dataclass(frozen=True)
class Cell:
    """One method on one data set at one budget."""

    scale: str
    method: str
    data: str
    epsilon: float

    @property
    def name(self) -> str:
        return f"{self.method} {self.data} {self.epsilon:g}"

    @property
    def folder(self) -> Path:
        return Path("runs/table") / self.scale / self.name.replace(" ", "_")

    @property
    def images(self) -> Path:
        return self.folder / "release" / "images.npz"


@dataclass(frozen=True)
class Recipe:
    """How a cell is trained: the module, the loader's batch size, the trainer's steps (none for full passes), the clip norm."""

    module: Callable[[], PrivateGenerator]
    batch_size: int
    steps: int | None
    clip_norm: float | None = None


def recipe(cell: Cell) -> Recipe:
    """What trains a cell at its scale."""
    small, paper = cell.scale == "cpu-small", cell.scale == "gpu-paper"
    if cell.method == "DP-CGAN":
        return Recipe(lambda: DPGAN("dp-cgan"), 600, 60 if small else 30_000 if paper else 4_000, clip_norm=1.1)
    if cell.method == "DP-GAN":
        if paper:
            rates = {"generator_lr": 2e-4, "discriminator_lr": 2e-4}
            larger = {"generator": "plain", "discriminator": "conv", "discriminator_steps": 50, **rates}
            return Recipe(lambda: DPGAN(overrides=larger), 128, 450_000)
        return Recipe(DPGAN, 128 if small else 256, 60 if small else 10_000)
    if cell.method == LONGER:
        return Recipe(DPGAN, 2_048, 16_000)
    if cell.method == "GS-WGAN":
        if small:
            return Recipe(lambda: GSWGAN(num_critics=20, critics_per_sample=4, batch_size=20, basis=8), 16, 20)
        if paper:
            return Recipe(lambda: GSWGAN(**yaml.safe_load(NETWORKS.read_text())["model"]["init_args"]), 32, 20_000)
        return Recipe(GSWGAN, 32, 2_000)
    if cell.method == "DP-MERF":
        if paper:
            frequencies = {"num_frequencies": 5_000, "frequencies_per_step": 5_000}
            return Recipe(lambda: DPMERF(generator="tiny", generator_steps=3_000, **frequencies), 1_000, None)
        return Recipe(lambda: DPMERF(generator_steps=200 if small else 2_000), 1_000, None)
    if cell.method == "mixture":
        return Recipe(MixturePPCA, 4_096, None)
    kind, images, *prior = cell.method.split()
    if kind == "set":
        return Recipe(lambda: PrivateSetGeneration(int(images), matching="features"), 256 if small else 8_192, 5 if small else 100)
    if paper and prior:
        return Recipe(lambda: PrivateSetGeneration(int(images), preset="published-prior"), 256, 20_000)
    if paper:
        steps = {"1": 10_000, "10": 100_000, "20": 200_000}[images]
        return Recipe(lambda: PrivateSetGeneration(int(images), preset="published"), 256, steps)
    overrides = {"prior": "generator"} if prior else {}
    return Recipe(lambda: PrivateSetGeneration(int(images), schedule_overrides=overrides), 256 if small else 2_048, 6 if small else 120)


def data_module(cell: Cell, root: str, batch_size: int) -> Any:
    if cell.data == "digits":
        return DigitsDataModule(batch_size=batch_size)
    return DATA[cell.data](root=root, batch_size=batch_size, origin=origin(cell))


def origin(cell: Cell) -> str:
    """Where lot size and steps come from, for the certificate."""
    kind = cell.method.split()[0]
    return PAPERS if cell.scale == "gpu-paper" and kind != "set" else TUNED.get(kind, SIZED)


def data_of(scale: str) -> tuple[str, ...]:
    return ("digits",) if scale == "cpu-small" else ("MNIST", "FashionMNIST")


def cells(scale: str) -> list[Cell]:
    """Every cell of a scale, the cheap ones first."""
    found = [Cell(scale, method, one, 10.0) for method in METHODS for one in data_of(scale)]
    found += [Cell(scale, method, one, 1.0) for method in AT_ONE for one in data_of(scale)]
    return found + ([Cell(scale, LONGER, "MNIST", 10.0)] if scale == "cpu" else [])


def curves(scale: str) -> list[Cell]:
    """What ``convergence.py`` draws: 1, 10 and 20 images a class, with and without the generator prior."""
    return [Cell(scale, f"PSG {n}{prior}", one, 10.0) for one in data_of(scale) for n in (1, 10, 20) for prior in ("", " prior")]


def named(found: list[Cell], text: str) -> list[Cell]:
    """The cell of this name, or those whose name contains it."""
    return [one for one in found if one.name == text] or [one for one in found if text in one.name]
