"""Real records without a download: scikit-learn's digits, and small IDX files made from them."""

from __future__ import annotations

import hashlib
import logging
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="pytorch_lightning")
torch.set_num_threads(1)  # the tensors of these tests are too small to share


@pytest.fixture(scope="session")
def digits() -> tuple[torch.Tensor, torch.Tensor]:
    """All 1,797 scans as floats ``[N, 1, 8, 8]`` in [0, 1], and their labels."""
    data = load_digits()
    return torch.tensor(data.images, dtype=torch.float32)[:, None] / 16, torch.tensor(data.target)


@pytest.fixture
def digit_records(digits):
    """The first 64 scans as a data set."""
    images, labels = digits
    return TensorDataset(images[:64], labels[:64])


def _idx(array: np.ndarray) -> bytes:
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_root(tmp_path, monkeypatch) -> Path:
    """A data folder with MNIST and FashionMNIST in IDX files made from digits (enlarged to 28 x 28), digests to match."""
    from lightning_dpgen.data import fetch as module

    data = load_digits()
    images = (data.images * 255 / 16).round().astype(np.uint8).repeat(3, 1).repeat(3, 2)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))
    files = {}
    for offset, name in enumerate(("MNIST", "FashionMNIST")):
        folder = tmp_path / name / "raw"
        folder.mkdir(parents=True)
        train, test = slice(offset, 300), slice(300 + offset, 400)
        contents = {
            module.TRAIN_IMAGES: _idx(images[train]),
            module.TRAIN_LABELS: _idx(data.target[train]),
            module.TEST_IMAGES: _idx(images[test]),
            module.TEST_LABELS: _idx(data.target[test]),
        }
        for file, content in contents.items():
            (folder / file).write_bytes(content)
        files[name] = {file: hashlib.md5(content, usedforsecurity=False).hexdigest() for file, content in contents.items()}
    monkeypatch.setattr(module, "MD5", files)
    return tmp_path
