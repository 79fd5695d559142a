import pytest
import torch
from torch.nn import functional as F

from lightning_dpgen.nn.critics import CRITICS, DISCRIMINATORS, UnfoldedConv, largest_singular_value


@pytest.mark.parametrize("name", DISCRIMINATORS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_a_discriminator_says_of_a_pair_what_it_says_of_each(name, shape):
    torch.manual_seed(0)
    network = DISCRIMINATORS[name](4, shape)
    one, other = ((torch.rand(5, *shape), torch.randint(4, (5,))) for _ in range(2))
    for found, alone in zip(network.pairs(one, other), (network(*one), network(*other)), strict=True):
        assert found.shape == (5,)
        torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("name", [*(f"critic {key}" for key in CRITICS), *DISCRIMINATORS])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_critics_give_a_number_for_image_and_class(name, shape):
    torch.manual_seed(0)
    network = {**DISCRIMINATORS, **{f"critic {key}": make for key, make in CRITICS.items()}}[name](4, shape)
    images = torch.rand(3, *shape)
    scores = network(images, torch.tensor([0, 1, 2]))
    assert scores.shape == (3,)
    assert (network(images, torch.tensor([3, 3, 3])) - scores).abs().min() > 1e-5
    torch.testing.assert_close(network(images[1:2], torch.tensor([1])), scores[1:2])


def test_the_unfolded_convolution_is_the_convolution():
    torch.manual_seed(0)
    layer, images = UnfoldedConv(3, 7), torch.randn(4, 3, 9, 14)
    expected = F.conv2d(images, layer.weight.view(7, 3, 5, 5), layer.bias[:, 0], stride=2, padding=2)
    torch.testing.assert_close(layer(images), expected, atol=1e-5, rtol=1e-4)
    spectral = UnfoldedConv(3, 7, spectral=True)
    spectral.load_state_dict(layer.state_dict())
    norm = torch.linalg.matrix_norm(layer.weight, 2)
    torch.testing.assert_close(
        spectral(images), F.conv2d(images, layer.weight.view(7, 3, 5, 5) / norm, stride=2, padding=2), rtol=0.1, atol=0.02
    )
    assert float(largest_singular_value(layer.weight)) == pytest.approx(float(norm), rel=0.1)
