import json

import pytest

from lightning_dpgen.privacy import LedgerError, PoissonSampling, PrivacyLedger, PrivacyPlan, Release

PLAN = PrivacyPlan(PoissonSampling(100, 10), (Release("sum", 1.0, 5),))
EVENT = PLAN.release_event("sum", 1.0)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "privacy" / "run.jsonl"


def written(path, releases: int) -> PrivacyLedger:
    ledger = PrivacyLedger(path)
    for _ in range(releases):
        ledger.charge(EVENT)
    return ledger


def test_what_is_charged_is_read_back(path):
    written(path, 3)
    again = PrivacyLedger(path)
    assert again.counts == {EVENT: 3}
    assert len(again) == again.count("sum") == 3
    assert again.event() == PrivacyPlan(PLAN.sampling, (Release("sum", 1.0, 3),)).event(1.0)


def test_a_later_run_adds(path):
    written(path, 3)
    written(path, 2)
    assert len(PrivacyLedger(path)) == 5


def test_reading_epsilon_changes_nothing(path):
    ledger = written(path, 2)
    before = path.read_bytes()
    assert ledger.epsilon(1e-5).value == ledger.epsilon(1e-5).value > 0
    assert path.read_bytes() == before
    assert PrivacyLedger(None).epsilon(1e-5).value == 0


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_line_cut_by_a_crash_is_charged_and_the_run_goes_on(path, cut):
    written(path, 3)
    data = path.read_bytes()
    path.write_bytes(data[:-cut] if cut > 1 else data[:-1])
    kept = data if cut == 1 else data[:-cut]  # without its newline alone, a line is whole
    resumed = PrivacyLedger(path)
    assert len(resumed) == 3
    assert resumed.torn_lines == (0 if cut == 1 else 1)
    resumed.charge(EVENT)
    assert path.read_bytes().startswith(kept[: len(data) - cut])  # nothing is overwritten
    final = PrivacyLedger(path)
    assert len(final) == 4
    assert final.torn_lines == resumed.torn_lines


def test_garbage_in_the_last_line_counts_as_a_cut(path):
    written(path, 2)
    with open(path, "ab") as file:
        file.write(b"\x00\x00\x00\n")
    resumed = PrivacyLedger(path)
    assert len(resumed) == 3
    resumed.charge(EVENT)
    assert len(PrivacyLedger(path)) == 4


def test_a_cut_header_loses_nothing(path):
    path.parent.mkdir()
    path.write_bytes(b'{"type":"head')
    ledger = PrivacyLedger(path)
    assert len(ledger) == 0
    ledger.charge(EVENT)
    assert len(PrivacyLedger(path)) == 1


@pytest.mark.parametrize("change", ["drop", "edit", "garble", "swap"])
def test_tampering_in_the_middle_is_refused(path, change):
    written(path, 5)
    lines = path.read_text().splitlines(keepends=True)
    if change == "drop":
        del lines[2]
    elif change == "edit":
        lines[2] = lines[2].replace('"count":1', '"count":0')
    elif change == "garble":
        lines[2] = "garbage\n"
    else:
        entry = json.loads(lines[2])
        entry["event"]["zero_out"]["noise_multiplier"] = 9.0
        lines[2] = json.dumps(entry) + "\n"
    path.write_text("".join(lines))
    before = path.read_bytes()
    with pytest.raises(LedgerError, match=r"line \d"):
        PrivacyLedger(path)
    assert path.read_bytes() == before


def test_two_writers_are_noticed(path):
    first, second = PrivacyLedger(path), PrivacyLedger(path)
    first.charge(EVENT)
    with pytest.raises(LedgerError, match="another process"):
        second.charge(EVENT)


def test_merging_takes_the_larger_count_of_each_event(path):
    other = PLAN.release_event("sum", 2.0)
    ledger = written(path, 3)
    ledger.merge({EVENT: 2, other: 4})
    ledger.merge({EVENT: 2, other: 4})
    assert PrivacyLedger(path).counts == {EVENT: 3, other: 4}


def test_a_failed_write_leaves_the_ledger_usable(path, monkeypatch):
    ledger = written(path, 2)

    def full(*_):
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match="no space"):
            ledger.charge(EVENT)
    assert ledger.counts == {EVENT: 2}
    with pytest.raises(LedgerError, match="another process"):  # the line is in the file, so it counts: read the file again
        ledger.charge(EVENT)
    assert PrivacyLedger(path).counts == {EVENT: 3}


def test_merging_says_how_much_was_missing(path):
    ledger = written(path, 2)
    assert ledger.merge({EVENT: 5}) == 3
    assert ledger.merge({EVENT: 4}) == 0
    assert PrivacyLedger(path).counts == {EVENT: 5}
