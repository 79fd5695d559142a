import torch

from lightning_dpgen.nn.augmentation import Augmentation, augment, draw_augmentation


def test_no_movement_is_the_image_and_a_shift_is_a_shift():
    images = torch.rand(3, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(augment(images, draw_augmentation(Augmentation(0, 0, 0))), images)
    right = torch.tensor([[1.0, 0.0, 2 / 8], [0.0, 1.0, 0.0]])  # one pixel of eight
    moved = augment(images, right)
    torch.testing.assert_close(moved[..., :-1], images[..., 1:])
    assert torch.count_nonzero(moved[..., -1]) == 0


def test_every_image_is_moved_alike_by_one_seedable_draw_and_gradients_flow():
    torch.manual_seed(1)
    draw = draw_augmentation(Augmentation(flip=True))
    torch.manual_seed(1)
    assert torch.equal(draw, draw_augmentation(Augmentation(flip=True)))
    images = torch.rand(4, 1, 9, 14, requires_grad=True)
    together = augment(images, draw)
    alone = torch.cat([augment(image[None], draw) for image in images])
    torch.testing.assert_close(together, alone)
    together[0].sum().backward()
    assert images.grad[0].abs().sum() > 0
    assert images.grad[1:].abs().sum() == 0


def test_draws_stay_within_their_limits():
    torch.manual_seed(0)
    settings = Augmentation(shift=0.1, scale=0.5, degrees=90)
    draws = torch.stack([draw_augmentation(settings) for _ in range(200)])
    zoom = draws[:, :, :2].det().abs().rsqrt()
    assert draws[:, :, 2].abs().max() <= 0.2
    assert zoom.min() >= 1 / 1.5 - 1e-5
    assert zoom.max() <= 1.5 + 1e-5
    assert zoom.std() > 0.1
