"""The whole table: every method on both data sets under one accountant and one evaluation, beside the published numbers.

    python benchmarks/table.py --scale cpu              # trains and evaluates what is missing; goes on where it stopped
    python benchmarks/table.py --scale cpu --train      # trains only; --evaluate evaluates only, with --device cuda on a GPU
    python benchmarks/table.py --scale cpu --cells PSG  # only the cell of this name, or those whose name contains it
    python benchmarks/table.py --scale cpu --published  # the six classifiers of the literature for two methods, one seed; hours on a CPU
    python benchmarks/table.py --scale cpu --render     # prints the tables

Scales: ``cpu-small`` (scikit-learn's digits, no download, a few minutes in all: to see that everything runs), ``cpu`` (MNIST and
FashionMNIST, at most a quarter of an hour a cell on one thread, but for DP-GAN's hour), ``gpu-paper`` (sizes and loops after the papers,
with this package's networks and this table's ε; hours on a GPU). Results are kept in ``benchmarks/results/table-SCALE.json``, releases in
``runs/table/SCALE``. A cell is one training and one noise draw; what stands after ± is the deviation over evaluation seeds, not over draws.
A cell whose release is gone is trained again; until its new draw is evaluated by as many seeds, an accuracy of an earlier draw by the same
knobs stands, marked †. What was evaluated with ``--bfloat16`` is marked ‡, with ``--compile`` §.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from math import isclose
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from filelock import FileLock, Timeout
from lightning_dpgen.callbacks import Prior
from recipes import LONGER, SCALES, Cell, cells, curves, data_module, data_of, named, recipe

from lightning_dpgen import (
    DPStrategy,
    MixturePPCA,
    PrivateSetGeneration,
    Relation,
    SanitizedRelease,
    tstr,
)
from lightning_dpgen.data.base import ImageRecords
from lightning_dpgen.evaluation.protocols import protocol_named
from lightning_dpgen.generators import to_bytes
from lightning_dpgen.nn.classifiers import CLASSIFIERS

DELTA, SEEDS, PRIOR_SHARE = 1e-5, (0, 1, 2), 0.3
PROTOCOLS = {name: protocol_named(name).classifiers for name in ("quick", "common")}
SIX = {"published": protocol_named("published").classifiers}
ALL = tuple(dict.fromkeys(name for names in [*PROTOCOLS.values(), *SIX.values()] for name in names))
SMALL = ("LogReg",)
"""The classifiers of ``cpu-small``."""
MARKS = {"bfloat16": "‡", "compile": "§"}
TERMS = ("epsilon", "replace_one", "noise_multiplier", "steps")
PUBLISHED = {  # ConvNet, (10, 1e-5), as printed by Chen, Kerkouche and Fritz (NeurIPS 2022)
    "Real": (99.6, 93.5),
    "DP-CGAN": (50.2, 50.2),
    "GS-WGAN": (84.9, 54.7),
    "DP-MERF": (85.7, 72.4),
    "PSG 10": (94.9, 75.6),
    "PSG 20": (95.6, 77.7),
}
PUBLISHED_SIX = {  # the same table's row of ten images a class, in the order of SIX
    "MNIST": (94.9, 91.3, 90.3, 93.6, 94.3, 86.1),
    "FashionMNIST": (75.6, 68.0, 66.2, 74.7, 72.1, 62.8),
}
WITH_SIX = ("PSG 10", "set 10")


def trained(scale: str) -> tuple[str, ...]:
    """The classifiers of a scale."""
    return SMALL if scale == "cpu-small" else ALL


class Snapshots(pl.Callback):
    """Keeps the images of a set six times in a run, with ε so far. Every step's images may be published, at no cost."""

    def __init__(self, steps: int, path: Path) -> None:
        self.at, self.path, self.kept = {round(steps * part / 6) for part in range(1, 7)}, path, []

    def on_train_batch_end(self, trainer: pl.Trainer, module: PrivateSetGeneration, *args: Any) -> None:
        if trainer.global_step in self.at:
            images = to_bytes(module.sample(module.release_labels()))
            self.kept.append((trainer.global_step, trainer.strategy.epsilon_spent(), images))

    def on_train_end(self, trainer: pl.Trainer, module: PrivateSetGeneration) -> None:
        steps, epsilons, images = zip(*self.kept, strict=True)
        np.savez_compressed(self.path, steps=steps, epsilons=epsilons, images=np.stack(images), labels=module.release_labels().numpy())


