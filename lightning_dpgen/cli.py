"""``dpgen``: fit, test, generate, evaluate, feature_network, calibrate, verify."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from jsonargparse import ArgumentParser

from lightning_dpgen import commands
from lightning_dpgen._compat import pl, submodule
from lightning_dpgen.privacy import BudgetExhausted, LedgerError, RowDependenceError
from lightning_dpgen.strategies.private import PrivateTraining

USAGE = """usage: dpgen COMMAND [arguments]

Synthetic images under differential privacy.

  fit        train a generator or classifier: dpgen fit --config examples/configs/psg_fashion_mnist.yaml
  test       test a trained classifier: dpgen test --config examples/configs/dpsgd_mnist.yaml --ckpt_path …
  evaluate   train classifiers on a release, test them on real records: dpgen evaluate release --data fashion_mnist
  generate   write a release's generator's images in another number or form: dpgen generate release images --per_class 100
  feature_network  train the network in whose features evaluate compares images: dpgen feature_network features.safetensors --data mnist
  calibrate  epsilon, noise and steps as a table, without data: dpgen calibrate --records 60000 --batch_size 256 --steps 1000
  verify     check a release against its certificate: dpgen verify release

dpgen COMMAND --help lists a command's arguments; each may come from a YAML file with --config.
"""

COMMANDS: dict[str, Callable[..., Any]] = {
    "evaluate": commands.evaluate,
    "generate": commands.generate,
    "feature_network": commands.feature_network,
    "calibrate": commands.calibrate,
    "verify": commands.verify,
}


_POSITIONAL = ("release", "output")


def _call(name: str, arguments: list[str]) -> None:
    """Parses a command's arguments, from YAML or the command line, and calls it."""
    function = COMMANDS[name]
    required = {p.name for p in inspect.signature(function).parameters.values() if p.default is p.empty}
    positional = [argument for argument in _POSITIONAL if argument in required]
    parser = ArgumentParser(prog=f"dpgen {name}", description=(inspect.getdoc(function) or "").split("\n")[0])
    parser.add_argument("--config", action="config", help="A YAML file with arguments.")
    for argument in positional:
        parser.add_argument(argument, type=str, help=_HELP[argument])
    parser.add_function_arguments(function, skip=set(positional))
    options = parser.parse_args(arguments)
    del options["config"]
    function(**parser.instantiate_classes(options))


_HELP = {"release": "The release folder.", "output": "What to write; must not exist."}


def _lightning(command: str, arguments: list[str] | None) -> None:
    lightning_cli = submodule("cli").LightningCLI

    class FitCLI(lightning_cli):  # type: ignore[misc, valid-type]
        """LightningCLI with ``fit`` and ``test``: what else there is to do with private records has commands of its own."""

        @staticmethod
        def subcommands() -> dict[str, set[str]]:
            return {"fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"}, "test": {"model", "dataloaders", "datamodule"}}

        def before_fit(self) -> None:
            if not isinstance(self.trainer.strategy, PrivateTraining):
                raise ValueError(
                    f"the Trainer's strategy is {type(self.trainer.strategy).__name__}, which would train on the records without privacy. "
                    "Add trainer.strategy: {class_path: lightning_dpgen.DPStrategy, init_args: {epsilon: …, delta: …}}, or "
                    "--trainer.strategy dpsgd (epsilon 3)."
                )

        def _parse_ckpt_path(self) -> None:
            """Lightning puts a checkpoint's arguments in place of those given; for ``fit`` a difference must be seen and refused."""
            if command != "fit":
                super()._parse_ckpt_path()

    for module in ("callbacks", "classifier", "generators", "data"):
        importlib.import_module(f"lightning_dpgen.{module}")  # so that short class names work
    FitCLI(
        pl.LightningModule,
        pl.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_kwargs={"overwrite": True},
        parser_kwargs={
            "fit": {"description": "Trains under differential privacy."},
            "test": {"description": "Tests a trained module on real test records, outside the guarantee."},
        },
        args=None if arguments is None else [command, *arguments],
    )


def main(arguments: list[str] | None = None) -> int:
    """The command line.

    Args:
        arguments: As after ``dpgen``; ``sys.argv`` if not given.

    Returns:
        0, or 1 with the reason on the error stream.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in ("-h", "--help"):
        print(USAGE)
        return 0
    try:
        if command in ("fit", "test"):
            _lightning(command, None if arguments is None else rest)
        elif command in COMMANDS:
            _call(command, rest)
        else:
            print(f"dpgen: no command {command!r}; there are fit, test, {', '.join(COMMANDS)}.\n\n{USAGE}", file=sys.stderr)
            return 2
    except (ValueError, FileExistsError, FileNotFoundError, BudgetExhausted, LedgerError, RowDependenceError) as error:
        print(f"dpgen {command}: {error}", file=sys.stderr)
        return 1
    return 0


def run() -> None:
    """Entry point of the console script."""
    sys.exit(main())
