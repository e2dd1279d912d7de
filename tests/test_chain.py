"""Gradients by the chain rule written out, against autograd: the same bits for one network, to rounding for stacks."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge.chain import ELEMENTWISE, Chain, chain_for, chain_of
from fedmerge.models import create
from fedmerge.problem import Examples
from fedmerge.seeds import default_generator, generator
from fedmerge.sgd import LocalTraining
from fedmerge.train import fit

CLASSES = 3


def network(
    widths: list[int],
    layers: list[type[nn.Module]],
    *,
    bias: bool = True,
    dtype: torch.dtype = torch.float64,
    around: tuple[type[nn.Module], ...] = (),
) -> nn.Sequential:
    with default_generator(0):
        found: list[nn.Module] = [nn.Flatten(), *(layer() for layer in around)]
        for place, (inputs, outputs) in enumerate(zip([4, *widths], [*widths, CLASSES], strict=True)):
            found += [nn.Linear(inputs, outputs, bias=bias), *([layers[place]()] if place < len(widths) else [])]
        return nn.Sequential(*found, *(layer() for layer in around)).to(dtype)


def images_and_labels(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    chance = generator(0, "images")
    images = torch.randn(*shape, 1, 2, 2, generator=chance, dtype=dtype)
    return images, torch.randint(CLASSES, shape, generator=chance)


def by_autograd(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    weights = dict(model.named_parameters())
    loss = functional.cross_entropy(model(images), labels)
    return loss, dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def the_chain(model: nn.Module) -> Chain:
    found = chain_of(model)
    assert found is not None
    return found


@settings(deadline=None, max_examples=50)
@given(
    widths=st.lists(st.integers(1, 6), max_size=3),
    layer=st.sampled_from(ELEMENTWISE),
    bias=st.booleans(),
    size=st.integers(1, 7),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    around=st.sampled_from([(), (nn.ReLU,), (nn.Tanh,)]),
)
def test_gradients_have_the_bits_of_autograds(
    widths: list[int],
    layer: type[nn.Module],
    bias: bool,
    size: int,
    dtype: torch.dtype,
    around: tuple[type[nn.Module], ...],
) -> None:
    model = network(widths, [layer] * len(widths), bias=bias, dtype=dtype, around=around)
    images, labels = images_and_labels(size, dtype=dtype)
    expected_loss, expected = by_autograd(model, images, labels)
    loss, found = the_chain(model).gradients(dict(model.named_parameters()), images, labels)
    torch.testing.assert_close(loss, expected_loss.detach())
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].stride() == tensor.stride()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("bias", [True, False])
def test_velocities_of_a_stack_gain_each_networks_gradient_by_its_own_shares(momentum: float, bias: bool) -> None:
    model = network([5, 4], [nn.ReLU, nn.Tanh], bias=bias)
    images, labels = images_and_labels(3, 6)
    chance = generator(0, "weights")
    like = {name: (3, *tensor.shape) for name, tensor in model.named_parameters()}
    weights, before = [
        {name: torch.randn(shape, generator=chance, dtype=torch.float64) for name, shape in like.items()} for _ in "12"
    ]
    shares = torch.tensor([[1, 1, 1, 1, 1, 1], [2, 2, 2, 0, 0, 0], [6, 0, 0, 0, 0, 0]]).double() / 6
    velocities = copy.deepcopy(before)
    losses = the_chain(model).accelerate(velocities, momentum, weights, images, labels, shares)
    for place, size in enumerate((6, 3, 1)):
        own = {name: tensor[place].requires_grad_() for name, tensor in weights.items()}
        loss = functional.cross_entropy(functional_call(model, own, (images[place, :size],)), labels[place, :size])
        torch.testing.assert_close(losses[place], loss.detach(), rtol=1e-12, atol=0)
        for name, gradient in zip(own, torch.autograd.grad(loss, list(own.values())), strict=True):
            expected = momentum * before[name][place] + gradient
            torch.testing.assert_close(velocities[name][place], expected, rtol=1e-12, atol=1e-14)


def test_training_has_the_bits_of_autograds(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create("mlp@0.1", shape=(1, 2, 2), num_classes=CLASSES, seed=0)
    examples = Examples(*images_and_labels(21, dtype=torch.float32))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    used: list[Chain] = []

    def trained() -> dict[str, Tensor]:
        return fit(model, start, examples, LocalTraining(epochs=3, batch_size=4), generator=generator(0, "order"))[0]

    gradients = Chain.gradients

    def counted(chain: Chain, *arguments: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        used.append(chain)
        return gradients(chain, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(Chain, "gradients", counted)
    found = trained()
    assert len(used) == 15
    monkeypatch.setattr("fedmerge.train.chain_for", lambda *_: None)
    for name, tensor in trained().items():
        assert torch.equal(found[name], tensor)
    assert len(used) == 15


def test_chains_are_of_linear_and_element_wise_layers_alone_with_weights_of_their_own_and_no_hooks() -> None:
    shared, own = nn.Linear(4, 4), nn.Linear
    tied = nn.Sequential(own(4, 4), own(4, 4))
    tied[1].weight = tied[0].weight
    frozen, hooked = own(4, 4), own(4, 4)
    frozen.bias.requires_grad_(False)
    hooked.register_forward_hook(lambda *_: None)

    class Named(nn.Sequential):
        pass

    for layers in (
        [nn.BatchNorm1d(4)],
        [nn.Dropout()],
        [nn.ELU(inplace=True)],
        [nn.Flatten(0)],
        [shared, nn.ReLU(), shared],
        [tied],
        [frozen],
        [hooked],
        [Named(own(4, 4))],
    ):
        assert chain_of(nn.Sequential(nn.Flatten(), *layers, nn.Linear(4, 2))) is None
    assert chain_of(nn.Sequential(nn.Flatten(), nn.ReLU())) is None
    assert chain_of(nn.Sequential(nn.Flatten(), nn.ReLU(inplace=True), nn.Sequential(own(4, 2)))) is not None


def test_a_network_that_does_not_flatten_is_a_chain_for_vectors_alone() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, CLASSES))
    assert chain_for(model, torch.zeros(5, 1, 2, 2)) is None
    assert chain_for(nn.Linear(4, CLASSES), torch.zeros(5, 4)) is not None
    assert chain_for(network([], []), torch.zeros(5, 1, 2, 2)) is not None


def test_a_label_that_is_no_class_is_an_error() -> None:
    model = network([], [])
    images, _ = images_and_labels(2)
    with pytest.raises((RuntimeError, IndexError)):
        the_chain(model).gradients(dict(model.named_parameters()), images, torch.tensor([0, CLASSES]))
