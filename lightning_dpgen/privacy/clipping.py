"""Per-record gradients, their norms, and clipped sums.

The functional core under every method: rows go in, a :class:`ClippedSum` comes out, and only this module can build or
add one, so that what the mechanism noises is known to be bounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import grad, vmap

from lightning_dpgen._validate import fail, positive, positive_int

Gradients = dict[str, Tensor]
GROUP = 32
"""Rows that are added up in float32; their sums are added up in float64."""
PIECE = 1024
"""Columns whose squares are added up at once."""
ROUNDING = 1 + 2.0**-12
"""A bound on how far one record moves a sum, of C, rounding included (norms to 4e-6, sums of 32 rows to 1.2e-4 of C)."""
COUNTER = 0.3
"""What a record adds to its cell's count in :func:`cell_sums`, of the radius that its row is clipped to."""
HELD = 2**24
"""Numbers that :func:`cell_moments` holds at once."""
_KEY = object()


class ClippedSum:
    """A sum of rows, each clipped to the same norm; built and added up only by this module.

    Args:
        tensors: The sum by name, each of its parameter's shape, float64; several sums side by side, ``[count, …]``, where
            ``count`` says so.
        clip_norm: The bound C on the norm of each row, taken over all its tensors together.
        count: How many sums these are, each a release of its own; ``None`` for one.
        replaced: A bound, in units of C, on how far replacing one record by another moves the sum.

    Privacy:
        **Private**: it leaves only through ``mechanism.release``. Removing a record's row moves the sum by at most C
        (zero-out), replacing it by at most ``replaced`` times C (2C for rows), times ``ROUNDING``: float32 reaches over a few
        rows only, since in a long float32 sum one record can decide whether many small rows are rounded away. How many rows
        there are is not kept.
    """

    __slots__ = ("_clip_norm", "_count", "_replaced", "_tensors")

    def __init__(
        self, tensors: Mapping[str, Tensor], clip_norm: float, count: int | None = None, replaced: float = 2.0, *, _key: object = None
    ) -> None:
        if _key is not _KEY:
            raise TypeError("a ClippedSum is built by lightning_dpgen.privacy.clipping only: use clipped_sum(rows, clip_norm).")
        self._tensors = dict(tensors)
        self._clip_norm = clip_norm
        self._count = count
        self._replaced = replaced

    @property
    def clip_norm(self) -> float:
        """The bound C."""
        return self._clip_norm

    @property
    def count(self) -> int | None:
        """How many sums, or ``None`` for a single one."""
        return self._count

    @property
    def replaced(self) -> float:
        """Replace-one sensitivity ÷ C."""
        return self._replaced

    def __add__(self, other: ClippedSum) -> ClippedSum:
        """The sum over both sets of rows, which must be of different records.

        Raises:
            ValueError: If the clip norms, the numbers of sums or the kinds of rows differ.
        """
        if (self.clip_norm, self.count, self.replaced) != (other.clip_norm, other.count, other.replaced):
            raise ValueError(
                f"{self.count or 1} sums clipped to {self.clip_norm} and {other.count or 1} sums clipped to {other.clip_norm} cannot be "
                "added."
            )
        added = {name: value + other._tensors[name] for name, value in self._tensors.items()}
        return ClippedSum(added, self.clip_norm, self.count, self.replaced, _key=_KEY)


def row_norms(rows: Mapping[str, Tensor]) -> Tensor:
    """The norm of every row over all its tensors, to 4e-6 of it.

    Args:
        rows: Tensors ``[B, …]`` by name.

    Returns:
        ``[B]``.

    Privacy:
        Private, one number a record.
    """
    with torch.autocast(next(iter(rows.values())).device.type, enabled=False):
        norms = [_norms(as_matrix(value).to(_wide(value))) for value in rows.values()]
        return torch.stack(norms).double().square().sum(0).sqrt()


