import math
import time

import dp_accounting
import numpy as np
import pytest
from dp_accounting import NeighboringRelation
from dp_accounting.pld import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from opacus.accountants import PRVAccountant

from lightning_dpgen.privacy import (
    DisjointShards,
    FullPass,
    PoissonSampling,
    PrivacyBudget,
    PrivacyPlan,
    Relation,
    Release,
    calibrate_noise_multiplier,
    epsilon,
)
from lightning_dpgen.privacy.accounting import antipodal_rdp

DELTA = 1e-5


def poisson(q: float, steps: int, records: int = 1_000_000) -> PrivacyPlan:
    return PrivacyPlan(PoissonSampling(records, round(q * records)), (Release("sum", 1.0, steps),))


PSG = PrivacyPlan(PoissonSampling(60_000, 256), (Release("sum", 0.1, 100_000),))


@pytest.mark.parametrize(
    ("plan", "noise", "relation", "value"),
    [
        (poisson(1, 1), 1.0, Relation.ZERO_OUT, 4.3772),
        (poisson(1, 10), 2.0, Relation.ZERO_OUT, 7.511),
        (poisson(1, 1), 1.0, Relation.REPLACE_ONE, 9.997),
        (PrivacyPlan(FullPass(100), (Release("sum", 1.0, 1),)), 1.0, Relation.ZERO_OUT, 4.3772),
        (PSG, 0.966, Relation.ZERO_OUT, 9.29),
        (PSG, 0.966, Relation.REPLACE_ONE, 16.98),
        (poisson(4 / 21, 30, 21_000), 1.0, Relation.ZERO_OUT, 7.58),
        (PrivacyPlan(DisjointShards(60_000, 1000, 1), (Release("rows", 1.0, 640_000),)), 2.14, Relation.ZERO_OUT, 3.15),
        (PrivacyPlan(DisjointShards(60_000, 1000, 1), (Release("rows", 1.0, 640_000),)), 2.14, Relation.REPLACE_ONE, 3.15),
        (PrivacyPlan(DisjointShards(100, 10, 10), (Release("rows", 1.0, 1),)), 2.0, Relation.ZERO_OUT, 4.3772),
    ],
)
def test_anchors_of_the_literature(plan, noise, relation, value):
    assert plan.epsilon(noise, DELTA, relation) == pytest.approx(value, abs=0.02)


def test_the_library_still_means_by_replace_one_what_we_take_it_to_mean():
    event = dp_accounting.GaussianDpEvent(1.0)
    figures = []
    for accountant, relation in [
        (PLDAccountant, NeighboringRelation.ADD_OR_REMOVE_ONE),
        (PLDAccountant, NeighboringRelation.REPLACE_ONE),
        (RdpAccountant, NeighboringRelation.REPLACE_ONE),
        (RdpAccountant, NeighboringRelation.ADD_OR_REMOVE_ONE),
    ]:
        figures.append(accountant(neighboring_relation=relation).compose(event).get_epsilon(DELTA))
    assert figures == pytest.approx([4.377, 9.997, 4.729, 4.729], abs=2e-3)


@pytest.mark.parametrize(("plan", "noise"), [(poisson(1, 10), 2.0), (PSG, 0.966)])
def test_second_accountant_agrees_where_it_is_tight(plan, noise):
    figure = epsilon(plan.events(noise), DELTA)
    assert figure.accountant == "PLD"
    assert figure.value <= figure.rdp <= 1.15 * figure.value


@pytest.mark.parametrize(("q", "noise", "steps"), [(0.068, 0.65, 60), (0.01, 1.0, 1000), (256 / 60_000, 0.966, 100_000)])
def test_opacus_prv_agrees(q, noise, steps):
    accountant = PRVAccountant()
    accountant.history = [(noise, q, steps)]
    theirs = accountant.get_epsilon(DELTA, eps_error=0.01)
    ours = PrivacyPlan(PoissonSampling(10**9, round(q * 10**9)), (Release("sum", 1.0, steps),)).epsilon(noise, DELTA)
    assert ours == pytest.approx(theirs, rel=0.02)
    assert ours <= 1.02 * theirs + 0.02


