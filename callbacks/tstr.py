"""Train on synthetic, test on real, as a callback."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_dpgen.callbacks._every import LooksAtGenerator

from lightning_dpgen._compat import pl
from lightning_dpgen.evaluation.protocols import protocol_named
from lightning_dpgen.evaluation.tstr import TSTRTable, print_table, tstr
from lightning_dpgen.generators.base import as_generator, looking_at


class TSTREvaluation(LooksAtGenerator):
    """Trains classifiers on the generator's images and tests them on the data module's real test records.

    Logs ``tstr/<classifier>`` (percent) through the Trainer's loggers and prints the table at the end. Weights, mode flags
    and the random state are as before afterwards.

    Args:
        protocol: Name of the protocol.
        every_n_steps: Also while training, every so many steps; only at the end if not given.
        seeds: Trainings of each classifier.
        classifiers: Some of the protocol's classifiers; all if not given.

    Attributes:
        table: The last result.

    Privacy:
        Reads real test records, so its numbers are **outside the guarantee**, and they are never put into a release or fed
        back into training. Do not choose a run, a step or a setting by them and then claim the certificate's ε.
    """

    def __init__(
        self,
        protocol: str = "quick",
        every_n_steps: int | None = None,
        seeds: Sequence[int] = (0,),
        classifiers: list[str] | None = None,
    ) -> None:
        self.protocol = protocol_named(protocol).name
        super().__init__(every_n_steps)
        self.seeds = tuple(seeds)
        self.classifiers = classifiers
        self.table: TSTRTable | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Refuses at once what could not be evaluated at the end.

        Raises:
            ValueError: If the module is no generator or the data module has no real test records.
        """
        if stage == "fit":
            as_generator(pl_module, self)
            if not hasattr(trainer.datamodule, "real_test"):  # type: ignore[attr-defined]
                raise ValueError("TSTREvaluation needs one of lightning_dpgen.data's data modules, which know the real test records.")
            trainer.datamodule.real_test()  # type: ignore[attr-defined]

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Evaluates the last state and prints the table."""
        print_table(self.look(trainer, pl_module))

    def look(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> TSTRTable:
        """Evaluates the generator as it is and logs it."""
        generator = as_generator(pl_module, self)
        with looking_at(generator):
            labels = generator.release_labels().to(generator.device)
            images = generator.sample(labels)
            real = trainer.datamodule.real_test()  # type: ignore[attr-defined]
            self.table = tstr(
                (images, labels), real, generator.num_classes, self.protocol, self.seeds, self.classifiers, device=generator.device
            )
        for logger in trainer.loggers:
            logger.log_metrics({f"tstr/{name}": self.table.mean(name) for name in self.table.accuracy}, step=trainer.global_step)
        return self.table