def clipped_sum(rows: Mapping[str, Tensor], clip_norm: float) -> ClippedSum:
    """Clips each row to ``clip_norm`` and sums them.

    Args:
        rows: Tensors ``[B, …]`` by name; row ``i`` of all of them together is record ``i``'s contribution. ``B`` may be 0.
        clip_norm: C.

    Privacy:
        Each record contributes one row of norm at most C. A row with a non-finite number contributes nothing, so that no
        record can turn the sum into NaN.

    Raises:
        ValueError: If the rows differ in number or C is not positive.
    """
    positive("clip_norm", clip_norm)
    lengths = {len(value) for value in rows.values()}
    if len(lengths) != 1:
        raise fail("rows", {name: tuple(value.shape) for name, value in rows.items()}, "tensors with the same number of rows")
    norms = row_norms(rows)

    def weighted(factors: Tensor) -> Gradients:
        return {name: weighted_rows(value, factors) for name, value in rows.items()}

    return ghost_clipped_sum(norms, weighted, clip_norm)


def grouped_clipped_sum(rows: Mapping[str, Tensor], groups: Tensor, count: int, clip_norm: float) -> ClippedSum:
    """Clips each row to ``clip_norm`` and adds it to the sum that its group names.

    Args:
        rows: Tensors ``[P, …]`` by name; ``P`` may be 0.
        groups: ``[P]``: which of the ``count`` sums each row belongs to.
        count: Number of sums.
        clip_norm: C.

    Returns:
        ``count`` sums side by side, each of which is charged when they are released.

    Privacy:
        In each sum a row is bounded by C; a row with a non-finite number contributes nothing. One record may shape one row in
        every sum: that is why each is a release of its own.
    """
    positive("clip_norm", clip_norm)
    factors = _clip_factors(row_norms(rows), clip_norm)
    sums = {}
    for name, value in rows.items():
        scaled = _scaled(as_matrix(value), factors)
        empty = torch.zeros((count, scaled.shape[1]), dtype=torch.float64, device=value.device)
        sums[name] = empty.index_add_(0, groups, scaled).view(count, *value.shape[1:])
    return ClippedSum(sums, clip_norm, count, _key=_KEY)


def cell_sums(rows: Tensor, cells: Tensor, count: int, radius: float) -> ClippedSum:
    """Clips each row to ``radius`` and adds it to its cell's sum, with a count of the cell's records beside it.

    Args:
        rows: ``[B, D]``; ``B`` may be 0.
        cells: ``[B]``: the cell of each record, for example its class.
        count: Number of cells.
        radius: R.

    Returns:
        ``sums`` ``[count, D]`` and ``counts`` ``[count]``, the latter in units of 0.3 R, as one sum of clip norm √1.09 R.

    Privacy:
        Each record is in one cell, to which it adds (row, 0.3 R) of norm at most √1.09 R = C: zero-out sensitivity C. Replaced
        within its cell it moves the sum by 2R, between cells by √2 C, which is less: replace-one sensitivity 2R
        (:data:`CELL_SUMS_REPLACED` of C). A row with a non-finite number adds nothing.
    """
    positive("radius", radius)
    factors = _clip_factors(row_norms({"rows": rows.double()}), radius)
    clipped = _scaled(rows, factors)
    sums = torch.zeros((count, rows.shape[1]), dtype=torch.float64, device=rows.device).index_add_(0, cells, clipped)
    counted = (factors > 0).double() * (COUNTER * radius)
    counts = torch.zeros(count, dtype=torch.float64, device=rows.device).index_add_(0, cells, counted)
    return ClippedSum({"sums": sums, "counts": counts}, cell_sums_norm(radius), replaced=CELL_SUMS_REPLACED, _key=_KEY)


def cell_sums_norm(radius: float) -> float:
    """The clip norm of :func:`cell_sums`: √1.09 R."""
    return math.sqrt(1 + COUNTER**2) * radius


def records_in_cells(counts: Tensor, radius: float) -> Tensor:
    """How many records the ``counts`` of :func:`cell_sums`, released or not, stand for."""
    return counts / (COUNTER * radius)


CELL_SUMS_REPLACED = 2 / math.sqrt(1 + COUNTER**2)
CELL_MOMENTS_REPLACED = math.sqrt(2)


