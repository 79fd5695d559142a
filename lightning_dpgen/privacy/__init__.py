"""The privacy core: plans, accounting, the ledger and the one door. Torch and ``dp_accounting`` only, no Lightning."""

from lightning_dpgen.privacy.accounting import Epsilon, calibrate_noise_multiplier, epsilon
from lightning_dpgen.privacy.budget import PrivacyBudget
from lightning_dpgen.privacy.clipping import ClippedSum, clipped_gradient_sum, clipped_sum, grouped_clipped_sum, per_record_gradients
from lightning_dpgen.privacy.ledger import LedgerError, PrivacyLedger
from lightning_dpgen.privacy.mechanism import BudgetExhausted, GaussianMechanism
from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import (
    DisjointShards,
    DominatingPair,
    FullPass,
    PoissonSampling,
    PrivacyPlan,
    Relation,
    Release,
    ReleaseEvent,
)
from lightning_dpgen.privacy.probe import RowDependenceError, check_row_independence
from lightning_dpgen.privacy.sampling import FullPassChunks, NoRecords, PoissonLots, assign_shards, draw_answers

__all__ = [
    "BudgetExhausted",
    "ClippedSum",
    "DisjointShards",
    "DominatingPair",
    "Epsilon",
    "FullPass",
    "FullPassChunks",
    "GaussianMechanism",
    "LedgerError",
    "NoRecords",
    "PoissonLots",
    "PoissonSampling",
    "PrivacyBudget",
    "PrivacyLedger",
    "PrivacyPlan",
    "Relation",
    "Release",
    "ReleaseEvent",
    "RowDependenceError",
    "SecretStream",
    "assign_shards",
    "calibrate_noise_multiplier",
    "check_row_independence",
    "clipped_gradient_sum",
    "clipped_sum",
    "draw_answers",
    "epsilon",
    "grouped_clipped_sum",
    "per_record_gradients",
]
