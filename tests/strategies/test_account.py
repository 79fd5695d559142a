"""What several fits, crashes and lost files come to: never less than what was released."""

from __future__ import annotations

from collections import Counter

import pytest
import pytorch_lightning as pl
from helpers import Mlp, fit, trainer
from lightning_dpgen.callbacks import PrivacyBudgetStop
from torch.utils.data import DataLoader

from lightning_dpgen import (
    DigitsDataModule,
    DPStrategy,
    PrivacyBudget,
    PrivateSetGeneration,
    SanitizedRelease,
    calibrate_noise_multiplier,
    verify_release,
)
from lightning_dpgen.privacy import PrivacyLedger
from lightning_dpgen.privacy.plan import FullPass, PoissonSampling, PrivacyPlan, Relation, Release
from lightning_dpgen.release import NotCertifiable
from lightning_dpgen.release.certificate import claim
from lightning_dpgen.strategies.account import releases_ahead


class StopAt(pl.Callback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step == self.step:
            trainer.should_stop = True


def claimed(strategy) -> float:
    account = strategy.account
    return claim(account.before, account.planned, strategy.ledger.counts, strategy.delta, Relation.ZERO_OUT)[0].value


def generator() -> PrivateSetGeneration:
    return PrivateSetGeneration(images_per_class=1, schedule_overrides={"width": 4, "image_steps": 1})


def psg_fit(folder, module, strategy, steps, **options):
    run = trainer(folder, strategy, max_steps=steps, **options)
    run.fit(module, datamodule=DigitsDataModule(batch_size=200))
    return run


def test_a_later_fit_that_stops_early_claims_what_came_before_and_all_that_it_planned(tmp_path, digit_records):
    path = tmp_path / "data.jsonl"
    fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=path, trainer_options={"max_steps": 20})
    options = {"max_steps": 20, "min_steps": 1, "callbacks": [StopAt(3)]}
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=path, trainer_options=options)
    assert run.strategy.epsilon_spent() < 5.0  # 23 releases
    assert claimed(run.strategy) == pytest.approx(5.79, abs=0.02)  # 40


@pytest.mark.parametrize("done", [1, 7, 119])
def test_what_is_left_of_a_plan_is_counted_in_whole_releases(done):
    plan = PrivacyPlan(PoissonSampling(80, 8), (Release("sum", 1.0, 120),))
    assert releases_ahead(plan, 120, done) == {"sum": 120 - done}
    passes = PrivacyPlan(FullPass(80), (Release("one", 1.0, 1), Release("two", 1.0, 3), Release("three", 1.0, 1)))
    assert releases_ahead(passes, 5, 0) == {"one": 1, "two": 3, "three": 1}
    assert releases_ahead(passes, 5, 2) == {"one": 0, "two": 2, "three": 1}
    assert releases_ahead(passes, 5, 5) == {"one": 0, "two": 0, "three": 0}


def test_a_resumed_run_claims_its_plan_once(tmp_path, digit_records):
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 10})
    run.save_checkpoint(tmp_path / "ten.ckpt")
    again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=20)
    again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "ten.ckpt")
    assert len(again.strategy.ledger) == 20
    assert claimed(again.strategy) == again.strategy.epsilon_spent() == pytest.approx(4.36, abs=0.02)


def test_one_module_under_two_ledgers_is_refused(tmp_path):
    module = generator()
    run = psg_fit(tmp_path, module, DPStrategy(epsilon=5.0), 2)
    with pytest.raises(ValueError, match=f"trained before, under ledger {run.strategy.ledger.run_id}.*DPStrategy\\(ledger"):
        psg_fit(tmp_path, module, DPStrategy(epsilon=5.0), 2)
    run.save_checkpoint(tmp_path / "one.ckpt")
    loaded = PrivateSetGeneration.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=False)
    with pytest.raises(ValueError, match="trained before"):
        psg_fit(tmp_path, loaded, DPStrategy(epsilon=5.0), 2)
    again = psg_fit(tmp_path, loaded, DPStrategy(noise_multiplier=2.0, ledger=run.strategy.ledger.path), 2)
    SanitizedRelease.from_trainer(again).save(tmp_path / "release")
    certificate = verify_release(tmp_path / "release")
    assert [entry["count"] for entry in certificate["before"]] == [2]
    assert certificate["claim"]["epsilon"] == pytest.approx(again.strategy.epsilon_spent())
    assert certificate["claim"]["epsilon"] > run.strategy.epsilon_spent()


