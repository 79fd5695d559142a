import pytest
import torch
from torch.func import functional_call
from torch.nn import functional as F

from lightning_dpgen.nn.classifiers import ConvNet
from lightning_dpgen.privacy.clipping import (
    ROUNDING,
    ClippedSum,
    cell_moments,
    cell_sums,
    clipped_gradient_sum,
    clipped_sum,
    grouped_clipped_sum,
    moment_matrices,
    per_record_gradients,
    row_norms,
    sum_over_processes,
    tensors_of,
)


@pytest.fixture
def problem(digits):
    torch.manual_seed(0)
    network = ConvNet(10, (1, 8, 8), width=4)
    parameters = {name: value.detach() for name, value in network.named_parameters()}

    def loss(values, image, label):
        return F.cross_entropy(functional_call(network, values, (image[None],)), label[None])

    def one_record(index):  # the oracle: autograd on a lot of one record
        network.zero_grad()
        F.cross_entropy(network(digits[0][index : index + 1]), digits[1][index : index + 1]).backward()
        return {name: value.grad.clone() for name, value in network.named_parameters()}

    return loss, parameters, one_record, (digits[0][:23], digits[1][:23])


def oracle_sum(one_record, count, clip_norm):
    total: dict[str, torch.Tensor] = {}
    for index in range(count):
        gradient = one_record(index)
        norm = torch.sqrt(sum(value.square().sum() for value in gradient.values()))
        for name, value in gradient.items():
            total[name] = total.get(name, 0) + value * min(1.0, clip_norm / float(norm))
    return total


@pytest.mark.parametrize("clip_norm", [0.01, 5.0, 100.0])
@pytest.mark.parametrize("chunk_size", [1, 7, 64])
def test_the_sum_is_that_of_a_loop_over_records(problem, clip_norm, chunk_size):
    loss, parameters, one_record, records = problem
    total = tensors_of(clipped_gradient_sum(loss, parameters, records, clip_norm, chunk_size))
    expected = oracle_sum(one_record, 23, clip_norm)
    for name, value in expected.items():
        torch.testing.assert_close(total[name], value.double(), atol=1e-5, rtol=1e-4)


def test_rows_are_those_of_each_record(problem):
    loss, parameters, one_record, records = problem
    rows = per_record_gradients(loss, parameters, records)
    for name, value in one_record(5).items():
        torch.testing.assert_close(rows[name][5], value, atol=1e-5, rtol=1e-4)


def test_no_record_moves_the_sum_by_more_than_the_clip_norm(problem):
    loss, parameters, _, (images, labels) = problem
    adversarial = [images[:1] * 1e4, -images[:1] * 1e4, torch.zeros_like(images[:1]), torch.full_like(images[:1], float("nan"))]
    base = tensors_of(clipped_gradient_sum(loss, parameters, (images, labels), 0.1))
    for record in adversarial:
        for label in (0, 9):
            more = (torch.cat([images, record]), torch.cat([labels, torch.tensor([label])]))
            moved = tensors_of(clipped_gradient_sum(loss, parameters, more, 0.1))
            distance = torch.sqrt(sum((moved[name] - base[name]).double().square().sum() for name in base))
            assert distance <= 0.1 * (1 + 1e-5)


def test_an_empty_lot_sums_to_zero(problem):
    loss, parameters, _, (images, labels) = problem
    total = tensors_of(clipped_gradient_sum(loss, parameters, (images[:0], labels[:0]), 0.1))
    assert {name: value.shape for name, value in total.items()} == {name: value.shape for name, value in parameters.items()}
    assert all((value == 0).all() for value in total.values())


def test_rows_with_infinite_numbers_count_as_nothing():
    rows = {"a": torch.tensor([[3.0, 4.0], [float("inf"), 0.0], [float("nan"), 1.0]]), "b": torch.tensor([[0.0], [1.0], [1.0]])}
    total = tensors_of(clipped_sum(rows, 1.0))
    torch.testing.assert_close(total["a"].float(), torch.tensor([0.6, 0.8]))
    torch.testing.assert_close(total["b"].float(), torch.tensor([0.0]))


def test_one_record_does_not_decide_whether_small_rows_are_rounded_away():
    # In a float32 sum, 4,096 rows of 1 leave no room for rows of -0.49 units in the last place; 4,095 do.
    small = -0.49 * 2.0**-11
    for place in (0, -1):
        rows = torch.cat([torch.ones(4096, 1), torch.full((4096, 1), small)])
        rows = rows if place == 0 else rows.flip(0)
        without = rows.clone()
        without[place] = 0
        moved = tensors_of(clipped_sum({"a": rows}, 1.0))["a"] - tensors_of(clipped_sum({"a": without}, 1.0))["a"]
        assert abs(float(moved)) <= ROUNDING
    chunks = [clipped_sum({"a": part}, 1.0) for part in (torch.ones(4096, 1), *[torch.full((1, 1), small)] * 4096)]
    total = chunks[0]
    for chunk in chunks[1:]:
        total = total + chunk
    assert float(tensors_of(total)["a"]) == pytest.approx(4096 * (1 + small), rel=1e-4)


def test_a_long_row_of_small_numbers_beside_a_large_one_is_no_shorter_than_it_is():
    row = torch.full((1, 600_000), 2.4e-4)
    row[0, :64] = 1.0
    assert float(row_norms({"a": row})) == pytest.approx(float(row.double().norm()), rel=4e-6)  # in one float32 sum: 2.7e-4 less


def test_low_precision_rows_are_summed_in_float64():
    rows = {"a": torch.full((4096, 1), 1e-3, dtype=torch.bfloat16)}
    total = tensors_of(clipped_sum(rows, 1.0))["a"]
    assert total.dtype == torch.float64
    assert float(total) == pytest.approx(4096 * float(rows["a"][0]), rel=1e-6)
    assert row_norms(rows).dtype == torch.float64


