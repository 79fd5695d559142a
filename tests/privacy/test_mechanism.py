import copy
import math
import pickle

import pytest
import torch

from lightning_dpgen.privacy import (
    BudgetExhausted,
    DisjointShards,
    FullPass,
    GaussianMechanism,
    PoissonSampling,
    PrivacyLedger,
    PrivacyPlan,
    Release,
    SecretStream,
    clipped_sum,
    grouped_clipped_sum,
)
from lightning_dpgen.privacy.clipping import cell_moments

COORDINATES = 20_000


def mechanism(noise: float = 1.0, count: int = 1000, clip_norm: float = 0.5, path=None, **options) -> GaussianMechanism:
    plan = PrivacyPlan(FullPass(10), (Release("sum", clip_norm, count), Release("twice", clip_norm, count, relative_noise=2.0)))
    return GaussianMechanism(plan, noise, PrivacyLedger(path), SecretStream(), **options)


def rows(value: float = 0.0) -> dict[str, torch.Tensor]:
    return {"a": torch.full((1, COORDINATES), value)}


@pytest.mark.parametrize("secure", [False, True])
def test_noise_has_the_stated_deviation(secure):
    # 20,000 normals: the sample deviation is within 3 % of the true one but for a chance below 1e-8 (6 standard errors).
    door = mechanism(noise=3.0)
    door._stream = SecretStream(secure=secure)
    for name, factor in (("sum", 1.0), ("twice", 2.0)):
        released = door.release(name, rows())["a"]
        assert float(released.std()) == pytest.approx(3.0 * 0.5 * factor, rel=0.03)
        assert abs(float(released.mean())) < 6 * 1.5 * factor / math.sqrt(COORDINATES)
        assert abs(float((released[1:] * released[:-1]).mean())) < 6 * (1.5 * factor) ** 2 / math.sqrt(COORDINATES)


def test_noise_is_fresh_under_the_same_public_seed():
    outputs = []
    for _ in range(2):
        torch.manual_seed(0)
        door = mechanism()
        outputs += [door.release("sum", rows())["a"], door.release("sum", rows())["a"]]
    for i in range(4):
        for j in range(i):
            correlation = torch.corrcoef(torch.stack([outputs[i], outputs[j]]))[0, 1]
            assert abs(float(correlation)) < 6 / math.sqrt(COORDINATES)  # false alarm below 1e-8


def test_releasing_leaves_the_public_stream_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    mechanism().release("sum", rows())
    assert torch.equal(torch.get_rng_state(), state)


def test_without_noise_the_clipped_sum_comes_out():
    door = mechanism(noise=0.0)
    released = door.release("sum", {"a": torch.tensor([[3.0, 4.0], [0.0, 0.1]])})["a"]
    torch.testing.assert_close(released, torch.tensor([0.3, 0.5]))
    assert door.ledger.epsilon(1e-5).value == math.inf


def test_the_ledger_is_written_before_noise_is_drawn(tmp_path):
    path = tmp_path / "run.jsonl"

    class Crash(SecretStream):
        def normal(self, *args, **kwargs):
            assert len(PrivacyLedger(path)) == 1  # on disk already, as another process would read it
            raise KeyboardInterrupt

    door = mechanism(path=path)
    door._stream = Crash()
    with pytest.raises(KeyboardInterrupt):
        door.release("sum", rows())
    assert len(PrivacyLedger(path)) == 1


def test_what_the_plan_does_not_allow_is_refused_and_not_charged():
    door = mechanism(count=1)
    with pytest.raises(ValueError, match="not in the plan"):
        door.release("other", rows())
    with pytest.raises(ValueError, match=r"clipped to 0\.4, the plan says 0\.5"):
        door.release("sum", clipped_sum(rows(), 0.4))
    assert len(door.ledger) == 0
    door.release("sum", rows())
    with pytest.raises(BudgetExhausted, match="none is left of 1 planned"):
        door.release("sum", rows())
    assert len(door.ledger) == 1
    mechanism(count=1, capped=False).release("sum", rows())


def test_without_a_cap_every_release_is_charged():
    door = mechanism(count=1, capped=False)
    for _ in range(3):
        door.release("sum", rows())
    assert len(door.ledger) == 3


def test_secret_streams_can_be_neither_copied_nor_saved():
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="cannot be pickled or copied"):
            attempt(SecretStream())


def test_two_secret_streams_differ_and_uniforms_fill_the_interval():
    for secure in (False, True):
        one, other = SecretStream(secure).uniform(10_000), SecretStream(secure).uniform(10_000)
        assert (one != other).all()
        assert 0 <= one.min() < 0.01
        assert 0.99 < one.max() < 1
        assert sorted(SecretStream(secure).permutation(50).tolist()) == list(range(50))