def cell_moments(rows: Tensor, cells: Tensor, count: int, radius: float) -> ClippedSum:
    """Clips each row z to ``radius`` and adds zzᵀ to its cell's sum.

    Args:
        rows: ``[B, D]``; ``B`` may be 0.
        cells: ``[B]``.
        count: Number of cells.
        radius: R.

    Returns:
        ``moments`` ``[count, D (D + 1) / 2]``: upper triangles whose off-diagonal numbers are multiplied by √2, as
        :func:`moment_matrices` undoes, so that the norm is that of the matrix. Clip norm R².

    Privacy:
        Each record is in one cell, to which it adds a matrix of norm ‖z‖² ≤ R² = C: zero-out sensitivity C. Replace-one: two such
        matrices of any two cells have a product of at least 0, so they lie at most √2 C apart (:data:`CELL_MOMENTS_REPLACED`
        of C). A row with a non-finite number adds nothing.
    """
    positive("radius", radius)
    factors = _clip_factors(row_norms({"rows": rows.double()}), radius)
    clipped = _scaled(rows, factors)
    row, column, scale = _triangle(rows.shape[1], rows.device)
    if count == 1:
        total = ((clipped.T @ clipped)[row, column] * scale)[None]
    else:
        total = torch.zeros((count, len(row)), dtype=torch.float64, device=rows.device)
        for part, cell in zip(clipped.split(max(1, HELD // len(row))), cells.split(max(1, HELD // len(row))), strict=True):
            total.index_add_(0, cell, part[:, row] * part[:, column] * scale)
    return ClippedSum({"moments": total}, radius**2, replaced=CELL_MOMENTS_REPLACED, _key=_KEY)


def moment_matrices(packed: Tensor, dimensions: int) -> Tensor:
    """The symmetric matrices ``[…, D, D]`` of packed triangles ``[…, D (D + 1) / 2]``.

    Args:
        packed: As :func:`cell_moments` packs them.
        dimensions: D.
    """
    row, column, scale = _triangle(dimensions, packed.device)
    full = packed.new_zeros((*packed.shape[:-1], dimensions, dimensions))
    full[..., row, column] = packed / scale.to(packed.dtype)
    full[..., column, row] = full[..., row, column]
    return full


def _scaled(rows: Tensor, factors: Tensor) -> Tensor:
    """Each row times its factor, float64; one of factor 0 is zeros, even if it holds NaN."""
    return torch.where(factors[:, None] > 0, rows.double(), 0.0) * factors[:, None]


def _triangle(dimensions: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    row, column = torch.triu_indices(dimensions, dimensions, device=device)
    scale = torch.full(row.shape, math.sqrt(2), dtype=torch.float64, device=device)
    scale[row == column] = 1.0
    return row, column, scale


def weighted_rows(rows: Tensor, factors: Tensor) -> Tensor:
    """The sum of ``factors[i]`` times row ``i``, in float64; rows of factor 0 do not enter, even if they hold NaN.

    Args:
        rows: ``[B, …]``.
        factors: ``[B]``.
    """
    flat = as_matrix(rows).to(_wide(rows))
    if not (factors > 0).all():
        flat = torch.where(factors[:, None] > 0, flat, 0.0)
    # A vector times a matrix is BLAS's gemv, which the reduced precisions of matrix products do not reach.
    groups = zip(factors.to(flat.dtype).split(GROUP), flat.split(GROUP), strict=True)
    total = torch.zeros((), dtype=torch.float64, device=flat.device)
    for number, (weights, part) in enumerate(groups):
        total = (weights @ part).double() if number == 0 else total.add_(weights @ part)
    return total.view(rows.shape[1:])


def ghost_clipped_sum(norms: Tensor, weighted: Callable[[Tensor], Gradients], clip_norm: float) -> ClippedSum:
    """Clips rows that are never held, only their norms and their weighted sums.

    Args:
        norms: ``[B]``, each over the whole row.
        weighted: ``weighted(factors)`` is the sum of ``factors[i]`` times row ``i`` by name; a row of factor 0 must not enter
            it at all, since it may hold NaN.
        clip_norm: C.

    Privacy:
        As :func:`clipped_sum`, provided that ``norms`` and ``weighted`` are of the same rows; a test holds every engine to it.
    """
    positive("clip_norm", clip_norm)
    factors = _clip_factors(norms, clip_norm)
    with torch.autocast(norms.device.type, enabled=False):
        return ClippedSum(weighted(factors), clip_norm, _key=_KEY)


def zero_sum(like: Mapping[str, Tensor], clip_norm: float) -> ClippedSum:
    """The clipped sum of no rows: what an empty lot contributes.

    Args:
        like: Tensors of the sum's shapes, for example the parameters.
        clip_norm: C.
    """
    zeros = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in like.items()}
    return ClippedSum(zeros, clip_norm, _key=_KEY)


def sum_over_processes(total: ClippedSum, add_up: Callable[[Tensor], Tensor]) -> ClippedSum:
    """The sum of several processes' clipped sums, which must be of different records.

    Args:
        total: This process's sum.
        add_up: Adds a tensor over the processes, for example by an all-reduce.

    Privacy:
        Clipped before it is added up, so that a record still moves the result by at most C.
    """
    added = {name: add_up(total._tensors[name]) for name in sorted(total._tensors)}
    return ClippedSum(added, total.clip_norm, total.count, total.replaced, _key=_KEY)


def per_record_gradients(loss: Callable[..., Tensor], parameters: Mapping[str, Tensor], records: tuple[Tensor, ...]) -> Gradients:
    """The gradient of every record's own loss.

    Args:
        loss: ``loss(parameters, *record) -> scalar`` for *one* record, without a batch dimension.
        parameters: Tensors by name.
        records: Tensors ``[B, …]``, for example images and labels.

    Returns:
        Tensors ``[B, …]`` by name.

    Privacy:
        Row ``i`` is a function of record ``i`` and of ``parameters`` alone.
    """
    in_dims = (None, *([0] * len(records)))
    rows: Gradients = vmap(grad(loss), in_dims=in_dims, randomness="different")(dict(parameters), *records)
    return rows


def clipped_gradient_sum(
    loss: Callable[..., Tensor],
    parameters: Mapping[str, Tensor],
    records: tuple[Tensor, ...],
    clip_norm: float,
    chunk_size: int = 64,
) -> ClippedSum:
    """The sum over records of their clipped gradients, in chunks of bounded memory.

    Args:
        loss: ``loss(parameters, *record) -> scalar`` for one record.
        parameters: Tensors by name.
        records: Tensors ``[B, …]``; ``B`` may be 0.
        clip_norm: C, over the whole gradient.
        chunk_size: Records whose gradients are held at once. 64 rows of a small network fit in a CPU's cache, which makes
            this about as fast as the gradient of the mean loss (``benchmarks/``).

    Privacy:
        Zero-out sensitivity C, whatever the chunk size.
    """
    positive_int("chunk_size", chunk_size)
    total = zero_sum(parameters, clip_norm)
    for chunk in zip(*(tensor.split(chunk_size) for tensor in records), strict=True):
        if len(chunk[0]):
            total = total + clipped_sum(per_record_gradients(loss, parameters, chunk), clip_norm)
    return total


def _clip_factors(norms: Tensor, clip_norm: float) -> Tensor:
    return torch.where(norms.isfinite(), (clip_norm / norms.clamp_min(1e-30)).clamp(max=1.0), 0.0)


def as_matrix(rows: Tensor) -> Tensor:
    """Rows ``[B, …]`` as ``[B, D]``; those of a scalar have D = 1."""
    return rows.flatten(1) if rows.dim() > 1 else rows[:, None]


def _norms(flat: Tensor) -> Tensor:
    """Norms ``[B]`` of ``[B, D]``, piece by piece: in a long float32 sum, squares that are small beside it are rounded away."""
    pieces = [torch.linalg.vector_norm(flat[:, -(flat.shape[1] % PIECE) :], dim=1)[:, None]] if flat.shape[1] % PIECE else []
    whole = flat[:, : flat.shape[1] // PIECE * PIECE]
    pieces.append(torch.linalg.vector_norm(whole.unflatten(1, (-1, PIECE)), dim=2) if whole.shape[1] else flat.new_zeros((len(flat), 0)))
    return torch.cat(pieces, 1).double().square().sum(1).sqrt()


def _wide(value: Tensor) -> torch.dtype:
    return torch.float64 if value.dtype == torch.float64 else torch.float32


def tensors_of(total: ClippedSum) -> dict[str, Tensor]:
    """The tensors of a clipped sum, for the mechanism and for tests.

    Privacy:
        Private. Outside a test the mechanism is its only caller.
    """
    return total._tensors
