"""Which Lightning is used: decided here, imported from here.

``lightning.pytorch`` and ``pytorch_lightning`` are the same code under two names whose classes do not mix. A program
that has imported one of them gets that one; otherwise ``pytorch_lightning``, our declared dependency.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytorch_lightning as pl
else:
    _ONLY_NEW = "lightning.pytorch" in sys.modules and "pytorch_lightning" not in sys.modules
    pl = importlib.import_module("lightning.pytorch" if _ONLY_NEW else "pytorch_lightning")


def submodule(path: str) -> Any:
    """Imports ``path`` below the Lightning in use, for example ``"strategies.launchers"``."""
    return importlib.import_module(f"{pl.__name__}.{path}")