def test_plan_equals_ledger_after_all_releases():
    plan = PrivacyPlan(PoissonSampling(100, 10), (Release("sum", 1.0, 4),))
    door = GaussianMechanism(plan, 1.3, PrivacyLedger(None), SecretStream())
    for _ in range(4):
        door.release("sum", rows())
    assert door.ledger.event() == plan.event(1.3)


def test_a_poisson_lot_is_released_once():
    plan = PrivacyPlan(PoissonSampling(100, 10), (Release("sum", 1.0, 9), Release("other", 1.0, 9)))
    door = GaussianMechanism(plan, 1.0, PrivacyLedger(None), SecretStream())
    door.release("sum", rows())  # by hand, without lots
    for _ in range(2):
        door.next_lot()
        door.release("sum", rows())
        for name in ("sum", "other"):
            with pytest.raises(RuntimeError, match="released already"):
                door.release(name, rows())
    assert len(door.ledger) == 3


def test_where_noise_comes_from_is_said_for_each_device():
    assert "CUDA Philox" in SecretStream().source(torch.device("cuda"))
    assert "PCG64DXSM, 256 bits" in SecretStream().source(torch.device("cpu"))
    assert "AES" in SecretStream(secure=True).source(torch.device("cuda"))


def shards(asked: int = 1, count: int = 10, **options) -> GaussianMechanism:
    plan = PrivacyPlan(DisjointShards(100, 10, asked), (Release("answers", 1.0, count, zero_out_factor=2.0),))
    return GaussianMechanism(plan, 1.0, PrivacyLedger(None), SecretStream(), **options)


def test_answers_are_clipped_summed_by_row_charged_one_by_one_and_drawn_afresh():
    door = shards(asked=3, count=100)
    door._stream.normal = lambda shape, std, device: torch.zeros(shape, dtype=torch.float64)
    row, _ = door.draw_answers(40)
    rows = torch.randn(len(row), 3) * 2
    kept = row.clone()
    row.zero_()  # what was handed out is not what is added up by
    released = door.release_answers("answers", {"x": rows})["x"]
    expected = torch.zeros(40, 3)
    for one, place in zip(rows, kept, strict=True):
        expected[place] += one / max(1.0, float(one.norm()))
    torch.testing.assert_close(released, expected, atol=1e-5, rtol=1e-5)
    assert len(door.ledger) == 40
    assert door.ledger.event() == shards(asked=3, count=40).plan.event(1.0)
    with pytest.raises(RuntimeError, match="no answers were drawn"):
        door.release_answers("answers", {"x": rows})
    row, _ = door.draw_answers(61)
    with pytest.raises(RuntimeError, match="a second draw"):
        door.draw_answers(61)
    with pytest.raises(ValueError, match=f"{len(row)} answers were drawn"):
        door.release_answers("answers", {"x": torch.ones(len(row) + 1, 3)})
    with pytest.raises(BudgetExhausted, match="61 asked for, 60 left of 100 planned"):
        door.release_answers("answers", {"x": torch.ones(len(row), 3)})
    assert len(door.ledger) == 40


def test_shards_answer_by_their_own_door_only():
    with pytest.raises(RuntimeError, match=r"release_answers\(\)"):
        shards().release("answers", {"x": torch.ones(2, 3)})
    door = mechanism()
    with pytest.raises(RuntimeError, match="2 sums side by side"):
        door.release("sum", grouped_clipped_sum({"a": torch.ones(2, 3)}, torch.tensor([0, 1]), 2, 0.5))
    for call in (door.assign_shards, lambda: door.draw_answers(2), lambda: door.release_answers("sum", {})):
        with pytest.raises(TypeError, match="DisjointShards"):
            call()
    assert len(door.ledger) == 0


def test_the_plans_replace_one_factor_must_bound_what_is_released():
    plan = PrivacyPlan(FullPass(10), (Release("moments", 1.0, 1, replace_one_factor=2**0.5), Release("sums", 1.0, 1)))
    door = GaussianMechanism(plan, 1.0, PrivacyLedger(None), SecretStream())
    with pytest.raises(ValueError, match=r"by 2 C, the plan says 1\.414 C"):
        door.release("moments", {"a": torch.ones(2, 3)})  # plain rows may be opposite
    assert len(door.ledger) == 0
    both = torch.ones(2, 3), torch.zeros(2, dtype=torch.int64)
    door.release("moments", cell_moments(*both, 1, 1.0) + cell_moments(*both, 1, 1.0))
    door.release("sums", cell_moments(*both, 1, 1.0))
