"""Private generators, one LightningModule a file."""

from lightning_dpgen.generators.base import PrivateGenerator, looking_at, to_bytes
from lightning_dpgen.generators.dp_gan import DPGAN, AdversarialSchedule
from lightning_dpgen.generators.dp_merf import DPMERF
from lightning_dpgen.generators.gs_wgan import GSWGAN
from lightning_dpgen.generators.matching import MatchingSchedule
from lightning_dpgen.generators.mixture_ppca import MixturePPCA
from lightning_dpgen.generators.private_set import PrivateSetGeneration

__all__ = [
    "DPGAN",
    "DPMERF",
    "GSWGAN",
    "AdversarialSchedule",
    "MatchingSchedule",
    "MixturePPCA",
    "PrivateGenerator",
    "PrivateSetGeneration",
    "looking_at",
    "to_bytes",
]
