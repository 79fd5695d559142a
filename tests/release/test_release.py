import json

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from helpers import trainer
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import (
    DPGAN,
    DPMERF,
    DigitsDataModule,
    DPStrategy,
    PrivateSetGeneration,
    SanitizedRelease,
    load_release,
    verify_release,
)
from lightning_dpgen.release import InvalidRelease, NotCertifiable
from lightning_dpgen.strategies.private import UNENDED


def finished(folder, strategy=None, steps=3, **options) -> pl.Trainer:
    run = trainer(folder, strategy or DPStrategy(epsilon=5.0), max_steps=steps, **options)
    run.fit(PrivateSetGeneration(images_per_class=2, schedule_overrides={"width": 4}), DigitsDataModule(batch_size=200))
    return run


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = finished(folder)
    SanitizedRelease.from_trainer(run).save(folder / "release")
    return folder / "release", run


@pytest.fixture
def release(original, tmp_path):
    import shutil

    return shutil.copytree(original[0], tmp_path / "release")


@pytest.mark.parametrize("kind", [DPGAN, PrivateSetGeneration])
def test_only_the_last_trainer_of_a_module_certifies_it(tmp_path, digit_records, kind):
    """The earlier one's ledger does not know what the later one paid."""
    module, runs = kind(num_classes=10, image_shape=(1, 8, 8)), []
    for noise in (8.0, 1.0):
        strategy = DPStrategy(noise_multiplier=noise, ledger=tmp_path / "shared.jsonl")
        runs.append(trainer(tmp_path, strategy, max_steps=2, max_epochs=-1))
        runs[-1].fit(module, DataLoader(digit_records, batch_size=16))
    with pytest.raises(NotCertifiable, match="not the last to train"):
        SanitizedRelease.from_trainer(runs[0])
    released = SanitizedRelease.from_trainer(runs[1], torch.arange(10))
    before = {name: value.clone() for name, value in released.parameters.items()}
    with torch.no_grad():
        for value in module.public_state().values():
            value += 1
    assert all(torch.equal(value, before[name]) for name, value in released.parameters.items())


class Break(pl.Callback):
    """Raises after a step, or at the end."""

    def __init__(self, after: int | None = None):
        self.after = after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise RuntimeError("broken off")

    def on_train_end(self, trainer, module):
        if self.after is None:
            raise RuntimeError("broken off")


def gan() -> DPGAN:
    return DPGAN(num_classes=10, image_shape=(1, 8, 8))


def test_a_run_that_an_error_broke_off_is_certified_after_its_resume_alone_and_with_a_note(tmp_path, digit_records):
    """When it broke off may be what a record decided."""
    loader = DataLoader(digit_records, batch_size=8)
    first = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=6, max_epochs=-1, callbacks=[Break(2), Break(4)])
    with pytest.raises(RuntimeError, match="broken off"):
        first.fit(gan(), loader)
    first.save_checkpoint(tmp_path / "early.ckpt")
    with pytest.raises(NotCertifiable, match="broken off by an error"):
        SanitizedRelease.from_trainer(first)
    second = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=6, max_epochs=-1, callbacks=[Break(4)])
    with pytest.raises(RuntimeError, match="broken off"):
        second.fit(gan(), loader, ckpt_path=tmp_path / "early.ckpt")
    third = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=6, max_epochs=-1)
    third.fit(gan(), loader, ckpt_path=tmp_path / "early.ckpt")
    (note,) = SanitizedRelease.from_trainer(third).certificate["notes"]
    assert note.startswith("Resumed from a checkpoint of 2 releases, when the ledger held 4.")


