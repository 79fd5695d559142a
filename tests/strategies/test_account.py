"""What several fits, crashes and lost files come to: never less than what was released."""

from __future__ import annotations

from collections import Counter

import pytest
import pytorch_lightning as pl
from helpers import Mlp, fit, flat, noised, trainer
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
from lightning_dpgen.privacy import BudgetExhausted, PrivacyLedger
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


class Crash(pl.Callback):
    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.at:
            raise RuntimeError("crash")


def test_crash_and_resume_count_everything(tmp_path, digit_records):
    # Releases 13 before the crash, 10 after the resume from step 10: 23, where a naive count says 20.
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    options = {"max_steps": 20, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, Mlp(), digit_records, 13, trainer_options={**options, "callbacks": [checkpoints, Crash(13)]}, noise_multiplier=1.5)
    for releases in (23, 33):  # a second resume from the same checkpoint adds again
        run = trainer(tmp_path, DPStrategy(noise_multiplier=1.5), **options)
        run.fit(Mlp(), DataLoader(digit_records, batch_size=13), ckpt_path=tmp_path / "ckpt" / "step=10.ckpt")
        assert run.global_step == 20
        assert len(run.strategy.ledger) == releases
    assert len(list((tmp_path / "privacy").glob("*.jsonl"))) == 1


def test_a_crashed_run_with_a_budget_ends_early(tmp_path, digit_records):
    checkpoints = pl.callbacks.ModelCheckpoint(tmp_path / "ckpt", every_n_train_steps=5, save_top_k=-1, filename="{step}")
    options = {"max_steps": 10, "enable_checkpointing": True}
    with pytest.raises(RuntimeError, match="crash"):
        fit(tmp_path, Mlp(), digit_records, 16, trainer_options={**options, "callbacks": [checkpoints, Crash(8)]}, epsilon=3.0)
    resume = {"ckpt_path": tmp_path / "ckpt" / "step=5.ckpt"}
    run = trainer(tmp_path, DPStrategy(epsilon=3.0), **options)
    run.fit(Mlp(), DataLoader(digit_records, batch_size=16), **resume)
    assert run.global_step == 7  # 8 were spent, 2 were left
    assert run.strategy.epsilon_spent() <= 3.0
    for other, message in (({"epsilon": 4.0}, "3.0.*4.0"), ({"epsilon": 3.0, "clip_norm": 2.0}, "clip_norm")):
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, DPStrategy(**other), **options).fit(Mlp(), DataLoader(digit_records, batch_size=16), **resume)
    with pytest.raises(ValueError, match="another plan: plan sampling expected_batch_size was 16 and is 8 here"):
        trainer(tmp_path, DPStrategy(epsilon=3.0), **options).fit(Mlp(), DataLoader(digit_records, batch_size=8), **resume)
    with pytest.raises(ValueError, match="releases count was 10 and is 20 here"):
        trainer(tmp_path, DPStrategy(epsilon=3.0), max_steps=20).fit(Mlp(), DataLoader(digit_records, batch_size=16), **resume)
    next((tmp_path / "privacy").glob("*.jsonl")).unlink()
    with pytest.raises(ValueError, match='ledger .* is missing.*"?new'):
        trainer(tmp_path, DPStrategy(epsilon=3.0), **options).fit(Mlp(), DataLoader(digit_records, batch_size=16), **resume)
    run = trainer(tmp_path, DPStrategy(epsilon=3.0, ledger="new"), **options)
    run.fit(Mlp(), DataLoader(digit_records, batch_size=16), **resume)
    assert len(run.strategy.ledger) == 10  # the checkpoint's 5 were carried over
    assert run.strategy.account.notes


def test_noise_is_fresh_under_one_seed_from_the_start_and_after_a_resume(tmp_path, digit_records):
    fit(tmp_path, Mlp(zero_loss=True), digit_records, 16, noise_multiplier=1.0).save_checkpoint(tmp_path / "one.ckpt")
    for checkpoint in (None, tmp_path / "one.ckpt"):
        weights = []
        for _ in range(2):
            pl.seed_everything(0, verbose=False)
            module = Mlp(zero_loss=True)
            run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=2)
            run.fit(module, DataLoader(digit_records, batch_size=16), ckpt_path=checkpoint)
            weights.append(flat(module))
        assert noised(*weights)


