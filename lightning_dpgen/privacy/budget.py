"""The privacy that a run may spend."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lightning_dpgen._validate import between


@dataclass(frozen=True)
class PrivacyBudget:
    """An (ε, δ) that a run must not pass.

    Args:
        epsilon: ε > 0, finite, under the zero-out relation.
        delta: 0 < δ < 1. Choose it well below 1/N.

    Privacy:
        Stated by a person before any record is read; releases nothing.

    Raises:
        ValueError: If a value is out of range.
    """

    epsilon: float
    delta: float = 1e-5

    def __post_init__(self) -> None:
        between("epsilon", self.epsilon, 0, math.inf, "Common choices are 1 to 10.")
        between("delta", self.delta, 0, 1, "Choose it well below 1 / (number of records), for example 1e-5.")