def fit(cell: Cell, root: str, device: str, threads: int) -> None:
    """Trains one cell in this process and writes its release and what it took."""
    torch.set_num_threads(threads)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    start, how, folder = time.perf_counter(), recipe(cell), cell.folder
    folder.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(0)

    def trainer(epsilon: float, steps: int | None, **options: Any) -> pl.Trainer:
        limits: dict[str, Any] = {} if steps is None else {"max_steps": steps, "max_epochs": -1}
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "enable_progress_bar": False}
        engine = {"grad_sample": "ghost", "clip_norm": how.clip_norm} if cell.method.startswith(("DP-CGAN", "DP-GAN")) else {}
        strategy = DPStrategy(epsilon=epsilon, delta=DELTA, **engine)
        return pl.Trainer(strategy=strategy, accelerator=device, devices=1, default_root_dir=folder, **limits, **quiet, **options)

    options: dict[str, Any] = {}
    if cell.method.startswith("set"):
        first = trainer(PRIOR_SHARE * cell.epsilon, None)
        first.fit(MixturePPCA(), datamodule=data_module(cell, root, 4_096))
        labels = torch.arange(first.lightning_module.num_classes).repeat_interleave(int(cell.method.split()[1]))
        SanitizedRelease.from_trainer(first, labels).save(folder / "prior", overwrite=True)
        options = {"callbacks": [Prior(str(folder / "prior"))]}
    if cell.method.startswith("PSG"):
        options = {"callbacks": [Snapshots(how.steps, folder / "snapshots.npz")]}
    run, module = trainer(cell.epsilon, how.steps, **options), how.module()
    run.fit(module, datamodule=data_module(cell, root, how.batch_size))
    release = SanitizedRelease.from_trainer(run)
    release.save(folder / "release", overwrite=True)
    facts = {
        "epsilon": run.strategy.epsilon_spent(),
        "replace_one": run.strategy.epsilon_spent(Relation.REPLACE_ONE),
        "steps": run.global_step,
        "noise_multiplier": run.strategy.noise_multiplier,
        "train_seconds": time.perf_counter() - start,
        "train_cpu_seconds": time.process_time(),
        "train_device": device,
        "train_threads": threads,
        "peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else peak_mib(),
        "knobs": {name: knob["value"] for name, knob in release.certificate["knobs"].items()},
        "release": digest_of(cell),
    }
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")


def train(cell: Cell, options: argparse.Namespace) -> bool:
    """Trains a cell that is not, in a process of its own, so that its memory is its own; ``False`` if another process is at it."""
    facts = cell.folder / "facts.json"
    cell.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(cell.folder / "training.lock", timeout=0):
            if not facts.exists():
                print(f"{cell.name}: training", flush=True)
                again = [sys.executable, __file__, "--fit", "--scale", cell.scale, "--cells", cell.name, "--root", options.root]
                subprocess.run([*again, "--device", options.device, "--threads", str(options.threads)], check=True)
            keep(cell, json.loads(facts.read_text()))
    except Timeout:
        return False
    return True


def peak_mib() -> float:
    """The most memory that this process held; what its parent held does not count, as it would in ``getrusage``."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def images_of(cell: Cell, root: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What classifiers are trained on: the release's images, or the real training records."""
    if cell.method == "Real":
        data = data_module(cell, root, 256)
        data.setup("fit")
        images: tuple[torch.Tensor, torch.Tensor] = data.train_records.tensors()
        return images
    with np.load(cell.images) as release:
        return tensors(release["images"], release["labels"])


def digest_of(cell: Cell) -> str | None:
    """Which draw of a cell the images are; none for the real records."""
    return None if cell.method == "Real" else sha256(cell.images.read_bytes()).hexdigest()[:16]


