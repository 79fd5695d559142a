"""The certificate of a release: what was spent, by which argument, with what noise."""

from __future__ import annotations

import importlib.metadata
import math
import platform
from collections import Counter
from typing import Any

from lightning_dpgen._compat import pl
from lightning_dpgen.generators.base import PrivateGenerator
from lightning_dpgen.privacy.accounting import Epsilon, epsilon
from lightning_dpgen.privacy.plan import FullPass, PoissonSampling, Relation, ReleaseEvent
from lightning_dpgen.strategies.private import PrivateTraining

FORMAT = "lightning-dpgen-certificate/1"

RELATION = (
    "Zero-out: two data sets are neighbours if one record of one is replaced by a null record that contributes nothing. The number of "
    "records is public. The replace-one figure is for any record replaced by any other."
)
UNIT = "One record (one labelled image). A person with several records has the guarantee of a group, which is weaker."
TRUST = (
    "Central model: whoever ran the training held the records. The certificate states what that run recorded of itself; verifying it "
    "checks consistency, not that the run was honest. Other releases from the same records add to this one's ε. A run that ended early "
    "claims all that it had planned, which covers a stop that released numbers, the clock or chance decided, not one decided by records."
)
NOISE_LIMITS = (
    "Floating-point Gaussian noise, drawn and added in float64: attacks on the low bits of floating-point numbers are not covered."
)
_LIBRARIES = ("lightning-dpgen", "torch", "pytorch-lightning", "dp-accounting", "numpy", "opacus")

Counts = dict[ReleaseEvent, int]


class NotCertifiable(ValueError):
    """A run about which no (ε, δ) can be claimed."""


def claim(before: Counts, planned: Counts, released: Counts, delta: float, relation: Relation) -> tuple[Epsilon, str]:
    """The ε of all that was released or planned, and which of the two it rests on.

    Args:
        before: What the records had paid for before the run.
        planned: What the run was to add. One that was stopped early claims it all the same: when to stop may have depended on
            what was released.
        released: What the ledger holds now.
        delta: δ.
        relation: The neighbouring relation.
    """
    promised = Counter(before) + Counter(planned)
    plan = epsilon(promised.items(), delta, relation)
    total = epsilon((promised | Counter(released)).items(), delta, relation)
    return (total, "ledger") if total.value > plan.value else (plan, "plan")


def make_certificate(trainer: pl.Trainer, images: int) -> dict[str, Any]:
    """The certificate of the run that ``trainer`` has just finished, without the digests of the release's files.

    Args:
        trainer: A trainer whose ``fit`` has ended.
        images: Number of released images.

    Privacy:
        Holds public constants, event parameters and counts; no digest, path or statistic of the records.

    Raises:
        NotCertifiable: If the run had no private strategy, no noise, or no limit of its own.
    """
    strategy, module = trainer.strategy, trainer.lightning_module
    if not isinstance(strategy, PrivateTraining) or strategy.mechanism is None:
        raise NotCertifiable("no release without DPStrategy: train with Trainer(strategy=DPStrategy(epsilon=…, delta=…)).")
    if strategy.open_ended:
        raise NotCertifiable("this run had neither max_steps nor max_epochs, so it had no plan to claim. Set one and train again.")
    if not isinstance(module, PrivateGenerator):
        raise NotCertifiable(f"{type(module).__name__} is not a PrivateGenerator: it has no images to release.")
    if not strategy.trained_last(module):
        raise NotCertifiable(
            f"this trainer was not the last to train its {type(module).__name__}, or trained another: ask the trainer that was, whose "
            "ledger knows what the parameters cost."
        )
    if getattr(module, "trained_under", strategy.ledger.run_id) != strategy.ledger.run_id:
        raise NotCertifiable(f"the parameters were made under ledger {module.trained_under}, not under this trainer's.")
    if not strategy.ended:
        raise NotCertifiable(
            "the run was broken off by an error before it had released all that it planned, at a moment that a record may have chosen. "
            "Mend what broke it, resume with ckpt_path, and publish what that run ends with: its certificate says that it was resumed."
        )
    plan, noise_multiplier, account = strategy.plan, strategy.noise_multiplier, strategy.account
    counts = dict(account.before), dict(account.planned), strategy.ledger.counts
    figure, basis = claim(*counts, strategy.delta, Relation.ZERO_OUT)
    replace_one, _ = claim(*counts, strategy.delta, Relation.REPLACE_ONE)
    if not math.isfinite(figure.value):
        raise NotCertifiable(
            f"noise_multiplier={noise_multiplier:g} gives epsilon={figure.value}: nothing can be claimed, so nothing is released."
        )
    data = getattr(trainer, "datamodule", None)
    knobs = {**strategy.knobs(), **module.knobs()}
    origin = getattr(data, "origin", "set by the user")
    if isinstance(plan.sampling, PoissonSampling):
        knobs["batch_size"] = {"value": plan.sampling.expected_batch_size, "origin": origin}
    if module.started_from is not None:
        knobs["started_from"] = {"value": module.started_from, "origin": "set by the user"}
    if not isinstance(plan.sampling, FullPass):
        knobs["steps"] = {"value": trainer.global_step, "origin": origin}
    return {
        "format": FORMAT,
        "claim": {
            "epsilon": figure.value,
            "delta": strategy.delta,
            "relation": Relation.ZERO_OUT.value,
            "accountant": figure.accountant,
            "basis": basis,
        },
        "replace_one": {"epsilon": replace_one.value, "accountant": replace_one.accountant},
        "second_accountant": {"name": "RDP", "epsilon": figure.rdp},
        "relation_in_words": RELATION,
        "unit_in_words": UNIT,
        "trust_model": TRUST,
        "budget": {"epsilon": strategy.budget.epsilon, "delta": strategy.budget.delta}
        if strategy.budget and account.keeps_budget
        else None,
        "plan": plan.to_dict(),
        "noise_multiplier": noise_multiplier,
        "before": _events(counts[0]),
        "planned": _events(counts[1]),
        "released": _events(counts[2]),
        "ledger": {"run": strategy.ledger.run_id, "torn_lines": strategy.ledger.torn_lines},
        "noise": {"source": strategy.noise_source, "limits": NOISE_LIMITS},
        "generator": {
            "class": type(module).__name__,
            "arguments": _plain({k: v for k, v in module.hparams.items() if not k.startswith("_")}),
        },
        "knobs": _plain(knobs),
        "published_without_noise": {
            "records": plan.sampling.records,
            "classes": list(getattr(data, "class_names", ())) or [str(i) for i in range(module.num_classes)],
            "image_shape": list(module.image_shape),
        },
        "images": images,
        "notes": list(account.notes),
        "libraries": {"python": platform.python_version(), **{name: _version(name) for name in _LIBRARIES}},
    }


def _events(counts: Counts) -> list[dict[str, Any]]:
    return [{"event": event.to_dict(), "count": count} for event, count in counts.items() if count]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed as a package"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else repr(value)
