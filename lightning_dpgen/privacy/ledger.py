"""The ledger: what was released, written down before it was released.

A JSON-lines file that only grows. Each line carries the SHA-256 of the chain up to it, so an edit in the middle is seen;
each line is on disk before the noise of its release is drawn, so a crash can only over-count.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import dp_accounting

from lightning_dpgen.privacy.accounting import Epsilon, epsilon
from lightning_dpgen.privacy.plan import Relation, ReleaseEvent, compose

FORMAT = "lightning-dpgen-ledger/1"


class LedgerError(RuntimeError):
    """A ledger file that cannot be trusted, or that another process is writing."""


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _digest(previous: str, body: dict[str, Any]) -> str:
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return _sha256((previous + text).encode())


class PrivacyLedger:
    """An append-only, durable record of every release of a run.

    Args:
        path: The JSON-lines file; created with its folder if it does not exist. ``None`` keeps the ledger in memory, for
            tests and notebooks.
        run_id: The name of a new ledger; drawn at random if not given. A file keeps the one that it has.

    Attributes:
        run_id: Names the run; written into checkpoints and certificates.
        torn_lines: How many lines a crash had cut. Each is charged as one more release of the event before it, although a
            release is drawn only once its line is whole.

    Privacy:
        Holds event parameters and counts only. :meth:`charge` returns after ``fsync``; the mechanism draws noise after that.

    Raises:
        LedgerError: If the file is damaged anywhere but in its last line.
    """

    def __init__(self, path: str | os.PathLike[str] | None, run_id: str | None = None) -> None:
        self.path = None if path is None else Path(path)
        self.run_id = run_id or uuid.uuid4().hex[:12]
        self.torn_lines = 0
        self._counts: Counter[ReleaseEvent] = Counter()
        self._promised: Counter[ReleaseEvent] = Counter()
        self._chain = ""
        self._size = 0
        self._has_header = False
        self._separator = b""
        self._cut: bytes | None = None
        if self.path is not None and self.path.exists():
            self._read(self.path)

    @property
    def counts(self) -> dict[ReleaseEvent, int]:
        """How often each release event happened, crashes counted as releases."""
        return dict(self._counts)

    @property
    def promised(self) -> dict[ReleaseEvent, int]:
        """What the runs under this ledger had planned in all, whether they made it or not."""
        return dict(self._promised)

    def __len__(self) -> int:
        """Number of releases."""
        return sum(self._counts.values())

    def count(self, name: str) -> int:
        """Number of releases called ``name``."""
        return sum(count for event, count in self._counts.items() if event.name == name)

    def event(self, relation: Relation = Relation.ZERO_OUT) -> dp_accounting.DpEvent:
        """Everything released so far as one ``dp_accounting`` event."""
        return compose(list(self._counts.items()), relation)

    def epsilon(self, delta: float, relation: Relation = Relation.ZERO_OUT) -> Epsilon:
        """ε of everything released so far; 0 before the first release. Reading it changes nothing."""
        return epsilon(self._counts.items(), delta, relation)

    def charge(self, event: ReleaseEvent, count: int = 1, note: str = "") -> None:
        """Records ``count`` releases of ``event`` and returns when they are on disk.

        Args:
            event: What is about to be released.
            count: How many times.
            note: Why, if not an ordinary release.

        Raises:
            LedgerError: If the file changed since this process last wrote it.
        """
        body: dict[str, Any] = {"type": "release", "event": event.to_dict(), "count": count}
        if note:
            body["note"] = note
        self._append(body)
        self._counts[event] += count

    def promise(self, counts: dict[ReleaseEvent, int]) -> None:
        """Records what a run plans, earlier releases included. Its claim is the plan's, also if it ends early.

        Raises:
            LedgerError: If the file changed since this process last wrote it.
        """
        more = Counter(counts) | self._promised
        if more != self._promised:
            self._append({"type": "plan", "total": [[event.to_dict(), count] for event, count in more.items()]})
            self._promised = more

    def merge(self, counts: dict[ReleaseEvent, int]) -> int:
        """Raises each event's count to at least that of ``counts``: what a checkpoint knows and the file does not.

        Returns:
            How many releases were missing from the file.
        """
        missing = {event: count - self._counts[event] for event, count in counts.items() if count > self._counts[event]}
        for event, count in missing.items():
            self.charge(event, count, note="known to a checkpoint, missing from the file")
        return sum(missing.values())

    def _append(self, body: dict[str, Any]) -> None:
        if self.path is None:
            return
        bodies = [body]
        if not self._has_header:
            bodies.insert(0, {"type": "header", "format": FORMAT, "run": self.run_id})
        if self._cut is not None:  # the line that a crash had cut stays, and the next one says so
            bodies.insert(0, {"type": "recovery", "cut": _sha256(self._cut), "charged": self.torn_lines})
        chain, lines = self._chain, self._separator
        for entry in bodies:
            chain = _digest(chain, entry)
            lines += (json.dumps({**entry, "chain": chain}, separators=(",", ":")) + "\n").encode()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            if file.tell() != self._size:
                raise LedgerError(
                    f"{self.path} is {file.tell()} bytes long where this run left it at {self._size}: another process is "
                    "writing it. Stop that one, or give this run a ledger path of its own."
                )
            file.write(lines)
            file.flush()
            os.fsync(file.fileno())
            is_new, self._size = self._size == 0, file.tell()
        if is_new and os.name == "posix":  # a new file is durable once its folder is
            folder = os.open(self.path.parent, os.O_RDONLY)
            os.fsync(folder)
            os.close(folder)
        self._chain, self._cut, self._separator, self._has_header = chain, None, b"", True

    def _read(self, path: Path) -> None:
        data = path.read_bytes()
        self._size = len(data)
        self._separator = b"" if data.endswith(b"\n") or not data else b"\n"
        lines = data.removesuffix(b"\n").split(b"\n") if data else []
        last: ReleaseEvent | None = None
        for number, line in enumerate(lines, start=1):
            body = _parse(line)
            if body is None:
                following = _parse(lines[number]) if number < len(lines) else None
                if number == len(lines):
                    self._cut = line
                elif following is None or following.get("cut") != _sha256(line):
                    raise self._damaged(number, "is not a ledger entry")
                self.torn_lines += 1
                if last is not None:
                    self._counts[last] += 1
                continue
            chain = body.pop("chain")
            if _digest(self._chain, body) != chain:
                raise self._damaged(number, "does not continue the chain of digests before it")
            self._chain = chain
            if body["type"] == "header":
                if body.get("format") != FORMAT:
                    raise self._damaged(number, f"is not a header of format {FORMAT}")
                self._has_header, self.run_id = True, str(body["run"])
            elif not self._has_header and body["type"] != "recovery":
                raise self._damaged(number, "comes before the header")
            elif body["type"] == "release":
                last = ReleaseEvent.from_dict(body["event"])
                self._counts[last] += int(body["count"])
            elif body["type"] == "plan":
                self._promised |= Counter({ReleaseEvent.from_dict(event): int(count) for event, count in body["total"]})

    def _damaged(self, number: int, what: str) -> LedgerError:
        return LedgerError(
            f"{self.path}, line {number} {what}: the file was changed after it was written, so what was spent is not known. "
            "Restore it as this run left it: an older copy would forget releases. A run on a new ledger must be composed with "
            "everything released under this one."
        )


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        body = json.loads(line)
    except ValueError:
        return None
    return body if isinstance(body, dict) and "type" in body and "chain" in body else None
