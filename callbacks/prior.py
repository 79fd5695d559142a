"""Starts a generator from the images of an earlier release."""

from __future__ import annotations

from pathlib import Path

from lightning_dpgen._compat import pl
from lightning_dpgen.generators.base import as_generator
from lightning_dpgen.release.folder import load_release
from lightning_dpgen.strategies.private import PrivateTraining


class Prior(pl.Callback):
    """Starts a private set's images, or a GAN's generator, from a release: for example of :class:`MixturePPCA`.

    Both runs share one ledger and one budget: the first spends a part, the second what is left. With the same
    ``default_root_dir`` the second finds the first's ledger by itself.

    Args:
        release: The release folder.

    Privacy:
        The release is public. What it cost is in the ledger that it was made under; the run that starts from it must be under the
        same one, so that its certificate counts both.

    Raises:
        InvalidRelease: If the folder is not a release that verifies.
        ValueError: If the release is of other classes or shapes, or was made under another ledger.
    """

    def __init__(self, release: str) -> None:
        self.release = release

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reads and verifies the release, before a record is read."""
        if stage != "fit":
            return
        self._release = load_release(self.release)
        as_generator(pl_module, self).prior = self._release.dataset().tensors()
        ledger = Path(trainer.default_root_dir) / "privacy" / f"{self._release.certificate['ledger']['run']}.jsonl"
        if isinstance(trainer.strategy, PrivateTraining) and ledger.exists():
            trainer.strategy.continue_ledger(ledger)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts the generator from the release's images; a resumed one goes on from where it was."""
        generator, strategy = as_generator(pl_module, self), trainer.strategy
        assert isinstance(strategy, PrivateTraining)
        assert generator.prior is not None
        run = self._release.certificate["ledger"]["run"]
        if run != strategy.ledger.run_id:
            raise ValueError(
                f"{self.release} was made under ledger {run}, and this run's is {strategy.ledger.run_id}: its certificate would leave out "
                "what the release cost. Give both runs one ledger, DPStrategy(epsilon=…, ledger='….jsonl'), and the second one the "
                "whole budget. Images of other records need no ledger: call start_from(images, labels) before fit."
            )
        kind = self._release.certificate["generator"]["class"]
        generator.started_from = f"a release of {kind} under the same ledger, whose cost is counted"
        if trainer.global_step == 0:
            generator.start_from(*(tensor.to(generator.device) for tensor in generator.prior))
