"""What a strategy's fits may spend, have spent and must claim; kept in its ledger and in every checkpoint."""

from __future__ import annotations

import contextlib
import logging
import math
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from lightning_dpgen.privacy.accounting import calibrate_noise_multiplier, epsilon
from lightning_dpgen.privacy.budget import PrivacyBudget
from lightning_dpgen.privacy.ledger import PrivacyLedger
from lightning_dpgen.privacy.mechanism import BudgetExhausted, GaussianMechanism
from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import FullPass, PrivacyPlan, Relation, ReleaseEvent

log = logging.getLogger(__name__)

NEW_LEDGER = "new"
Counts = dict[ReleaseEvent, int]


@dataclass(frozen=True)
class Terms:
    """The arguments of a strategy that its account rests on.

    Args:
        budget: The target, or ``None`` where a noise multiplier was given.
        delta: δ.
        noise_multiplier: The given noise multiplier, or ``None`` where a budget was given.
        ledger: Path of the ledger, ``None`` for the default place, ``"new"`` to accept a lost one.
    """

    budget: PrivacyBudget | None
    delta: float
    noise_multiplier: float | None
    ledger: str | None


class PrivacyAccount:
    """The ledger of one strategy, over all its fits.

    Args:
        terms: What was asked for.
        stream: The SECRET stream of the mechanism.

    Attributes:
        mechanism: The door of the current or last fit; ``None`` before the first.
        before: Releases that the records had already paid for when the last fit began.
        planned: Releases that the last fit may add.
        ahead: Releases that the last fit makes if it runs to its end: ``planned`` without what earlier parts leave to be claimed.
        notes: Sentences for the certificate, each once.
        per_step: How many of each release one trainer step makes; 1 where it does not say.

    Privacy:
        A target ε is a cap for all fits together. A fit that ends early still claims what it had planned, also when a later
        fit plans less: the noise bounds what released numbers tell, also about when to stop. Nothing that was ever released
        is forgotten: file and checkpoint are merged.
    """

    def __init__(self, terms: Terms, stream: SecretStream) -> None:
        self.terms = terms
        self.stream = stream
        self.mechanism: GaussianMechanism | None = None
        self.before: Counter[ReleaseEvent] = Counter()
        self.planned: Counter[ReleaseEvent] = Counter()
        self.ahead: Counter[ReleaseEvent] = Counter()
        self.notes: list[str] = []
        self.per_step: dict[str, int] = {}
        self._lost: Counter[ReleaseEvent] = Counter()
        self._began_with: Counter[ReleaseEvent] = Counter()

    @property
    def keeps_budget(self) -> bool:
        """Whether the budget bounds everything that may have been released."""
        return self.terms.budget is not None and not self._lost

    def ready(self) -> GaussianMechanism:
        """The mechanism.

        Raises:
            RuntimeError: Before the first fit.
        """
        if self.mechanism is None:
            raise RuntimeError("DPStrategy has no plan yet: it is made when Trainer.fit sets up the module and its data.")
        return self.mechanism

    @property
    def spent(self) -> Counter[ReleaseEvent]:
        """Releases so far: the ledger's, and what a lost ledger may have held."""
        return self._lost if self.mechanism is None else Counter(self.mechanism.ledger.counts) + self._lost

    @property
    def made(self) -> Counter[ReleaseEvent]:
        """Releases of the last fit."""
        return self.spent - self._began_with

    def note(self, sentence: str) -> bool:
        """Adds a sentence for the certificate; returns whether it is new."""
        if sentence in self.notes:
            return False
        self.notes.append(sentence)
        return True

    def epsilon_spent(self, relation: Relation = Relation.ZERO_OUT) -> float:
        """ε of everything so far; 0 before the first release."""
        return epsilon(self.spent.items(), self.terms.delta, relation).value

    def epsilon_after(self, steps: int) -> float:
        """ε of the ledger and of ``steps`` more trainer steps."""
        mechanism = self.ready()
        made = self.made
        ahead: Counter[ReleaseEvent] = Counter()
        for event, _ in mechanism.plan.events(mechanism.noise_multiplier):
            if isinstance(mechanism.plan.sampling, FullPass):  # one release a step, in the plan's order
                ahead[event] = max(0, min(self.ahead[event] - made[event], steps - sum(ahead.values())))
            else:
                ahead[event] = steps * self._step(event.name)
        return epsilon((self.spent + ahead).items(), self.terms.delta).value

    def epsilon_planned(self) -> float:
        """ε of what the records had paid for before the last fit and of all that it plans."""
        return epsilon((self.before + self.planned).items(), self.terms.delta).value

    def is_spent(self) -> bool:
        """Whether a budget was given and allows no further trainer step."""
        mechanism = self.ready()
        return self.terms.budget is not None and all(mechanism.remaining(r.name) < self._step(r.name) for r in mechanism.plan.releases)

    def _step(self, name: str) -> int:
        return self.per_step.get(name, 1)

    def begin(
        self,
        plan: PrivacyPlan,
        folder: Path,
        previous: dict[str, Any] | None,
        ahead: Mapping[str, int],
        check: Callable[[PrivacyLedger], None] = lambda ledger: None,
    ) -> GaussianMechanism:
        """Opens a fit: calibrates or continues, merges what a checkpoint knows, checks the budget.

        Args:
            plan: What this fit would release if it ran from its first step.
            folder: Where a ledger without a given path is kept.
            previous: :meth:`state` from a checkpoint that the fit continues.
            ahead: How many of each release lie ahead of the fit; counts only without a budget, since a budget's plan is counted by
                the ledger.
            check: Looks at the ledger before anything is promised in it, and raises to stop the fit.

        Raises:
            ValueError: If the checkpoint or an earlier fit was under other terms or another ledger.
            BudgetExhausted: If the budget does not allow the fit.
        """
        budget = self.terms.budget
        if self.mechanism is not None and budget is not None:
            plan = self._first_plan(self.mechanism.plan, plan)
        if previous is not None:
            self._check_same(previous, plan)
        if self.mechanism is not None:
            noise, ledger = self.mechanism.noise_multiplier, self.mechanism.ledger
            if previous is not None and previous["run"] != ledger.run_id:
                raise ValueError(
                    f"the checkpoint belongs to ledger {previous['run']}, this strategy has already written ledger {ledger.run_id}. Use a "
                    "DPStrategy of its own to continue the checkpoint."
                )
        else:
            ledger = self._open_ledger(folder, previous)
            noise = self._noise(plan, previous, ledger)
        check(ledger)
        if previous is not None:
            self._continue(ledger, previous)
        self.mechanism = GaussianMechanism(plan, noise, ledger, self.stream, capped=budget is not None)
        promised = Counter(ledger.promised) | (Counter() if previous is None else Counter(_counts(previous["promised"])))
        made = Counter(ledger.counts) + self._lost
        self._began_with = Counter(made)
        self.before, self.planned, self.ahead = made | promised, Counter(), Counter()
        for event, _ in plan.events(noise):
            left = max(0, self.mechanism.remaining(event.name)) if budget is not None else ahead[event.name]
            self.ahead[event] = self.planned[event] = left
            if budget is not None:  # the same plan goes on: what it had promised is not promised again
                self.before[event] = made[event]
                self.planned[event] = max(left, promised[event] - made[event])
            elif previous is not None:  # likewise, but what other runs under this ledger had promised stays promised
                own = _counts(previous["planned"]).get(event, 0) - (made[event] - _counts(previous["began_with"]).get(event, 0))
                self.before[event] = max(made[event], promised[event] - max(0, own))
                self.planned[event] = max(left, own)
        self._check_budget(ledger)
        return self.mechanism

    def promise(self) -> None:
        """Writes what the fit plans into the ledger, before its first release or checkpoint: a refused fit promises nothing."""
        self.ready().ledger.promise(dict(self.before + self.planned))

    def follow(self, leader: dict[str, Any], plan: PrivacyPlan) -> GaussianMechanism:
        """Takes over a fit that another process has begun: the same noise and counts, with a ledger in memory only.

        Args:
            leader: :meth:`state` of that process's account.
            plan: The plan of its mechanism.
        """
        ledger = PrivacyLedger(None, str(leader["run"]))
        ledger.merge(_counts(leader["released"]))
        noise = float(leader["noise_multiplier"])
        self.mechanism = GaussianMechanism(plan, noise, ledger, self.stream, capped=self.terms.budget is not None)
        self._lost, self.notes = Counter(_counts(leader["lost"])), list(leader["notes"])
        self.before = Counter(ledger.counts) + self._lost
        self._began_with = Counter(self.before)
        self.planned = Counter(_counts(leader["promised"])) - self.before
        self.ahead = Counter(_counts(leader["ahead"]))
        return self.mechanism

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        mechanism = self.ready()
        return {
            **self._claims(mechanism.plan),
            "noise_multiplier": mechanism.noise_multiplier,
            "run": mechanism.ledger.run_id,
            "ledger": None if mechanism.ledger.path is None else str(mechanism.ledger.path),
            "released": _listed(mechanism.ledger.counts),
            "promised": _listed(self.before + self.planned),
            "planned": _listed(self.planned),
            "ahead": _listed(self.ahead),
            "began_with": _listed(self._began_with),
            "lost": _listed(self._lost),
            "notes": list(self.notes),
        }

    def _continue(self, ledger: PrivacyLedger, previous: dict[str, Any]) -> None:
        self._lost = self._lost | Counter(_counts(previous["lost"]))
        for note in previous["notes"]:
            self.note(note)
        held, released = len(ledger), _counts(previous["released"])
        missing = ledger.merge(released)
        if missing and held:
            note = f"The ledger file, of {held} releases, lacked {missing} that a checkpoint knew of; they were added again."
            self.note(note)
            log.warning(note)
        self.note(
            f"Resumed from a checkpoint of {sum(released.values())} releases, when the ledger held {held}. The claim counts them all, and "
            "does not cover a moment of breaking off that records chose."
        )

    def _first_plan(self, first: PrivacyPlan, plan: PrivacyPlan) -> PrivacyPlan:
        """The plan that the budget was calibrated for: a target ε is for all fits together."""
        uncounted = [replace(p, releases=tuple(replace(r, count=1) for r in p.releases)) for p in (first, plan)]
        if uncounted[0] != uncounted[1]:
            raise ValueError(
                f"this strategy's epsilon was calibrated for {first}; this fit plans {plan}. Use a DPStrategy of its own, with "
                "ledger=… the earlier ledger's path if the records are the same."
            )
        return first

    def _noise(self, plan: PrivacyPlan, previous: dict[str, Any] | None, ledger: PrivacyLedger) -> float:
        if previous is not None:
            return float(previous["noise_multiplier"])
        budget = self.terms.budget
        if budget is None:
            assert self.terms.noise_multiplier is not None
            return self.terms.noise_multiplier
        alone = calibrate_noise_multiplier(plan, budget)
        earlier = Counter(ledger.counts) | Counter(ledger.promised)
        if not earlier or any(event in earlier for event, _ in plan.events(alone)):  # the very plan, begun before
            return alone
        figure = epsilon(earlier.items(), budget.delta).value
        if figure < budget.epsilon:
            with contextlib.suppress(ValueError):
                return calibrate_noise_multiplier(plan, budget, earlier)
        raise BudgetExhausted(
            f"ledger {ledger.run_id} already comes to epsilon={figure:.3f} (what its runs had planned); with this run's releases it "
            f"cannot stay within {budget.epsilon:g}. Use a larger budget, for all of them together, less in the first of them, or a "
            "ledger of other records."
        )

    def _open_ledger(self, folder: Path, previous: dict[str, Any] | None) -> PrivacyLedger:
        run = uuid.uuid4().hex[:12] if previous is None else str(previous["run"])
        argument = self.terms.ledger
        path = folder / f"{run}.jsonl"
        if argument not in (None, NEW_LEDGER):
            path = Path(str(argument))
        elif previous is not None and not path.exists() and previous["ledger"] is not None and Path(previous["ledger"]).exists():
            path = Path(previous["ledger"])
        if previous is not None and not path.exists():
            if argument != NEW_LEDGER:
                raise ValueError(
                    f"the checkpoint's ledger {path} is missing: releases made after the checkpoint would be forgotten. Restore the "
                    f"file, give its place with DPStrategy(ledger=…), or accept a new one with DPStrategy(ledger={NEW_LEDGER!r}): the "
                    "claim then counts everything that the lost part of the run had planned as released, and says so."
                )
            released, promised = Counter(_counts(previous["released"])), Counter(_counts(previous["promised"]))
            self._lost = promised - released
            self.note(
                f"The ledger file of an earlier part of this run was lost. All {sum(self._lost.values())} releases that it had planned "
                "beyond its checkpoint are counted as made, so the claim may be above the budget."
            )
        if previous is None and argument is None:
            others = sorted(file.name for file in folder.glob("*.jsonl"))
            if others:
                log.warning(
                    "%s holds earlier ledgers (%s). This run starts a new one: its certificate will not count theirs. If they are of the "
                    "same records, every run costs again; DPStrategy(ledger='%s') counts this run together with that one.",
                    folder,
                    ", ".join(others[-3:]) + ("" if len(others) < 4 else f" and {len(others) - 3} others"),
                    folder / others[-1],
                )
        ledger = PrivacyLedger(path, run)
        if previous is not None and ledger.run_id != run:
            raise ValueError(f"the checkpoint belongs to ledger {run}; {path} is ledger {ledger.run_id}. Give the path of ledger {run}.")
        return ledger

    def _check_same(self, previous: dict[str, Any], plan: PrivacyPlan) -> None:
        found = [line for name, value in self._claims(plan).items() for line in _differences(name, previous[name], value)]
        if found:
            raise ValueError(
                f"the checkpoint is of another plan: {'; '.join(found)}. Use the same epsilon, delta, clip norm, batch size and steps "
                "(max_epochs, max_steps): the noise was calibrated for them. Or start without ckpt_path."
            )

    def _claims(self, plan: PrivacyPlan) -> dict[str, Any]:
        shape = plan.to_dict()
        if self.terms.budget is None:  # without a cap a run may be continued for more steps
            shape["releases"] = [{**release, "count": None} for release in shape["releases"]]
        return {
            "epsilon": None if self.terms.budget is None else self.terms.budget.epsilon,
            "delta": self.terms.delta,
            "given_noise_multiplier": self.terms.noise_multiplier,
            "plan": shape,
        }

    def _check_budget(self, ledger: PrivacyLedger) -> None:
        budget = self.terms.budget
        if budget is None:
            return
        if all(count < self._step(event.name) for event, count in self.planned.items()):
            raise BudgetExhausted(
                f"epsilon={budget.epsilon:g} is spent: ledger {ledger.run_id} holds {len(ledger)} releases. What was trained may be "
                "used freely, but these records allow no more training under this budget."
            )
        needed = self.epsilon_planned()
        if needed <= budget.epsilon:
            return
        if self._lost:
            log.warning("What a lost ledger had planned counts as made: with it this run comes to epsilon=%.3f.", needed)
            return
        raise BudgetExhausted(
            f"ledger {ledger.run_id} already holds {len(ledger)} releases; with this run's they come to epsilon={needed:.3f}, above "
            f"{budget.epsilon:g}. Use a larger budget or a ledger of other records."
        )


def releases_ahead(plan: PrivacyPlan, steps: int, done: int) -> dict[str, int]:
    """How many of each release a fit makes after ``done`` of its ``steps``: of full passes one a step, in the plan's order."""
    if not isinstance(plan.sampling, FullPass):
        return {release.name: math.ceil(release.count * (1 - Fraction(min(done, steps), steps))) for release in plan.releases}
    ahead, behind = {}, done
    for release in plan.releases:
        ahead[release.name] = max(0, release.count - behind)
        behind = max(0, behind - release.count)
    return ahead


def _listed(counts: Counts) -> list[Any]:
    return [[event.to_dict(), count] for event, count in counts.items() if count]


def _differences(name: str, old: Any, new: Any) -> list[str]:
    """What two nested plain values differ in, in words."""
    if isinstance(old, dict) and isinstance(new, dict) and old.keys() == new.keys():
        return [line for key in old for line in _differences(f"{name} {key}", old[key], new[key])]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for before, after in zip(old, new, strict=True) for line in _differences(name, before, after)]
    return [] if old == new else [f"{name} was {old} and is {new} here"]


def _counts(listed: list[Any]) -> Counts:
    return {ReleaseEvent.from_dict(event): int(count) for event, count in listed}
