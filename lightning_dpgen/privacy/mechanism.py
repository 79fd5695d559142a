"""The one door: ``GaussianMechanism.release``, and ``release_answers`` for networks on shards."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_dpgen._validate import non_negative
from lightning_dpgen.privacy.clipping import ROUNDING, ClippedSum, clipped_sum, grouped_clipped_sum, tensors_of
from lightning_dpgen.privacy.ledger import PrivacyLedger
from lightning_dpgen.privacy.noise import SecretStream
from lightning_dpgen.privacy.plan import DisjointShards, PoissonSampling, PrivacyPlan
from lightning_dpgen.privacy.sampling import assign_shards, draw_answers


class BudgetExhausted(RuntimeError):
    """The next release would pass what the plan allows. Nothing was released and nothing charged."""


class GaussianMechanism:
    """Adds Gaussian noise to clipped sums and lets them out, each charged before its noise is drawn.

    Args:
        plan: The releases that are allowed, with their clip norms.
        noise_multiplier: Noise standard deviation ÷ clip norm; each release's relative noise multiplies it.
        ledger: Where releases are recorded.
        stream: The SECRET stream that noise is drawn from.
        capped: Whether the plan's counts are a hard cap (they are when a budget was given).

    Attributes:
        add_up: Adds a clipped sum up over processes that hold different records; nothing to do for one process.
        share: Gives what the first process released to all.

    Privacy:
        Relation, sensitivity and count are the plan's. What passes is the clipped sum plus N(0, (zC)²) on every number (larger
        by what rounding may add to C, 2.4e-4), drawn and added in float64 and rounded once. In this order: check, ledger,
        noise, so that a crash over-counts.
    """

    def __init__(
        self,
        plan: PrivacyPlan,
        noise_multiplier: float,
        ledger: PrivacyLedger,
        stream: SecretStream,
        capped: bool = True,
    ) -> None:
        self.plan = plan
        self.noise_multiplier = non_negative("noise_multiplier", noise_multiplier)
        self.ledger = ledger
        self.capped = capped
        self.add_up: Callable[[ClippedSum], ClippedSum] = lambda total: total
        self.share: Callable[[dict[str, Tensor]], dict[str, Tensor]] = lambda released: released
        self._stream = stream
        self._released_lot: bool | None = None
        self._drawn: tuple[int, Tensor] | None = None
        self._lots, self._paid = 0, len(ledger)
        self._events = {release.name: plan.release_event(release.name, noise_multiplier) for release in plan.releases}

    def remaining(self, name: str) -> int:
        """How many releases called ``name`` the plan still allows; equal ones of past runs under the same ledger are counted."""
        return self.plan.release(name).count - self.ledger.counts.get(self._events[name], 0)

    def next_lot(self) -> None:
        """Says that a lot was drawn. From the first call on, every Poisson lot must be released, and once.

        Privacy:
            Two releases of one lot are one release with less noise, not two independent samples of the records. A lot that
            is not released may be missing for what is in it, or may have been added to another.

        Raises:
            RuntimeError: If the Poisson lot before was not released.
        """
        self.end_lot()
        self._lots += 1
        self._released_lot = False

    def end_lot(self) -> None:
        """Says that no further lot follows.

        Raises:
            RuntimeError: If the last Poisson lot was not released.
        """
        if len(self.ledger) > self._paid:
            self._refuse_skipped(len(self.ledger) - self._paid)

    def _refuse_skipped(self, made: int) -> None:
        if made < self._lots and isinstance(self.plan.sampling, PoissonSampling):
            raise RuntimeError(
                f"{self._lots} lots were drawn and {self._lots - made} not released. Every lot must release, also an empty one, since "
                "which lots do not may tell of records: step the private optimizer (or call release) once for every lot."
            )

    def assign_shards(self) -> Tensor:
        """Record indices of each shard, ``[K, ⌈N / K⌉]``, filled up with -1: drawn anew at every call, to be called once and kept.

        Raises:
            TypeError: If the plan's sampling is not by shards.
        """
        return torch.from_numpy(assign_shards(self._shards(), self._stream))

    def draw_answers(self, rows: int) -> tuple[Tensor, Tensor]:
        """Row and shard of each answer that the next :meth:`release_answers` will hold; see :func:`.sampling.draw_answers`.

        Privacy:
            SECRET, and good for one release. A draw cannot be taken back for another.

        Raises:
            TypeError: If the plan's sampling is not by shards.
            RuntimeError: If the last draw was not released.
        """
        shards = self._shards()
        if self._drawn is not None:
            raise RuntimeError("answers were drawn and not released: a second draw would be a choice among draws. Call release_answers().")
        row, shard = (torch.from_numpy(index) for index in draw_answers(shards, rows, self._stream))
        self._drawn = rows, row.clone()  # what is handed out may be changed
        return row, shard

    def release_answers(self, name: str, answers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """For each row of the last draw the noisy sum of its clipped answers, each row a release that is charged.

        Args:
            name: Which of the plan's releases this is.
            answers: Tensors ``[P, …]`` by name, one answer for each pair of the draw, in its order.

        Returns:
            Tensors ``[rows, …]`` by name.

        Privacy:
            Answer p must be computed from nothing but shard ``shard[p]`` and what is public. Then a record is in one answer to a
            row at most, which moves that row's sum by 2C at most.

        Raises:
            RuntimeError: If no answers were drawn.
            ValueError: If there is not one answer for each pair.
        """
        self._shards()
        if self._drawn is None:
            raise RuntimeError("no answers were drawn: call draw_answers(rows) first, and let only the shards that it names answer.")
        rows, row = self._drawn
        found = {key: len(value) for key, value in answers.items()}
        if set(found.values()) != {len(row)}:
            raise ValueError(f"release {name!r}: {len(row)} answers were drawn, {found} are given. Give one for each, in the draw's order.")
        place = row.to(next(iter(answers.values())).device)
        return self._release(name, grouped_clipped_sum(answers, place, rows, self.plan.release(name).clip_norm))

    def _shards(self) -> DisjointShards:
        if not isinstance(self.plan.sampling, DisjointShards):
            raise TypeError(f"the plan samples by {type(self.plan.sampling).__name__}; shards are of DisjointShards.")
        return self.plan.sampling

    def release(self, name: str, contribution: ClippedSum | Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Releases one noisy sum.

        Args:
            name: Which of the plan's releases this is.
            contribution: A :class:`ClippedSum`, or the rows themselves (``[B, …]`` by name), which are clipped and summed.

        Returns:
            The noisy sum by name, float32 (float64 where that is torch's default). Public from here on; divide it by a constant,
            never by the lot's size.

        Privacy:
            With :meth:`release_answers` the only way out for anything computed from records. Happens for every lot, also an empty one.

        Raises:
            ValueError: If the plan has no release of that name, or with another clip norm or a smaller replace-one factor.
            BudgetExhausted: If the plan allows no more of them.
            RuntimeError: If this Poisson lot was released before, or the plan samples by shards.
        """
        release = self.plan.release(name)
        if isinstance(self.plan.sampling, DisjointShards):
            raise RuntimeError(
                f"release {name!r}: the plan samples by shards, whose answers go through draw_answers() and release_answers()."
            )
        if not isinstance(contribution, ClippedSum):
            contribution = clipped_sum(contribution, release.clip_norm)
        if contribution.count is not None:
            raise RuntimeError(f"release {name!r}: {contribution.count} sums side by side; release() lets out one.")
        if contribution.clip_norm != release.clip_norm:
            raise ValueError(
                f"release {name!r}: rows were clipped to {contribution.clip_norm}, the plan says {release.clip_norm}: the "
                "noise would not fit. Take the clip norm from the plan."
            )
        if contribution.replaced > release.replace_one_factor:
            raise ValueError(
                f"release {name!r}: replacing a record moves this sum by {contribution.replaced:.4g} C, the plan says "
                f"{release.replace_one_factor:.4g} C (replace_one_factor)."
            )
        return self.share(self._release(name, self.add_up(contribution)))

    def _release(self, name: str, contribution: ClippedSum) -> dict[str, Tensor]:
        release = self.plan.release(name)
        sums = contribution.count or 1
        if self.capped and self.remaining(name) < sums:
            left = f"{self.remaining(name)} left of" if self.remaining(name) > 0 else "none is left of"
            raise BudgetExhausted(
                f"release {name!r}: {sums} asked for, {left} {release.count} planned releases (ledger {self.ledger.run_id})."
            )
        if self._released_lot and isinstance(self.plan.sampling, PoissonSampling):
            raise RuntimeError(
                f"release {name!r}: this lot was released already; the plan counts one release of each Poisson lot. Use one optimizer "
                "step and one closure call a lot, and take further critic steps on further lots."
            )
        self._refuse_skipped(len(self.ledger) - self._paid + 1)
        event = self._events[name]
        self.ledger.charge(event, sums)
        self._drawn = None
        self._released_lot = None if self._released_lot is None else True
        released = {}
        dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
        for key, value in tensors_of(contribution).items():
            noise = self._stream.normal(value.shape, ROUNDING * event.noise_std, value.device)
            wide = noise.add_(value.to(noise.device))
            released[key] = wide.to(dtype).to(value.device)
        return released