def test_a_fit_that_goes_on_from_a_broken_one_without_a_checkpoint_says_so(tmp_path, digit_records):
    loader, module = DataLoader(digit_records, batch_size=8), gan()
    run = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=6, max_epochs=-1, callbacks=[Break(2)])
    with pytest.raises(RuntimeError, match="broken off"):
        run.fit(module, loader)
    ledger = run.strategy.ledger.path
    run.callbacks.clear()
    run.fit(module, loader)
    assert SanitizedRelease.from_trainer(run).certificate["notes"] == [UNENDED]

    other = gan()
    broken = trainer(tmp_path, DPStrategy(noise_multiplier=2.0), max_steps=6, max_epochs=-1, callbacks=[Break(2)])
    with pytest.raises(RuntimeError, match="broken off"):
        broken.fit(other, loader)
    again = trainer(tmp_path, DPStrategy(noise_multiplier=2.0, ledger=broken.strategy.ledger.path), max_steps=6, max_epochs=-1)
    again.fit(other, loader)
    assert SanitizedRelease.from_trainer(again).certificate["notes"] == [UNENDED]

    new = trainer(tmp_path, DPStrategy(noise_multiplier=2.0, ledger=ledger), max_steps=6, max_epochs=-1)
    new.fit(gan(), loader)
    assert SanitizedRelease.from_trainer(new).certificate["notes"] == []


def test_an_error_within_the_last_lot_is_not_certified(tmp_path, digit_records):
    """It may have chosen whether the lot's last step was taken."""

    class BreakInLot(pl.Callback):
        def on_train_batch_end(self, trainer, module, *_):
            if trainer.global_step == 3:
                raise RuntimeError("broken off")

    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=3, max_epochs=-1, callbacks=[BreakInLot()])
    with pytest.raises(RuntimeError, match="broken off"):
        run.fit(gan(), DataLoader(digit_records, batch_size=16))
    assert len(run.strategy.ledger) == 3
    with pytest.raises(NotCertifiable, match="broken off by an error"):
        SanitizedRelease.from_trainer(run)


@pytest.mark.parametrize("kind", [DPGAN, PrivateSetGeneration, DPMERF])
def test_an_error_after_the_last_release_loses_nothing(tmp_path, digit_records, kind):
    limits, small = ({}, {"generator_steps": 5}) if kind is DPMERF else ({"max_steps": 3, "max_epochs": -1}, {})
    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), callbacks=[Break()], **limits)
    with pytest.raises(RuntimeError, match="broken off"):
        run.fit(kind(num_classes=10, image_shape=(1, 8, 8), **small), DataLoader(digit_records, batch_size=16))
    assert SanitizedRelease.from_trainer(run, torch.arange(10)).epsilon > 0


def test_a_broken_off_training_of_dp_merfs_generator_goes_on(tmp_path, digit_records, monkeypatch):
    module = DPMERF(num_classes=10, image_shape=(1, 8, 8), num_frequencies=50, frequencies_per_step=50, generator_steps=20)
    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0))

    def broken(*_):
        raise RuntimeError("broken off")

    monkeypatch.setattr(DPMERF, "_distance", broken)
    with pytest.raises(RuntimeError, match="broken off"):
        run.fit(module, DataLoader(digit_records, batch_size=16))
    monkeypatch.undo()
    module.train_generator(30)
    assert SanitizedRelease.from_trainer(run).certificate["knobs"]["generator_steps"]["value"] == 30


@pytest.mark.parametrize("kind", [DPGAN, PrivateSetGeneration])
def test_a_loaded_checkpoint_is_certified_by_its_own_fit_alone(tmp_path, digit_records, kind):
    """Lightning loads it before the strategy can refuse the fit."""
    loader, runs = DataLoader(digit_records, batch_size=16), []
    for noise, folder in ((8.0, "a"), (1.0, "b")):
        run = trainer(tmp_path / folder, DPStrategy(noise_multiplier=noise), max_steps=2, max_epochs=-1)
        run.fit(kind(num_classes=10, image_shape=(1, 8, 8)), loader)
        run.save_checkpoint(tmp_path / f"{folder}.ckpt")
        runs.append(run)
    mine = runs[0].lightning_module
    own = torch.load(tmp_path / "a.ckpt", weights_only=False)
    mine.on_load_checkpoint(own)  # as ``trainer.test(ckpt_path="best")`` does
    mine.load_state_dict(own["state_dict"])
    assert SanitizedRelease.from_trainer(runs[0], torch.arange(10)).epsilon > 0
    with pytest.raises(ValueError, match="another plan|has already written ledger"):
        runs[0].fit(mine, loader, ckpt_path=tmp_path / "b.ckpt")
    with pytest.raises(NotCertifiable, match="not the last to train"):
        SanitizedRelease.from_trainer(runs[0], torch.arange(10))


