import pytest
import torch

from lightning_dpgen.nn.generators import GENERATORS


@pytest.mark.parametrize("name", GENERATORS)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 14)])
def test_generators_make_images_that_depend_on_latent_and_class(name, shape):
    torch.manual_seed(0)
    network = GENERATORS[name](3, shape, 5).eval()
    latent, labels = torch.randn(2, 5), torch.tensor([0, 0])
    images = network(latent, labels)
    assert images.shape == (2, *shape)
    assert 0 <= images.min() <= images.max() <= 1
    assert (images[0] - images[1]).abs().max() > 1e-4
    assert (network(latent, torch.tensor([2, 2])) - images).abs().max() > 1e-4
