import pytest
import torch

from lightning_dpgen.privacy import RowDependenceError, check_row_independence


def batch(seed: int) -> list[torch.Tensor]:
    return [torch.rand(4, 5, generator=torch.Generator().manual_seed(seed))]


def check(rows) -> None:
    check_row_independence(rows, batch(0), batch(1))


def test_independent_rows_pass():
    check(lambda lot: {"weight": lot[0] * 3})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda lot: {"weight": lot[0] - lot[0].mean(0)}, "exchanged"),  # BatchNorm
        (lambda lot: {"weight": lot[0] / len(lot[0])}, "removed"),  # a mean where a sum is taken for one
        (lambda lot: {"fine": lot[0], "weight": lot[0].cumsum(0).flip(0)}, "in weight"),  # order, and only the named one
        (lambda lot: {"weight": lot[0].repeat_interleave(2, 0)}, "8 rows for a lot of 4"),
        (lambda lot: {"weight": lot[0].T}, "5 rows for a lot of 4"),
    ],
)
def test_rows_that_mix_records_are_refused_by_name(rows, message):
    with pytest.raises(RowDependenceError, match=message):
        check(rows)
