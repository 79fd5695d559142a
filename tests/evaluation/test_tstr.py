import pytest
import torch

from lightning_dpgen import DigitsDataModule, tstr
from lightning_dpgen.evaluation import PROTOCOLS


def test_real_records_teach_and_shuffled_labels_do_not():
    data = DigitsDataModule()
    data.setup()
    images, labels = data.train_records.tensors()
    real = tstr((images, labels), data.real_test(), 10, "quick", [0, 1], ["MLP"], show_progress=False)
    assert real.mean("MLP") > 85
    assert len(real.accuracy["MLP"]) == 2
    assert real.std("MLP") > 0
    assert len(real.per_class["MLP"]) == 10
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    wrong = tstr((images, shuffled), data.real_test(), 10, "quick", [0], ["MLP"], show_progress=False)
    assert wrong.mean("MLP") < 35


def test_seeds_repeat_and_the_random_state_is_left_alone():
    data = DigitsDataModule()
    data.setup()
    images, labels = data.train_records.tensors()
    state = torch.get_rng_state()
    runs = [tstr((images[:50], labels[:50]), data.real_test(), 10, "quick", [3], ["LogReg"], show_progress=False) for _ in range(2)]
    assert runs[0].accuracy == runs[1].accuracy
    assert torch.equal(torch.get_rng_state(), state)


def test_the_published_protocol_does_not_see_how_bright_images_are():
    data = DigitsDataModule()
    data.setup()
    images, labels = data.train_records.tensors()
    real, real_labels = data.real_test()
    dark = [tensor * 0.1 + 0.4 for tensor in (images[:200], real)]
    found = {}
    for protocol in ("quick", "published"):
        bright = tstr((images[:200], labels[:200]), (real, real_labels), 10, protocol, [0], ["MLP"], show_progress=False)
        other = tstr((dark[0], labels[:200]), (dark[1], real_labels), 10, protocol, [0], ["MLP"], show_progress=False)
        found[protocol] = bright.mean("MLP"), other.mean("MLP")
    assert abs(found["published"][0] - found["published"][1]) < 1
    assert found["published"][1] > found["quick"][1] + 5


def test_protocols_say_how_long_they_train():
    assert PROTOCOLS["published"].updates(100) == 300
    assert PROTOCOLS["quick"].updates(100) == 300
    assert PROTOCOLS["quick"].updates(60_000) == 3000
    assert PROTOCOLS["common"].updates(100) == 2000
    assert set(PROTOCOLS["published"].classifiers) == {"ConvNet", "LeNet", "AlexNet", "VGG11", "ResNet18", "MLP"}


def test_unknown_names_and_other_shapes_are_refused():
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 0, 1])
    with pytest.raises(ValueError, match="protocol='fast'"):
        tstr((images, labels), (images, labels), 2, "fast")
    with pytest.raises(ValueError, match="no classifier VGG"):
        tstr((images, labels), (images, labels), 2, "quick", classifiers=["VGG"])
    with pytest.raises(ValueError, match=r"\(1, 8, 8\).*\(1, 4, 4\)"):
        tstr((images, labels), (images[..., :4, :4], labels), 2)