def test_a_checkpoint_of_another_run_is_refused_in_a_used_strategy(tmp_path, digit_records):
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 4})
    run.save_checkpoint(tmp_path / "one.ckpt")
    other = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 2})
    other.fit_loop.epoch_loop.max_steps = 8
    with pytest.raises(ValueError, match="belongs to ledger .*this strategy has already written ledger"):
        other.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "one.ckpt")


def test_a_lost_ledger_is_claimed_as_if_its_run_had_finished(tmp_path):
    run = psg_fit(tmp_path, generator(), DPStrategy(epsilon=5.0), 10, callbacks=[StopAt(4)])
    run.save_checkpoint(tmp_path / "four.ckpt")
    planned = run.strategy.plan.epsilon(run.strategy.noise_multiplier, 1e-5)
    run.strategy.ledger.path.unlink()
    again = trainer(tmp_path, DPStrategy(epsilon=5.0, ledger="new"), max_steps=10)
    again.fit(generator(), datamodule=DigitsDataModule(batch_size=200), ckpt_path=tmp_path / "four.ckpt")
    assert sum((again.strategy.account.before + again.strategy.account.planned).values()) == 10 + 6  # six may be lost, six are new
    assert claimed(again.strategy) > planned
    SanitizedRelease.from_trainer(again).save(tmp_path / "release")
    certificate = verify_release(tmp_path / "release")
    assert certificate["budget"] is None
    assert "was lost" in certificate["notes"][0]
    again.save_checkpoint(tmp_path / "later.ckpt")  # and what was lost once stays claimed
    third = trainer(tmp_path, DPStrategy(epsilon=5.0), max_steps=10)
    from lightning_dpgen.privacy import BudgetExhausted

    with pytest.raises(BudgetExhausted):
        third.fit(generator(), datamodule=DigitsDataModule(batch_size=200), ckpt_path=tmp_path / "later.ckpt")


def test_a_ledger_that_lacks_what_its_checkpoint_knew_is_completed_and_says_so(tmp_path, digit_records):
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 10})
    run.save_checkpoint(tmp_path / "ten.ckpt")
    path = run.strategy.ledger.path
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:9]))  # an older copy: header, plan, seven releases
    again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=12)
    again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "ten.ckpt")
    assert len(again.strategy.ledger) == 12
    assert "lacked 3 that" in again.strategy.account.notes[0]


@pytest.mark.parametrize("kept", [0, 5_000])
def test_a_checkpoint_that_is_cut_short_is_refused_in_words_and_the_ledger_is_left_alone(tmp_path, digit_records, kept):
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, trainer_options={"max_steps": 3})
    run.save_checkpoint(tmp_path / "three.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "three.ckpt").read_bytes()[:kept])
    before = run.strategy.ledger.path.read_bytes()
    again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=5)
    with pytest.raises(ValueError, match=r"cut\.ckpt cannot be read as a checkpoint"):
        again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "cut.ckpt")
    assert run.strategy.ledger.path.read_bytes() == before
    again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=5)
    again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "three.ckpt")
    assert len(again.strategy.ledger) == 5


def test_a_release_is_of_the_module_that_was_trained(tmp_path):
    run = psg_fit(tmp_path, generator(), DPStrategy(epsilon=5.0), 2)
    other = generator()
    run.strategy.connect(other)
    with pytest.raises(NotCertifiable, match="not the last to train"):
        SanitizedRelease.from_trainer(run)


def test_the_claim_is_the_union_of_what_was_promised_and_what_was_released():
    from lightning_dpgen.privacy import PoissonSampling, PrivacyPlan, Release

    event, _ = PrivacyPlan(PoissonSampling(80, 8), (Release("sum", 1.0, 20),)).events(1.0)[0]

    def value(before, planned, released):
        figure, basis = claim(Counter({event: before}), Counter({event: planned}), {event: released}, 1e-5, Relation.ZERO_OUT)
        return figure.value, basis

    assert value(0, 20, 5) == value(5, 15, 20) == (value(0, 20, 20)[0], "plan")
    assert value(0, 20, 23)[1] == "ledger"
    assert value(0, 20, 23)[0] > value(0, 20, 20)[0]


