"""Mixtures and feature-matched sets: accuracy over noise draws and evaluation seeds, time, and the ceilings beside them.

    python benchmarks/ask_once.py                 # everything that is missing, some minutes a line; goes on where it stopped
    python benchmarks/ask_once.py --cells mixture # only cells whose name contains this
    python benchmarks/ask_once.py --device cuda   # trains and evaluates there; times are then that device's, and marked so
    python benchmarks/ask_once.py --table         # prints what there is

Results are kept in ``benchmarks/results/ask_once.json``, releases in ``runs/ask_once``. Noise draws, evaluation seeds, numbers of samples
and the package's defaults are fixed here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from filelock import FileLock
from lightning_dpgen.callbacks import Prior

from lightning_dpgen import (
    DPStrategy,
    FashionMNISTDataModule,
    MixturePPCA,
    MNISTDataModule,
    PrivateGenerator,
    PrivateSetGeneration,
    SanitizedRelease,
    tstr,
)

RESULTS = Path(__file__).parent / "results" / "ask_once.json"
DATA = {"MNIST": MNISTDataModule, "FashionMNIST": FashionMNISTDataModule}
DRAWS, SEEDS = (0, 1, 2), (0, 1, 2)
MIXTURE_SAMPLES, PRIOR_SHARE = 5000, 0.3


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    name: str
    method: str
    data: str
    epsilon: float | None
    protocol: str
    classifiers: tuple[str, ...]
    images_per_class: int = 0
    prior: bool = True
    steps: int = 100

    @property
    def draws(self) -> tuple[int, ...]:
        return (0,) if self.method == "real" or self.epsilon is None else DRAWS


def cells() -> list[Cell]:
    found = []
    for data in DATA:
        for epsilon in (10.0, 1.0, None):
            found.append(Cell(f"mixture {data} {epsilon}", "mixture", data, epsilon, "common", ("CNN", "MLP", "LogReg")))
        for images, epsilon in ((10, 10.0), (10, 1.0), (50, 10.0)):
            found.append(Cell(f"set {data} {images} {epsilon}", "set", data, epsilon, "quick", ("ConvNet32",), images))
        found.append(Cell(f"set from noise {data} 10 10.0", "set", data, 10.0, "quick", ("ConvNet32",), 10, prior=False))
        for images in (10, 50):
            found.append(Cell(f"set {data} {images} None", "set", data, None, "quick", ("ConvNet32",), images))
        found.append(Cell(f"real {data}", "real", data, None, "common", ("CNN", "MLP", "LogReg")))
    return found


def trainer(folder: Path, epsilon: float | None, device: str, **options: Any) -> pl.Trainer:
    strategy = DPStrategy(noise_multiplier=0.0) if epsilon is None else DPStrategy(epsilon=epsilon, delta=1e-5)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(strategy=strategy, default_root_dir=folder, accelerator=device, devices=1, **quiet, **options)


def fit(cell: Cell, folder: Path, root: str, device: str) -> tuple[PrivateGenerator, dict[str, Any]]:
    """Trains; the seed of the public randomness is torch's own, so that draws differ in it too."""
    start, spent = time.perf_counter(), None
    data = DATA[cell.data](root=root, batch_size=4096)
    callbacks = []
    if cell.method == "mixture":
        module: PrivateGenerator = MixturePPCA()
        run = trainer(folder, cell.epsilon, device, max_epochs=7)
    else:
        module = PrivateSetGeneration(cell.images_per_class, matching="features")
        if cell.prior:
            first = trainer(folder, None if cell.epsilon is None else PRIOR_SHARE * cell.epsilon, device, max_epochs=7)
            first.fit(MixturePPCA(), datamodule=data)
            if cell.epsilon is None:
                labels = module_labels(cell)
                module.prior, module.started_from = (first.lightning_module.sample(labels), labels), "a mixture without noise"
                callbacks.append(StartFrom())
            else:
                labels = module_labels(cell)
                SanitizedRelease.from_trainer(first, labels).save(folder / "prior", overwrite=True)
                callbacks.append(Prior(str(folder / "prior")))
        data = DATA[cell.data](root=root, batch_size=8192)
        run = trainer(folder, cell.epsilon, device, max_steps=cell.steps, callbacks=callbacks)
    run.fit(module, datamodule=data)
    if cell.epsilon is not None:
        spent = run.strategy.epsilon_spent()
    return module, {"epsilon": spent, "fit_seconds": time.perf_counter() - start, "device": device}


