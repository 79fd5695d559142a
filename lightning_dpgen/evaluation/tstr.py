"""Train on synthetic, test on real (TSTR)."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_dpgen.evaluation.protocols import Protocol, protocol_named
from lightning_dpgen.nn.classifiers import CLASSIFIERS


@dataclass
class TSTRTable:
    """Accuracies in percent by classifier, one for each seed.

    Args:
        protocol: Name of the protocol.
        images: Number of synthetic images.
        accuracy: Accuracy in percent by classifier, one a seed.
        per_class: Mean accuracy in percent by classifier, one a class.
    """

    protocol: str
    images: int
    accuracy: dict[str, list[float]] = field(default_factory=dict)
    per_class: dict[str, list[float]] = field(default_factory=dict)

    def mean(self, classifier: str) -> float:
        """Mean over seeds, in percent."""
        return statistics.fmean(self.accuracy[classifier])

    def std(self, classifier: str) -> float:
        """Sample standard deviation over seeds, in percent points; 0 for one seed."""
        values = self.accuracy[classifier]
        return statistics.stdev(values) if len(values) > 1 else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with mean and deviation."""
        rows = {
            name: {"mean": self.mean(name), "std": self.std(name), "seeds": values, "per_class": self.per_class[name]}
            for name, values in self.accuracy.items()
        }
        return {"protocol": self.protocol, "images": self.images, "classifiers": rows}

    def to_rich(self) -> Table:
        """A table for people."""
        table = Table(title=f"Train on synthetic ({self.images} images), test on real; protocol {self.protocol}")
        for heading in ("classifier", "accuracy %", "± std", "seeds", "worst class %"):
            table.add_column(heading, justify="left" if heading == "classifier" else "right")
        for name, values in self.accuracy.items():
            spread = f"{self.std(name):.2f}" if len(values) > 1 else "-"
            table.add_row(name, f"{self.mean(name):.2f}", spread, str(len(values)), f"{min(self.per_class[name]):.1f}")
        return table


def train_classifier(network: nn.Module, images: Tensor, labels: Tensor, protocol: Protocol, progress: Any = None) -> None:
    """Trains ``network`` in place; the last state counts, nothing is selected.

    Args:
        network: A classifier.
        images: Synthetic images ``[N, C, H, W]`` in [0, 1].
        labels: ``[N]``.
        protocol: Optimizer and number of updates.
        progress: Called with no argument after each update.
    """
    if protocol.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(network.parameters(), protocol.lr, momentum=0.9, weight_decay=5e-4)
    else:
        optimizer = torch.optim.Adam(network.parameters(), protocol.lr)
    updates, done = protocol.updates(len(images)), 0
    network.train()
    while done < updates:
        for index in torch.randperm(len(images), device=images.device).split(protocol.batch_size):
            if done == updates:
                break
            if protocol.optimizer == "sgd" and done == updates // 2:
                optimizer.param_groups[0]["lr"] *= 0.1
            optimizer.zero_grad()
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimizer.step()
            done += 1
            if progress is not None:
                progress()


@torch.no_grad()
def class_accuracy(network: nn.Module, images: Tensor, labels: Tensor, num_classes: int) -> tuple[float, list[float]]:
    """Accuracy in percent, overall and for each class (0 for a class without test images).

    Args:
        network: A classifier.
        images: ``[N, C, H, W]``.
        labels: ``[N]``.
        num_classes: Number of classes.
    """
    network.eval()
    predicted = torch.cat([network(chunk).argmax(1) for chunk in images.split(500)])
    right = torch.bincount(labels[predicted == labels], minlength=num_classes).double()
    total = torch.bincount(labels, minlength=num_classes).double()
    return float(right.sum() / total.sum() * 100), (right / total.clamp_min(1) * 100).tolist()


def tstr(
    synthetic: tuple[Tensor, Tensor],
    real_test: tuple[Tensor, Tensor],
    num_classes: int,
    protocol: str = "quick",
    seeds: Sequence[int] = (0, 1, 2),
    classifiers: Sequence[str] | None = None,
    show_progress: bool = True,
    device: torch.device | str = "cpu",
) -> TSTRTable:
    """Trains each classifier of a protocol on synthetic images and tests it on real ones.

    The global random state is as before afterwards.

    Args:
        synthetic: Images ``[N, C, H, W]`` in [0, 1] and labels ``[N]``.
        real_test: Likewise, real test records.
        num_classes: Number of classes.
        protocol: ``"quick"``, ``"common"`` or ``"published"``.
        seeds: One training for each.
        classifiers: Some of the protocol's classifiers; all if not given.
        show_progress: Whether to show a progress bar with an estimate.
        device: Where to train.

    Privacy:
        Reads real test records: its numbers are evaluation, outside the guarantee. Never select or tune on them.

    Raises:
        ValueError: For an unknown protocol or classifier, or images of different shapes.
    """
    chosen = protocol_named(protocol)
    names = list(classifiers or chosen.classifiers)
    unknown = sorted(set(names) - set(chosen.classifiers))
    if unknown:
        raise ValueError(f"protocol {protocol!r} has no classifier {', '.join(unknown)}; it has {', '.join(chosen.classifiers)}.")
    images, labels = (tensor.to(device) for tensor in synthetic)
    test_images, test_labels = (tensor.to(device) for tensor in real_test)
    if images.shape[1:] != test_images.shape[1:]:
        raise ValueError(
            f"synthetic images are {tuple(images.shape[1:])}, real test images {tuple(test_images.shape[1:])}: this release is not of "
            "this data set."
        )
    if chosen.standardize:
        deviation, mean = torch.std_mean(images, dim=(0, 2, 3), keepdim=True)
        images, test_images = ((one - mean) / deviation.clamp_min(1e-3) for one in (images, test_images))
    shape = (images.shape[1], images.shape[2], images.shape[3])
    table = TSTRTable(protocol, len(images))
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"), TimeRemainingColumn())
    with Progress(*columns, transient=True, disable=not show_progress) as bar, torch.random.fork_rng():
        task = bar.add_task("TSTR", total=len(names) * len(seeds) * chosen.updates(len(images)))
        for name in names:
            per_class = []
            table.accuracy[name] = []
            for seed in seeds:
                bar.update(task, description=f"TSTR {name}, seed {seed}")
                torch.manual_seed(seed)
                network = CLASSIFIERS[name](num_classes, shape).to(device)
                with torch.enable_grad():
                    train_classifier(network, images, labels, chosen, lambda: bar.advance(task))
                overall, by_class = class_accuracy(network, test_images, test_labels, num_classes)
                table.accuracy[name].append(overall)
                per_class.append(by_class)
            table.per_class[name] = [statistics.fmean(values) for values in zip(*per_class, strict=True)]
    return table


def print_table(table: TSTRTable) -> None:
    """Prints the table to the terminal."""
    Console().print(table.to_rich())
