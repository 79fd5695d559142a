"""Several processes: the single-process result without noise, noise once, one ledger."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import Mlp, fit
from torch.utils.data import TensorDataset

from lightning_dpgen import DPDDPStrategy, DPStrategy, MixturePPCA

HERE = Path(__file__).parent


def ddp(folder, launcher=(), **options):
    """Runs two (or ``world``) gloo processes, started by Lightning or by a launcher; returns what each of them kept."""
    folder.mkdir(exist_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(HERE.parent), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launcher, str(HERE / "ddp_run.py"), str(folder), json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(options.get("world", 2))]


def test_forked_processes_are_refused():
    with pytest.raises(ValueError, match="start_method='fork'"):
        DPDDPStrategy(epsilon=3.0, start_method="fork")


def test_full_passes_of_several_processes_are_one_pass(tmp_path):
    options = {"records": 33, "batch_size": 16, "steps": -1, "generator": "mixture"}
    found = ddp(tmp_path / "ddp", **options, strategy={"noise_multiplier": 0.0})
    generator = torch.Generator().manual_seed(0)
    records = TensorDataset(torch.rand(33, 1, 8, 8, generator=generator), torch.randint(10, (33,), generator=generator))
    torch.manual_seed(0)
    module = MixturePPCA(num_classes=10, image_shape=(1, 8, 8))
    fit(tmp_path, module, records, 16, strategy=DPStrategy(noise_multiplier=0.0), trainer_options={"max_steps": -1})
    for name, value in module.public_state().items():
        assert torch.equal(found[0]["state"][name], found[1]["state"][name])
        if name in ("means", "weights"):  # eigenvectors of 33 random images in 64 numbers may turn with rounding
            torch.testing.assert_close(found[0]["state"][name], value, atol=1e-4, rtol=1e-4)
    noised = ddp(tmp_path / "noised", **options, strategy={"epsilon": 10.0})
    assert [one["releases"] for one in noised] == [7, 7]
    assert all(torch.equal(value, noised[1]["state"][name]) for name, value in noised[0]["state"].items())


def test_other_methods_with_releases_of_their_own_stay_on_one_device(tmp_path):
    with pytest.raises(AssertionError, match="PrivateSetGeneration makes its own releases, on one device"):
        ddp(tmp_path, records=33, batch_size=16, steps=2, generator="private_set", strategy={"epsilon": 10.0})


SLOW = [pytest.param(world, grad_sample, marks=pytest.mark.slow) for world, grad_sample in ((4, "hooks"), (2, "ghost"), (2, "functional"))]


@pytest.mark.parametrize(("world", "grad_sample"), [(2, "hooks"), *SLOW])
def test_without_noise_the_processes_are_one(tmp_path, world, grad_sample):
    # 33 records: the shares differ in size, and nothing is padded.
    strategy = {"noise_multiplier": 0.0, "clip_norm": 0.05, "grad_sample": grad_sample}
    found = ddp(tmp_path / "ddp", records=33, batch_size=33, steps=1, world=world, strategy=strategy)
    generator = torch.Generator().manual_seed(0)
    records = TensorDataset(torch.rand(33, 1, 8, 8, generator=generator), torch.randint(10, (33,), generator=generator))
    module = Mlp()
    start = torch.cat([p.detach().flatten() for p in module.parameters()])
    fit(tmp_path, module, records, 33, clip_norm=0.05)
    expected = start - torch.cat([p.detach().flatten() for p in module.parameters()])
    for one in found:
        torch.testing.assert_close(one["moved"], expected, atol=1e-6, rtol=1e-4)
        assert torch.equal(one["moved"], found[0]["moved"])
    assert sorted(i for one in found for i in one["lots"][0]) == list(range(33))


def test_noise_is_added_once_and_lots_are_disjoint_and_fair(tmp_path):
    strategy = {"noise_multiplier": 2.0, "clip_norm": 0.5}
    found = ddp(tmp_path, records=33, batch_size=8, steps=60, wide=True, strategy=strategy)
    assert torch.equal(found[0]["moved"], found[1]["moved"])
    # 4,160 sums of 60 normals: the sample deviation is within 6 % but for a chance below 1e-7.
    assert float(found[0]["moved"].std()) == pytest.approx(2.0 * 0.5 / 8 * 60**0.5, rel=0.06)
    for rank, one in enumerate(found):
        assert len(one["lots"]) == one["steps"] == one["releases"] == 60
        assert {i % 2 for lot in one["lots"] for i in lot} == {rank}
    # Inclusions: 33 * 60 draws of 8 / 33, within 5 standard deviations but for a chance of 6e-7.
    drawn = sum(len(lot) for one in found for lot in one["lots"])
    assert abs(drawn - 480) < 5 * (33 * 60 * (8 / 33) * (25 / 33)) ** 0.5
    sizes = torch.tensor([[len(lot) for lot in one["lots"]] for one in found], dtype=torch.float64)
    assert abs(float(torch.corrcoef(sizes)[0, 1])) < 0.6  # equal masks: 1
    files = [one["file"] for one in found]
    assert files[1] is None
    assert len(Path(files[0]).read_text().splitlines()) == 62  # header, plan, and each release once


@pytest.mark.slow
def test_torchrun_starts_it_too(tmp_path):
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    found = ddp(tmp_path, launcher, records=64, batch_size=8, steps=5, strategy={"epsilon": 3.0})
    assert [one["releases"] for one in found] == [5, 5]
    assert torch.equal(found[0]["moved"], found[1]["moved"])
    assert {i % 2 for lot in found[1]["lots"] for i in lot} == {1}


@pytest.mark.slow
def test_one_record_and_two_processes_end_though_lots_are_empty(tmp_path):
    found = ddp(tmp_path, records=3, batch_size=1, steps=20, strategy={"noise_multiplier": 1.0})
    assert any(not lot for one in found for lot in one["lots"])
    assert [one["releases"] for one in found] == [20, 20]


@pytest.mark.slow
def test_a_budget_and_a_resume_count_in_every_process(tmp_path):
    strategy = {"epsilon": 3.0}
    first = ddp(tmp_path, records=64, batch_size=8, steps=6, save=True, strategy={"noise_multiplier": 1.5})
    assert [one["releases"] for one in first] == [6, 6]
    again = ddp(tmp_path, records=64, batch_size=8, steps=10, resume=str(tmp_path / "last.ckpt"), strategy={"noise_multiplier": 1.5})
    assert [one["releases"] for one in again] == [10, 10]
    assert again[0]["epsilon"] == again[1]["epsilon"] > first[0]["epsilon"]
    capped = ddp(tmp_path / "capped", records=64, batch_size=8, steps=5, strategy=strategy)
    assert capped[0]["epsilon"] <= 3.0
    assert [one["releases"] for one in capped] == [5, 5]
