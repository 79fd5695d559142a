import pytest
import torch

from lightning_dpgen.nn.classifiers import CLASSIFIERS, ConvNet


@pytest.mark.parametrize("name", CLASSIFIERS)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
def test_shapes_and_independence_of_the_batch(name, shape):
    torch.manual_seed(0)
    network = CLASSIFIERS[name](7, shape).eval()
    images = torch.rand(3, *shape)
    logits = network(images)
    assert logits.shape == (3, 7)
    torch.testing.assert_close(network(images[:1]), logits[:1], atol=1e-4, rtol=1e-4)
    assert logits.std(0).max() > 0  # images differ, so must the logits


def test_the_published_convnet_has_2048_features_on_28_pixels():
    assert ConvNet(10, (1, 28, 28)).head.in_features == 2048
