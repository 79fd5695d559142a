"""The command line, driven as a user drives it."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from lightning_dpgen import DPGAN, DPMERF, GSWGAN, MixturePPCA, load_release
from lightning_dpgen.cli import main
from lightning_dpgen.generators import gs_wgan

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"
SMALL = [
    "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
    '--model.schedule_overrides={"width": 4, "image_steps": 1}',
    "--model.images_per_class=1",
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def own_images(root: Path) -> None:
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = root / "images" / part / name
            folder.mkdir(parents=True)
            for number in range(20):
                pixels = generator.integers(0, 256, (28, 28), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")


def settings_of(config: Path) -> dict:
    settings = yaml.safe_load(config.read_text())
    settings["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    return settings


def made(settings: dict, place: Path, idx_root: Path, *more: str, protocol: str = "quick") -> Path:
    """Runs a configuration on small data, with one cheap classifier, and verifies its release."""
    for callback in settings["trainer"]["callbacks"]:
        if callback["class_path"] == "TSTREvaluation":
            callback["init_args"] = {"seeds": [0], "protocol": protocol, "classifiers": ["LogReg"]}
    if "root" in settings["data"]["init_args"]:
        settings["data"]["init_args"]["root"] = str(idx_root)
    if settings["data"]["class_path"] == "ImagesDataModule":
        own_images(place)
    (place / "small.yaml").write_text(yaml.safe_dump(settings))
    assert main(["fit", "--config", "small.yaml", *more]) == 0
    release = place / settings["trainer"]["callbacks"][-1]["init_args"]["path"]
    assert main(["verify", str(release)]) == 0
    return release


def check_that_it_generates(release: Path, place: Path) -> None:
    assert main(["generate", str(release), "more", "--per_class", "2"]) == 0
    assert len(list((place / "more").rglob("*.png"))) == 2 * len(load_release(release).class_names)


def twenty_a_class(self) -> torch.Tensor:
    return torch.arange(self.num_classes).repeat_interleave(20)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("psg_*.yaml")), ids=lambda path: path.stem)
def test_every_generator_config_runs_and_makes_a_release(config, place, idx_root):
    settings = settings_of(config)
    assert "TSTREvaluation" in [callback["class_path"] for callback in settings["trainer"]["callbacks"]]
    settings["trainer"] |= {"max_steps": 2} if settings["model"]["init_args"]["preset"] == "published" else {"max_epochs": 1}
    settings["data"]["init_args"]["batch_size"] = 20
    release = made(settings, place, idx_root, *SMALL)
    assert load_release(release).epsilon <= 10
    assert not [path for path in place.rglob("*") if ":" in path.name]


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("gs_wgan_*.yaml")), ids=lambda path: path.stem)
def test_every_gs_wgan_config_runs_and_makes_a_release(config, place, idx_root, monkeypatch):
    monkeypatch.setattr(gs_wgan, "FAKES", 2)
    monkeypatch.setattr(GSWGAN, "release_labels", twenty_a_class)
    settings = settings_of(config)
    settings["trainer"]["max_steps"] = 2
    settings["model"].setdefault("init_args", {}).update(num_critics=10, batch_size=20, warm_up_steps=1)
    settings["data"]["init_args"]["batch_size"] = 2
    check_that_it_generates(made(settings, place, idx_root), place)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("mixture_*.yaml")), ids=lambda path: path.stem)
def test_every_mixture_config_runs_and_makes_a_release(config, place, idx_root, monkeypatch):
    monkeypatch.setattr(MixturePPCA, "release_labels", twenty_a_class)
    release = made(settings_of(config), place, idx_root, protocol="common")
    assert 9.8 < load_release(release).epsilon <= 10
    check_that_it_generates(release, place)


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("dp_*.yaml")), ids=lambda path: path.stem)
def test_every_baseline_config_runs_and_makes_a_release(config, place, idx_root, monkeypatch):
    for kind in (DPGAN, DPMERF):
        monkeypatch.setattr(kind, "release_labels", twenty_a_class)
    settings = settings_of(config)
    if settings["model"]["class_path"] == "DPMERF":
        settings["model"]["init_args"] = {"generator_steps": 5}
    else:
        settings["trainer"]["max_steps"] = 2
        settings["data"]["init_args"]["batch_size"] = 20
    release = made(settings, place, idx_root)
    assert load_release(release).epsilon <= 10
    check_that_it_generates(release, place)


def test_the_classifier_config_trains_and_is_tested(place, idx_root, capsys):
    config = ["--config", str(CONFIGS / "dpsgd_mnist.yaml"), f"--data.root={idx_root}", "--trainer.enable_progress_bar=false"]
    assert main(["fit", *config, "--data.batch_size=50", "--trainer.max_epochs=2"]) == 0
    assert len(list(place.glob("runs/dpsgd_mnist/privacy/*.jsonl"))) == 1
    assert main(["test", *config, "--ckpt_path=runs/dpsgd_mnist/last.ckpt"]) == 0
    assert "test/accuracy" in capsys.readouterr().out


def digits(place: Path, *more: str) -> list[str]:
    return ["fit", "--config", str(CONFIGS / "psg_digits.yaml"), *SMALL, "--trainer.max_epochs=2", "--trainer.callbacks=[]", *more]


WRITER = ["--trainer.callbacks+=ReleaseWriter", "--trainer.callbacks.path=release", "--trainer.callbacks.overwrite=true"]


def test_fit_twice_in_one_directory_and_again_from_the_saved_config(place):
    assert main(digits(place, *WRITER)) == 0
    first = load_release("release").certificate
    saved = sorted(place.rglob("config.yaml"))[0]
    assert main(digits(place, *WRITER)) == 0
    assert main(["fit", "--config", str(saved)]) == 0
    again = load_release("release").certificate
    assert again["noise_multiplier"] == first["noise_multiplier"]
    assert again["ledger"]["run"] != first["ledger"]["run"]


def test_the_seed_of_a_config_fixes_the_start_and_not_the_secrets(place):
    for _ in range(2):
        assert main(digits(place, "--seed_everything=0", "--trainer.max_epochs=1", *WRITER)) == 0
    one, other = (torch.load(p, weights_only=True)["state_dict"] for p in sorted(place.rglob("*.ckpt")))
    assert not torch.equal(one["images"], other["images"])  # same initial images and network, other noise
    assert torch.equal(one["labels"], other["labels"])


def test_generate_and_evaluate(place, capsys):
    assert main(digits(place, *WRITER)) == 0
    assert main(["generate", "release", "images", "--per_class", "3"]) == 0
    assert len(list((place / "images").rglob("*.png"))) == 30
    assert main(["generate", "release", "images.npz", "--per_class=2", "--format=npz"]) == 0
    assert np.load("images.npz")["images"].shape == (20, 8, 8)
    assert main(["generate", "release", "images"]) == 1
    assert main(["evaluate", "release", "--data", "digits", "--seeds", "1"]) == 0
    table = json.loads((place / "release-evaluation" / "tstr-quick.json").read_text())
    rows = list(csv.DictReader(open(place / "release-evaluation" / "tstr-quick.csv")))
    assert {row["classifier"] for row in rows} == set(table["classifiers"]) == {"ConvNet32", "LeNet", "MLP", "LogReg"}
    for name in ("mnist", "MNIST", "fashion_mnist", "FashionMNIST"):
        assert main(["evaluate", "release", "--data", name, "--root", "nowhere"]) == 1
    assert "is missing" in capsys.readouterr().err


def test_evaluate_with_fidelity_and_classic_classifiers(place, capsys):
    assert main(digits(place, *WRITER)) == 0
    assert main(["feature_network", "features.safetensors", "--data", "digits", "--updates", "20"]) == 0
    assert main(["feature_network", "features.safetensors", "--data", "digits"]) == 1
    extras = ["--protocol", "[classic]", "--seeds=1", "--feature_network", "features.safetensors"]
    assert main(["evaluate", "release", "--data=digits", *extras]) == 0
    folder = place / "release-evaluation"
    assert set(json.loads((folder / "fidelity.json").read_text())) == {"fid", "inception_score", "precision", "recall"}
    assert "RandomForest" in json.loads((folder / "tstr-classic.json").read_text())["classifiers"]
    assert Image.open(folder / "tstr.png").width > 500
    capsys.readouterr()
    assert main(["evaluate", "release", "--data=digits", "--protocol=fast"]) == 1
    assert "'quick', 'common', 'classic'" in capsys.readouterr().err.replace("'published', ", "")


def test_calibrate_prints_a_table_without_data(place, capsys):
    assert main(["calibrate", "--records=60000", "--batch_size=4096", "--steps=[60]", "--epsilon=[10.0]"]) == 0
    table = capsys.readouterr().out
    assert "0.6494" in table
    assert main(["calibrate", "--records=60000", "--batch_size=256", "--steps=100000", "--noise_multiplier=0.966"]) == 0
    assert "9.28" in capsys.readouterr().out
    assert main(["calibrate", "--records=100", "--batch_size=10", "--steps=5"]) == 1
    assert main(["calibrate", "--records=100", "--batch_size=1000", "--steps=5", "--epsilon=1.0"]) == 1
    assert "larger than the 100 records" in capsys.readouterr().err


def test_calibrate_shows_a_mixtures_releases_and_size(place, capsys):
    assert main(["calibrate", "--method=mixture", "--records=60000", "--epsilon=[1.0,10.0]", "--num_classes=10"]) == 0
    table = capsys.readouterr().out
    assert "cluster_moments" in table
    assert table.count("clusters a class") == 2
    assert main(["calibrate", "--method=mixture", "--records=60000", "--epsilon=1.0", "--steps=5"]) == 1
    assert "Leave it out" in capsys.readouterr().err


def test_mistakes_are_named(place, capsys):
    with pytest.raises(SystemExit):
        main(digits(place, "--trainer.strategy.init_args.epsilonn=3"))
    assert "epsilonn" in capsys.readouterr().err
    assert main(digits(place, "--trainer.strategy.init_args.epsilon=0")) == 1
    assert "epsilon=0" in capsys.readouterr().err
    assert main(["verify", "nothing"]) == 1
    assert main(["fly"]) == 2
    assert main([]) == 0
    captured = capsys.readouterr()
    assert "not a release" in captured.err
    assert "no command 'fly'" in captured.err
    assert "calibrate" in captured.out


def test_resume_with_another_budget_is_refused_with_both_values(place, capsys):
    assert main(digits(place)) == 0
    checkpoint = next(place.rglob("*.ckpt"))
    changes = {
        "--trainer.strategy.init_args.epsilon=3": "epsilon was 10.0 and is 3.0 here",
        "--data.batch_size=100": "expected_batch_size was 1437 and is 100 here",
        "--trainer.max_epochs=3": "count was 2 and is 3 here",
        '--model.schedule_overrides={"width": 4, "image_steps": 1, "clip_norm": 0.7}': "clip_norm was",
    }
    for change, message in changes.items():
        capsys.readouterr()
        assert main(digits(place, f"--ckpt_path={checkpoint}", change)) == 1
        assert message in capsys.readouterr().err


def test_training_without_a_private_strategy_is_refused(place, capsys):
    arguments = ["fit", "--model=Classifier", "--model.network=LogReg", "--data=DigitsDataModule", "--trainer.max_steps=3"]
    assert main([*arguments, "--trainer.accelerator=cpu"]) == 1
    assert "without privacy" in capsys.readouterr().err
    assert not list(place.rglob("*.ckpt"))
    assert main([*arguments, "--trainer.accelerator=cpu", "--trainer.strategy=dpsgd", "--trainer.enable_progress_bar=false"]) == 0
    assert len(list(place.rglob("*.jsonl"))) == 1