def sets(images_per_class=2) -> PrivateSetGeneration:
    return PrivateSetGeneration(images_per_class, num_classes=10, image_shape=(1, 8, 8), schedule_overrides={"width": 4})


def private_trainer(folder, noise=1.0, **strategy) -> pl.Trainer:
    return trainer(folder, DPStrategy(noise_multiplier=noise, **strategy), max_steps=2, max_epochs=-1)


def test_weights_of_which_a_part_was_loaded_are_nobodys(tmp_path, digit_records):
    loader, first, second, module = DataLoader(digit_records, batch_size=16), private_trainer(tmp_path), private_trainer(tmp_path), sets(2)
    first.fit(sets(1), loader)
    first.save_checkpoint(tmp_path / "one.ckpt")
    second.fit(module, loader)
    with pytest.raises(RuntimeError, match="size mismatch"):
        first.fit(module, loader, ckpt_path=tmp_path / "one.ckpt")
    for run in (first, second):
        with pytest.raises(NotCertifiable, match="not the last to train"):
            SanitizedRelease.from_trainer(run)
    with pytest.raises(ValueError, match="loaded in part"):
        private_trainer(tmp_path, ledger=first.strategy.ledger.path).fit(module, loader)


def test_weights_that_were_put_into_a_module_are_not_its_trainers(tmp_path, digit_records):
    loader, run, other = DataLoader(digit_records, batch_size=16), private_trainer(tmp_path), private_trainer(tmp_path)
    run.fit(sets(), loader)
    other.fit(sets(), loader)
    run.lightning_module.load_state_dict(other.lightning_module.state_dict())
    with pytest.raises(NotCertifiable, match="not the last to train"):
        SanitizedRelease.from_trainer(run)


def test_a_trainer_writes_no_checkpoint_of_weights_that_another_trained(tmp_path, digit_records):
    """Its account does not know what they cost, and the checkpoint would carry it on."""
    loader, module = DataLoader(digit_records, batch_size=16), gan()
    first, second = (private_trainer(tmp_path, ledger=tmp_path / "shared.jsonl") for _ in range(2))
    first.fit(module, loader)
    second.fit(module, loader)
    with pytest.raises(ValueError, match=r"first.ckpt is not written: this DPGAN is not as this trainer's last fit left it"):
        first.save_checkpoint(tmp_path / "first.ckpt")
    second.save_checkpoint(tmp_path / "second.ckpt")


def test_what_the_checks_at_the_end_refuse_is_not_certified(tmp_path, digit_records):
    class Keeps(DPGAN):
        def build(self):
            super().build()
            self.average.register_buffer("kept", torch.zeros(64))

        def on_train_batch_start(self, batch, batch_idx):
            if len(batch[0]):
                self.average.kept.data.copy_(batch[0][0].flatten())

    run = private_trainer(tmp_path)
    with pytest.raises(RuntimeError, match="kept"):
        run.fit(Keeps(num_classes=10, image_shape=(1, 8, 8)), DataLoader(digit_records, batch_size=16))
    assert len(run.strategy.ledger) == 2
    with pytest.raises(NotCertifiable, match="broken off by an error"):
        SanitizedRelease.from_trainer(run)


def test_labels_are_looked_at_as_the_training_step_gets_them(tmp_path, digits):
    class FromOne(DPGAN):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0], batch[1] - 1

    records = TensorDataset(digits[0][:64], digits[1][:64] + 1)
    private_trainer(tmp_path).fit(FromOne(num_classes=10, image_shape=(1, 8, 8)), DataLoader(records, batch_size=16))


def test_a_fit_with_nothing_left_to_do_leaves_the_certificate(tmp_path, digit_records):
    loader, run = DataLoader(digit_records, batch_size=16), private_trainer(tmp_path)
    run.fit(gan(), loader)
    run.fit(run.lightning_module, loader)
    claimed = SanitizedRelease.from_trainer(run, torch.arange(10)).epsilon
    run.save_checkpoint(tmp_path / "whole.ckpt")
    again = private_trainer(tmp_path)
    again.fit(gan(), loader, ckpt_path=tmp_path / "whole.ckpt")
    assert len(again.strategy.ledger) == 2
    assert SanitizedRelease.from_trainer(again, torch.arange(10)).epsilon == claimed