def test_only_this_module_builds_sums_and_only_equal_clip_norms_add():
    with pytest.raises(TypeError, match="clipped_sum"):
        ClippedSum({"a": torch.ones(1)}, 1.0)
    one, other = clipped_sum({"a": torch.ones(1, 1)}, 1.0), clipped_sum({"a": torch.ones(1, 1)}, 2.0)
    assert float(tensors_of(one + one)["a"]) == 2.0
    with pytest.raises(ValueError, match=r"1\.0 and 1 sums clipped to 2\.0"):
        _ = one + other


@pytest.mark.parametrize("clip_norm", [0.0, -1.0, float("inf"), float("nan")])
def test_clip_norms_out_of_range_are_refused(clip_norm):
    with pytest.raises(ValueError, match="clip_norm"):
        clipped_sum({"a": torch.ones(1, 1)}, clip_norm)


def test_autocast_does_not_round_a_clipped_sum():
    # Eight equal rows: in bfloat16 their clipped sum would be off by up to one part in 256.
    rows = {"a": torch.full((8, 30), 0.37), "b": torch.full((8,), 2.0)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total = tensors_of(clipped_sum(rows, 0.1))
    assert all(value.dtype == torch.float64 for value in total.values())
    norm = torch.cat([value.flatten() for value in total.values()]).norm()
    assert float(norm) == pytest.approx(0.8, rel=1e-6)


def test_a_clip_norm_cannot_be_rewritten():
    total = clipped_sum({"a": torch.ones(2, 3)}, 0.1)
    with pytest.raises(AttributeError):
        total.clip_norm = 5.0


def test_grouped_sums_are_the_loop_over_rows():
    torch.manual_seed(0)
    rows = {"a": torch.randn(7, 2, 3) * 3, "b": torch.randn(7)}
    rows["a"][2, 0, 0] = float("nan")
    groups = torch.tensor([0, 4, 0, 1, 4, 4, 1])
    total = grouped_clipped_sum(rows, groups, 5, 1.5)
    assert (total.count, total.clip_norm) == (5, 1.5)
    for group in range(5):
        kept = [row for row in range(7) if groups[row] == group and row != 2]
        for name, value in tensors_of(total).items():
            expected = torch.zeros(rows[name].shape[1:], dtype=torch.float64)
            for row in kept:
                norm = torch.sqrt(sum(leaf[row].double().square().sum() for leaf in rows.values()))
                expected += rows[name][row].double() * min(1.0, 1.5 / float(norm))
            torch.testing.assert_close(value[group], expected, atol=1e-6, rtol=1e-5)
    assert sum_over_processes(total, lambda value: 2 * value).count == (total + total).count == 5
    with pytest.raises(ValueError, match="5 sums"):
        total + grouped_clipped_sum(rows, groups, 6, 1.5)
    empty = grouped_clipped_sum({"a": torch.zeros(0, 3)}, torch.zeros(0, dtype=torch.int64), 2, 1.0)
    assert tensors_of(empty)["a"].tolist() == [[0.0] * 3] * 2


def test_cell_sums_are_the_loop_over_rows_and_leave_out_what_is_not_finite():
    torch.manual_seed(0)
    rows, cells = torch.randn(9, 4) * 3, torch.tensor([0, 2, 2, 0, 1, 2, 0, 0, 1])
    rows[3, 1], rows[8, 0] = float("nan"), float("inf")
    total = cell_sums(rows, cells, 4, 2.0)
    found = tensors_of(total)
    assert total.clip_norm == pytest.approx(2.0 * 1.09**0.5)
    for cell in range(4):
        mine = [row.double() for index, row in enumerate(rows) if cells[index] == cell and index not in (3, 8)]
        expected = sum((row * min(1.0, 2.0 / float(row.norm())) for row in mine), torch.zeros(4, dtype=torch.float64))
        torch.testing.assert_close(found["sums"][cell], expected)
        assert float(found["counts"][cell]) == pytest.approx(0.3 * 2.0 * len(mine))
    parts = cell_sums(rows[:5], cells[:5], 4, 2.0) + cell_sums(rows[5:], cells[5:], 4, 2.0)
    torch.testing.assert_close(tensors_of(parts)["sums"], found["sums"])


@pytest.mark.parametrize("count", [1, 3])
def test_cell_moments_are_the_loop_over_rows_with_the_norm_of_the_matrix(monkeypatch, count):
    monkeypatch.setattr("lightning_dpgen.privacy.clipping.HELD", 25)  # two rows at a time
    torch.manual_seed(0)
    rows, cells = torch.randn(9, 4), torch.arange(9) % count
    rows[3, 1] = float("nan")
    total = cell_moments(rows, cells, count, 1.5)
    packed = tensors_of(total)["moments"]
    matrices = moment_matrices(packed, 4)
    assert total.clip_norm == 1.5**2
    for cell in range(count):
        mine = [row.double() for index, row in enumerate(rows) if cells[index] == cell and index != 3]
        expected = sum((torch.outer(row, row) * min(1.0, 1.5 / float(row.norm())) ** 2 for row in mine), torch.zeros(4, 4).double())
        torch.testing.assert_close(matrices[cell], expected)
        assert float(packed[cell].norm()) == pytest.approx(float(expected.norm()))


def test_cells_of_no_rows_are_zero():
    nothing = torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)
    for total in (cell_sums(*nothing, 2, 1.0), cell_moments(*nothing, 2, 1.0), cell_moments(*nothing, 1, 1.0)):
        assert all(not value.any() for value in tensors_of(total).values())
