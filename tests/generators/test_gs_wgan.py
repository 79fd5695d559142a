"""GS-WGAN: the seven tests, its warm-up and refresh, and what it tells its users."""

from __future__ import annotations

import pytest
import pytorch_lightning as pl
import torch
from helpers import trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_dpgen import GSWGAN, DigitsDataModule, DPStrategy, load_release
from lightning_dpgen.cli import main
from lightning_dpgen.generators import gs_wgan
from lightning_dpgen.generators.critic_ensemble import CriticEnsemble
from lightning_dpgen.generators.gs_wgan import low_frequencies
from lightning_dpgen.privacy import DisjointShards, GaussianMechanism, RowDependenceError
from lightning_dpgen.privacy.clipping import tensors_of
from lightning_dpgen.release import SanitizedRelease, verify_release

SMALL = {
    "num_critics": 6,
    "critics_per_sample": 2,
    "batch_size": 20,
    "basis": 4,
    "warm_up_steps": 3,
    "num_classes": 10,
    "image_shape": (1, 8, 8),
}
KINDS = ["potential", "mlp"]


def generator(critic="potential", **arguments) -> GSWGAN:
    torch.manual_seed(0)
    return GSWGAN(**{**SMALL, "critic": critic, **arguments})


def fit(tmp_path, module, records, steps=3, strategy=None, ckpt_path=None, batch_size=4, **options):
    run = trainer(tmp_path, strategy or DPStrategy(noise_multiplier=1.0), max_steps=steps, **options)
    run.fit(module, DataLoader(records, batch_size=batch_size), ckpt_path=ckpt_path)
    return run


@pytest.fixture
def any_values(monkeypatch):
    """Lets values in that are refused otherwise: a guarantee does not rest on what records hold."""
    monkeypatch.setattr(gs_wgan, "check_batch", lambda *_: None)


@pytest.fixture
def records(digits):
    return TensorDataset(digits[0][:120], digits[1][:120])


class Spy:
    """Keeps what goes through the door, and who was asked."""

    def __init__(self, monkeypatch, answers=None):
        self.sums, self.asked = [], []
        release, draw = GaussianMechanism._release, GaussianMechanism.draw_answers

        def spy(mechanism, name, contribution):
            self.sums.append({key: value.clone() for key, value in tensors_of(contribution).items()})
            return release(mechanism, name, contribution)

        def drawn(mechanism, rows):
            self.asked.append(draw(mechanism, rows))
            if answers is not None:
                self.asked[-1] = answers
                mechanism._drawn = rows, answers[0]
            return self.asked[-1]

        monkeypatch.setattr(GaussianMechanism, "_release", spy)
        monkeypatch.setattr(GaussianMechanism, "draw_answers", drawn)


