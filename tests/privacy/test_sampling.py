import math

import numpy as np
import pytest

from lightning_dpgen.privacy import (
    DisjointShards,
    FullPass,
    FullPassChunks,
    PoissonLots,
    PoissonSampling,
    SecretStream,
    assign_shards,
    draw_answers,
)

LOTS = 2000


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    sampler = PoissonLots(PoissonSampling(40, 10), LOTS // 2, SecretStream())
    masks = np.zeros((LOTS, 40), dtype=bool)
    for number, lot in enumerate([*sampler, *sampler]):  # two epochs
        masks[number, lot] = True
    return masks


def test_every_record_is_included_at_the_accounted_rate(masks):
    # 40 frequencies, each within 5 standard errors: false alarm 40 x 6e-7.
    assert np.abs(masks.mean(0) - 0.25).max() < 5 * math.sqrt(0.25 * 0.75 / LOTS)


def test_lot_sizes_vary_as_binomials_do(masks):
    # The variance of 2,000 binomials has a standard error of 7.5 x sqrt(2 / 2000) = 0.24: 5 of them, 6e-7.
    sizes = masks.sum(1)
    assert abs(sizes.mean() - 10) < 5 * math.sqrt(7.5 / LOTS)
    assert abs(sizes.var() - 7.5) < 1.2


def test_inclusion_is_independent_of_other_records_other_lots_and_epochs(masks):
    bound = 5 * math.sqrt(0.0625 * 0.9375 / LOTS)
    together = (masks[:, :1] & masks[:, 1:2]).mean()
    assert abs(together - 0.0625) < bound
    in_a_row = (masks[:-1, 0] & masks[1:, 0]).mean()
    assert abs(in_a_row - 0.0625) < bound
    over_the_border = (masks[LOTS // 2 - 1] & masks[LOTS // 2]).mean()
    assert abs(over_the_border - 0.0625) < 5 * math.sqrt(0.0625 * 0.9375 / 40)


def test_lots_may_be_empty_and_are_lots():
    lots = list(PoissonLots(PoissonSampling(3, 1), 200, SecretStream()))
    assert len(lots) == 200
    assert any(lot == [] for lot in lots)  # each is empty with probability 0.296: false alarm 3e-31


def test_a_full_pass_sees_every_record_once():
    sampler = FullPassChunks(FullPass(10), 4)
    assert list(sampler) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len(sampler) == 3
    parts = [list(FullPassChunks(FullPass(10), 4, rank, 3)) for rank in range(3)]
    assert [sorted(sum(chunk, [])) for chunk in zip(*parts, strict=True)] == list(sampler)
    assert [part[2] for part in parts] == [[9], [], [8]]


def test_shards_are_disjoint_equal_and_secret():
    sampling = DisjointShards(101, 10)
    table = assign_shards(sampling, SecretStream())
    assert table.shape == (10, 11)
    assert sorted(table[table >= 0].tolist()) == list(range(101))
    assert set((table >= 0).sum(1)) == {10, 11}
    assert (assign_shards(sampling, SecretStream()) != table).any()  # equal with probability below 1e-100


def test_answers_are_independent_draws_at_the_accounted_rate():
    # 200 draws of 20 x 50 pairs at rate 0.06. Each pair's frequency has a standard error of 0.0168: 1,000 of them stay within 8
    # (a count of 39 where 12 are expected) but for a chance of 2e-6. Sums of disjoint halves of a draw: a correlation of 200 draws
    # beyond 0.4 has a chance of 2e-8.
    sampling, stream = DisjointShards(1000, 50, 3), SecretStream()
    drawn = np.zeros((200, 20, 50))
    for one in drawn:
        one[draw_answers(sampling, 20, stream)] += 1
    assert drawn.max() == 1
    assert np.abs(drawn.mean(0) - 0.06).max() < 8 * 0.0168
    assert drawn.mean() == pytest.approx(0.06, abs=6 * 0.0168 / np.sqrt(1000))
    for halves in (drawn.reshape(200, 2, -1), drawn.transpose(0, 2, 1).reshape(200, 2, -1)):
        assert abs(np.corrcoef(halves.sum(2).T)[0, 1]) < 0.4
    assert abs(np.corrcoef(drawn[:-1].sum((1, 2)), drawn[1:].sum((1, 2)))[0, 1]) < 0.4


def test_all_shards_answer_where_all_are_asked_and_pairs_come_by_shard():
    row, shard = draw_answers(DisjointShards(100, 4, 4), 3, SecretStream())
    assert row.tolist() == [0, 1, 2] * 4
    assert shard.tolist() == sorted(list(range(4)) * 3)
