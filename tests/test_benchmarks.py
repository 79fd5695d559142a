"""The table's benchmark: every cell can be trained, nothing is lost, nothing of another release is kept."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from lightning_dpgen import MNISTDataModule, PrivateGenerator

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def script(name, monkeypatch):
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def recipes(monkeypatch):
    return script("recipes", monkeypatch)


@pytest.fixture
def table(recipes, tmp_path, monkeypatch):
    module = script("table", monkeypatch)
    monkeypatch.setattr(module, "results_file", lambda scale: tmp_path / f"{scale}.json")
    monkeypatch.chdir(tmp_path)
    return module


def test_every_cell_of_every_scale_has_a_recipe(recipes):
    for scale in recipes.SCALES:
        for cell in [*recipes.cells(scale), *recipes.curves(scale)]:
            if cell.method != "Real":
                assert isinstance(recipes.recipe(cell).module(), PrivateGenerator)
    origins = {(cell.scale, cell.method): recipes.origin(cell) for scale in ("cpu", "gpu-paper") for cell in recipes.cells(scale)}
    assert origins["cpu", "PSG 10"].startswith("tuned on MNIST's training records")
    assert origins["cpu", "DP-GAN"] == origins["cpu", "GS-WGAN"] == recipes.SIZED
    assert origins["gpu-paper", "PSG 10"] == origins["gpu-paper", "DP-CGAN"] == recipes.PAPERS
    names = [cell.name for cell in recipes.cells("cpu")]
    assert len(names) == len(set(names)) == 2 * (9 + 4) + 1


def test_results_are_kept_cell_by_cell_and_an_earlier_draws_are_marked_until_as_many_seeds_are_done(table):
    cell = next(cell for cell in table.cells("cpu-small") if cell.method == "mixture")
    terms = {"epsilon": 9.9, "replace_one": 12.0, "noise_multiplier": 0.5, "steps": 7, "knobs": {"width": 8}}
    table.keep(cell, {**terms, "release": "one"})
    table.record(cell, "quick LogReg", 0, 80.0, "one", [])
    table.keep(cell, {**terms, "release": "one", "peak_mib": 500.0})
    table.record(cell, "quick LogReg", 1, 82.0, "one", [])
    assert "81.00 ± 1.41 (2 of 3)" in table.render("cpu-small")
    assert "missing" in table.render("cpu-small")
    assert "LeNet" not in table.render("cpu-small")  # which this scale does not train
    table.keep(cell, {**terms, "release": "other", "peak_mib": 600.0})
    with pytest.raises(SystemExit, match="not those of the newest training"):
        table.record(cell, "quick LogReg", 2, 99.0, "one", [])
    table.record(cell, "quick LogReg", 0, 70.0, "other", [])
    assert "81.00 ± 1.41† (2 of 3)" in table.render("cpu-small")
    assert "| 600 |" in table.render("cpu-small")
    table.record(cell, "quick LogReg", 1, 72.0, "other", ["bfloat16", "compile"])
    assert "71.00 ± 1.41‡§ (2 of 3)" in table.render("cpu-small")
    assert "†" not in table.render("cpu-small")
    kept = table.known(cell)
    for change in ({"epsilon": 1.0}, {"knobs": {"width": 16}}, None):
        with table.results("cpu-small") as found:
            found[cell.name] = kept if change else {name: value for name, value in kept.items() if name != "knobs"}
        table.keep(cell, {**terms, **(change or {}), "release": "third"})
        assert "71.00" not in table.render("cpu-small")


def test_the_six_classifiers_are_one_seeds_and_have_a_table_of_their_own(table, monkeypatch):
    cell = table.Cell("cpu", "set 10", "MNIST", 10.0)
    (cell.folder).mkdir(parents=True)
    (cell.folder / "facts.json").write_text("{}")
    monkeypatch.setattr(table, "digest_of", lambda cell: "one")
    table.keep(cell, {"release": "one"})
    asked = []
    monkeypatch.setattr(table, "images_of", lambda cell, root: None)
    monkeypatch.setattr(MNISTDataModule, "setup", lambda self, stage: None)
    monkeypatch.setattr(MNISTDataModule, "real_test", lambda self: None)

    class Found:
        def mean(self, name):
            return 60.0

    monkeypatch.setattr(table, "tstr", lambda *arguments, **_: asked.append(arguments[3:6]) or Found())
    monkeypatch.setattr(sys, "argv", ["table.py", "--scale", "cpu", "--published", "--evaluate", "--cells", "MNIST"])
    table.main()
    table.main()  # nothing is asked twice
    assert asked == [("published", [0], [name]) for name in table.SIX["published"]]
    assert "| MNIST, set 10 | 60.00 | 60.00 | 60.00 | 60.00 | 60.00 | 60.00 |" in table.render("cpu")


def test_the_six_classifiers_are_refused_at_the_small_scale(table, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["table.py", "--published"])
    with pytest.raises(SystemExit):
        table.main()
    assert "images of 28 x 28" in capsys.readouterr().err


def test_a_cell_is_trained_evaluated_and_gone_on_with(table, monkeypatch, capsys):
    arguments = ["table.py", "--scale", "cpu-small", "--cells", "mixture digits 10", "--seeds", "0"]
    monkeypatch.setattr(sys, "argv", arguments)
    table.main()
    first = table.known(table.Cell("cpu-small", "mixture", "digits", 10.0))
    assert first["evaluations"]["quick LogReg"]["0"] > 70
    assert 9.5 < first["epsilon"] <= 10 < first["replace_one"]
    assert first["knobs"]["dimensions"] > 0
    capsys.readouterr()
    table.main()
    assert capsys.readouterr().out == ""  # nothing is left to do
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], "1", "--bfloat16"])
    table.main()
    again = table.known(table.Cell("cpu-small", "mixture", "digits", 10.0))
    assert again["bfloat16"] == ["common LogReg", "quick LogReg"]
    for key in again["bfloat16"]:
        assert abs(again["evaluations"][key]["1"] - first["evaluations"][key]["0"]) < 5


def test_a_curve_is_trained_evaluated_gone_on_with_and_drawn(table, tmp_path, monkeypatch, capsys):
    convergence = script("convergence", monkeypatch)
    monkeypatch.setattr(convergence, "log_of", lambda scale: tmp_path / "log.csv")
    arguments = ["convergence.py", "--scale", "cpu-small", "--cells", "PSG 1 digits 10"]
    monkeypatch.setattr(sys, "argv", arguments)
    convergence.main()
    rows = convergence.logged("cpu-small")
    assert [int(row["step"]) for row in rows] == [1, 2, 3, 4, 5, 6]
    spent = [float(row["epsilon"]) for row in rows]
    assert spent == sorted(spent)
    assert 9.5 < spent[-1] <= 10
    assert float(rows[-1]["accuracy"]) > 50
    (tmp_path / "log.csv").write_text("".join((tmp_path / "log.csv").read_text().splitlines(keepends=True)[:-1]))
    capsys.readouterr()
    convergence.main()
    assert capsys.readouterr().out.count("\n") == 1  # the line that was lost
    assert convergence.logged("cpu-small") == rows
    monkeypatch.setattr(sys, "argv", [*arguments, "--draw"])
    convergence.main()
    assert Path("runs/convergence-cpu-small.png").stat().st_size > 10_000  # and docs/ is left alone
