"""Train generators and classifiers on private records under differential privacy, and publish what may be published."""

from lightning_dpgen.classifier import Classifier
from lightning_dpgen.data import DigitsDataModule, FashionMNISTDataModule, ImagesDataModule, MNISTDataModule
from lightning_dpgen.evaluation import tstr
from lightning_dpgen.generators import DPGAN, DPMERF, GSWGAN, MixturePPCA, PrivateGenerator, PrivateSetGeneration
from lightning_dpgen.privacy import PrivacyBudget, PrivacyPlan, Relation, calibrate_noise_multiplier
from lightning_dpgen.release import SanitizedRelease, load_release, verify_release
from lightning_dpgen.strategies import DPDDPStrategy, DPStrategy

__version__ = "0.1.0"

__all__ = [
    "DPGAN",
    "DPMERF",
    "GSWGAN",
    "Classifier",
    "DPDDPStrategy",
    "DPStrategy",
    "DigitsDataModule",
    "FashionMNISTDataModule",
    "ImagesDataModule",
    "MNISTDataModule",
    "MixturePPCA",
    "PrivacyBudget",
    "PrivacyPlan",
    "PrivateGenerator",
    "PrivateSetGeneration",
    "Relation",
    "SanitizedRelease",
    "calibrate_noise_multiplier",
    "load_release",
    "tstr",
    "verify_release",
]
