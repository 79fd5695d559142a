"""Argument checks with one voice: what was given, what is wrong, what to do."""

from __future__ import annotations

import math
from typing import Any


def describe(value: Any) -> str:
    """``repr`` of ``value``, shortened to a length that fits in a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def fail(name: str, value: Any, wanted: str, advice: str = "") -> ValueError:
    """A ``ValueError`` that says what was given and what is wanted."""
    message = f"{name}={describe(value)}: {name} must be {wanted}."
    return ValueError(f"{message} {advice}".rstrip())


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def positive(name: str, value: Any, advice: str = "") -> float:
    """Returns ``value`` as a float if it is finite and above zero.

    Raises:
        ValueError: If it is not.
    """
    if not _is_number(value) or not math.isfinite(value) or value <= 0:
        raise fail(name, value, "a finite number above 0", advice)
    return float(value)


def non_negative(name: str, value: Any, advice: str = "") -> float:
    """Returns ``value`` as a float if it is finite and not below zero.

    Raises:
        ValueError: If it is not.
    """
    if not _is_number(value) or not math.isfinite(value) or value < 0:
        raise fail(name, value, "a finite number of at least 0", advice)
    return float(value)


def between(name: str, value: Any, low: float, high: float, advice: str = "") -> float:
    """Returns ``value`` as a float if ``low < value < high``.

    Raises:
        ValueError: If it is not.
    """
    if not _is_number(value) or not low < value < high:
        raise fail(name, value, f"above {low:g} and below {high:g}", advice)
    return float(value)


def positive_int(name: str, value: Any, advice: str = "") -> int:
    """Returns ``value`` if it is a whole number above zero.

    Raises:
        ValueError: If it is not.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise fail(name, value, "a whole number of at least 1", advice)
    return value


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns ``value`` if it is one of ``choices``.

    Raises:
        ValueError: If it is not.
    """
    if value not in choices:
        raise fail(name, value, "one of " + ", ".join(map(repr, choices)))
    return str(value)
