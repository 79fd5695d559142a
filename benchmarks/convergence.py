"""The convergence figure: TSTR against updates and against ε, for 1, 10 and 20 images a class, with and without the generator prior.

    python benchmarks/convergence.py --scale cpu   # trains and evaluates what is missing, 3 to 30 minutes a curve on one thread
    python benchmarks/convergence.py --draw        # draws docs/convergence.png from the logs (at other scales runs/convergence-SCALE.png)

Private set generation by gradient matching at (10, 1e-5): the cells of ``recipes.py`` that have the method's name, whose sets it keeps six
times a run. Each of these is evaluated by the ConvNet of ``quick``, one seed, and logged with ε as a line of
``benchmarks/results/convergence-SCALE.csv``.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
import table
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from recipes import SCALES, Cell, curves, data_module, data_of, named

from lightning_dpgen import tstr

FIGURE = Path(__file__).parent.parent / "docs" / "convergence.png"
CLASSIFIER = {"cpu-small": "LogReg"}
COLORS = {"1": "#4477aa", "10": "#cc6677", "20": "#117733"}
COLUMNS = ("cell", "step", "epsilon", "accuracy", "release")


def log_of(scale: str) -> Path:
    return Path(__file__).parent / "results" / f"convergence-{scale}.csv"


def logged(scale: str) -> list[dict[str, str]]:
    path = log_of(scale)
    if not path.exists():
        return []
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def kept(cell: Cell, release: str) -> list[dict[str, str]]:
    """The log without lines of an earlier draw of this cell."""
    return [row for row in logged(cell.scale) if row["cell"] != cell.name or row["release"] == release]


def evaluate(cell: Cell, root: str, device: str) -> None:
    """Evaluates each kept set of a run that is not in the log; the first new line takes those of an earlier draw out."""
    release = str(table.digest_of(cell))
    with table.lock(cell.scale):
        done = {int(row["step"]) for row in kept(cell, release) if row["cell"] == cell.name}
    data = data_module(cell, root, 256)
    real, classifier = data.real_test(), CLASSIFIER.get(cell.scale, "ConvNet32")
    with np.load(cell.folder / "snapshots.npz") as sets:
        labels = sets["labels"]
        for step, epsilon, images in zip(sets["steps"], sets["epsilons"], sets["images"], strict=True):
            if int(step) in done:
                continue
            synthetic = table.tensors(images, labels)
            results = tstr(synthetic, real, data.num_classes, "quick", [0], [classifier], show_progress=False, device=device)
            accuracy = results.mean(classifier)
            print(f"{cell.name}: step {step}, epsilon {epsilon:.3f}: {accuracy:.2f}", flush=True)
            values = (cell.name, str(int(step)), f"{epsilon:.4f}", f"{accuracy:.2f}", release)
            with table.lock(cell.scale):
                rows = [*kept(cell, release), dict(zip(COLUMNS, values, strict=True))]
                with open(log_of(cell.scale), "w", encoding="utf-8", newline="") as file:
                    writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                    writer.writeheader()
                    writer.writerows(rows)


def draw(scale: str) -> None:
    """The figure, from the lines that there are."""
    found = data_of(scale)
    figure = Figure(figsize=(10, 3.5 * len(found)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(found), 2, sharey="row", squeeze=False)
    for cell in curves(scale):
        rows = sorted((row for row in logged(scale) if row["cell"] == cell.name), key=lambda row: int(row["step"]))
        if not rows:
            continue
        _, images, *prior = cell.method.split()
        label = f"{images} a class" + (", generator prior" if prior else "")
        look = {"linestyle": "--" if prior else "-", "color": COLORS[images], "marker": ".", "label": label}
        for axis, key in zip(axes[found.index(cell.data)], ("step", "epsilon"), strict=True):
            axis.plot([float(row[key]) for row in rows], [float(row["accuracy"]) for row in rows], **look)
            axis.set_xlabel({"step": "updates (releases)", "epsilon": "ε spent at δ = 1e-5"}[key])
            axis.set_title(cell.data)
            axis.grid(alpha=0.3)
    for row in axes:
        row[0].set_ylabel(f"{CLASSIFIER.get(scale, 'ConvNet32')} on real test records, %")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}  # a curve may be missing on one data set
    figure.legend(list(lines.values()), list(lines), loc="outside lower center", ncols=6, fontsize=8)
    path = FIGURE if scale == "cpu" else Path("runs") / f"convergence-{scale}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    print(f"written: {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--root", default="data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", default="", help="only the curve of this name, or those whose name contains it")
    parser.add_argument("--train", action="store_true", help="evaluate later")
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    if options.draw:
        draw(options.scale)
        return
    torch.set_num_threads(options.threads)
    for cell in named(curves(options.scale), options.cells):
        if table.train(cell, options) and not options.train:
            evaluate(cell, options.root, options.device)


if __name__ == "__main__":
    main()
