"""Starts a generator from the images of an earlier release."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

from lightning_dpgen._compat import pl
from lightning_dpgen.generators.base import as_generator
from lightning_dpgen.privacy.ledger import PrivacyLedger
from lightning_dpgen.release.folder import load_release
from lightning_dpgen.release.verify import event_counts
from lightning_dpgen.strategies.private import PrivateTraining


class Prior(pl.Callback):
    """Starts a private set's images, or GS-WGAN's generator, from a release: for example of :class:`MixturePPCA`.

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
        release = load_release(self.release)
        as_generator(pl_module, self).prior = release.dataset().tensors()
        strategy, run = trainer.strategy, release.certificate["ledger"]["run"]
        if isinstance(strategy, PrivateTraining):
            ledger = Path(trainer.default_root_dir) / "privacy" / f"{run}.jsonl"
            if re.fullmatch("[0-9a-f]{12}", run) and ledger.exists():
                strategy.continue_ledger(ledger)
            strategy.ledger_checks.append(lambda ledger: self._check_counted(release.certificate, ledger))
        kind, figure = release.certificate["generator"]["class"], release.certificate["claim"]["epsilon"]
        earlier = release.certificate["knobs"].get("started_from", {}).get("value")
        self._words = [f"a release of {kind}; its epsilon of {figure:.4g} is in this run's ledger and in its claim"]
        self._words += [f"that release started from: {earlier}"] if earlier else []
        self._notes = [f"Of the release that it started from: {note}" for note in release.certificate["notes"]]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Starts a new generator from the release's images; one that was trained before, or is resumed, goes on from where it was."""
        generator, strategy = as_generator(pl_module, self), trainer.strategy
        assert isinstance(strategy, PrivateTraining)
        for note in self._notes:
            strategy.account.note(note)
        if hasattr(generator, "trained_under"):
            return
        assert generator.prior is not None
        given = [generator.started_from] if generator.started_from else []
        vars(generator)["trained_under"] = strategy.ledger.run_id
        generator.start_from(*(tensor.to(generator.device) for tensor in generator.prior))
        generator.started_from = "; ".join(given + self._words)

    def _check_counted(self, certificate: dict[str, Any], ledger: PrivacyLedger) -> None:
        """Raises unless everything that the release was made from, or may have been, is in ``ledger``."""
        run = certificate["ledger"]["run"]
        if run != ledger.run_id:
            raise ValueError(
                f"{self.release} was made under ledger {run}, and this run's is {ledger.run_id}: its certificate would leave out what "
                "the release cost. Give both runs one ledger, DPStrategy(epsilon=…, ledger='….jsonl'), or one default_root_dir, and "
                "the second one the whole budget."
            )
        before, planned, released = (Counter(event_counts(certificate[part])) for part in ("before", "planned", "released"))
        cost = (before + planned) | released
        missing = cost - (Counter(ledger.counts) | Counter(ledger.promised))
        if missing:
            names = ", ".join(f"{count} x {event.name}" for event, count in missing.items())
            raise ValueError(
                f"{self.release} was made from {names} that ledger {run} ({ledger.path}) does not hold: it is an older copy, or the "
                "release was changed. Give the ledger that the release was made under."
            )