@pytest.mark.parametrize("kind", [DPGAN, PrivateSetGeneration])
def test_a_label_out_of_range_is_found_before_the_first_lot(tmp_path, digits, kind):
    """Training, it would break the run off in the first lot that holds its record."""
    records = TensorDataset(digits[0][:64], torch.cat([digits[1][:63], torch.tensor([10])]))
    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=50, max_epochs=-1)
    with pytest.raises(ValueError, match="labels must run from 0 to 9"):
        run.fit(kind(num_classes=10, image_shape=(1, 8, 8)), DataLoader(records, batch_size=1))
    assert len(run.strategy.ledger) == 0


def test_knobs_of_dp_sgd_and_of_a_published_prior_say_where_they_come_from(tmp_path, digit_records):
    run = trainer(tmp_path, DPStrategy(epsilon=5.0, clip_norm=0.5), max_steps=2, max_epochs=-1)
    run.fit(gan(), DataLoader(digit_records, batch_size=16))
    assert SanitizedRelease.from_trainer(run).certificate["knobs"]["clip_norm"] == {"value": 0.5, "origin": "set by the user"}
    published = PrivateSetGeneration(preset="published-prior", num_classes=10, image_shape=(1, 8, 8)).knobs()["prior"]
    assert published["value"] == "generator"
    assert published["origin"].startswith("Chen, Kerkouche and Fritz")


def test_a_release_holds_images_certificate_card_and_preview(original):
    path, run = original
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "generator.safetensors", "images.npz", "preview.png", "privacy.json"]
    loaded = load_release(path)
    module = run.lightning_module
    assert loaded.images.shape == (20, 8, 8)
    assert repr(loaded).startswith("SanitizedRelease(20 images of 10 classes by PrivateSetGeneration, epsilon=4.")
    np.testing.assert_array_equal(loaded.images, (module.average[:, 0].clamp(0, 1) * 255).round().to(torch.uint8).numpy())
    assert loaded.labels.tolist() == module.labels.tolist()
    image, label = loaded.dataset()[3]
    assert image.shape == (1, 8, 8)
    assert label == 1
    assert torch.equal(loaded.parameters["images"], module.average.clamp(0, 1))


def test_the_certificate_says_what_was_spent_and_how(original):
    path, run = original
    certificate = verify_release(path)
    strategy = run.strategy
    claim = certificate["claim"]
    assert claim["epsilon"] == pytest.approx(strategy.plan.epsilon(strategy.noise_multiplier, 1e-5))
    assert claim["epsilon"] <= 5.0
    assert certificate["replace_one"]["epsilon"] > claim["epsilon"]
    assert certificate["second_accountant"]["epsilon"] >= claim["epsilon"]
    assert certificate["published_without_noise"]["records"] == 1437
    assert certificate["knobs"]["image_lr"]["origin"].startswith("tuned, with lots of 2,048 and 120 steps, on MNIST")
    assert certificate["knobs"]["width"]["origin"] == "set by the user"
    card = (path / "README.md").read_text(encoding="utf-8")
    assert f"**{claim['epsilon']:.3f}**" in card
    assert "outside the guarantee" in card


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["claim"].update(epsilon=1.0), "epsilon is stated as 1.0000; the events come to 4"),
        (lambda c: c["claim"].update(delta=1e-3), "epsilon is stated"),
        (lambda c: c["replace_one"].update(epsilon=1.0), "replace-one epsilon"),
        (lambda c: c["second_accountant"].update(epsilon=1.0), "RDP epsilon"),
        (lambda c: c["claim"].update(relation="replace-one"), "relation"),
        (lambda c: c.update(noise_multiplier=9.0), "planned events are not those of the plan"),
        (lambda c: c["released"][0].update(count=2000), "epsilon is stated"),
        (lambda c: c["planned"][0].update(count=99), "planned events"),
        (lambda c: c["planned"][0].update(count=-1), "damaged.*below 1"),
        (lambda c: c["budget"].update(epsilon=1.0), "above the stated budget"),
        (lambda c: c["budget"].update(delta=1e-3), "the claim is at delta 1e-05, the budget at 0.001"),
        (lambda c: c.update(released=[]), "nothing was released"),
        (lambda c: c["released"][0]["event"]["zero_out"].update(noise_multiplier=9.0), "neither the plan nor the earlier"),
        (lambda c: c["published_without_noise"].update(records=5), "number of records"),
        (lambda c: c.update(format="other/1"), "format"),
        (lambda c: c.pop("claim"), "damaged"),
        (lambda c: c.update(images=3), "certificate says"),
    ],
)
def test_an_edited_certificate_is_refused(release, edit, message):
    file = release / "privacy.json"
    certificate = json.loads(file.read_text(encoding="utf-8"))
    edit(certificate)
    file.write_text(json.dumps(certificate), encoding="utf-8")
    with pytest.raises(InvalidRelease, match=message):
        verify_release(release)


