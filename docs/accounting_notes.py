"""Prints the table of accounting-notes.md: GS-WGAN's published setting under eight accountings.

Run it with ``python docs/accounting_notes.py``.
"""

from __future__ import annotations

import math

import dp_accounting
import numpy as np
from dp_accounting import NeighboringRelation
from dp_accounting.pld import pld_pmf, privacy_loss_distribution
from dp_accounting.pld.pld_privacy_accountant import PLDAccountant
from dp_accounting.rdp import RdpAccountant
from dp_accounting.rdp.rdp_privacy_accountant import compute_epsilon
from scipy.signal import fftconvolve
from scipy.special import gammaln, logsumexp, ndtr

from lightning_dpgen.privacy import DisjointShards, PrivacyPlan, Release

CRITICS, BATCH, STEPS, DELTA = 1000, 32, 20_000, 1e-5
STD = 2.14  # of the noise, in units of C
RATE, DRAWS, SIGMA = 1 / CRITICS, BATCH * STEPS, STD / 2  # SIGMA: in units of the replace-one sensitivity 2C
ORDERS = range(2, 257)


def from_rdp(rdp: list[float], draws: int) -> float:
    """ε of ``draws`` releases by the conversion of Mironov (2017): the smallest over orders of draws·RDP + log(1/δ)/(α-1)."""
    return min(draws * value + math.log(1 / DELTA) / (order - 1) for order, value in zip(ORDERS, rdp, strict=True))


def log_binomial(order: int, j: int) -> float:
    """The logarithm of ``order`` choose ``j``."""
    return float(gammaln(order + 1) - gammaln(j + 1) - gammaln(order - j + 1))


def subsampled_rdp(order: int, second: float, later: list[float]) -> float:
    """1/(α-1)·log(1 + C(α,2) q²·second + Σ_{j≥3} C(α,j) qʲ·later[j] e^{(j-1) j / 2σ²})."""
    terms = [0.0, log_binomial(order, 2) + 2 * math.log(RATE) + math.log(second)]
    for j in range(3, order + 1):
        terms.append(log_binomial(order, j) + j * math.log(RATE) + math.log(later[j % 2]) + j * (j - 1) / (2 * SIGMA**2))
    return float(logsumexp(terms)) / (order - 1)


def claimed() -> float:
    """The general bound for subsampling without replacement (Wang, Balle and Kasiviswanathan 2019), T·B independent draws."""
    growth = math.exp(1 / SIGMA**2)
    return from_rdp([subsampled_rdp(order, min(4 * (growth - 1), 2 * growth), [2, 2]) for order in ORDERS], DRAWS)


def proven_one_critic() -> float:
    """Our bound for one critic a sample, with the tighter conversion of Canonne, Kamath and Steinke (2020)."""
    rdp = [DRAWS * subsampled_rdp(order, math.exp(1 / SIGMA**2) - 1, [2, 1]) for order in ORDERS]
    return float(compute_epsilon(list(ORDERS), rdp, DELTA)[0])


def library(event: dp_accounting.DpEvent, count: int, relation: NeighboringRelation, by: str) -> float:
    """ε of ``count`` events by one of the library's accountants."""
    accountant = PLDAccountant(relation) if by == "PLD" else RdpAccountant(neighboring_relation=relation)
    return float(accountant.compose(event, count).get_epsilon(DELTA))


def symmetrised() -> float:
    """The subsampling profile of Zhu, Dong and Wang (2022), made symmetric, composed numerically (pessimistic grid)."""
    grid = 1e-4
    epsilons = np.arange(0, 80_001) * grid
    with np.errstate(divide="ignore"):
        threshold = SIGMA**2 * np.log((np.exp(epsilons) - 1 + RATE) / RATE) + 0.5
    tail, shifted = ndtr(-threshold / SIGMA), ndtr(-(threshold - 1) / SIGMA)
    above = np.maximum((1 - RATE) * tail + RATE * shifted - np.exp(epsilons) * tail, 0)
    below = 1 - np.exp(-epsilons[:0:-1]) * (1 - above[:0:-1])
    rounded = np.arange(-80_000, 80_001)
    pmf = pld_pmf.create_pmf_pessimistic_connect_dots(grid, rounded, np.concatenate([below, above]))
    return float(pmf.self_compose(DRAWS, 1e-15).get_epsilon_for_delta(DELTA))


def adaptive_excess(epsilon: float, blocks: int = 50) -> float:
    """By how much δ at ``epsilon`` grows where the adversary picks the direction anew for every block of draws, in percent.

    Backward induction over the privacy loss so far, both with and without the choice on the same grid.
    """
    grid = 1e-3
    pair = privacy_loss_distribution.from_gaussian_mechanism(SIGMA, sampling_prob=RATE, value_discretization_interval=1e-4)
    steps = []
    for pmf in (pair._pmf_remove, pair._pmf_add):
        block = pmf.self_compose(DRAWS // blocks, 1e-13).to_dense_pmf()
        cells = np.floor((block._lower_loss + np.arange(len(block._probs))) * 1e-4 / grid).astype(int)
        steps.append((int(cells.min()), np.bincount(cells - cells.min(), weights=block._probs)))
    losses = np.arange(int(-20 / grid), int(30 / grid) + 1) * grid

    def delta(choose: bool) -> float:
        value = np.maximum(0, 1 - np.exp(epsilon - losses))
        for _ in range(blocks):
            ahead = []
            for first, weights in steps[: 2 if choose else 1]:
                pad = len(weights) + abs(first)
                expected = fftconvolve(np.pad(value, pad, mode="edge"), weights[::-1])
                ahead.append(expected[pad + first + len(weights) - 1 :][: len(value)])
            value = np.max(ahead, axis=0)
        return float(value[np.searchsorted(losses, 0)])

    return 100 * (delta(True) / delta(False) - 1)


def main() -> None:
    """Prints one line an accounting."""
    poisson = dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(SIGMA))
    without = dp_accounting.SampledWithoutReplacementDpEvent(CRITICS, 1, dp_accounting.GaussianDpEvent(SIGMA))
    joint = dp_accounting.PoissonSampledDpEvent(RATE, dp_accounting.GaussianDpEvent(SIGMA / math.sqrt(BATCH)))
    plan = PrivacyPlan(DisjointShards(60_000, CRITICS, 1), (Release("answer_sum", 1.0, DRAWS, zero_out_factor=2.0),))
    add, replace = NeighboringRelation.ADD_OR_REMOVE_ONE, NeighboringRelation.REPLACE_ONE
    rows = [
        ("published claim: T·B independent draws, general subsampling bound", claimed()),
        ("what its code does, one critic for the whole batch: joint, PLD", library(joint, STEPS, add, "PLD")),
        ("the same, RDP", library(joint, STEPS, add, "RDP")),
        ("one critic a sample: the library's without-replacement RDP", library(without, DRAWS, replace, "RDP")),
        ("one critic a sample: symmetrised subsampling profile", symmetrised()),
        ("one critic a sample: our RDP bound (one step checked numerically)", proven_one_critic()),
        ("one critic a sample by add-or-remove Poisson: not a bound", library(poisson, DRAWS, add, "PLD")),
        ("Poisson critics: what this package does and claims", plan.epsilon(STD, DELTA)),
    ]
    for name, value in rows:
        print(f"{name:<70} {value:8.2f}")
    fixed = rows[6][1]
    print(f"an adversary who picks the direction in 50 blocks has {adaptive_excess(fixed):.2f} % more delta at {fixed:.2f}")


if __name__ == "__main__":
    main()