def tensors(images: np.ndarray, labels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Grey images ``[N, H, W]`` as a release or a snapshot keeps them, as classifiers take them."""
    return ImageRecords(torch.from_numpy(images)[:, None], torch.from_numpy(labels)).tensors()


def evaluate(
    cell: Cell, root: str, device: str, protocols: dict[str, tuple[str, ...]], seeds: list[int], only: list[str], how: list[str]
) -> None:
    """Trains every classifier that is missing; keeps each as it is done."""
    synthetic, release, data = images_of(cell, root), digest_of(cell), data_module(cell, root, 256)
    data.setup("test")
    real = data.real_test()
    for protocol, classifiers in protocols.items():
        for name in (one for one in classifiers if one in only):
            for seed in seeds:
                key = f"{protocol} {name}"
                if str(seed) in accuracies(known(cell), key):
                    continue
                # no cache: weights that were cast before a step would be used again after it
                with torch.autocast(device, torch.bfloat16, enabled="bfloat16" in how, cache_enabled=False):
                    table = tstr(synthetic, real, 10, protocol, [seed], [name], show_progress=False, device=device)
                record(cell, key, seed, round(table.mean(name), 2), release, how)
                print(f"{cell.name}: {key}, seed {seed}: {table.mean(name):.2f}", flush=True)


def compile_classifiers() -> None:
    """Has networks compiled before they are trained: the same up to rounding, dropout's masks included, and faster on a CPU."""
    torch._dynamo.config.recompile_limit = 64  # networks, sizes of batches and modes count
    torch._inductor.config.fallback_random = True
    for name, build in CLASSIFIERS.items():
        CLASSIFIERS[name] = partial(lambda build, *shape: torch.compile(build(*shape)), build)


def results_file(scale: str) -> Path:
    return Path(__file__).parent / "results" / f"table-{scale}.json"


def read(scale: str) -> dict[str, Any]:
    """What is known of a scale, by cell."""
    path = results_file(scale)
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return found


def lock(scale: str) -> FileLock:
    """Held while results are read or written: other processes are at it too."""
    path = results_file(scale)
    path.parent.mkdir(exist_ok=True)
    return FileLock(f"{path}.lock")


@contextmanager
def results(scale: str) -> Iterator[dict[str, Any]]:
    """What is known of a scale, to be changed; written at the end, unless an error ends it."""
    with lock(scale):
        found = read(scale)
        yield found
        results_file(scale).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")


def known(cell: Cell) -> dict[str, Any]:
    with lock(cell.scale):
        entry: dict[str, Any] = read(cell.scale).get(cell.name, {})
    return entry


def keep(cell: Cell, facts: dict[str, Any]) -> None:
    """Adds what a training took. Another draw's facts and accuracies stay beside it, if its knobs and terms were the same."""

    def alike(draw: dict[str, Any]) -> bool:
        same = "knobs" in draw and draw["knobs"] == facts.get("knobs")
        return same and all(isclose(draw[term], facts[term], rel_tol=1e-6) for term in TERMS)

    with results(cell.scale) as found:
        entry = found.get(cell.name, {})
        if entry.get("release", facts["release"]) != facts["release"]:
            earlier = [*entry.pop("earlier", []), entry]
            entry = {"earlier": [one for one in earlier if alike(one)]}
        found[cell.name] = {**entry, **facts}


def record(cell: Cell, key: str, seed: int, accuracy: float, release: str | None, how: list[str]) -> None:
    """Adds an accuracy to the draw that it was had on, and which of ``MARKS`` it was had with."""
    with results(cell.scale) as found:
        entry = found.setdefault(cell.name, {})
        if entry.get("release") != release:
            raise SystemExit(f"{cell.name}: the images are not those of the newest training; train it again, or wait for the one at work.")
        entry.setdefault("evaluations", {}).setdefault(key, {})[str(seed)] = accuracy
        for option in how:
            entry[option] = sorted({*entry.get(option, []), key})


def accuracies(draw: dict[str, Any], key: str) -> dict[str, float]:
    """A classifier's accuracies on one draw of a cell, by seed."""
    found: dict[str, float] = draw.get("evaluations", {}).get(key, {})
    return found


def mean(entry: dict[str, Any], key: str, seeds: int = len(SEEDS)) -> str:
    """Of the draw that was evaluated by most seeds, the newest of these."""
    draws = [entry, *reversed(entry.get("earlier", []))]
    draw = max(draws, key=lambda one: len(accuracies(one, key)))
    values = list(accuracies(draw, key).values())
    if not values:
        return "missing"
    mark = ("" if draw is entry else "†") + "".join(mark for option, mark in MARKS.items() if key in draw.get(option, []))
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}{mark}" + (f" ({len(values)} of {seeds})" if len(values) < seeds else "")


