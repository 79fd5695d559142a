"""Fréchet distance, Inception score, precision and recall in learned features."""

import pytest
import torch

from lightning_dpgen import DigitsDataModule
from lightning_dpgen.evaluation.fidelity import (
    fidelity,
    load_feature_network,
    precision_recall,
    save_feature_network,
    train_feature_network,
)


@pytest.fixture(scope="module")
def real():
    data = DigitsDataModule()
    data.setup()
    return data.train_records.tensors()


@pytest.fixture(scope="module")
def network(real):
    return train_feature_network(*real, 10, updates=200, show_progress=False)


def test_real_images_beside_themselves_are_perfect_and_noise_is_not(real, network):
    images = real[0][:600]
    same = fidelity(images, images, network)
    assert same["fid"] == pytest.approx(0, abs=1e-3)
    assert same["precision"] == same["recall"] == 1.0
    assert 5 < same["inception_score"] <= 10  # ten classes, all alike
    noise = fidelity(torch.rand(600, 1, 8, 8, generator=torch.Generator().manual_seed(0)), images, network)
    assert noise["fid"] > 10 * abs(same["fid"]) + 1
    assert noise["recall"] < 0.2
    assert noise["inception_score"] < same["inception_score"]


def test_one_class_alone_is_precise_and_recalls_little(real, network):
    images, labels = real
    found = fidelity(images[labels == 3], images[:800], network)
    assert found["precision"] > 0.7
    assert found["recall"] < 0.5
    assert found["inception_score"] < 2


def test_precision_and_recall_on_a_line():
    real, synthetic = torch.arange(10.0)[:, None], torch.tensor([[0.4], [0.6], [8.0], [50.0]])
    # each real point reaches 1 (the ends too); the synthetic ones 0.2, 0.2, 7.4 and 42: all but the real 0
    assert precision_recall(synthetic, real, 1) == (0.75, 0.9)


def test_the_network_is_kept_and_the_random_state_left_alone(real, network, tmp_path):
    state = torch.get_rng_state()
    again = train_feature_network(*real, 10, updates=2, show_progress=False)
    fidelity(real[0][:50], real[0][50:100], again)
    assert torch.equal(torch.get_rng_state(), state)
    save_feature_network(network, tmp_path / "features.safetensors")
    loaded = load_feature_network(tmp_path / "features.safetensors")
    torch.testing.assert_close(loaded(real[0][:5]), network(real[0][:5]))
    (tmp_path / "other.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="no feature network"):
        load_feature_network(tmp_path / "other.safetensors")


def test_other_shapes_and_too_few_images_are_refused(real, network):
    with pytest.raises(ValueError, match="for this feature network"):
        fidelity(torch.rand(10, 1, 9, 9), real[0], network)
    with pytest.raises(ValueError, match="more than 3"):
        fidelity(real[0][:3], real[0], network)
