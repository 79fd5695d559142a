"""Drop-in Lightning callbacks: prior, privacy monitor, budget stop, sample grid, TSTR, release writer."""

from lightning_dpgen.callbacks.prior import Prior
from lightning_dpgen.callbacks.privacy_budget_stop import PrivacyBudgetStop
from lightning_dpgen.callbacks.privacy_monitor import PrivacyMonitor
from lightning_dpgen.callbacks.release_writer import ReleaseWriter
from lightning_dpgen.callbacks.sample_grid import SampleGrid
from lightning_dpgen.callbacks.tstr import TSTREvaluation

__all__ = ["Prior", "PrivacyBudgetStop", "PrivacyMonitor", "ReleaseWriter", "SampleGrid", "TSTREvaluation"]
