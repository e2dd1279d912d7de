"""Augmentation: what it does to images, and that clients train on what it makes of theirs, by the seed alone."""

from __future__ import annotations

import pytest
import torch
from problems import blobs
from torch import Tensor, nn
from torch.nn import functional

from fedmerge import federation
from fedmerge.augment import augmented
from fedmerge.client import train_client
from fedmerge.config import Config
from fedmerge.problem import Examples
from fedmerge.seeds import default_generator, fork, generator
from fedmerge.sgd import LocalTraining, batches
from fedmerge.train import fit


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def test_shifts_move_an_image_by_whole_pixels_and_repeat_its_border() -> None:
    image = torch.zeros(1, 2, 28, 28)
    image[0, :, 14, 14] = 1
    found = augmented(image.expand(400, -1, -1, -1), "shifts", stream())
    places = found[:, 0].flatten(1).argmax(1)
    offsets = {(int(place) // 28 - 14, int(place) % 28 - 14) for place in places}
    assert offsets == {(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)}
    assert torch.equal(found[:, 0], found[:, 1])
    constant = torch.full((5, 1, 8, 8), 3.0)
    assert torch.equal(augmented(constant, "both", stream()), constant)


def test_flips_mirror_about_half_of_the_images_left_to_right() -> None:
    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    found = augmented(image.expand(200, -1, -1, -1), "flips", stream())
    mirrored = (found == image.flip(3)).flatten(1).all(1)
    assert ((found == image).flatten(1).all(1) ^ mirrored).all()
    assert 60 < int(mirrored.sum()) < 140


def test_augmentation_depends_on_its_generator_alone_and_leaves_images_as_they_are() -> None:
    images = blobs(20, seed=3).images
    before = images.clone()
    torch.manual_seed(1)
    first = augmented(images, "both", stream())
    torch.manual_seed(2)
    assert torch.equal(first, augmented(images, "both", stream()))
    assert not torch.equal(first, images)
    assert torch.equal(images, before)
    assert augmented(images, "none", stream()) is images


def test_what_is_no_image_cannot_be_shifted() -> None:
    with pytest.raises(ValueError, match=r"augment=shifts needs images .* got 2 axes"):
        augmented(torch.zeros(3, 5), "shifts", stream())


@pytest.mark.parametrize("augment", ["shifts", "flips", "both"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_memory_layout_changes_no_value_and_stays(augment: str, channels: int) -> None:
    images = torch.randn(9, channels, 12, 10, generator=generator(1))
    last = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)
    plain, found = augmented(images, augment, generator(2)), augmented(last, augment, generator(2))
    assert torch.equal(found, plain)
    assert (found.stride(), plain.stride()) == (last.stride(), images.stride())


# Clients.


def softmax_regression() -> nn.Module:
    with default_generator(0):
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 3)).double()


def pictures() -> Examples:
    images = torch.randn(10, 1, 6, 6, generator=generator(3), dtype=torch.float64)
    return Examples(images, torch.arange(10) % 3)


def trained_by_hand(examples: Examples, recipe: LocalTraining) -> Tensor:
    """The weights that torch's own SGD reaches on images that are augmented batch by batch."""
    model, stream = softmax_regression(), generator(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr)
    fork(stream)  # dropout's seed comes first
    chance = torch.Generator().manual_seed(fork(stream))
    for index in batches(len(examples), recipe.batch_size, stream):
        optimizer.zero_grad()
        images = augmented(examples.images[index], recipe.augment, chance)
        functional.cross_entropy(model(images), examples.labels[index]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found: Tensor = model.state_dict()["1.weight"]
    return found


@pytest.mark.parametrize("augment", ["shifts", "flips", "both"])
def test_a_step_is_sgd_on_the_augmented_images(augment: str) -> None:
    recipe = LocalTraining(1, 10, 0.1, momentum=0, warmup=0, augment=augment)
    model = softmax_regression()
    found, _ = fit(model, model.state_dict(), pictures(), recipe, generator=generator(5))
    torch.testing.assert_close(found["1.weight"], trained_by_hand(pictures(), recipe), rtol=1e-12, atol=1e-12)


def test_a_client_augments_its_images_by_the_seed_and_tells_of_those_that_it_has() -> None:
    config = Config(model="cnn@0.1", device="cpu", clients=3, local_epochs="1", batch_size=16)
    examples = federation.load(config)

    def weights(augment: str) -> Tensor:
        update = train_client(config.replace(augment=augment), examples, 0, 1, None)
        assert update.num_examples == len(examples.client(0))
        return torch.cat([tensor.flatten() for tensor in update.state.values()])

    found = {augment: weights(augment) for augment in ("none", "shifts", "flips", "both")}
    assert torch.equal(found["both"], weights("both"))
    assert len({tensor.sum().item() for tensor in found.values()}) == len(found)
