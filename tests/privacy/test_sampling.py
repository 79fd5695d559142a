import math

import numpy as np
import pytest

from lightning_dpgen.privacy import DisjointShards, FullPass, FullPassChunks, PoissonLots, PoissonSampling, SecretStream, ShardBatches

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


def test_shards_are_disjoint_equal_and_kept():
    sampling = DisjointShards(101, 10)
    first = ShardBatches(sampling, SecretStream())
    shards = list(first)
    assert sorted(sum(shards, [])) == list(range(101))
    assert {len(shard) for shard in shards} == {10, 11}
    assert list(ShardBatches(sampling, SecretStream(), first.assignment)) == shards
    assert list(ShardBatches(sampling, SecretStream())) != shards
    with pytest.raises(ValueError, match="one shard"):
        ShardBatches(sampling, SecretStream(), first.assignment[:50])
