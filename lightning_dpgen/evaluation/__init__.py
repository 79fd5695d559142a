"""What synthetic images are worth: train on synthetic, test on real."""

from lightning_dpgen.evaluation.protocols import PROTOCOLS, Protocol
from lightning_dpgen.evaluation.tstr import TSTRTable, tstr

__all__ = ["PROTOCOLS", "Protocol", "TSTRTable", "tstr"]
