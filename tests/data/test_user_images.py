import numpy as np
import pytest
import torch
from PIL import Image

from lightning_dpgen import ImagesDataModule


@pytest.fixture
def folder(tmp_path):
    for number in range(12):
        place = tmp_path / "images" / str(number)
        place.mkdir(parents=True)
        for copy in range(2):
            Image.fromarray(np.full((8, 8), number * 10 + copy, dtype=np.uint8)).save(place / f"{copy}.png")
    return tmp_path / "images"


CLASSES = [str(number) for number in range(12)]


def read(path, classes=CLASSES, shape=(1, 8, 8), **options):
    data = ImagesDataModule(str(path), classes, shape, **options)
    data.setup()
    return data


def test_labels_follow_the_declared_order_not_the_alphabet(folder, tmp_path):
    data = read(folder)
    assert data.train_records.labels[data.train_records.images[:, 0, 0, 0] == 100].tolist() == [10]
    names = tmp_path / "names.txt"
    names.write_text("\n".join(reversed(CLASSES)) + "\n", encoding="utf-8")
    data = read(folder, str(names))
    assert data.train_records.labels[data.train_records.images[:, 0, 0, 0] == 100].tolist() == [1]
    assert data.class_names[1] == "10"
    assert read(folder, list(range(12))).class_names == tuple(CLASSES)  # as the command line reads [0, 1, 2]


def test_a_missing_place_is_named_with_its_argument(folder):
    with pytest.raises(ValueError, match="^path='nowhere'"):
        read("nowhere", test_path="neither")
    with pytest.raises(ValueError, match="^test_path='neither'.*remove TSTREvaluation"):
        read(folder, test_path="neither")


def test_undeclared_and_missing_folders_are_named(folder):
    with pytest.raises(ValueError, match=r"Missing: cat\. Not declared: 0"):
        read(folder, [*CLASSES[1:], "cat"])


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16", "P", "LA"])
def test_images_of_another_mode_are_refused_by_name(folder, mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 40_000, dtype=np.uint16))
    elif mode == "P":
        image = Image.new("P", (8, 8))
        image.info["transparency"] = 0
    else:
        image = Image.new(mode, (8, 8))
    image.save(folder / "3" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png has mode .*declared is image_shape=\(1, 8, 8\)"):
        read(folder)


def test_sizes_are_checked_after_turning_by_exif(folder):
    Image.new("L", (4, 8)).save(folder / "5" / "odd.png")
    with pytest.raises(ValueError, match=r"odd\.png is 8 x 4 .*declared is 8 x 8"):
        read(folder)
    for place in folder.iterdir():
        for file in place.iterdir():
            file.unlink()
        exif = Image.Exif()
        exif[0x0112] = 6  # turned by 90 degrees
        Image.new("RGB", (3, 2)).save(place / "turned.jpg", exif=exif)
    assert read(folder, shape=(3, 3, 2)).train_records.images.shape == (12, 3, 3, 2)


def test_a_class_without_records_and_a_damaged_file_are_refused(folder):
    for file in (folder / "7").iterdir():
        file.unlink()
    with pytest.raises(ValueError, match="classes 7 have no training record"):
        read(folder)
    (folder / "7" / "bad.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"bad\.png cannot be read"):
        read(folder)


def save(tmp_path, **arrays):
    path = tmp_path / "records.npz"
    np.savez(path, **arrays)
    return path


IMAGES = np.arange(4 * 64, dtype=np.uint8).reshape(4, 8, 8)
LABELS = np.array([0, 1, 0, 1])


def test_npz_arrays_of_bytes_floats_colours_and_names(tmp_path):
    data = read(save(tmp_path, images=IMAGES, labels=LABELS), ["a", "b"])
    assert torch.equal(data.train_records.images[:, 0], torch.from_numpy(IMAGES))
    data = read(save(tmp_path, images=IMAGES / 255, labels=np.array(["b", "a", "b", "a"])), ["a", "b"])
    assert torch.equal(data.train_records.images[:, 0], torch.from_numpy(IMAGES))
    assert data.train_records.labels.tolist() == [1, 0, 1, 0]
    colours = np.stack([IMAGES] * 3, axis=-1)
    assert read(save(tmp_path, images=colours, labels=LABELS), ["a", "b"], (3, 8, 8)).train_records.images.shape == (4, 3, 8, 8)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES, "labels": np.array([0, 1, 2, 1])}, "labels run from 0 to 2.*2 declared"),
        ({"images": IMAGES, "labels": np.array([0, -1, 0, 1])}, "labels run from -1"),
        ({"images": IMAGES, "labels": LABELS[:3]}, "4 training images"),
        ({"images": IMAGES, "labels": np.array(["a", "b", "c", "a"])}, "labels c are not declared"),
        ({"images": IMAGES, "labels": LABELS / 2}, "labels are float64"),
        ({"images": np.full((4, 8, 8), np.nan), "labels": LABELS}, "4 images hold NaN"),
        ({"images": IMAGES.astype(float), "labels": LABELS}, r"outside \[0, 1\]"),
        ({"images": IMAGES.astype(np.int32), "labels": LABELS}, "int32"),
        ({"images": IMAGES[:, :4], "labels": LABELS}, r"shape \(4, 4, 8\)"),
        ({"pictures": IMAGES, "labels": LABELS}, "images missing"),
    ],
)
def test_npz_files_that_are_not_what_was_declared(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        read(save(tmp_path, **arrays), ["a", "b"])


class Trap:
    """Unpickling it would create a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_object_arrays_are_refused_and_never_unpickled(tmp_path):
    trap = tmp_path / "created"
    path = save(tmp_path, images=np.array([Trap(trap)] * 4, dtype=object), labels=LABELS)
    with pytest.raises(ValueError, match=r"'images'.*uint8"):
        read(path, ["a", "b"])
    assert not trap.exists()


def test_damaged_and_missing_files(tmp_path):
    path = save(tmp_path, images=IMAGES, labels=LABELS)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="not a readable"):
        read(path, ["a", "b"])
    with pytest.raises(ValueError, match="that exists"):
        read(tmp_path / "nothing.npz", ["a", "b"])
    for classes in ([], ["a", "a"], "no-such-file.txt"):
        with pytest.raises(ValueError, match="classes="):
            ImagesDataModule("x", classes, (1, 8, 8))
    with pytest.raises(ValueError, match="image_shape"):
        ImagesDataModule("x", ["a"], (2, 8, 8))
