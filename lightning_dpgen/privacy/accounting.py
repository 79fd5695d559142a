"""ε from events, and noise from a budget.

The claim is composed from privacy-loss distributions (PLD); Rényi DP (RDP) is the second opinion that every certificate
shows beside it, and the claim where a PLD grid would not fit in memory, δ lies below its truncation, or ε is below its cells.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import privacy_loss_distribution as pld
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from scipy.special import gammaln, logsumexp

from lightning_dpgen._validate import between
from lightning_dpgen.privacy.budget import PrivacyBudget
from lightning_dpgen.privacy.plan import DominatingPair, PrivacyPlan, Relation, ReleaseEvent

GRIDS = (2e-3, 1e-3, 1e-4)
"""Widths of a cell of the privacy-loss grid. Every width is pessimistic; the second is used where the first differs from it by
less than a thousandth, so that the error is smaller still, and else the third."""
MAX_CELLS = 1e7
"""Above this many cells the claim is RDP."""
MIN_DELTA = 1e-12
"""Below this δ the library's truncated tails would dominate, and the claim is RDP."""

log = logging.getLogger(__name__)

_PairCounts = tuple[tuple[DominatingPair, int], ...]


@dataclass(frozen=True)
class Epsilon:
    """An ε with the accountant that proves it.

    Args:
        value: The claimed ε.
        accountant: ``"PLD"`` or ``"RDP"``.
        rdp: ε by the second accountant; ``inf`` where it has no finite answer.
    """

    value: float
    accountant: str
    rdp: float


def epsilon(events: Iterable[tuple[ReleaseEvent, int]], delta: float, relation: Relation = Relation.ZERO_OUT) -> Epsilon:
    """ε at ``delta`` of the composition of ``events`` under one relation.

    Args:
        events: Release events with how often each happened.
        delta: 0 < δ < 1.
        relation: The neighbouring relation; every event must have a dominating pair for it.

    Privacy:
        Composes privacy-loss distributions and never adds ε values. Pessimistic: the true ε is not above the figure.

    Raises:
        ValueError: If δ is out of range or an event has no pair for ``relation``.
    """
    between("delta", delta, 0, 1)
    counts: Counter[DominatingPair] = Counter()
    for event, count in events:
        counts[event.pair(relation)] += count
    pairs = tuple(sorted(((p, c) for p, c in counts.items() if c), key=repr))
    return _epsilon(pairs, delta)


@functools.lru_cache(maxsize=4096)
def _epsilon(pairs: _PairCounts, delta: float) -> Epsilon:
    if not pairs:
        return Epsilon(0.0, "PLD", 0.0)
    if any(pair.noise_multiplier == 0 for pair, _ in pairs):
        return Epsilon(math.inf, "PLD", math.inf)
    rdp = _rdp_epsilon(pairs, delta)
    if delta >= MIN_DELTA and _width(pairs) / GRIDS[-1] <= MAX_CELLS:
        rough, value = (_pld_epsilon(pairs, delta, grid) for grid in GRIDS[:2])
        if rough - value > 1e-3 * value:
            value = _pld_epsilon(pairs, delta, GRIDS[2])
        if value <= rdp:  # both are bounds; a grid is the looser one only where ε is below its cells
            return Epsilon(value, "PLD", rdp)
    return Epsilon(rdp, "RDP", rdp)


@functools.lru_cache(maxsize=4096)
def _pld_epsilon(pairs: _PairCounts, delta: float, grid: float) -> float:
    composed = functools.reduce(lambda a, b: a.compose(b), [_pld(pair, count, grid) for pair, count in pairs])
    return max(0.0, float(composed.get_epsilon_for_delta(delta)))


def _pld(pair: DominatingPair, count: int, grid: float) -> pld.PrivacyLossDistribution:
    unsampled = pair.sampling_probability == 1
    distribution = pld.from_gaussian_mechanism(
        standard_deviation=pair.noise_multiplier / (math.sqrt(count) if unsampled else 1.0),
        value_discretization_interval=grid,
        sampling_prob=pair.sampling_probability,
        neighboring_relation=pair.library_relation,
    )
    return distribution if unsampled or count == 1 else distribution.self_compose(count)


