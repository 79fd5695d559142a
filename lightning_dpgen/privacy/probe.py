"""Do rows depend on their own record alone? Checked once, at set-up, on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = dict[str, Tensor]
SEEDS = 16
"""Random states over which the rows of a random module are averaged."""


class RowDependenceError(RuntimeError):
    """A record's row changes with the other records of its lot, so clipping it does not bound the record."""


def check_row_independence(
    rows: Callable[[Sequence[Any], int], Rows], records: Sequence[Any], others: Sequence[Sequence[Any]], tolerance: float = 1e-3
) -> None:
    """Raises unless each record's row is a function of that record alone.

    Comparisons with the rows of ``records``: the number of rows; the first half of the records kept and the rest exchanged for
    that of each of ``others``, and the last half kept before the first of ``others``, under the same random state; the first
    record alone, which for a random module is held to the same scale only.

    Args:
        rows: ``rows(records, seed)`` computes the rows ``[B, …]`` by name of a lot of B records.
        records: Records with random content, an even number of them.
        others: Lots of as many, with other content.
        tolerance: Largest allowed change relative to the largest row.

    Privacy:
        The records hold random numbers in place of their own; nothing is released.

    Raises:
        RowDependenceError: Names the tensors whose rows change and what usually causes it.
    """
    half = len(records) // 2
    reference = rows(records, 0)
    for name, value in reference.items():
        if len(value) != len(records):
            raise RowDependenceError(
                f"{name}: {len(value)} rows for a lot of {len(records)} records. One record must be one row: a record that is "
                "repeated, augmented or split inside the forward pass is clipped once for each copy. Sum its copies' losses."
            )
    exchanges = [(slice(half), [*records[:half], *other[half:]]) for other in others]
    exchanges += [(slice(half, None), [*other[:half], *records[half:]]) for other in others[:1]]
    for kept, lot in exchanges:
        exchanged = rows(lot, 0)
        before, after = ({name: value[kept] for name, value in one.items()} for one in (reference, exchanged))
        _refuse(_moved(before, after, tolerance), "exchanged")
    first = {name: value[:1] for name, value in reference.items()}
    if not _moved(reference, rows(records, 1), tolerance):
        _refuse(_moved(first, rows(records[:1], 0), tolerance), "removed")
        return
    among, alone = (sum(_first(rows(lot, seed)) for seed in range(SEEDS)) for lot in (records, records[:1]))
    if not 0.5 * alone <= among <= 2 * alone:
        _refuse(list(reference), "removed")


def _first(rows: Rows) -> float:
    """The norm of the first row's finite numbers."""
    if not rows:
        return 0.0
    return float(torch.cat([value[0].flatten().double().nan_to_num(posinf=0, neginf=0) for value in rows.values()]).norm())


def _moved(expected: Rows, found: Rows, tolerance: float) -> list[str]:
    scale = max((float(value.nan_to_num(posinf=0, neginf=0).abs().max()) for value in expected.values() if value.numel()), default=0.0)
    return [name for name, value in expected.items() if not _close(value, found[name], tolerance, tolerance * scale + 1e-12)]


def _close(one: Tensor, other: Tensor, relative: float, absolute: float) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=relative, atol=absolute, equal_nan=True)


def _refuse(moved: list[str], change: str) -> None:
    if moved:
        raise RowDependenceError(
            f"a record's gradient changed when the other records of its lot were {change}, in {', '.join(moved[:6])}"
            f"{' and more' if len(moved) > 6 else ''}. Usual causes: BatchNorm or another layer that mixes records, a loss that "
            "is weighted or masked by the whole lot (class weights, ignore_index), a batch axis that is not the first, a "
            "contrastive loss, or a collate_fn that mixes records. Replace BatchNorm by GroupNorm; make the loss the mean over "
            "records of each record's own loss; collate records side by side; or, if it is a layer, take each record alone with "
            "physical_batch_size=1."
        )
