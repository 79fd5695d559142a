"""Checks a release folder against its own certificate."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from lightning_dpgen.privacy.plan import PrivacyPlan, Relation, ReleaseEvent
from lightning_dpgen.release.certificate import FORMAT, Counts, claim
from lightning_dpgen.release.folder import CARD, CERTIFICATE, IMAGES, sha256

TOLERANCE = 1e-3


class InvalidRelease(ValueError):
    """A release whose files or figures do not hold; the message lists everything that was found."""


def verify_release(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Recomputes ε from the events, checks every file's digest, refuses unlisted files.

    It checks that the folder is consistent with itself. It cannot check that the run was honest.

    Args:
        path: The release folder.

    Returns:
        The certificate.

    Raises:
        InvalidRelease: Lists what does not hold.
    """
    folder = Path(path)
    file = folder / CERTIFICATE
    if not file.is_file():
        missing = f"it has no {CERTIFICATE}" if folder.exists() else "there is no such folder"
        raise InvalidRelease(f"{folder} is not a release: {missing}.")
    try:
        certificate = json.loads(file.read_text(encoding="utf-8"))
        problems = [*_check_files(folder, certificate), *_check_figures(certificate)]
        if not problems:
            problems = [*_check_images(folder, certificate), *_check_card(folder, certificate)]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidRelease(f"{file} is damaged: {type(error).__name__}: {error}") from error
    if problems:
        raise InvalidRelease(f"{folder} does not hold:\n- " + "\n- ".join(problems))
    return dict(certificate)


def _check_files(folder: Path, certificate: dict[str, Any]) -> list[str]:
    listed = certificate["files"]
    found = [entry for entry in folder.rglob("*") if entry.is_symlink() or not entry.is_dir()]
    if links := sorted(entry.relative_to(folder).as_posix() for entry in found if entry.is_symlink()):
        return [f"{name} is a link, and whoever copies the folder may publish what it points to: take it out" for name in links]
    present = {entry.relative_to(folder).as_posix() for entry in found} - {CERTIFICATE}
    problems = [f"{name} is listed but missing" for name in sorted(set(listed) - present)]
    problems += [f"{name} is not listed in the certificate: take it out" for name in sorted(present - set(listed))]
    problems += [
        f"{name} was changed: its SHA-256 is not the certificate's"
        for name in sorted(present & set(listed))
        if sha256(folder / name) != listed[name]
    ]
    return problems


def event_counts(entries: list[dict[str, Any]]) -> Counts:
    """A certificate's events with their counts."""
    counts = {ReleaseEvent.from_dict(entry["event"]): int(entry["count"]) for entry in entries}
    if len(counts) < len(entries) or any(count < 1 for count in counts.values()):
        raise ValueError("an event is listed twice or with a count below 1")
    return counts


def _check_figures(certificate: dict[str, Any]) -> list[str]:
    if certificate["format"] != FORMAT:
        return [f"its format is {certificate['format']!r}; this version reads {FORMAT!r}"]
    problems = []
    before, planned, released = (event_counts(certificate[name]) for name in ("before", "planned", "released"))
    plan = PrivacyPlan.from_dict(certificate["plan"])
    allowed = dict(plan.events(float(certificate["noise_multiplier"])))
    if any(count > allowed.get(event, 0) for event, count in planned.items()):
        problems.append("the planned events are not those of the plan at its noise multiplier")
    if not released:
        problems.append("nothing was released")
    if released.keys() - before.keys() - allowed.keys():
        problems.append("there are released events that neither the plan nor the earlier releases name")
    if plan.sampling.records != certificate["published_without_noise"]["records"]:
        problems.append("the number of records is not the plan's")
    delta = float(certificate["claim"]["delta"])
    if certificate["claim"]["relation"] != Relation.ZERO_OUT.value:
        problems.append(f"the claim's relation is {certificate['claim']['relation']!r}; claims are {Relation.ZERO_OUT.value}")
    figure, basis = claim(before, planned, released, delta, Relation.ZERO_OUT)
    replace_one, _ = claim(before, planned, released, delta, Relation.REPLACE_ONE)
    for name, stated, found in (
        ("epsilon", certificate["claim"]["epsilon"], figure.value),
        ("replace-one epsilon", certificate["replace_one"]["epsilon"], replace_one.value),
        ("RDP epsilon", certificate["second_accountant"]["epsilon"], figure.rdp),
    ):
        if not math.isclose(float(stated), found, rel_tol=TOLERANCE):
            problems.append(f"{name} is stated as {float(stated):.4f}; the events come to {found:.4f}")
    if certificate["claim"]["basis"] != basis or certificate["claim"]["accountant"] != figure.accountant:
        problems.append(f"the claim should rest on the {basis} by {figure.accountant}")
    budget = certificate["budget"]
    if budget is not None and figure.value > float(budget["epsilon"]) * (1 + TOLERANCE):
        problems.append(f"epsilon {figure.value:.4f} is above the stated budget of {float(budget['epsilon']):g}")
    if budget is not None and float(budget["delta"]) != delta:
        problems.append(f"the claim is at delta {delta:g}, the budget at {float(budget['delta']):g}")
    return problems


def _check_card(folder: Path, certificate: dict[str, Any]) -> list[str]:
    stated = f"**{certificate['claim']['epsilon']:.3f}**"
    return [] if stated in (folder / CARD).read_text(encoding="utf-8") else [f"{CARD} does not state the claim, {stated}"]


def _check_images(folder: Path, certificate: dict[str, Any]) -> list[str]:
    public = certificate["published_without_noise"]
    channels, height, width = public["image_shape"]
    shape = (certificate["images"], height, width) if channels == 1 else (certificate["images"], height, width, channels)
    with np.load(folder / IMAGES, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    if images.dtype != np.uint8 or images.shape != shape or labels.shape != (shape[0],):
        return [f"{IMAGES} holds {images.dtype} {images.shape} with labels {labels.shape}; the certificate says {shape}"]
    if len(labels) and not 0 <= labels.min() <= labels.max() < len(public["classes"]):
        return [f"{IMAGES} has labels outside 0 to {len(public['classes']) - 1}"]
    return []
