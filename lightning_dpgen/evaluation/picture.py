"""Evaluation as a picture: accuracy by classifier, and by class, so that a bias is seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from lightning_dpgen.evaluation.tstr import TSTRTable


def draw_tables(tables: Sequence[TSTRTable], class_names: Sequence[str], path: Path) -> None:
    """Writes a PNG: one row a classifier, its mean accuracy as a bar with its deviation, and a cell for each class.

    Args:
        tables: One a protocol.
        class_names: In the order of labels.
        path: The PNG; its folder is made.
    """
    rows = [(table, name) for table in tables for name in table.accuracy]
    figure = Figure(figsize=(4 + 0.55 * len(class_names) + 3, 1.6 + 0.35 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    bars, cells = figure.subplots(1, 2, sharey=True, width_ratios=[3, max(3.0, 0.55 * len(class_names))])
    places = range(len(rows))
    means = [table.mean(name) for table, name in rows]
    bars.barh(places, means, xerr=[table.std(name) for table, name in rows], color="#4477aa", height=0.7)
    for place, value in zip(places, means, strict=True):
        bars.text(1, place, f"{value:.1f}", va="center", color="white", fontsize=8)
    bars.set_yticks(places, [f"{name} ({table.protocol})" for table, name in rows])
    bars.set_xlim(0, 100)
    bars.set_xlabel("accuracy on real test records, %")
    bars.invert_yaxis()
    shown = cells.imshow([table.per_class[name] for table, name in rows], vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for place, (table, name) in enumerate(rows):
        for label, value in enumerate(table.per_class[name]):
            cells.text(label, place, f"{value:.0f}", ha="center", va="center", fontsize=7, color="white" if value < 60 else "black")
    cells.set_xticks(range(len(class_names)), class_names, rotation=45, ha="right", fontsize=8)
    cells.set_title("by class, %", fontsize=9)
    figure.colorbar(shown, ax=cells)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