def test_release_factors_scale_the_sensitivity():
    doubled = PrivacyPlan(FullPass(10), (Release("network", 1.0, 1, zero_out_factor=2.0),))
    assert doubled.epsilon(2.0, DELTA) == pytest.approx(4.3772, abs=1e-3)
    triangle = PrivacyPlan(FullPass(10), (Release("triangle", 1.0, 1, replace_one_factor=math.sqrt(2)),))
    assert triangle.epsilon(math.sqrt(2), DELTA, Relation.REPLACE_ONE) == pytest.approx(4.3772, abs=1e-3)


def test_several_releases_compose_as_gaussians_do():
    # 1/1² + 1/2² = (1/z)² with z = 0.894…
    plan = PrivacyPlan(FullPass(10), (Release("a", 3.0, 1), Release("b", 0.1, 1, relative_noise=2.0)))
    single = PrivacyPlan(FullPass(10), (Release("a", 1.0, 1),))
    assert plan.epsilon(1.0, DELTA) == pytest.approx(single.epsilon(1 / math.sqrt(1.25), DELTA), abs=2e-3)


@pytest.mark.parametrize(("target", "q", "steps"), [(0.05, 0.01, 1000), (0.5, 0.25, 1), (1, 0.068, 60), (3, 1, 100), (8, 1e-3, 10_000)])
def test_calibration_comes_close_from_below(target, q, steps):
    plan = poisson(q, steps)
    noise = calibrate_noise_multiplier(plan, PrivacyBudget(target, DELTA))
    assert 0.98 * target <= plan.epsilon(noise, DELTA) <= target


@pytest.mark.slow
@pytest.mark.parametrize("target", [0.05, 0.5, 1, 3, 8, 50])
@pytest.mark.parametrize("q", [1e-3, 0.01, 0.25, 1])
@pytest.mark.parametrize("steps", [1, 100, 10_000])
def test_calibration_grid(target, q, steps):
    test_calibration_comes_close_from_below(target, q, steps)


@pytest.mark.parametrize("target", [1000.0, 0.01])
def test_extreme_budgets_calibrate_in_bounded_time(target):
    start = time.monotonic()
    plan = poisson(0.01, 100)
    assert plan.epsilon(calibrate_noise_multiplier(plan, PrivacyBudget(target, DELTA)), DELTA) <= target
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("noise", [1e-3, 0.05, 0.2, 200.0])
@pytest.mark.parametrize(("q", "steps"), [(1e-6, 1), (0.5, 100_000), (1.0, 1), (1.0, 100_000)])
def test_extreme_noise_gives_a_number_or_infinity(noise, q, steps):
    plan = poisson(q, steps)
    large, small = (epsilon(plan.events(noise), delta) for delta in (1e-5, 1e-18))
    assert 0 <= large.value <= large.rdp * (1 + 1e-9)
    assert large.value <= small.value
    assert small.accountant == "RDP"  # below the truncation of the library's tails


def test_no_noise_is_no_privacy_and_no_release_costs_nothing():
    assert poisson(0.1, 10).epsilon(0.0, DELTA) == math.inf
    assert epsilon([], DELTA).value == 0.0
    assert 0 <= poisson(1e-3, 1).epsilon(50.0, 1e-2) < 0.01


def test_epsilon_grows_with_every_release():
    figures = [poisson(0.1, steps).epsilon(1.0, DELTA) for steps in (1, 2, 5, 20)]
    assert figures == sorted(figures)
    assert figures[0] < figures[-1]


def test_an_event_without_a_pair_for_the_relation_is_refused():
    from dataclasses import replace

    event = replace(poisson(0.1, 1).release_event("sum", 1.0), replace_one=None)
    with pytest.raises(ValueError, match="no proven dominating pair under replace-one"):
        epsilon([(event, 1)], DELTA, Relation.REPLACE_ONE)


