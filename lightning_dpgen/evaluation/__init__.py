"""What synthetic images are worth: train on synthetic, test on real; and how they look beside real ones."""

from lightning_dpgen.evaluation.classic import classic
from lightning_dpgen.evaluation.fidelity import FeatureNetwork, fidelity, precision_recall, train_feature_network
from lightning_dpgen.evaluation.protocols import PROTOCOLS, Protocol
from lightning_dpgen.evaluation.tstr import TSTRTable, tstr

__all__ = [
    "PROTOCOLS",
    "FeatureNetwork",
    "Protocol",
    "TSTRTable",
    "classic",
    "fidelity",
    "precision_recall",
    "train_feature_network",
    "tstr",
]
