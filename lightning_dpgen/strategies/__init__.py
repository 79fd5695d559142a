"""Lightning strategies that train under differential privacy."""

from typing import Any

from lightning_dpgen._compat import pl
from lightning_dpgen.strategies.dp import DPDDPStrategy, DPStrategy

REGISTERED: dict[str, Any] = {"epsilon": 3.0, "delta": 1e-5}
"""What ``Trainer(strategy="dpsgd")`` means; the log says so at every fit."""

if "dpsgd" not in pl.strategies.StrategyRegistry:
    pl.strategies.StrategyRegistry.register(
        "dpsgd", DPStrategy, description="Differentially private training, epsilon=3, delta=1e-5", **REGISTERED
    )

__all__ = ["DPDDPStrategy", "DPStrategy"]