def test_edited_missing_and_unlisted_files_are_refused(release):
    (release / "README.md").write_text("better", encoding="utf-8")
    (release / "preview.png").unlink()
    (release / "extra").mkdir()
    (release / "extra" / "records.npz").write_bytes(b"x")
    with pytest.raises(InvalidRelease) as caught:
        load_release(release)
    for part in ("README.md was changed", "preview.png is listed but missing", "extra/records.npz is not listed"):
        assert part in str(caught.value)
    (release / "privacy.json").write_text("{", encoding="utf-8")
    with pytest.raises(InvalidRelease, match="damaged"):
        verify_release(release)
    with pytest.raises(InvalidRelease, match="not a release"):
        verify_release(release / "extra")


def test_links_and_a_card_with_another_claim_are_refused(release, tmp_path):
    import hashlib

    (tmp_path / "secret").mkdir()
    (release / "extra").symlink_to(tmp_path / "secret")
    with pytest.raises(InvalidRelease, match="extra is a link"):
        verify_release(release)
    (release / "extra").unlink()
    card, file = release / "README.md", release / "privacy.json"
    certificate = json.loads(file.read_text(encoding="utf-8"))
    card.write_text(card.read_text(encoding="utf-8").replace(f"**{certificate['claim']['epsilon']:.3f}**", "**0.100**"), encoding="utf-8")
    certificate["files"]["README.md"] = hashlib.sha256(card.read_bytes()).hexdigest()
    file.write_text(json.dumps(certificate), encoding="utf-8")
    with pytest.raises(InvalidRelease, match="does not state the claim"):
        verify_release(release)


def test_nothing_but_a_release_is_ever_replaced(original, release, tmp_path):
    one = load_release(original[0])
    with pytest.raises(FileExistsError, match="overwrite=True"):
        one.save(release)
    one.save(release, overwrite=True)
    (release / "notes.txt").write_text("x")
    with pytest.raises(FileExistsError, match="holds notes.txt beside an earlier release"):
        one.save(release, overwrite=True)
    assert (release / "notes.txt").exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="not a release"):
        one.save(mine, overwrite=True)
    assert (mine / "thesis.tex").exists()


def test_no_claim_without_noise_or_strategy(tmp_path):
    run = finished(tmp_path, DPStrategy(noise_multiplier=0.0))
    with pytest.raises(NotCertifiable, match="epsilon=inf"):
        SanitizedRelease.from_trainer(run)
    with pytest.raises(NotCertifiable, match="DPStrategy"):
        SanitizedRelease.from_trainer(pl.Trainer(logger=False, accelerator="cpu"))


def test_a_run_stopped_early_claims_the_plan(tmp_path):
    class Stop(pl.Callback):
        def on_train_batch_end(self, run, *args):
            run.should_stop = run.global_step == 2

    run = finished(tmp_path, DPStrategy(noise_multiplier=1.0), steps=8, callbacks=[Stop()])
    certificate = SanitizedRelease.from_trainer(run).certificate
    assert len(run.strategy.ledger) == 2
    assert certificate["claim"]["basis"] == "plan"
    assert certificate["claim"]["epsilon"] == pytest.approx(run.strategy.plan.epsilon(1.0, 1e-5))
    assert certificate["claim"]["epsilon"] > run.strategy.epsilon_spent()


def test_nothing_private_is_in_the_release(original):
    text = (original[0] / "privacy.json").read_text(encoding="utf-8") + (original[0] / "README.md").read_text(encoding="utf-8")
    assert str(original[0].parent) not in text
    assert "ckpt" not in text
