import pytest
import torch

from lightning_dpgen.privacy import RowDependenceError, check_row_independence


def lot(seed: int) -> list[torch.Tensor]:
    return list(torch.rand(4, 5, generator=torch.Generator().manual_seed(seed)))


def check(rows) -> None:
    check_row_independence(lambda records, seed: rows(torch.stack(list(records)), seed), lot(0), [lot(1)])


def test_independent_rows_pass():
    check(lambda lot, seed: {"weight": lot * 3})


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (lambda lot, seed: {"weight": lot - lot.mean(0)}, "exchanged"),  # BatchNorm
        (lambda lot, seed: {"weight": lot / len(lot)}, "removed"),  # a mean where a sum is taken for one
        (lambda lot, seed: {"weight": torch.cat([lot[:1], lot[1:] - lot.cumsum(0)[:-1]])}, "exchanged"),  # of earlier records only
        (lambda lot, seed: {"fine": lot, "weight": lot.cumsum(0).flip(0)}, "in weight"),  # order, and only the named one
        (lambda lot, seed: {"weight": lot.repeat_interleave(2, 0)}, "8 rows for a lot of 4"),
        (lambda lot, seed: {"weight": lot.T}, "5 rows for a lot of 4"),
    ],
)
def test_rows_that_mix_records_are_refused_by_name(rows, message):
    with pytest.raises(RowDependenceError, match=message):
        check(rows)
