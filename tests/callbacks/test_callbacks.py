import csv

import pytest
import pytorch_lightning as pl
import torch
from helpers import trainer as quiet
from helpers import unrelated_release
from lightning_dpgen.callbacks import PrivacyMonitor, ReleaseWriter, SampleGrid, TSTREvaluation
from pytorch_lightning.demos.boring_classes import BoringModel
from pytorch_lightning.loggers import CSVLogger

from lightning_dpgen import DigitsDataModule, DPStrategy, PrivateSetGeneration, verify_release


def run(folder, callbacks, strategy=None, steps=4, **options):
    torch.manual_seed(0)
    trainer = quiet(
        folder,
        strategy or DPStrategy(noise_multiplier=1.0),
        max_steps=steps,
        callbacks=callbacks,
        **{"logger": CSVLogger(folder, name="logs"), **options},
    )
    module = PrivateSetGeneration(images_per_class=1, schedule_overrides={"width": 4})
    trainer.fit(module, DigitsDataModule(batch_size=200))
    return trainer


def logged(folder) -> list[dict[str, str]]:
    return list(csv.DictReader(open(next(folder.glob("logs/*/metrics.csv")))))


def test_everything_is_logged_written_and_drawn(tmp_path, capsys, caplog):
    caplog.set_level("INFO", "pytorch_lightning.utilities.rank_zero")
    evaluation = TSTREvaluation(every_n_steps=2, seeds=[0], classifiers=["LogReg"])
    callbacks = [
        PrivacyMonitor(every_n_steps=2),
        SampleGrid(every_n_steps=2, per_class=2),
        evaluation,
        ReleaseWriter(str(tmp_path / "out")),
    ]
    trainer = run(tmp_path, callbacks, log_every_n_steps=1)
    rows = logged(tmp_path)
    epsilons = [float(row["privacy/epsilon"]) for row in rows if row.get("privacy/epsilon")]
    assert epsilons == pytest.approx(sorted(epsilons), rel=1e-6)
    assert epsilons[0] < epsilons[-1]
    assert epsilons[-1] == pytest.approx(trainer.strategy.epsilon_spent(), rel=1e-5)
    assert float(trainer.callback_metrics["privacy/epsilon"]) == pytest.approx(epsilons[-1], rel=1e-5)
    assert sum(bool(row.get("tstr/LogReg")) for row in rows) >= 2
    assert [p.name for p in sorted((tmp_path / "samples").iterdir())] == ["step-000002.png", "step-000004.png"]
    verify_release(tmp_path / "out")
    printed = capsys.readouterr().out
    assert f"Privacy spent: epsilon = {trainer.strategy.epsilon_spent():.3f}" in caplog.text
    assert "collapsed" not in caplog.text
    assert "LogReg" in printed
    assert "Release written" in printed


def test_a_generator_that_makes_one_image_is_named(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(PrivateSetGeneration, "sample", lambda self, labels, generator=None: torch.full((len(labels), 1, 8, 8), 0.5))
    run(tmp_path, [SampleGrid()])
    assert "collapsed to one image" in caplog.text


def test_a_class_whose_samples_are_alike_is_named_and_numbers_stand_beside_the_rows(tmp_path, caplog, monkeypatch):
    from PIL import Image

    def sample(self, labels, generator=None):
        images = torch.rand((len(labels), 1, 8, 8), generator=torch.Generator().manual_seed(1))
        images[labels == 3] = images[0] * 0.5
        return images

    monkeypatch.setattr(PrivateSetGeneration, "sample", sample)
    run(tmp_path / "one", [SampleGrid(per_class=4)])
    assert "alike" not in caplog.text  # one image a class by design
    assert "collapsed" not in caplog.text
    monkeypatch.setattr(PrivateSetGeneration, "release_labels", lambda self: torch.arange(10).repeat(5))
    run(tmp_path / "many", [SampleGrid(per_class=4)])
    assert "the samples of class 3 differ by less than 0.02" in caplog.text
    pictures = [Image.open(next((tmp_path / name / "samples").glob("*.png"))) for name in ("one", "many")]
    assert pictures[1].width == pictures[0].width + 80
    margin = torch.tensor(list(pictures[1].convert("L").crop((pictures[0].width, 0, *pictures[1].size)).getdata()))
    assert int((margin < 128).sum()) > 20


def test_looking_changes_nothing(tmp_path, monkeypatch):
    """The same run with and without callbacks ends in the same images, bit for bit."""
    from lightning_dpgen.privacy import GaussianMechanism

    monkeypatch.setattr(GaussianMechanism, "release", unrelated_release())
    looking = [PrivacyMonitor(1), SampleGrid(1, 2), TSTREvaluation(every_n_steps=1, seeds=[0], classifiers=["LogReg"])]
    images = []
    for name, callbacks in (("with", looking), ("without", [])):
        trainer = run(tmp_path / name, callbacks, steps=3)
        images.append(trainer.lightning_module.images.detach())
    assert torch.equal(*images)


def test_a_run_that_fails_leaves_no_release(tmp_path):
    class Crash(pl.Callback):
        def on_train_end(self, *args):
            raise RuntimeError("crash")

    with pytest.raises(RuntimeError, match="crash"):
        run(tmp_path, [ReleaseWriter(str(tmp_path / "out")), Crash()])
    assert not (tmp_path / "out").exists()


def test_what_could_not_be_done_at_the_end_is_refused_at_the_start(tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("x")
    with pytest.raises(FileExistsError, match="not a release"):
        run(tmp_path, [ReleaseWriter(str(tmp_path / "taken"))])
    with pytest.raises(ValueError, match="protocol='fast'"):
        TSTREvaluation(protocol="fast")
    with pytest.raises(ValueError, match="every_n_steps=0"):
        PrivacyMonitor(every_n_steps=0)
    plain = pl.Trainer(max_steps=1, logger=False, accelerator="cpu", callbacks=[PrivacyMonitor()], enable_checkpointing=False)
    with pytest.raises(ValueError, match="PrivacyMonitor needs DPStrategy"):
        plain.fit(BoringModel())