def render(scale: str) -> str:
    """The tables in Markdown."""
    text = []
    columns = [(protocol, name) for protocol, names in PROTOCOLS.items() for name in names if name in trained(scale)]
    for place, data in enumerate(data_of(scale)):
        headings = [
            "method",
            "ε spent",
            "replace-one",
            *(f"{name} ({protocol})" for protocol, name in columns),
            "published ConvNet",
        ]
        headings += ["train, s", "of a CPU", "peak MiB"]
        text += [f"\n### {data}\n", "| " + " | ".join(headings) + " |", "|---" * len(headings) + "|"]
        for cell in (one for one in cells(scale) if one.data == data and one.method != LONGER):
            entry = known(cell)
            published = PUBLISHED.get(cell.method) if cell.epsilon == 10.0 and data != "digits" else None
            row = [
                f"{cell.method}, ε = {cell.epsilon:g}" if cell.method != "Real" else "Real",
                *(f"{entry[key]:.3f}" if key in entry else "-" for key in ("epsilon", "replace_one")),
            ]
            row += [mean(entry, f"{protocol} {name}") for protocol, name in columns]
            row += [str(published[place]) if published else "-"]
            row += [f"{entry[key]:.0f}" if key in entry else "-" for key in ("train_seconds", "train_cpu_seconds", "peak_mib")]
            text.append("| " + " | ".join(row) + " |")
        if longer := known(Cell(scale, LONGER, data, 10.0)):
            terms = f"ε = {longer['epsilon']:.3f}, replace-one {longer['replace_one']:.3f}, {longer['train_cpu_seconds']:.0f} s of a CPU"
            text.append(f"\n{LONGER} ({terms}): " + ", ".join(f"{key} {mean(longer, key)}" for key in longer["evaluations"]))
    if scale == "cpu-small":
        return "\n".join(text)
    names = SIX["published"]
    text += ["\n### The six classifiers (published)\n", "| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for data, numbers in PUBLISHED_SIX.items():
        rows = {f"{data}, {method}": known(Cell(scale, method, data, 10.0)) for method in WITH_SIX}
        text += [f"| {row} | " + " | ".join(mean(entry, f"published {n}", 1) for n in names) + " |" for row, entry in rows.items()]
        text += [f"| {data}, PSG 10 as printed | " + " | ".join(map(str, numbers)) + " |"]
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu-small")
    parser.add_argument("--cells", default="")
    parser.add_argument("--root", default="data")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--classifiers", nargs="*", choices=ALL, help="only these")
    parser.add_argument("--bfloat16", action="store_true", help="classifiers in mixed precision: faster on a CPU with AMX")
    parser.add_argument("--compile", action="store_true", help="compile classifiers: faster on a CPU; needs a C++ compiler")
    parser.add_argument("--train", action="store_true")
    parser.add_argument("--evaluate", action="store_true")
    parser.add_argument("--published", action="store_true")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--fit", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.published and options.scale == "cpu-small":
        parser.error("--published wants --scale cpu or gpu-paper: the six classifiers take images of 28 x 28.")
    if options.render:
        print(render(options.scale))
        return
    if options.fit:
        cell = next(one for one in [*cells(options.scale), *curves(options.scale)] if one.name == options.cells)
        fit(cell, options.root, options.device, options.threads)
        return
    how = [option for option in MARKS if getattr(options, option)]
    if options.compile:
        compile_classifiers()
    protocols, seeds, chosen = PROTOCOLS, options.seeds, cells(options.scale)
    if options.published:
        protocols, seeds = SIX, SEEDS[:1]
        chosen = [one for one in chosen if one.method in WITH_SIX and one.epsilon == 10.0]
    for cell in named(chosen, options.cells):
        facts = cell.folder / "facts.json"
        if cell.method != "Real" and not options.evaluate and not train(cell, options):
            print(f"{cell.name}: in the hands of another process", flush=True)
            continue
        if not options.train and (cell.method == "Real" or facts.exists()):
            torch.set_num_threads(options.threads)
            evaluate(cell, options.root, options.device, protocols, seeds, options.classifiers or list(trained(options.scale)), how)


if __name__ == "__main__":
    main()