def test_a_second_run_in_the_same_folder_hears_of_the_first(tmp_path, digit_records, caplog):
    first = fit(tmp_path, Mlp(), digit_records, 16, noise_multiplier=1.0)
    assert "earlier ledger" not in caplog.text
    fit(tmp_path, Mlp(), digit_records, 16, noise_multiplier=1.0)
    assert "every run costs again" in caplog.text
    assert str(first.strategy.ledger.path) in caplog.text


def test_a_stopped_run_keeps_its_promise_under_every_later_fit(tmp_path, digit_records):
    path = tmp_path / "data.jsonl"
    options = {"max_steps": 20, "callbacks": [StopAt(3)]}
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=path, trainer_options=options)
    run.save_checkpoint(tmp_path / "three.ckpt")
    assert any("ended after 3 of 20" in note for note in run.strategy.account.notes)
    full = claimed(run.strategy)
    again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0, ledger=path), max_steps=4)
    again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "three.ckpt")
    assert len(again.strategy.ledger) == 4
    assert claimed(again.strategy) == pytest.approx(full)
    fresh = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=path, trainer_options={"max_steps": 1})
    assert sum((fresh.strategy.account.before + fresh.strategy.account.planned).values()) == 21
    assert claimed(fresh.strategy) > full


def test_a_budget_on_a_ledger_in_use_gets_noise_for_what_is_left(tmp_path, digit_records):
    path = tmp_path / "data.jsonl"
    first = fit(tmp_path, Mlp(), digit_records, 8, epsilon=1.0, ledger=path, trainer_options={"max_steps": 4})
    second = fit(tmp_path, Mlp(), digit_records, 8, epsilon=2.0, ledger=path, trainer_options={"max_steps": 6})
    assert 1.9 < second.strategy.epsilon_spent() <= 2.0
    alone = calibrate_noise_multiplier(second.strategy.plan, PrivacyBudget(2.0, 1e-5))
    assert second.strategy.noise_multiplier > alone
    assert len(second.strategy.ledger) == len(first.strategy.ledger) + 6 == 10


def test_what_is_said_of_a_lost_ledger_includes_what_it_may_have_held(tmp_path, digit_records):
    run = fit(tmp_path, Mlp(), digit_records, 8, epsilon=3.0, trainer_options={"max_steps": 20, "callbacks": [StopAt(5)]})
    run.save_checkpoint(tmp_path / "five.ckpt")
    run.strategy.ledger.path.unlink()
    again = trainer(tmp_path, DPStrategy(epsilon=3.0, ledger="new"), max_steps=20)
    again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "five.ckpt")
    assert again.strategy.epsilon_spent() == pytest.approx(claimed(again.strategy))
    assert float(again.callback_metrics["privacy/epsilon"]) > 3.0


def test_a_resume_under_a_shared_ledger_keeps_what_other_runs_promised(tmp_path, digit_records):
    path = tmp_path / "shared.jsonl"
    options = {"noise_multiplier": 1.0, "ledger": path}
    for name in ("a", "b"):
        run = fit(tmp_path, Mlp(), digit_records, 8, trainer_options={"max_steps": 20, "callbacks": [StopAt(3)]}, **options)
        run.save_checkpoint(tmp_path / f"{name}.ckpt")
    again = trainer(tmp_path, DPStrategy(**options), max_steps=60)
    again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "a.ckpt")
    account = again.strategy.account
    assert sum((account.before + account.planned).values()) >= 60 + 20
    assert not [note for note in account.notes if "ended after" in note]


def test_a_checkpoint_resumed_in_the_same_trainer_promises_its_own_rest(tmp_path, digit_records):
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=4, save_top_k=-1, filename="{step}")
    options = {"max_steps": 20, "callbacks": [keep], "enable_checkpointing": True}
    module = Mlp()
    run = fit(tmp_path, module, digit_records, 8, noise_multiplier=1.0, trainer_options=options)
    run.callbacks.append(StopAt(6))
    run.fit(module, DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "step=4.ckpt")
    account = run.strategy.account
    assert len(run.strategy.ledger) == 22
    assert sum((account.before + account.planned).values()) == 20 + 16


def test_a_refused_fit_promises_nothing(tmp_path, digit_records):
    path = tmp_path / "ledger.jsonl"
    options = {"trainer_options": {"max_steps": 20, "callbacks": [PrivacyBudgetStop(0.01)]}, "noise_multiplier": 1.0, "ledger": path}
    with pytest.raises(ValueError, match="PrivacyBudgetStop"):
        fit(tmp_path, Mlp(), digit_records, 8, **options)
    assert PrivacyLedger(path).promised == {}