@pytest.mark.parametrize("critic", [*KINDS, "dcgan"])
def test_the_released_sums_are_the_loop_over_asked_critics(tmp_path, monkeypatch, records, critic):
    spy, seen = Spy(monkeypatch), []
    answers = GSWGAN._answers

    def kept(self, images, labels, sample, asked):
        seen.append((images, labels))
        return answers(self, images, labels, sample, asked)

    monkeypatch.setattr(GSWGAN, "_answers", kept)
    module = generator(critic, clip_norm=0.5)
    fit(tmp_path, module, records, 1)
    images, labels = seen[0]
    monkeypatch.undo()
    expected = torch.zeros(20, 16)
    for i, k in zip(*spy.asked[0], strict=True):  # one question at a time
        row = module._answers(images, labels, i[None], k[None])[0]
        expected[i] += row * min(1.0, 0.5 / float(row.norm().clamp_min(1e-9)))
    torch.testing.assert_close(spy.sums[0]["images"].float(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("critic", KINDS)
@pytest.mark.parametrize("poison", [0.0, 3e38, float("inf"), float("nan")])
@pytest.mark.parametrize("record", [0, 8, 119])
def test_a_record_moves_a_sum_by_twice_the_clip_norm_and_only_where_its_critic_was_asked(
    tmp_path, monkeypatch, any_values, records, critic, poison, record
):
    """With masks, latents and minibatches of both runs equal, for whichever critic the record is in."""
    first = torch.arange(6)[None].expand(20, 6)
    keep = torch.rand(20, 6, generator=torch.Generator().manual_seed(3)) < 0.4
    sample, asked = torch.nonzero(keep.T, as_tuple=True)[1], first.T[keep.T]
    table = torch.arange(120).view(20, 6).T.contiguous()
    monkeypatch.setattr(gs_wgan, "fresh_randomness", lambda device: torch.random.fork_rng(devices=[]))
    monkeypatch.setattr(GaussianMechanism, "assign_shards", lambda self: table.clone())
    spy = Spy(monkeypatch, (sample, asked))
    for changed in (False, True):
        images, labels = records.tensors[0].clone(), records.tensors[1].clone()
        if changed:
            images[record], labels[record] = poison, (labels[record] + 1) % 10  # of critic record % 6
        fit(tmp_path, generator(critic), TensorDataset(images, labels), 1, batch_size=20)
    moved = (spy.sums[1]["images"] - spy.sums[0]["images"]).norm(dim=1)
    assert moved.max() <= 2 * (1 + 1e-5)
    assert moved[~keep[:, record % 6]].max() < 1e-12
    assert moved[keep[:, record % 6]].max() > 1e-6


@pytest.mark.parametrize("critic", KINDS)
def test_non_interference(tmp_path, monkeypatch, any_values, digits, critic):
    """With a release that ignores its rows, two unrelated data sets leave the same public state, bit for bit."""

    def stub(self, name, contribution):
        self.ledger.charge(self.plan.release_event(name, self.noise_multiplier), contribution.count)
        self._drawn = None
        noise = torch.Generator().manual_seed(len(self.ledger))
        return {key: torch.randn(value.shape, generator=noise) for key, value in tensors_of(contribution).items()}

    monkeypatch.setattr(GaussianMechanism, "_release", stub)
    states = []
    for images, labels in ((digits[0][:120], digits[1][:120]), (torch.rand(120, 1, 8, 8) * 100, torch.zeros(120, dtype=torch.int64))):
        torch.manual_seed(5)
        module = GSWGAN(**SMALL, critic=critic)
        run = fit(tmp_path, module, TensorDataset(images, labels), 7)
        public = {
            name: value for name, value in module.state_dict().items() if not name.startswith(("critics.", "assignment", "record_marks"))
        }
        adam = {f"{i}.{key}": value for i, state in run.optimizers[0].state_dict()["state"].items() for key, value in state.items()}
        logged = {key: float(value) for key, value in run.callback_metrics.items()}
        samples = module.sample(torch.arange(10), torch.Generator().manual_seed(0))
        states.append(
            ({**public, **adam, "stream": torch.get_rng_state(), "samples": samples}, (run.global_step, len(run.strategy.ledger), logged))
        )
    (one, counts), (other, other_counts) = states
    assert counts == other_counts
    assert counts[:2] == (7, 140)
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def test_who_was_asked_leaves_no_trace_but_the_release(tmp_path, monkeypatch, records):
    """Critics, their optimizer and both random streams are the same whether nobody or everybody answered."""
    nobody = (torch.empty(0, dtype=torch.int64),) * 2
    everybody = torch.arange(20).repeat(6), torch.arange(6).repeat_interleave(20)
    states = []
    monkeypatch.setattr(gs_wgan, "fresh_randomness", lambda device: torch.random.fork_rng(devices=[]))
    monkeypatch.setattr(GaussianMechanism, "assign_shards", lambda self: torch.arange(120).view(6, 20))
    monkeypatch.setattr(GaussianMechanism, "release_answers", lambda *_: {"images": torch.ones(20, 16)})
    for answers in (nobody, everybody):
        monkeypatch.setattr(GaussianMechanism, "draw_answers", lambda self, rows, answers=answers: answers)
        module = generator("mlp")
        fit(tmp_path, module, records, 4, DPStrategy(noise_multiplier=1.0, ledger=tmp_path / f"{len(states)}.jsonl"))
        adam = [value for state in module.critics.optimizer.state_dict()["state"].values() for value in state.values()]
        states.append([*module.state_dict().values(), *adam, torch.get_rng_state()])
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


def test_plan_equals_ledger_and_the_papers_setting_is_3_15(tmp_path, records):
    run = fit(tmp_path, generator(), records, 5, DPStrategy(epsilon=10.0))
    assert run.strategy.plan.sampling == DisjointShards(120, 6, 2)
    assert (run.global_step, len(run.strategy.ledger)) == (5, 100)
    assert run.strategy.ledger.event() == run.strategy.plan.event(run.strategy.noise_multiplier)
    assert 9.8 <= float(run.callback_metrics["privacy/epsilon"]) <= 10.0
    paper = GSWGAN(num_critics=1000, critics_per_sample=1, batch_size=32, critic="dcgan").configure_privacy(60_000, 20_000, 32)
    assert paper.epsilon(noise_multiplier=2.14, delta=1e-5) == pytest.approx(3.15, abs=0.03)


def test_all_critics_at_every_image_are_gaussians_of_twice_the_clip_norm(tmp_path, records):
    run = fit(tmp_path, generator(critics_per_sample=6), records, 2)
    ((event, count),) = run.strategy.ledger.counts.items()
    assert (count, event.zero_out.sampling_probability, event.zero_out.noise_multiplier) == (40, 1.0, 0.5)


def test_noise_reaches_every_released_number_with_the_stated_deviation(tmp_path, monkeypatch, records):
    # 40 steps x 20 images x 16 numbers = 12,800 normals: within 4 % but for a chance below 1e-9 (6 standard errors of 0.63 %).
    spy, released = Spy(monkeypatch), []
    release = GaussianMechanism._release

    def kept(mechanism, name, contribution):
        released.append(release(mechanism, name, contribution))
        return released[-1]

    monkeypatch.setattr(GaussianMechanism, "_release", kept)
    fit(tmp_path, generator(clip_norm=0.5), records, 40, DPStrategy(noise_multiplier=3.0))
    noise = torch.cat([out["images"].double() - exact["images"] for out, exact in zip(released, spy.sums, strict=True)])
    assert float(noise.std()) == pytest.approx(1.5, rel=0.04)
    assert (noise[:20] != noise[20:40]).all()


@pytest.mark.parametrize("critic", KINDS)
def test_nan_records_leave_the_public_state_finite(tmp_path, any_values, digits, critic):
    module = generator(critic)
    run = fit(tmp_path, module, TensorDataset(torch.full((120, 1, 8, 8), float("nan")), digits[1][:120]), 3)
    assert len(run.strategy.ledger) == 60
    assert all(value.isfinite().all() for value in module.public_state().values())


def test_warm_up_and_refresh_keep_their_schedule_and_resume_in_either_phase(tmp_path, monkeypatch, records):
    done, improve = [], CriticEnsemble.improve

    def counted(self, *batch):
        done.append(1)
        if len(done) == stop:
            raise KeyboardInterrupt
        improve(self, *batch)

    monkeypatch.setattr(CriticEnsemble, "improve", counted)
    options = {"warm_up_steps": 6, "warm_up_checkpoint": 2, "refresh_every": 2, "refresh_steps": 3}
    stop = 6  # in the sixth warm-up step; the last checkpoint holds four
    with pytest.raises(SystemExit):
        fit(tmp_path, generator("mlp", **options), records, 5)
    done.clear()
    stop = 0
    keep = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=3, save_top_k=-1, filename="{step}")
    module = generator("mlp", **options)
    run = fit(tmp_path, module, records, 5, ckpt_path=tmp_path / "warm-up.ckpt", callbacks=[keep], enable_checkpointing=True)
    assert len(done) == 2 + 3 * 3  # the rest of the warm-up; refreshes before steps 0, 2 and 4
    assert (run.global_step, len(run.strategy.ledger)) == (5, 100)
    done.clear()
    again = generator("mlp", **options)
    resumed = fit(tmp_path, again, records, 5, ckpt_path=tmp_path / "step=3.ckpt")
    assert len(done) == 3  # before step 4
    assert torch.equal(again.assignment, module.assignment)
    assert len(resumed.strategy.ledger) == 140
    checkpoint = torch.load(tmp_path / "step=3.ckpt", weights_only=False)
    assert checkpoint["critics_optimizer"]["state"][0]["step"] == 6 + 6
    del checkpoint["state_dict"]["assignment"]
    torch.save(checkpoint, tmp_path / "lacking.ckpt")
    with pytest.raises(ValueError, match="no shard assignment"):
        fit(tmp_path, generator("mlp", **options), records, 5, ckpt_path=tmp_path / "lacking.ckpt")


def test_a_second_fit_keeps_its_shards_and_refuses_other_records(tmp_path, records):
    strategy, module = DPStrategy(noise_multiplier=1.0), generator("mlp")
    run = fit(tmp_path, module, records, 2, strategy)
    before = module.assignment.clone()
    run.fit_loop.epoch_loop.max_steps = 4
    run.fit(module, DataLoader(records, batch_size=4))
    assert torch.equal(module.assignment, before)
    assert (run.global_step, len(strategy.ledger)) == (4, 80)
    run.fit_loop.epoch_loop.max_steps = 6
    fewer = TensorDataset(*(leaf[:100] for leaf in records.tensors))
    with pytest.raises(ValueError, match="120 records in 6 shards; now there are 100"):
        run.fit(module, DataLoader(fewer, batch_size=4))
    moved = TensorDataset(*(leaf[[1, 0, *range(2, 120)]] for leaf in records.tensors))
    with pytest.raises(ValueError, match="2 of 120 records are not those"):
        run.fit(module, DataLoader(moved, batch_size=4))
    assert len(strategy.ledger) == 80


def test_a_collate_function_that_mixes_records_is_refused_before_a_critic_sees_one(tmp_path, monkeypatch, records):
    monkeypatch.setattr(CriticEnsemble, "improve", lambda *_: pytest.fail("a critic was trained"))

    def mixed(batch):
        images = torch.stack([image for image, _ in batch])
        return images + images.flip(0), torch.stack([label for _, label in batch])

    run = trainer(tmp_path, DPStrategy(noise_multiplier=1.0), max_steps=2)
    with pytest.raises(RowDependenceError):
        run.fit(generator("mlp"), DataLoader(records, batch_size=4, collate_fn=mixed))


@pytest.mark.parametrize("critic", KINDS)
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(tmp_path, records, critic, precision):
    module = generator(critic)
    run = fit(tmp_path, module, records, 2, precision=precision)
    assert len(run.strategy.ledger) == 40
    assert all(value.isfinite().all() for value in module.public_state().values())


def test_what_hooks_of_the_module_do_to_a_batch_is_what_critics_see(tmp_path, records):
    class Darker(GSWGAN):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            return batch[0] * 0.5, batch[1]

    torch.manual_seed(0)
    module = Darker(**SMALL)
    fit(tmp_path, module, records, 1)
    torch.testing.assert_close(module._shards.images, records.tensors[0] * 0.5)


def test_a_torn_ledger_ends_the_run_one_step_early_and_in_order(tmp_path, records):
    def look(run, *_):
        run.should_stop = run.global_step == 3
        if run.global_step == 2:
            run.save_checkpoint(tmp_path / "two.ckpt")

    run = fit(tmp_path, generator(), records, 5, DPStrategy(epsilon=10.0), callbacks=[pl.callbacks.LambdaCallback(on_train_batch_end=look)])
    ledger = run.strategy.ledger.path
    ledger.write_bytes(ledger.read_bytes()[:-20])  # charged once more
    resumed = fit(tmp_path, generator(), records, 5, DPStrategy(epsilon=10.0), ckpt_path=tmp_path / "two.ckpt")
    assert (resumed.global_step, len(resumed.strategy.ledger)) == (4, 40 + 1 + 40)  # 19 are left, a step needs 20
    assert resumed.strategy.epsilon_spent() <= 10


@pytest.mark.parametrize("critic", ["potential", "mlp"])
def test_a_release_holds_the_generator_and_nothing_of_a_critic(tmp_path, records, critic):
    module = generator(critic)
    run = fit(tmp_path, module, records, 3, DPStrategy(epsilon=10.0))
    SanitizedRelease.from_trainer(run).save(tmp_path / "release")
    assert verify_release(tmp_path / "release")["claim"]["epsilon"] <= 10
    loaded = load_release(tmp_path / "release")
    assert set(loaded.parameters) == set(module.average.state_dict())
    again = GSWGAN(**loaded.certificate["generator"]["arguments"])
    again.load_public_state(loaded.parameters)
    labels = torch.arange(10)
    draw = [one.sample(labels, torch.Generator().manual_seed(1)) for one in (module, again)]
    assert torch.equal(*draw)
    assert 0 <= draw[0].min() <= draw[0].max() <= 1
    knobs = loaded.certificate["knobs"]
    assert knobs["num_critics"] == {"value": 6, "origin": "set by the user"}
    assert "tuned on MNIST" in knobs["generator_lr"]["origin"]
    assert knobs["latent"]["origin"] == "the package's default"
    assert ("sharpness" in knobs, "critic_lr" in knobs) == ((critic == "potential"), (critic == "mlp"))
    assert "declared" in knobs["num_classes"]["origin"]
    assert ("critic_minibatch" in knobs) == (critic == "mlp")


def test_networks_of_ones_own_and_bernoulli_latents(tmp_path, records, capsys):
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(64, 10)

        def forward(self, images, labels):
            return self.net(images.flatten(1)).gather(1, labels[:, None])[:, 0]

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(5 + 1, 64)

        def forward(self, latent, labels):
            return self.net(torch.cat([latent, labels[:, None].float()], 1)).sigmoid().view(-1, 1, 8, 8)

    module = generator(Critic(), generator=Generator(), latent_dim=5, latent="bernoulli", basis=None)
    run = fit(tmp_path, module, records, 2)
    SanitizedRelease.from_trainer(run).save(tmp_path / "release")
    assert main(["generate", str(tmp_path / "release"), str(tmp_path / "more")]) == 1
    assert "a generator network of its maker's own" in capsys.readouterr().err
    assert module.sample(torch.arange(10)).shape == (10, 1, 8, 8)
    assert "critic" not in module.hparams

    assert module.knobs()["critic"] == {"value": "Critic", "origin": "set by the user"}

    class Mixing(Critic):  # the first image's answer would tell of the others; each is asked alone
        def forward(self, images, labels):
            return super().forward(images, labels) * images.cumsum(0).flatten(1).sum(1)

    images, labels = torch.rand(4, 1, 8, 8), torch.arange(4)
    critics = generator(Mixing()).critics
    all_four, last = (critics.answer(images, labels, torch.arange(4)[-n:], torch.zeros(n, dtype=torch.int64)) for n in (4, 1))
    torch.testing.assert_close(last[0], all_four[3])

    class Rows(Critic):
        def forward(self, images, labels):
            return self.net(images.flatten(1))

    with pytest.raises(ValueError, match=r"gives \(2, 10\) for 2 images"):
        generator(Rows())


def test_the_basis_is_orthonormal_low_and_of_every_channel():
    waves = low_frequencies((2, 8, 6), 3)
    assert waves.shape == (18, 96)
    torch.testing.assert_close(waves @ waves.T, torch.eye(18), atol=1e-5, rtol=0)
    assert low_frequencies((1, 8, 6), None).shape == (48, 48)
    torch.testing.assert_close(waves[0].view(2, 8, 6)[0], torch.full((8, 6), 48**-0.5))


def test_without_noise_a_few_critics_teach_digits_and_images_of_a_class_differ(tmp_path):
    from lightning_dpgen import tstr

    data = DigitsDataModule(batch_size=32)
    torch.manual_seed(0)
    module = GSWGAN(num_critics=10, critics_per_sample=10, batch_size=100, basis=None, generator_lr=3e-3, average=0.9)
    trainer(tmp_path, DPStrategy(noise_multiplier=0.0), max_steps=200).fit(module, data)
    labels = torch.arange(10).repeat_interleave(50)
    images = module.sample(labels, torch.Generator().manual_seed(0))
    table = tstr((images, labels), data.real_test(), 10, "quick", [0], ["LogReg"], show_progress=False)
    assert table.mean("LogReg") > 70
    assert min(float(images[labels == c].std(0).mean()) for c in range(10)) > 0.05


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (lambda x: (x * 255).to(torch.uint8), lambda y: y, "uint8 and labels"),
        (lambda x: x, lambda y: y + 0.5, "labels torch.float32"),
        (lambda x: x * 255, lambda y: y, "finite and in"),
        (lambda x: x * float("nan"), lambda y: y, "finite and in"),
        (lambda x: x, lambda y: y - 1, "from 0 to 9"),
        (lambda x: x, lambda y: y + 1, "from 0 to 9"),
    ],
)
def test_values_that_are_no_images_or_classes_are_refused_before_a_release(tmp_path, records, images, labels, message):
    wrong = TensorDataset(images(records.tensors[0]), labels(records.tensors[1]))
    strategy = DPStrategy(noise_multiplier=1.0)
    with pytest.raises(ValueError, match=message):
        fit(tmp_path, generator("mlp"), wrong, 2, strategy)
    assert len(strategy.ledger) == 0