class StartFrom(pl.Callback):
    """Without noise there is no release to start from."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pl_module.start_from(*pl_module.prior)


def module_labels(cell: Cell) -> torch.Tensor:
    return torch.arange(10).repeat_interleave(cell.images_per_class)


def run_draw(cell: Cell, draw: int, root: str, device: str) -> dict[str, Any]:
    """One noise draw: fit, or take the images of an earlier fit."""
    folder = Path("runs/ask_once") / cell.name.replace(" ", "_") / str(draw)
    kept, facts = folder / "images.pt", folder / "facts.json"
    if not kept.exists():
        folder.mkdir(parents=True, exist_ok=True)
        if cell.method == "real":
            data = DATA[cell.data](root=root, batch_size=256)
            data.setup("fit")
            images, labels = data.train_records.tensors()
            found: dict[str, Any] = {"epsilon": None}
        else:
            module, found = fit(cell, folder, root, device)
            labels = torch.arange(10).repeat_interleave(MIXTURE_SAMPLES) if cell.method == "mixture" else module.release_labels()
            start = time.perf_counter()
            with torch.no_grad():
                images = module.sample(labels)
            found["sample_seconds_per_10000"] = (time.perf_counter() - start) * 10_000 / len(labels)
        torch.save(((images * 255).round().to(torch.uint8), labels), kept)
        facts.write_text(json.dumps(found))
    return json.loads(facts.read_text())


def record(cell: Cell, draw: int, seed: int | None, values: dict[str, Any]) -> None:
    """Adds to the results, also while another process does."""
    RESULTS.parent.mkdir(exist_ok=True)
    with FileLock(f"{RESULTS}.lock"):
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
        entry = results.setdefault(cell.name, {}).setdefault(str(draw), {"evaluations": {}})
        if seed is None:
            entry.update(values)
        else:
            entry["evaluations"][str(seed)] = values
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")


def known(cell: Cell, draw: int) -> dict[str, Any]:
    with FileLock(f"{RESULTS}.lock"):
        results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    return results.get(cell.name, {}).get(str(draw), {"evaluations": {}})["evaluations"]


def evaluate(cell: Cell, draw: int, seed: int, root: str, device: str) -> None:
    pixels, labels = torch.load(Path("runs/ask_once") / cell.name.replace(" ", "_") / str(draw) / "images.pt")
    data = DATA[cell.data](root=root, batch_size=256)
    data.setup("test")
    start = time.perf_counter()
    table = tstr((pixels.float() / 255, labels), data.real_test(), 10, cell.protocol, [seed], cell.classifiers, False, device)
    found = {name: round(table.mean(name), 2) for name in cell.classifiers}
    record(cell, draw, seed, {**found, "seconds": round(time.perf_counter() - start), "device": device})
    print(f"{cell.name}, noise draw {draw}, seed {seed}: {found}", flush=True)


def print_table() -> None:
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    print("| cell | accuracy %: mean ± std (least … most) | noise draws, evaluations | epsilon | fit, s |\n|---|---|---|---|---|")
    for cell in cells():
        draws = results.get(cell.name, {})
        for name in cell.classifiers:
            values = [seed[name] for draw in draws.values() for seed in draw["evaluations"].values() if name in seed]
            if not values:
                continue
            spread = f"{statistics.fmean(values):.2f} ± {statistics.stdev(values) if len(values) > 1 else 0:.2f}"
            fits = [draw["fit_seconds"] for draw in draws.values() if "fit_seconds" in draw and draw.get("device", "cpu") == "cpu"]
            epsilons = [draw["epsilon"] for draw in draws.values() if draw.get("epsilon")]
            print(
                f"| {cell.name}: {name} | {spread} ({min(values):.2f} … {max(values):.2f}) | {len(draws)}, {len(values)} | "
                f"{f'{max(epsilons):.3f}' if epsilons else '-'} | {f'{max(fits):.0f}' if fits else '-'} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", default="data")
    parser.add_argument("--cells", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--draws", type=int, nargs="*", default=DRAWS)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    options = parser.parse_args()
    if options.table:
        print_table()
        return
    torch.set_num_threads(options.threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    chosen = [cell for cell in cells() if options.cells in cell.name]
    for seed, draw in itertools.product(options.seeds, options.draws):  # one of everything first
        for cell in chosen:
            if draw in cell.draws and str(seed) not in known(cell, draw):
                facts = run_draw(cell, draw, options.root, options.device)
                record(cell, draw, None, facts)
                evaluate(cell, draw, seed, options.root, options.device)


if __name__ == "__main__":
    main()
