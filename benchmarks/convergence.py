"""The convergence figure: TSTR against updates and against ε, for 1, 10 and 20 images a class, with and without the generator prior.

    python benchmarks/convergence.py              # runs what is missing, about a quarter of an hour a curve on one thread
    python benchmarks/convergence.py --draw       # draws docs/convergence.png from the logs

Private set generation by gradient matching (``preset="cpu"``), (10, 1e-5); ConvNet of ``quick``, one evaluation seed. Each run's
log, with ε and accuracy by step, is kept as ``benchmarks/results/convergence/RUN.csv``.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import logging
from pathlib import Path

import pytorch_lightning as pl
from lightning_dpgen.callbacks import TSTREvaluation
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from pytorch_lightning.loggers import CSVLogger

from lightning_dpgen import DPStrategy, FashionMNISTDataModule, MNISTDataModule, PrivateSetGeneration

DATA = {"MNIST": MNISTDataModule, "FashionMNIST": FashionMNISTDataModule}
RUNS = list(itertools.product(DATA, (1, 10, 20), ("none", "generator")))
LOGS = Path(__file__).parent / "results" / "convergence"
FIGURE = Path(__file__).parent.parent / "docs" / "convergence.png"
STEPS, EVERY, COLUMN = 120, 15, "tstr/ConvNet32"


def log_of(data: str, images: int, prior: str) -> Path:
    return LOGS / f"{data}-{images}-{prior}.csv"


def read(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


class KeepEpsilon(pl.Callback):
    """Logs ε beside each evaluation."""

    def on_train_batch_end(self, trainer: pl.Trainer, *args: object) -> None:
        if trainer.global_step % EVERY == 0:
            trainer.logger.log_metrics({"epsilon": trainer.strategy.epsilon_spent()}, step=trainer.global_step)  # type: ignore[union-attr, attr-defined]


def run(data: str, images: int, prior: str, root: str, device: str) -> None:
    """One curve, logged by Lightning's CSVLogger."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0)
    folder = Path("runs/convergence") / f"{data}-{images}-{prior}"
    logger = CSVLogger(folder, name="log", version=0)
    trainer = pl.Trainer(
        max_steps=STEPS,
        strategy=DPStrategy(epsilon=10, delta=1e-5),
        accelerator=device,
        devices=1,
        logger=logger,
        callbacks=[TSTREvaluation(every_n_steps=EVERY, classifiers=["ConvNet32"]), KeepEpsilon()],
        default_root_dir=folder,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = PrivateSetGeneration(images, schedule_overrides={"prior": prior})
    trainer.fit(module, datamodule=DATA[data](root=root, batch_size=2048))
    found: dict[int, dict[str, str]] = {}
    for row in read(Path(logger.log_dir) / "metrics.csv"):
        found.setdefault(int(row["step"]), {}).update({key: value for key, value in row.items() if value and key in (COLUMN, "epsilon")})
    LOGS.mkdir(parents=True, exist_ok=True)
    with open(log_of(data, images, prior), "w", newline="") as file:
        writer = csv.DictWriter(file, ["step", "epsilon", COLUMN])
        writer.writeheader()
        writer.writerows({"step": step, **values} for step, values in sorted(found.items()) if COLUMN in values and "epsilon" in values)


def draw() -> None:
    """The figure, from the logs that there are."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey="row")
    for (data, images, prior), color in zip(RUNS, itertools.cycle(("#4477aa", "#4477aa", "#cc6677", "#cc6677", "#117733", "#117733"))):
        path = log_of(data, images, prior)
        if not path.exists():
            continue
        rows = read(path)
        label = f"{images} a class" + (", generator prior" if prior == "generator" else "")
        for axis, key in zip(axes[list(DATA).index(data)], ("step", "epsilon"), strict=True):
            style = "--" if prior == "generator" else "-"
            axis.plot([float(row[key]) for row in rows], [float(row[COLUMN]) for row in rows], style, color=color, label=label, marker=".")
            axis.set_xlabel({"step": "updates (releases)", "epsilon": "ε spent at δ = 1e-5"}[key])
            axis.set_title(data)
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel("ConvNet accuracy on real test records, %")
    axes[0][0].legend(fontsize=8)
    figure.savefig(FIGURE, dpi=110)
    print(f"written: {FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default="data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--runs", default="", help="only runs whose log's name contains this")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    for one in RUNS:
        if not options.draw and options.runs in log_of(*one).stem and not log_of(*one).exists():
            run(*one, options.root, options.device)
    if options.draw:
        draw()


if __name__ == "__main__":
    main()
