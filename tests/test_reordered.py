"""Pooling before the ReLU: the same bits, under the same names; other models as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call

from fedmerge.models import create
from fedmerge.reordered import reordered

SHAPE = (1, 32, 32)


def nested() -> nn.Module:
    layers = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1))
    return nn.Sequential(layers, nn.Sequential(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 10)))


def named(name: str) -> Callable[[], nn.Module]:
    return lambda: create(name, shape=SHAPE, num_classes=10, seed=0)


@pytest.mark.parametrize("make", [named("lenet5"), named("cnn"), named("vgg11-bn@0.25"), nested])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_the_same_bit_for_bit(
    make: Callable[[], nn.Module], layout: torch.memory_format
) -> None:
    model = make()
    ours = reordered(model)
    assert str(ours) != str(model)
    assert list(ours.state_dict()) == list(model.state_dict())
    images = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0))
    images = torch.empty_like(images, memory_format=layout).copy_(images)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moving = [name for name, _ in model.named_parameters()]
    found = []
    for one in (model, ours):
        weights = {name: tensor.clone().requires_grad_(name in moving) for name, tensor in state.items()}
        logits = functional_call(one, weights, (images,))
        found.append([logits, *torch.autograd.grad(logits.logsumexp(1).sum(), [weights[name] for name in moving])])
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))


def test_the_layers_are_the_models_own() -> None:
    model = create("cnn", shape=SHAPE, num_classes=10, seed=0)
    ours = reordered(model)
    assert {id(layer) for layer in ours.children()} == {id(layer) for layer in model.children()}
    model.eval()
    assert not any(layer.training for layer in ours.children())


def test_what_has_nothing_to_reorder_is_returned_as_it_is() -> None:
    class Own(nn.Sequential):
        """May have a forward pass of its own."""

    for model in (
        create("mlp", shape=SHAPE, num_classes=10, seed=0),
        create("resnet20", shape=SHAPE, num_classes=10, seed=0),
        Own(nn.ReLU(), nn.MaxPool2d(2)),
        nn.Sequential(nn.Tanh(), nn.MaxPool2d(2), nn.ReLU(), nn.AvgPool2d(2)),
    ):
        assert reordered(model) is model
