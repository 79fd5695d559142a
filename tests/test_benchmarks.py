"""The table's benchmark: every cell can be trained, nothing is lost, nothing of another release is kept."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from lightning_dpgen import PrivateGenerator

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def table(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("table", BENCHMARKS / "table.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "table", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "results_file", lambda scale: tmp_path / f"{scale}.json")
    monkeypatch.chdir(tmp_path)
    return module


def test_every_cell_of_every_scale_has_a_recipe(table):
    for scale in table.SCALES:
        for cell in table.cells(scale):
            if cell.method != "Real":
                assert isinstance(table.recipe(cell).module(), PrivateGenerator)
    names = [cell.name for cell in table.cells("cpu")]
    assert len(names) == len(set(names)) == 2 * (9 + 4)


def test_results_are_kept_cell_by_cell_and_evaluations_of_another_release_are_not(table):
    cell = next(cell for cell in table.cells("cpu-small") if cell.method == "mixture")
    table.keep(cell, {"epsilon": 9.9, "release": "one"})
    table.keep(cell, {}, ("quick LogReg", 0, 80.0))
    table.keep(cell, {"epsilon": 9.9, "release": "one"}, ("quick LogReg", 1, 82.0))
    assert "81.00 ± 1.41" in table.render("cpu-small")
    assert "missing" in table.render("cpu-small")
    table.keep(cell, {"epsilon": 9.8, "release": "other"})
    assert "81.00" not in table.render("cpu-small")


def test_a_cell_is_trained_evaluated_and_gone_on_with(table, monkeypatch, capsys):
    arguments = ["table.py", "--scale", "cpu-small", "--cells", "mixture digits 10", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    table.main()
    first = table.known(table.Cell("cpu-small", "mixture", "digits", 10.0))
    assert first["evaluations"]["quick LogReg"]["0"] > 70
    assert 9.5 < first["epsilon"] <= 10 < first["replace_one"]
    capsys.readouterr()
    table.main()
    assert capsys.readouterr().out == ""  # nothing is left to do