def test_a_resume_as_another_gswgan_is_refused_by_name(tmp_path, records):
    run = fit(tmp_path, generator("mlp"), records, 2)
    run.save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="basis was 4 and is 3 here; warm_up_steps was 3 and is 9 here"):
        fit(tmp_path, generator("mlp", basis=3, warm_up_steps=9), records, 4, ckpt_path=tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="minibatch, the data module's batch_size, was 4 and is 5 here"):
        fit(tmp_path, generator("mlp"), records, 4, ckpt_path=tmp_path / "two.ckpt", batch_size=5)
    loaded = GSWGAN.load_from_checkpoint(tmp_path / "two.ckpt")
    labels = torch.arange(10)
    samples = [one.sample(labels, torch.Generator().manual_seed(0)) for one in (loaded, run.lightning_module)]
    assert torch.equal(*samples)


def test_few_records_for_a_critic_are_warned_of(tmp_path, records, caplog):
    fit(tmp_path, generator(), records, 1)
    assert "num_critics=6 leaves 20 records for each critic, of 10 classes" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_critics": 0}, "num_critics=0"),
        ({"critics_per_sample": 7}, "at most num_critics=6"),
        ({"batch_size": 15}, "multiple of the 10 classes"),
        ({"critic": "vit"}, "critic='vit'"),
        ({"generator": "vit"}, "generator='vit'"),
        ({"latent": "cauchy"}, "latent='cauchy'"),
        ({"average": 1.0}, "average=1.0"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"warm_up_steps": -1}, "warm_up_steps=-1"),
        ({"warm_up_steps": 2.5}, "warm_up_steps=2.5"),
        ({"critic": nn.Sequential(nn.Flatten(), nn.Linear(64, 1))}, "cannot be called as"),
        ({"generator": nn.Bilinear(12, 1, 64)}, "cannot be called as"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        GSWGAN(**{**SMALL, **arguments})


def test_shards_that_are_too_small_are_refused_before_training(tmp_path, records):
    with pytest.raises(ValueError, match=r"batch_size=32 is a critic's minibatch.*leave 20.*num_critics=3 or fewer"):
        fit(tmp_path, generator("mlp"), records, 2, batch_size=32)
    with pytest.raises(ValueError, match="at most the number of records, 120"):
        fit(tmp_path, generator(num_critics=121), records, 2)
