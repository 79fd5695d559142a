"""Writes the release folder when a fit has ended."""

from __future__ import annotations

from rich.console import Console

from lightning_dpgen._compat import pl
from lightning_dpgen.release.folder import SanitizedRelease, check_target


class ReleaseWriter(pl.Callback):
    """Saves a :class:`SanitizedRelease` at the end of ``fit``, and only there: a run that failed leaves no release.

    Args:
        path: The release folder.
        overwrite: Whether an earlier release there may be replaced.

    Privacy:
        Writes what was released and the certificate; no record, no checkpoint.
    """

    def __init__(self, path: str = "release", overwrite: bool = False) -> None:
        self.path = path
        self.overwrite = overwrite

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses at once a folder that could not be written at the end."""
        if stage == "fit":
            check_target(self.path, self.overwrite)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Writes the folder and says where."""
        folder = SanitizedRelease.from_trainer(trainer).save(self.path, overwrite=self.overwrite)
        Console().print(f"Release written: {folder}", highlight=False, soft_wrap=True)