@functools.lru_cache(maxsize=256)
def antipodal_rdp(rate: float, z: float, order: int) -> float:
    """Rényi divergence of order α between (1-q)N(0) + qN(1) and (1-q)N(0) + qN(-1), deviation z: an upper bound.

    Args:
        rate: q.
        z: Noise multiplier.
        order: α, a whole number of at least 2.

    Returns:
        1/(α-1)·log(1 + C(α,2) q²·t₂ + Σ_{j≥3} C(α,j) qʲ c_j t_j): (P/Q)^α = (1 + q(A-B)/Q)^α is expanded under Q, whose first-order term
        vanishes. (A-B)² / Q and, after (A-B)ʲ ≤ Aʲ (+ Bʲ where j is even, hence c_j = 2), Aʲ / Q^(j-1) are convex in Q, so that
        each term is at most the mean of its values at Q's two components, N(0) and N(-1).
    """
    all_j, j = np.arange(2, order + 1), np.arange(3, order + 1)
    beside = math.log(2) + 1 / z**2 + math.log1p(-math.exp(-2 / z**2))  # log ∫(A-B)²/N(0)
    across = 4 / z**2 + math.log1p(-math.exp(-4 / z**2))  # log ∫(A-B)²/N(-1)
    squared = np.logaddexp(math.log1p(-rate) + beside, math.log(rate) + across)
    powers = np.logaddexp(math.log1p(-rate) + j * (j - 1) / (2 * z**2), math.log(rate) + 4 * j * (j - 1) / (2 * z**2))
    ways = gammaln(order + 1) - gammaln(all_j + 1) - gammaln(order - all_j + 1)
    terms = ways + all_j * math.log(rate)
    terms += np.concatenate([[squared], powers + np.where(j % 2 == 0, math.log(2), 0.0)])
    return float(np.logaddexp(0.0, logsumexp(terms))) / (order - 1)


def _rdp_epsilon(pairs: _PairCounts, delta: float) -> float:
    accountant = RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_SPECIAL)
    orders = [float(order) for order in accountant._orders]
    extra = np.zeros(len(orders))
    library_log = logging.getLogger("absl")  # warns of every order that it leaves out, which only loosens the bound
    level = library_log.level
    library_log.setLevel(logging.ERROR)
    try:
        for pair, count in pairs:
            if pair.library_relation is NeighboringRelation.REPLACE_ONE:  # of which the library has no RDP
                for place, order in enumerate(orders):
                    unsampled = order * 2 / pair.noise_multiplier**2
                    whole = order.is_integer() and order >= 2
                    sampled = antipodal_rdp(pair.sampling_probability, pair.noise_multiplier, int(order)) if whole else math.inf
                    extra[place] += count * min(unsampled, sampled)
            else:
                accountant.compose(pair.event, count)
        value = float(compute_epsilon(orders, np.asarray(accountant._rdp) + extra, delta)[0])
    except (OverflowError, FloatingPointError):
        return math.inf
    finally:
        library_log.setLevel(level)
    return max(0.0, value) if not math.isnan(value) else math.inf


@functools.lru_cache(maxsize=4096)
def _width(pairs: _PairCounts) -> float:
    """Roughly the widest range of privacy losses in the composition: those of one release, or of all of them."""
    # An estimate of size, not a claim: replace-one is taken as sensitivity 2 under sampling.
    halved = tuple((_halved(pair), count) for pair, count in pairs)
    single = 0.0
    for pair, count in halved:
        mu = (math.sqrt(count) if pair.sampling_probability == 1 else 1.0) / pair.noise_multiplier
        single = max(single, mu * mu / 2 + 20 * mu)
    return max(single, 2 * _rdp_epsilon(halved, 1e-15)) if single / GRIDS[-1] <= MAX_CELLS else single


