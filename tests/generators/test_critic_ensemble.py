"""The stacked critics against a loop over them; exact potentials against linear programming."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import nn

from lightning_dpgen.generators import critic_ensemble
from lightning_dpgen.generators.critic_ensemble import CriticEnsemble, PotentialCritics, Shards, fingerprints
from lightning_dpgen.nn.critics import CRITICS

SHAPE = (1, 8, 8)


def ensemble(name="mlp", count=5, **options) -> CriticEnsemble:
    torch.manual_seed(0)
    return CriticEnsemble(CRITICS[name](3, SHAPE), count, **{"rate": 1e-2, "gradient_penalty": 10.0, "drift_penalty": 1e-3, **options})


def minibatches(count=5, size=4, seed=0):
    source = torch.Generator().manual_seed(seed)
    real, fake = (torch.rand(count, size, *SHAPE, generator=source) for _ in range(2))
    return real, fake, torch.randint(3, (count, size), generator=source)


def one_critic_loop(network, rate, batches) -> None:
    """A critic trained by itself, with the mixing shares that the ensemble drew for it."""
    optimizer = torch.optim.Adam(network.parameters(), rate, betas=(0.5, 0.9))
    for real, fake, labels, share in batches:
        between = (share * real + (1 - share) * fake).requires_grad_()
        slope = torch.autograd.grad(network(between, labels).sum(), between, create_graph=True)[0].flatten(1).norm(dim=1)
        on_real = network(real, labels)
        loss = (network(fake, labels) - on_real + 10.0 * (slope - 1).square() + 1e-3 * on_real.square()).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("name", CRITICS)
@pytest.mark.parametrize("at_once", [4096, 8])
def test_training_is_the_loop_over_critics(name, at_once, monkeypatch, request):
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    monkeypatch.setitem(critic_ensemble.IMAGES_AT_ONCE, "cpu", at_once)
    torch.set_default_dtype(torch.float64)  # Adam makes a step of every gradient, also of one that is rounding
    critics = ensemble(name)
    alone = [copy.deepcopy(critics._template).requires_grad_(True) for _ in range(5)]
    shares = []
    rand = torch.rand

    def kept(shape, **options):
        shares.append(rand(shape, **options))
        return shares[-1]

    batches = [minibatches(seed=seed) for seed in range(3)]
    monkeypatch.setattr(torch, "rand", kept)
    for batch in batches:
        critics.improve(*batch)
    share = torch.cat(shares).view(3, 5, 4, 1, 1, 1)
    for k, network in enumerate(alone):
        one_critic_loop(network, 1e-2, [(real[k], fake[k], labels[k], share[i, k]) for i, (real, fake, labels) in enumerate(batches)])
        for stacked, parameter in zip(critics.stacked, network.parameters(), strict=True):
            torch.testing.assert_close(stacked[k], parameter, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("at_once", [64, 3])
def test_answers_are_the_loop_over_questions_and_write_nothing(at_once, monkeypatch):
    monkeypatch.setattr(critic_ensemble, "QUESTIONS_AT_ONCE", at_once)
    critics = ensemble("dcgan")
    critics.improve(*minibatches())
    images, labels = torch.rand(6, *SHAPE), torch.tensor([0, 1, 2, 0, 1, 2])
    sample, critic = torch.tensor([5, 0, 1, 2, 5, 3, 0]), torch.tensor([0, 1, 1, 1, 3, 4, 4])
    before = copy.deepcopy(critics.state_dict()), copy.deepcopy(critics.optimizer.state_dict())
    rows = critics.answer(images, labels, sample, critic)
    for row, i, k in zip(rows, sample, critic, strict=True):
        network = copy.deepcopy(critics._template)
        for parameter, stacked in zip(network.parameters(), critics.stacked, strict=True):
            parameter.data = stacked.detach()[k]
        image = images[i : i + 1].clone().requires_grad_()
        expected = torch.autograd.grad(-network(image, labels[i : i + 1]).sum(), image)[0][0]
        torch.testing.assert_close(row, expected, atol=1e-6, rtol=1e-4)
    assert critics.answer(images, labels, sample[:0], critic[:0]).shape == (0, *SHAPE)
    alone = torch.cat([critics.answer(images, labels, sample[p : p + 1], critic[p : p + 1]) for p in range(7)])
    assert torch.equal(alone, rows)  # to the last bit, whoever else was asked
    everyone, everything = torch.arange(5).repeat_interleave(6), torch.arange(6).repeat(5)
    whole = critics.answer(images, labels, everything, everyone)
    torch.testing.assert_close(whole[(everything == 5) & (everyone == 3)][0], rows[4], atol=1e-6, rtol=1e-4)
    after = critics.state_dict(), critics.optimizer.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before[0].values(), after[0].values(), strict=True))
    assert all(
        torch.equal(a["exp_avg"], b["exp_avg"]) for a, b in zip(before[1]["state"].values(), after[1]["state"].values(), strict=True)
    )


def test_one_record_changes_only_its_own_critic():
    real, fake, labels = minibatches()
    trained = []
    for change in (None, 0.3, float("nan")):
        critics, changed = ensemble("dcgan"), real.clone()
        if change is not None:
            changed[2, 1] = change
        for _ in range(3):
            torch.manual_seed(1)
            critics.improve(changed, fake, labels)
        trained.append([parameter.detach().clone() for parameter in critics.stacked])
    for others in trained[1:]:
        for before, after in zip(trained[0], others, strict=True):
            assert torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])
        assert any(not torch.equal(before[2], after[2]) for before, after in zip(trained[0], others, strict=True))


def test_critics_with_state_are_refused():
    with pytest.raises(ValueError, match=r"buffers \(1.running_mean"):
        CriticEnsemble(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64), nn.Linear(64, 1)), 2, 1e-3, 10.0, 0.0)


def test_minibatches_hold_different_records_of_their_own_shard():
    table = torch.tensor([[0, 3, 6], [1, 4, -1], [2, 5, -1]])
    shards = Shards(torch.arange(7.0), torch.tensor([0, 1, 0, 1, 0, 1, 1]), table)
    seen = [set(), set(), set()]
    for _ in range(60):
        images, labels = shards.minibatch(2)
        for k in range(3):
            assert len(set(images[k].tolist())) == 2
            seen[k] |= set(images[k].int().tolist())
            assert labels[k].tolist() == [shards.labels[int(i)] for i in images[k]]
    assert seen == [{0, 3, 6}, {1, 4}, {2, 5}]  # missing one has a chance of 3^-60
    by_class = shards.by_class(2)
    assert by_class.tolist() == [[[0, -1], [3, 6]], [[4, -1], [1, -1]], [[2, -1], [5, -1]]]


def test_potentials_point_along_the_optimal_assignment():
    """Nearly without entropy each answer is the unit vector from the record that the exact assignment gives the point."""
    torch.manual_seed(0)
    points, records = torch.randn(1, 6, 4), torch.randn(6, 4) + 2
    critics = PotentialCritics(sharpness=0.01, iterations=2000)
    sample, critic = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    rows = critics.answer(points, sample, critic, records, torch.arange(6).view(1, 1, 6))
    distance = torch.cdist(points[0], records)
    chosen = linear_sum_assignment(np.asarray(distance))[1]
    expected = (points[0] - records[chosen]) / distance[torch.arange(6), chosen][:, None]
    torch.testing.assert_close(rows, expected, atol=0.02, rtol=0)


def test_potentials_know_their_shard_and_class_alone_and_are_bounded():
    torch.manual_seed(0)
    points, records = torch.rand(3, 4, 9), torch.rand(30, 9)
    shards = Shards(records, torch.arange(30) % 3, torch.arange(30).view(5, 6))
    table = shards.by_class(3)
    table[1, 2] = -1  # no record of this class in this shard
    critics = PotentialCritics(0.3, 20)
    sample, critic = (index.flatten() for index in torch.meshgrid(torch.arange(12), torch.arange(5), indexing="ij"))
    rows = critics.answer(points, sample, critic, records, table)
    assert rows.isfinite().all()
    assert rows.norm(dim=1).max() <= 1 + 1e-5
    assert (rows[(critic == 1) & (sample >= 8)] == 0).all()
    few = torch.tensor([7, 31, 50])
    torch.testing.assert_close(critics.answer(points, sample[few], critic[few], records, table), rows[few], atol=1e-6, rtol=1e-5)
    for change in (100.0, float("nan"), float("inf"), -float("inf"), 3e38):
        for record in (0, 7, 29):  # each alone in what it may move: its shard and its class
            changed = records.clone()
            changed[record] = change
            moved = critics.answer(points, sample, critic, changed, table) - rows
            others = (critic != record // 6) | (sample // 4 != record % 3)
            assert (moved[others] == 0).all()
            assert not (moved[~others] == 0).all()


def test_one_label_does_not_move_other_critics_by_rounding():
    """Its class may become the largest of any shard and widen every table; points on top of records are the worst case."""
    torch.manual_seed(0)
    records = torch.rand(600, 9).round()
    points, labels = records[:30].view(3, 10, 9).clone(), torch.arange(600) % 3
    critics, table = PotentialCritics(0.3, 20), torch.arange(600).view(20, 30)
    sample, critic = (index.flatten() for index in torch.meshgrid(torch.arange(30), torch.arange(20), indexing="ij"))
    answers, widths = [], []
    for changed in (False, True):
        labels[4] = 0 if changed else labels[4]
        by_class = Shards(records, labels, table).by_class(3)
        widths.append(by_class.shape[2])
        answers.append(critics.answer(points, sample, critic, records, by_class))
    assert widths[0] != widths[1]
    assert float((answers[1] - answers[0])[critic != 0].abs().max()) < 1e-6


def test_fingerprints_know_records_and_their_order():
    images, labels = torch.rand(2500, 1, 8, 8), torch.randint(3, (2500,))
    marks = fingerprints(images, labels)
    assert len(marks.unique()) == 2500
    assert torch.equal(fingerprints(images.clone(), labels.clone()), marks)
    images[7, 0, 0, 0] += 1e-6
    labels[2400] += 1
    assert torch.nonzero(fingerprints(images, labels) != marks).flatten().tolist() == [7, 2400]
