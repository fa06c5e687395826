"""Augmentation: random numbers of its own for each image, the same on any number of ranks."""
import hashlib

import pytest
import torch

import vit_helpers

EVERYTHING = "crop,flip,trivial,erase,cutout"


@pytest.fixture(scope="module")
def augmentation():
    return vit_helpers.load_notebook("03_augmentation")


@pytest.fixture
def images():
    """32 images of 3 x 8 x 8, all alike, every pixel different and none black."""
    return torch.arange(64, dtype=torch.uint8).view(1, 1, 8, 8).repeat(32, 3, 1, 1) + 1


def generator():
    return vit_helpers.generator(0, 1, 2)


@pytest.mark.parametrize("kinds", ["crop,flip", EVERYTHING])
def test_each_image_is_changed_by_random_numbers_of_its_own(augmentation, images, kinds):
    changed = augmentation.augment(images, kinds, generator())
    assert len({image.numpy().tobytes() for image in changed}) > 12     # 9 shifts, each mirrored


@pytest.mark.parametrize("kinds", ["crop,flip", EVERYTHING])
@pytest.mark.parametrize("world_size", [2, 3])
def test_images_are_changed_alike_on_any_number_of_ranks(augmentation, images, kinds, world_size):
    whole = augmentation.augment(images, kinds, generator())
    for rank in range(world_size):
        part = slice(rank, 32, world_size)
        own = augmentation.augment(images[part], kinds, generator(), part)
        assert torch.equal(own, whole[part])


def test_none_changes_nothing(augmentation, images):
    assert torch.equal(augmentation.augment(images, "none", generator()), images)


def test_images_of_one_channel_and_a_batch_of_one(augmentation, images):
    changed = augmentation.augment(images[:1, :1], EVERYTHING, generator())
    assert changed.shape == (1, 1, 8, 8)
    assert changed.dtype == torch.uint8


def test_cutout_hides_a_square_of_every_image(augmentation):
    """At most 12 of 32 pixels wide and tall, less at an edge, in the mean colour of the image."""
    noise = torch.randint(256, (64, 3, 32, 32), generator=generator(), dtype=torch.uint8)
    changed = augmentation.augment(noise, "cutout", generator())
    for before, after in zip(noise, changed, strict=True):
        down, right = (before != after).any(0).nonzero().unbind(1)
        tall, wide = (int(places.max() - places.min()) + 1 for places in (down, right))
        assert 5 <= tall <= 12 and 5 <= wide <= 12
        square = after[:, down.min():down.max() + 1, right.min():right.max() + 1]
        mean = before.float().mean((1, 2)).round().byte()[:, None, None]
        assert torch.equal(square, mean.expand_as(square))


@pytest.mark.parametrize("kinds, digest", [("crop,flip", "f18f51f2e60a5a42"),
                                           ("crop,flip,erase", "122570600ec50b5c")])
def test_random_numbers_are_those_of_earlier_versions(augmentation, images, kinds, digest):
    """A run that was begun by an earlier version goes on with the very same images (with erasing,
    since noise is drawn for the erased images alone)."""
    changed = augmentation.augment(images, kinds, generator())
    assert hashlib.sha256(changed.numpy().tobytes()).hexdigest()[:16] == digest


NAMES = ["identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate", "brightness",
         "contrast", "colour", "sharpness", "posterize", "solarize", "autocontrast", "equalize"]


def test_operations_keep_their_order(augmentation):
    """A random number says which: in another order, old runs would go on with other images."""
    assert [operation.__name__ for operation in augmentation.OPERATIONS] == NAMES


@pytest.mark.parametrize("name", NAMES[:-2])
def test_no_strength_leaves_an_image_as_it_is(augmentation, images, name):
    noise = torch.randint(256, images.shape, generator=generator()).float()
    same = getattr(augmentation, name)(noise, torch.zeros(32))
    torch.testing.assert_close(same, noise, atol=1e-3, rtol=0)


def test_operations_stay_in_range_and_differ(augmentation):
    noise = torch.randint(40, 200, (8, 3, 32, 32), generator=generator()).float()
    results = [operation(noise, torch.full((8,), 0.9)) for operation in augmentation.OPERATIONS]
    assert len({result.numpy().tobytes() for result in results}) == 14
    assert all(result.min() >= 0 for result in results)
    assert all(result.max() <= 255 for result in results)


@pytest.fixture
def mixed(augmentation):
    """(images, labels, mixed images, targets): the value of an image is its label."""
    labels = torch.arange(64) % 7
    images = labels.view(-1, 1, 1, 1).expand(-1, 3, 8, 8).double()
    return images, labels, *augmentation.mix(images, labels, 7, 0.8, generator())


def test_mixed_images_and_their_targets_go_together(mixed):
    _, _, images, targets = mixed
    expected = targets @ torch.arange(7.0, dtype=torch.double)
    torch.testing.assert_close(images.mean((1, 2, 3)), expected)


def test_the_fraction_asked_for_is_mixed_by_either_method(mixed):
    _, _, images, targets = mixed
    is_mixed = targets.max(1).values < 1
    assert 0.6 < is_mixed.double().mean() < 0.95
    cut = images.amax((1, 2, 3)) > images.amin((1, 2, 3))           # CutMix leaves two values
    assert 10 < cut.sum() < 40


@pytest.mark.parametrize("rank", [0, 1])
def test_images_are_mixed_alike_on_two_ranks(augmentation, mixed, rank):
    images, labels, whole, targets = mixed
    part = slice(rank, 64, 2)
    own, own_targets = augmentation.mix(images[part], labels[part], 7, 0.8, generator(), part)
    torch.testing.assert_close(own, whole[part])
    torch.testing.assert_close(own_targets, targets[part])
