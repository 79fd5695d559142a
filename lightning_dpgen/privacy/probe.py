"""Do rows depend on their own record alone? Checked once, at set-up, on random inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rows = dict[str, Tensor]
Batch = Sequence[Tensor]


class RowDependenceError(RuntimeError):
    """A record's row changes with the other records of its lot, so clipping it does not bound the record."""


def check_row_independence(rows: Callable[[Batch], Rows], batch: Batch, other: Batch, tolerance: float = 1e-3) -> None:
    """Raises unless each record's row is a function of that record alone.

    Three comparisons with the rows of ``batch``: the number of rows; the first half of the records kept and the others
    exchanged; the first record alone.

    Args:
        rows: Computes the rows ``[B, …]`` by name of a batch of B records, with the same random state at every call.
        batch: Tensors ``[B, …]`` with random content, B ≥ 2 and even.
        other: As ``batch``, with other content.
        tolerance: Largest allowed change relative to the row's norm.

    Privacy:
        ``batch`` holds random numbers of the records' shape, not records; nothing is released.

    Raises:
        RowDependenceError: Names the tensors whose rows change and what usually causes it.
    """
    half = len(batch[0]) // 2
    reference = rows(batch)
    for name, value in reference.items():
        if len(value) != len(batch[0]):
            raise RowDependenceError(
                f"{name}: {len(value)} rows for a lot of {len(batch[0])} records. One record must be one row: a record that is "
                "repeated, augmented or split inside the forward pass is clipped once for each copy. Sum its copies' losses."
            )
    exchanged = rows([torch.cat([a[:half], b[half:]]) for a, b in zip(batch, other, strict=True)])
    _compare({k: v[:half] for k, v in reference.items()}, {k: v[:half] for k, v in exchanged.items()}, tolerance, "exchanged")
    alone = rows([tensor[:1] for tensor in batch])
    _compare({k: v[:1] for k, v in reference.items()}, alone, tolerance, "removed")


def _compare(expected: Rows, found: Rows, tolerance: float, change: str) -> None:
    scale = max(float(value.abs().max()) for value in expected.values()) if expected else 0.0
    moved = [
        name
        for name, value in expected.items()
        if value.shape != found[name].shape or not torch.allclose(value, found[name], rtol=tolerance, atol=tolerance * scale + 1e-12)
    ]
    if moved:
        raise RowDependenceError(
            f"a record's gradient changed when the other records of its lot were {change}, in {', '.join(moved[:6])}"
            f"{' and more' if len(moved) > 6 else ''}. Usual causes: BatchNorm or another layer that mixes records, a loss that "
            "is weighted or masked by the whole lot (class weights, ignore_index), a batch axis that is not the first, or a "
            "contrastive loss. Replace BatchNorm by GroupNorm; make the loss the mean over records of each record's own loss."
        )
