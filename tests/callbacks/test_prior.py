"""A release as the start of another generator, under one ledger."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from helpers import trainer
from lightning_dpgen.callbacks import Prior, PrivacyBudgetStop

from lightning_dpgen import GSWGAN, DigitsDataModule, DPStrategy, MixturePPCA, PrivateSetGeneration, SanitizedRelease, load_release
from lightning_dpgen.generators import gs_wgan


@pytest.fixture
def mixture(tmp_path):
    """A mixture of the digits at epsilon 4, its release, and its ledger."""
    ledger = tmp_path / "ledger.jsonl"
    run = trainer(tmp_path, DPStrategy(epsilon=4.0, ledger=ledger), max_steps=-1)
    torch.manual_seed(0)
    run.fit(MixturePPCA(), datamodule=DigitsDataModule(batch_size=500))
    SanitizedRelease.from_trainer(run, torch.arange(10).repeat_interleave(5)).save(tmp_path / "prior")
    return tmp_path / "prior", ledger


def fit(folder, module, prior, ledger, steps=3, ckpt_path=None, callbacks=(), **noise):
    run = trainer(
        folder,
        DPStrategy(**(noise or {"noise_multiplier": 3.0}), ledger=ledger),
        max_steps=steps,
        callbacks=[Prior(str(prior)), *callbacks],
    )
    run.fit(module, datamodule=DigitsDataModule(batch_size=200), ckpt_path=ckpt_path)
    return run


def small_set(images_per_class=2):
    return PrivateSetGeneration(images_per_class, matching="features", schedule_overrides={"width": 4, "image_steps": 2, "image_lr": 1e-6})


def test_a_private_set_starts_from_it_and_the_certificate_counts_both(tmp_path, mixture):
    prior, ledger = mixture
    module = small_set()
    run = fit(tmp_path, module, prior, ledger, epsilon=10.0)
    labels = torch.arange(10).repeat_interleave(2)
    release = SanitizedRelease.from_trainer(run)
    given, given_labels = load_release(prior).dataset().tensors()
    expected = torch.stack([given[given_labels == label][number % 2] for number, label in enumerate(labels)])
    assert float((module.images.detach() - expected).abs().max()) < 1e-3  # the images hardly move at this rate
    names = [entry["event"]["name"] for entry in release.certificate["before"]]
    assert "cluster_moments" in names
    assert release.certificate["planned"][0]["event"]["name"] == "feature_sums"
    assert 9.8 < release.epsilon <= 10.0
    assert "MixturePPCA" in release.certificate["knobs"]["started_from"]["value"]


def test_a_prior_under_another_ledger_is_refused_before_anything_is_released(tmp_path, mixture):
    prior, _ = mixture
    run = trainer(tmp_path, DPStrategy(epsilon=10.0, ledger=tmp_path / "other.jsonl"), max_steps=3, callbacks=[Prior(str(prior))])
    with pytest.raises(ValueError, match="under ledger .* this run's is"):
        run.fit(small_set(), datamodule=DigitsDataModule(batch_size=200))
    assert not list(tmp_path.glob("other.jsonl"))


def test_the_priors_ledger_is_found_in_the_same_folder(tmp_path, mixture):
    first = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=-1)
    first.fit(MixturePPCA(), datamodule=DigitsDataModule(batch_size=500))
    SanitizedRelease.from_trainer(first, torch.arange(10).repeat_interleave(5)).save(tmp_path / "found")
    run = fit(tmp_path, small_set(), tmp_path / "found", None)
    assert run.strategy.ledger.path == first.strategy.ledger.path
    assert len(run.strategy.ledger) == 7 + 3


def test_a_ledger_that_does_not_hold_the_priors_cost_is_refused_and_nothing_is_promised(tmp_path, mixture):
    prior, ledger = mixture
    old = tmp_path / "old.jsonl"
    old.write_text("".join(ledger.read_text().splitlines(keepends=True)[:1]))  # a copy from before the mixture
    for path, message in ((old, "does not hold"), (tmp_path / "other.jsonl", "under ledger .* this run's is")):
        module = small_set()
        with pytest.raises(ValueError, match=message):
            fit(tmp_path, module, prior, path)
        assert not path.exists() or len(path.read_text().splitlines()) <= 1
        assert not hasattr(module, "trained_under")
    fit(tmp_path, module, prior, ledger)  # the module of a refused run is as good as new


def test_a_started_module_stays_under_its_ledger_whatever_stopped_the_fit(tmp_path, mixture):
    prior, ledger = mixture
    module = small_set()
    with pytest.raises(ValueError, match="PrivacyBudgetStop"):
        fit(tmp_path, module, prior, ledger, callbacks=[PrivacyBudgetStop(0.01)])
    with pytest.raises(ValueError, match="was trained before, under ledger"):
        trainer(tmp_path, DPStrategy(epsilon=1.0, ledger=tmp_path / "fresh.jsonl"), max_steps=2).fit(
            module, DigitsDataModule(batch_size=200)
        )


def test_what_a_user_gave_before_is_still_said(tmp_path, mixture):
    prior, ledger = mixture
    module = small_set()
    module.num_classes, module.image_shape = 10, (1, 8, 8)
    module.build()
    module.load_public_state({"images": torch.rand(20, 1, 8, 8), "labels": module.labels})
    certificate = SanitizedRelease.from_trainer(fit(tmp_path, module, prior, ledger)).certificate
    assert "not covered" in certificate["knobs"]["started_from"]["value"]
    assert "a release of MixturePPCA" in certificate["knobs"]["started_from"]["value"]


def test_the_certificate_says_when_a_user_gave_the_start(tmp_path, digits):
    class Start(pl.Callback):
        def on_train_start(self, trainer, module):
            module.start_from(*digits)

    run = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=2, callbacks=[Start()])
    run.fit(small_set(), datamodule=DigitsDataModule(batch_size=200))
    assert "not covered" in SanitizedRelease.from_trainer(run).certificate["knobs"]["started_from"]["value"]


def test_what_does_not_fit_is_refused(tmp_path, mixture):
    prior, ledger = mixture
    with pytest.raises(ValueError, match=r"5, 5.*needs \(1, 8, 8\), 6 or more"):
        fit(tmp_path, small_set(6), prior, ledger)
    with pytest.raises(ValueError, match="cannot start from images"):
        fit(tmp_path, MixturePPCA(), prior, ledger, steps=-1)
    (prior / "images.npz").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"images\.npz"):
        fit(tmp_path, small_set(), prior, ledger)


def test_a_resumed_run_does_not_start_again(tmp_path, mixture, monkeypatch):
    prior, ledger = mixture
    stop = pl.callbacks.LambdaCallback(on_train_batch_end=lambda run, *_: setattr(run, "should_stop", run.global_step == 2))
    run = fit(tmp_path, small_set(), prior, ledger, steps=4, callbacks=[stop])
    run.save_checkpoint(tmp_path / "two.ckpt")
    monkeypatch.setattr(PrivateSetGeneration, "take_start", lambda *_: pytest.fail("started again"))
    resumed = small_set()
    again = fit(tmp_path, resumed, prior, ledger, steps=4, ckpt_path=tmp_path / "two.ckpt")
    assert again.global_step == 4
    assert resumed.started_from


def test_a_generator_warm_starts_without_a_release(tmp_path, mixture, monkeypatch):
    monkeypatch.setattr(gs_wgan, "START_STEPS", 60)
    prior, ledger = mixture
    torch.manual_seed(0)
    module = GSWGAN(num_critics=20, critics_per_sample=2, batch_size=10)
    before = len(ledger.read_text().splitlines())
    run = fit(tmp_path, module, prior, ledger, steps=1)
    assert run.global_step == 1
    assert len(ledger.read_text().splitlines()) <= before + 3  # the plan and the releases of one step
    images, labels = load_release(prior).dataset().tensors()
    made = module.sample(torch.arange(10).repeat_interleave(20)).view(10, 20, -1).mean(1)
    means = torch.stack([images[labels == label].flatten(1).mean(0) for label in range(10)])
    nearest = torch.cdist(made, means).argmin(1)
    assert int((nearest == torch.arange(10)).sum()) >= 8  # by chance one
