"""What a run will release, how often, and how its records are sampled.

A :class:`PrivacyPlan` is the whole claim of a method, written down before a record is read: the accountant turns it into
ε, the strategy builds the loader that its sampling asks for, and the mechanism refuses every release that it does not
name. All sensitivities are those of the table in ``docs/privacy.md``.
"""

from __future__ import annotations

import enum
from dataclasses import asdict, dataclass
from typing import Any

import dp_accounting
from dp_accounting import NeighboringRelation

from lightning_dpgen._validate import fail, positive, positive_int


class Relation(enum.Enum):
    """Which pairs of data sets must look alike.

    Privacy:
        ``ZERO_OUT``: one record is replaced by a null record that contributes nothing; the number of records is public.
        ``REPLACE_ONE``: one record is replaced by any other. Its ε is larger for the same noise.
    """

    ZERO_OUT = "zero-out"
    REPLACE_ONE = "replace-one"


@dataclass(frozen=True)
class DominatingPair:
    """A (sampled) Gaussian whose privacy loss bounds that of one release.

    Args:
        library_relation: The ``dp_accounting`` relation under which ``event`` is to be read.
        sampling_probability: Poisson inclusion probability; 1 for an unsampled Gaussian.
        noise_multiplier: Noise standard deviation in units of the sensitivity that the library takes to be 1.

    Privacy:
        Under ``REPLACE_ONE`` the library's PLD doubles the sensitivity of a Poisson-sampled Gaussian by itself, and an
        unsampled Gaussian is therefore always stated under ``ADD_OR_REMOVE_ONE`` or ``REPLACE_SPECIAL``.
    """

    library_relation: NeighboringRelation
    sampling_probability: float
    noise_multiplier: float

    @property
    def event(self) -> dp_accounting.DpEvent:
        """The pair in the library's language."""
        gaussian = dp_accounting.GaussianDpEvent(self.noise_multiplier)
        if self.sampling_probability == 1:
            return gaussian
        return dp_accounting.PoissonSampledDpEvent(self.sampling_probability, gaussian)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger and the certificate."""
        return {**asdict(self), "library_relation": self.library_relation.name}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DominatingPair:
        """The inverse of :meth:`to_dict`."""
        relation = NeighboringRelation[values["library_relation"]]
        return cls(relation, float(values["sampling_probability"]), float(values["noise_multiplier"]))


@dataclass(frozen=True)
class ReleaseEvent:
    """One executed or planned release, as the ledger records it.

    Args:
        name: Which of the plan's releases it is.
        clip_norm: The bound C on the norm of a released row.
        noise_std: Standard deviation of the noise added to each released number.
        zero_out: Dominating pair under the zero-out relation.
        replace_one: Dominating pair under the replace-one relation, or ``None`` if none is proven.
    """

    name: str
    clip_norm: float
    noise_std: float
    zero_out: DominatingPair
    replace_one: DominatingPair | None

    def pair(self, relation: Relation) -> DominatingPair:
        """The dominating pair under ``relation``.

        Raises:
            ValueError: If this event has none, so that no ε is ever reported under a relation that is not proven.
        """
        pair = self.zero_out if relation is Relation.ZERO_OUT else self.replace_one
        if pair is None:
            raise ValueError(f"release {self.name!r} has no proven dominating pair under {relation.value}.")
        return pair

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the ledger and the certificate."""
        return {
            "name": self.name,
            "clip_norm": self.clip_norm,
            "noise_std": self.noise_std,
            "zero_out": self.zero_out.to_dict(),
            "replace_one": None if self.replace_one is None else self.replace_one.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReleaseEvent:
        """The inverse of :meth:`to_dict`."""
        replace_one = values["replace_one"]
        return cls(
            str(values["name"]),
            float(values["clip_norm"]),
            float(values["noise_std"]),
            DominatingPair.from_dict(values["zero_out"]),
            None if replace_one is None else DominatingPair.from_dict(replace_one),
        )


@dataclass(frozen=True)
class PoissonSampling:
    """Every record enters every lot independently with probability ``expected_batch_size / records``.

    Args:
        records: Number of records N, a public constant.
        expected_batch_size: Expected lot size B, the constant that sums are divided by.

    Privacy:
        The masks come from the SECRET stream and are never published.
    """

    records: int
    expected_batch_size: int

    def __post_init__(self) -> None:
        positive_int("records", self.records)
        positive_int("expected_batch_size", self.expected_batch_size)
        if self.expected_batch_size > self.records:
            raise ValueError(
                f"expected_batch_size={self.expected_batch_size} is larger than the {self.records} records: a record can "
                f"enter a lot once. Use batch_size={self.records} or less."
            )

    @property
    def rate(self) -> float:
        """The inclusion probability q."""
        return self.expected_batch_size / self.records

    def pairs(self, release: Release, noise_multiplier: float) -> tuple[DominatingPair, DominatingPair]:
        """Zero-out and replace-one dominating pairs of one lot's release."""
        z = noise_multiplier / release.zero_out_factor
        if self.rate == 1:
            return _unsampled(release, noise_multiplier)
        return (
            DominatingPair(NeighboringRelation.REPLACE_SPECIAL, self.rate, z),
            DominatingPair(NeighboringRelation.REPLACE_ONE, self.rate, z),
        )


@dataclass(frozen=True)
class FullPass:
    """Every record enters the release exactly once.

    Args:
        records: Number of records N, a public constant.
    """

    records: int

    def __post_init__(self) -> None:
        positive_int("records", self.records)

    def pairs(self, release: Release, noise_multiplier: float) -> tuple[DominatingPair, DominatingPair]:
        """Zero-out and replace-one dominating pairs of one pass."""
        return _unsampled(release, noise_multiplier)


@dataclass(frozen=True)
class DisjointShards:
    """Records split over ``count`` networks; each released row asks each network with probability ``asked / count``.

    Args:
        records: Number of records N, a public constant.
        count: Number of shards K, each seen by one network only.
        asked: Expected number m of networks that answer for one released row.

    Privacy:
        A network that a record shaped may answer anything within the clip norm, with the record or without it. So the
        antipodal pair (1−q)N(0)+qN(±C) dominates in both relations, which is what the library's ``REPLACE_ONE`` pair is.
        With ``asked == count`` nothing is secret and the release is an unsampled Gaussian of sensitivity 2C.
    """

    records: int
    count: int
    asked: int = 1

    def __post_init__(self) -> None:
        for name in ("records", "count", "asked"):
            positive_int(name, getattr(self, name))
        if not self.asked <= self.count <= self.records:
            raise fail("count", self.count, f"between asked={self.asked} and the {self.records} records")

    def pairs(self, release: Release, noise_multiplier: float) -> tuple[DominatingPair, DominatingPair]:
        """Zero-out and replace-one dominating pairs of one released row."""
        if self.asked == self.count:
            pair = DominatingPair(NeighboringRelation.REPLACE_SPECIAL, 1.0, noise_multiplier / 2)
        else:
            pair = DominatingPair(NeighboringRelation.REPLACE_ONE, self.asked / self.count, noise_multiplier)
        return pair, pair


Sampling = PoissonSampling | FullPass | DisjointShards


@dataclass(frozen=True)
class Release:
    """A kind of release that a plan allows.

    Args:
        name: What is released, for example ``"gradient_sum"``.
        clip_norm: The bound C on the norm of each released row.
        count: How often it may happen.
        relative_noise: This release's noise multiplier in units of the plan's.
        zero_out_factor: Zero-out sensitivity ÷ C: 1 for a sum of clipped record rows, 2 for anything computed by a network
            or a whole lot that the record shaped.
        replace_one_factor: Replace-one sensitivity ÷ C of an unsampled release: 2 for a sum of clipped record rows.
    """

    name: str
    clip_norm: float
    count: int
    relative_noise: float = 1.0
    zero_out_factor: float = 1.0
    replace_one_factor: float = 2.0

    def __post_init__(self) -> None:
        positive_int("count", self.count)
        for name in ("clip_norm", "relative_noise", "zero_out_factor", "replace_one_factor"):
            positive(name, getattr(self, name))


def _unsampled(release: Release, noise_multiplier: float) -> tuple[DominatingPair, DominatingPair]:
    return (
        DominatingPair(NeighboringRelation.REPLACE_SPECIAL, 1.0, noise_multiplier / release.zero_out_factor),
        DominatingPair(NeighboringRelation.ADD_OR_REMOVE_ONE, 1.0, noise_multiplier / release.replace_one_factor),
    )


@dataclass(frozen=True)
class PrivacyPlan:
    """The releases that a run may make and the sampling under which it makes them.

    Args:
        sampling: How records enter a release.
        releases: The allowed kinds of release, each with its clip norm, count and relative noise.

    Privacy:
        The plan is a function of public constants (N, batch size, steps, clip norm) only.

    Raises:
        ValueError: If there is no release or two share a name.
    """

    sampling: Sampling
    releases: tuple[Release, ...]

    def __post_init__(self) -> None:
        names = [release.name for release in self.releases]
        if not names or len(set(names)) < len(names):
            raise fail("releases", names, "at least one release, each with a name of its own")

    def release(self, name: str) -> Release:
        """The release called ``name``.

        Raises:
            ValueError: If the plan has none of that name.
        """
        for release in self.releases:
            if release.name == name:
                return release
        raise ValueError(f"release {name!r} is not in the plan, which allows {[r.name for r in self.releases]}.")

    def release_event(self, name: str, noise_multiplier: float) -> ReleaseEvent:
        """What the ledger records for one release called ``name``."""
        release = self.release(name)
        z = noise_multiplier * release.relative_noise
        zero_out, replace_one = self.sampling.pairs(release, z)
        return ReleaseEvent(name, release.clip_norm, z * release.clip_norm, zero_out, replace_one)

    def events(self, noise_multiplier: float) -> list[tuple[ReleaseEvent, int]]:
        """Every planned release event with its count."""
        return [(self.release_event(r.name, noise_multiplier), r.count) for r in self.releases]

    def event(self, noise_multiplier: float, relation: Relation = Relation.ZERO_OUT) -> dp_accounting.DpEvent:
        """The whole plan as one ``dp_accounting`` event."""
        return compose(self.events(noise_multiplier), relation)

    def epsilon(self, noise_multiplier: float, delta: float, relation: Relation = Relation.ZERO_OUT) -> float:
        """ε of the whole plan at ``delta``, by privacy-loss distributions.

        Args:
            noise_multiplier: Noise standard deviation ÷ clip norm; 0 gives ``inf``.
            delta: The δ at which to report.
            relation: Zero-out (the claim) or replace-one.
        """
        from lightning_dpgen.privacy.accounting import epsilon

        return epsilon(self.events(noise_multiplier), delta, relation).value

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for checkpoints and certificates."""
        return {
            "sampling": {"kind": type(self.sampling).__name__, **asdict(self.sampling)},
            "releases": [asdict(release) for release in self.releases],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrivacyPlan:
        """The inverse of :meth:`to_dict`."""
        kinds: dict[str, type[Sampling]] = {kind.__name__: kind for kind in (PoissonSampling, FullPass, DisjointShards)}
        sampling = dict(values["sampling"])
        kind = kinds[sampling.pop("kind")]
        return cls(kind(**sampling), tuple(Release(**release) for release in values["releases"]))


def compose(events: list[tuple[ReleaseEvent, int]], relation: Relation = Relation.ZERO_OUT) -> dp_accounting.DpEvent:
    """Release events with their counts as one ``dp_accounting`` event."""
    return dp_accounting.ComposedDpEvent([dp_accounting.SelfComposedDpEvent(event.pair(relation).event, count) for event, count in events])