def test_a_second_fit_adds_and_a_budget_is_for_all_fits(tmp_path, digit_records):
    strategy = DPStrategy(noise_multiplier=1.0)
    run = fit(tmp_path, Mlp(), digit_records, 8, strategy=strategy, trainer_options={"max_steps": 20})
    first = run.strategy.epsilon_spent()
    run.fit_loop.epoch_loop.max_steps = 40
    run.fit(run.lightning_module, DataLoader(digit_records, batch_size=8))
    assert len(strategy.ledger) == 40
    assert strategy.epsilon_spent() == pytest.approx(5.79, abs=0.02)
    assert first == pytest.approx(4.36, abs=0.02)

    strategy = DPStrategy(epsilon=3.0)
    run = fit(tmp_path, Mlp(), digit_records, 8, strategy=strategy, trainer_options={"max_steps": 5})
    run.fit_loop.epoch_loop.max_steps = 10
    for module in (run.lightning_module, Mlp()):
        with pytest.raises(BudgetExhausted, match="is spent"):
            run.fit(module, DataLoader(digit_records, batch_size=8))
    assert len(strategy.ledger) == 5


def test_a_given_ledger_is_composed_with_what_it_holds(tmp_path, digit_records):
    path = tmp_path / "data-set.jsonl"
    fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=path, trainer_options={"max_steps": 20})
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=path, trainer_options={"max_steps": 20})
    assert run.strategy.epsilon_spent() == pytest.approx(5.79, abs=0.02)
    assert f"({run.strategy.epsilon_spent():.3f} with what its ledger holds)" in run.strategy.summary()
    with pytest.raises(BudgetExhausted, match="already comes to epsilon=5"):
        fit(tmp_path, Mlp(), digit_records, 8, epsilon=3.0, ledger=path)


def test_a_later_fit_with_another_plan_is_refused_under_a_budget(tmp_path, digit_records):
    strategy = DPStrategy(epsilon=3.0)
    run = fit(tmp_path, Mlp(), digit_records, 8, strategy=strategy, trainer_options={"max_steps": 2})
    run.fit_loop.epoch_loop.max_steps = 4
    with pytest.raises(ValueError, match=r"expected_batch_size=8.*expected_batch_size=16"):
        run.fit(Mlp(), DataLoader(digit_records, batch_size=16))


def test_the_ledger_of_another_run_is_refused_on_resume(tmp_path, digit_records):
    run = fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=tmp_path / "one.jsonl", trainer_options={"max_steps": 4})
    run.save_checkpoint(tmp_path / "one.ckpt")
    fit(tmp_path, Mlp(), digit_records, 8, noise_multiplier=1.0, ledger=tmp_path / "other.jsonl", trainer_options={"max_steps": 4})
    for path, message in (("other.jsonl", "belongs to ledger"), ("nothing.jsonl", "is missing")):
        again = trainer(tmp_path, DPStrategy(noise_multiplier=1.0, ledger=tmp_path / path), max_steps=6)
        with pytest.raises(ValueError, match=message):
            again.fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "one.ckpt")


def test_the_budget_stops_a_run_even_with_min_steps(tmp_path, digit_records):
    other = DPStrategy(epsilon=3.0)
    run = trainer(tmp_path, other, max_steps=6, min_steps=6)

    class Spends(pl.Callback):
        def on_train_start(self, trainer, module):
            event = other.plan.release_event("gradient_sum", other.noise_multiplier)
            other.ledger.charge(event, 3)  # as a crashed run would have

    run.callbacks.append(Spends())
    run.fit(Mlp(), DataLoader(digit_records, batch_size=8))
    assert run.global_step == 3
    assert other.epsilon_spent() <= 3.0


def test_a_checkpoint_without_a_ledger_is_refused(tmp_path, digit_records):
    plain = pl.Trainer(max_steps=1, default_root_dir=tmp_path, logger=False, accelerator="cpu", enable_progress_bar=False)
    plain.fit(Mlp(), DataLoader(digit_records, batch_size=8))
    plain.save_checkpoint(tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="without DPStrategy"):
        trainer(tmp_path, DPStrategy(epsilon=3.0)).fit(Mlp(), DataLoader(digit_records, batch_size=8), ckpt_path=tmp_path / "plain.ckpt")