def _halved(pair: DominatingPair) -> DominatingPair:
    if pair.library_relation is not NeighboringRelation.REPLACE_ONE:
        return pair
    return DominatingPair(NeighboringRelation.REPLACE_SPECIAL, pair.sampling_probability, pair.noise_multiplier / 2)


def calibrate_noise_multiplier(plan: PrivacyPlan, budget: PrivacyBudget, spent: Mapping[ReleaseEvent, int] = MappingProxyType({})) -> float:
    """The smallest noise multiplier, to within half a percent of ε, with which ``plan`` stays inside ``budget``.

    Args:
        plan: What will be released.
        budget: The (ε, δ) not to pass, zero-out.
        spent: What the same records have paid for already, with counts.

    Returns:
        Noise standard deviation ÷ clip norm, rounded up to six digits.

    Privacy:
        A function of public constants only. The result satisfies ``plan.epsilon(result, δ) <= ε`` by the claim's own
        accountant, checked before it is returned.

    Raises:
        ValueError: If no noise below 10⁶ clip norms meets the budget.
    """

    def events(z: float) -> list[tuple[ReleaseEvent, int]]:
        return [*plan.events(z), *spent.items()]

    def checked(z: float) -> float:
        """Rounded up, and raised further until the claim itself is inside the budget."""
        rounded = _rounded_up(z)
        while (found := epsilon(events(rounded), budget.delta).value) > budget.epsilon:
            rounded = _rounded_up(1.005 * rounded)
        if found < budget.epsilon / 2:
            log.warning(
                "epsilon=%g is below what the accountants resolve for this plan: the noise multiplier %g keeps %.2g, with more noise than "
                "the budget asks for. Use a larger epsilon.",
                budget.epsilon,
                rounded,
                found,
            )
        return rounded

    def pairs(z: float) -> _PairCounts:
        return tuple((event.pair(Relation.ZERO_OUT), count) for event, count in events(z))

    def by_rdp(z: float) -> float:
        return _rdp_epsilon(pairs(z), budget.delta)

    def narrowed(low: float, high: float, ratio: float) -> tuple[float, float]:
        while high / low > ratio:
            middle = math.sqrt(low * high)
            low, high = (middle, high) if by_rdp(middle) > budget.epsilon else (low, middle)
        return low, high

    def searched(z: float) -> float:  # on a grid as coarse as the budget allows; the last word is the claim's own
        return _pld_epsilon(pairs(z), budget.delta, min(1e-3, max(GRIDS[-1], budget.epsilon / 5000)))

    high = 1.0
    while by_rdp(high) > budget.epsilon:
        high *= 2
        if high > 1e6:
            raise ValueError(
                f"no noise meets epsilon={budget.epsilon:g} at delta={budget.delta:g} for {plan.releases}"
                f"{' beside what is spent' if spent else ''}: use fewer releases or a larger budget."
            )
    low = high
    while by_rdp(low) <= budget.epsilon and low > 1e-4:
        low /= 2
    low, high = narrowed(low, high, 1.01)
    if epsilon(events(high), budget.delta).accountant == "RDP":
        return checked(narrowed(low, high, 1.0005)[1])

    # RDP is never below PLD, so `high` is inside the budget. Tighten by PLD, false position in log-log coordinates.
    inside, inside_epsilon = high, searched(high)
    outside, outside_epsilon = high / 1.5, math.inf
    for step in range(8):
        if inside_epsilon >= 0.995 * budget.epsilon:
            break
        if math.isinf(outside_epsilon):
            guess = inside * (inside_epsilon / budget.epsilon) ** (0.8 if step else 1.0)
        else:
            share = math.log(inside_epsilon / (0.9985 * budget.epsilon)) / math.log(inside_epsilon / outside_epsilon)
            guess = inside * (outside / inside) ** share
        guess_epsilon = searched(guess)
        if guess_epsilon <= budget.epsilon:
            inside, inside_epsilon = guess, guess_epsilon
        else:
            outside, outside_epsilon = guess, guess_epsilon
    return checked(inside)


def _rounded_up(value: float) -> float:
    scale = 10.0 ** (5 - math.floor(math.log10(value)))
    return math.ceil(value * scale) / scale