@pytest.mark.parametrize(("budget", "delta"), [(0, 1e-5), (-1, 1e-5), (math.nan, 1e-5), (math.inf, 1e-5), (1, 0), (1, 1), (1, math.nan)])
def test_budgets_out_of_range_are_refused(budget, delta):
    with pytest.raises(ValueError, match=r"(epsilon|delta)=.*must be"):
        PrivacyBudget(budget, delta)


def test_a_lot_larger_than_the_records_is_refused_with_both_numbers():
    with pytest.raises(ValueError, match=r"64.*5 records"):
        PoissonSampling(5, 64)


def test_plans_survive_a_round_trip():
    for sampling in (PoissonSampling(100, 10), FullPass(100), DisjointShards(100, 10, 2)):
        plan = PrivacyPlan(sampling, (Release("a", 0.3, 7, 2.0),))
        assert PrivacyPlan.from_dict(plan.to_dict()) == plan
        assert plan.event(1.0) == PrivacyPlan.from_dict(plan.to_dict()).event(1.0)


def test_the_claim_is_the_smaller_of_two_bounds():
    tiny = PrivacyPlan(PoissonSampling(60_000, 256), (Release("sum", 1.0, 1),))
    figure = epsilon(tiny.events(50.0), 1e-5)
    assert figure.value <= figure.rdp


def test_calibration_to_a_tiny_budget_ends():
    plan = PrivacyPlan(PoissonSampling(60_000, 256), (Release("sum", 1.0, 10_000),))
    noise = calibrate_noise_multiplier(plan, PrivacyBudget(0.01, 1e-5))
    assert 0.009 <= plan.epsilon(noise, 1e-5) <= 0.01


@pytest.mark.parametrize(("rate", "z", "order"), [(0.001, 2.14, 2), (0.001, 2.14, 6), (0.008, 3.95, 16), (0.04, 4.4, 8), (0.04, 0.6, 2)])
def test_the_antipodal_renyi_bound_is_above_the_divergence_and_near_it_at_small_rates(rate, z, order):
    x = np.linspace(-14 * z - 1.5 * order - 2, 14 * z + 1.5 * order + 2, 400_001)

    def log_mixture(centre):
        normal = [-((x - m) ** 2) / (2 * z * z) - math.log(z * math.sqrt(2 * math.pi)) for m in (0, centre)]
        return np.logaddexp(math.log1p(-rate) + normal[0], math.log(rate) + normal[1])

    integrand = order * log_mixture(1) + (1 - order) * log_mixture(-1)
    exact = (integrand.max() + math.log(np.exp(integrand - integrand.max()).sum() * (x[1] - x[0]))) / (order - 1)
    bound = antipodal_rdp(rate, z, order)
    assert bound >= exact * (1 - 1e-6)
    if rate * math.exp(4 / z**2) < 0.01:
        assert bound <= 1.02 * exact


def test_rdp_is_a_second_opinion_on_poisson_critics():
    plan = PrivacyPlan(DisjointShards(60_000, 1000, 1), (Release("answers", 1.0, 640_000, zero_out_factor=2.0),))
    figure = epsilon(plan.events(2.14), 1e-5)
    assert figure.value == pytest.approx(3.153, abs=0.002)
    assert figure.value < figure.rdp < 1.15 * figure.value


def test_a_budget_finer_than_the_accountants_is_kept_and_said(caplog):
    plan = PrivacyPlan(PoissonSampling(1400, 256), (Release("gradient_sum", 1.0, 12),))
    noise = calibrate_noise_multiplier(plan, PrivacyBudget(0.001, 1e-5))
    assert plan.epsilon(noise, 1e-5) <= 0.001
    assert "below what the accountants resolve" in caplog.text
    caplog.clear()
    calibrate_noise_multiplier(plan, PrivacyBudget(0.1, 1e-5))
    assert not caplog.text
