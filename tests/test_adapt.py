"""States of one architecture as states of another: functions stay where they can, and what is no family is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from invariance import outputs, random_state
from problems import same
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.adapt import adapt, relation
from fedmerge.architectures import BUILDERS
from fedmerge.data import load
from fedmerge.models import create
from fedmerge.train import LocalTraining, evaluate, fit

SHAPE = (1, 8, 8)
DEEPER = ("vgg16", "vgg16-bn", "resnet32", "resnet44", "resnet56", "vit8")
"""They are others with more of the same."""


def images(count: int = 60) -> Tensor:
    return torch.randn(count, *SHAPE, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def network(name: str) -> nn.Module:
    return create(name, shape=SHAPE, num_classes=4, seed=0).double()


class Attention(nn.Module):
    """Tokens of four pixels, two heads; scores are scaled by the size of a head, or by a constant."""

    def __init__(self, size: int, scale: float | None = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.embed, self.norm = nn.Linear(4, size), nn.LayerNorm(size)
        self.projections, self.output = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.head = nn.Linear(size, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        tokens = self.embed(inputs.reshape(-1, 16, 4))
        parts = self.projections(self.norm(tokens)).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], scale=self.scale)
        logits: Tensor = self.head((tokens + self.output(found.transpose(1, 2).flatten(2))).mean(1))
        return logits


class PreActivation(nn.Module):
    """A BatchNorm that cannot be folded, behind an addition."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, size, 3, 2), nn.Conv2d(size, size, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(size), nn.Linear(size, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.first(inputs)
        found = functional.leaky_relu(self.norm(found + self.second(functional.leaky_relu(found))))
        logits: Tensor = self.head(found.mean((2, 3)))
        return logits


def convolutions(size: int) -> nn.Module:
    """Of all kinds: depthwise behind a BatchNorm, in groups, transposed; and a flatten with several entries a unit."""
    return nn.Sequential(
        nn.Conv2d(1, size, 3, stride=2),
        nn.BatchNorm2d(size),
        nn.LeakyReLU(),
        nn.Conv2d(size, size, 3, padding=1, groups=size),
        nn.BatchNorm2d(size),
        nn.Conv2d(size, 2 * size, 1),
        nn.GroupNorm(2, 2 * size),
        nn.LeakyReLU(),
        nn.Conv2d(2 * size, 2 * size, 1, groups=2, bias=False),
        nn.ConvTranspose2d(2 * size, size, 2),
        nn.PReLU(size),
        nn.Flatten(),
        nn.Linear(16 * size, 4),
    )


CASES: dict[str, Callable[[int], nn.Module]] = {
    "convolutions": convolutions,
    "attention": Attention,
    "pre-activation": PreActivation,
}

MULTIPLES = ("vit", "attention", "convolutions")
"""Have a norm over units, which copies keep only if there are equally many of each."""

NAMES = [*(name for name in BUILDERS if name not in DEEPER), *CASES]


def pair(name: str, first: int, second: int) -> tuple[nn.Module, nn.Module]:
    """An architecture in two widths, in parts of the full one or in units."""
    if name in CASES:
        return CASES[name](4 * first).double().eval(), CASES[name](4 * second).double().eval()
    full = 16 if name.startswith("vgg") else 4
    return network(f"{name}@{first / full}"), network(f"{name}@{second / full}")


def state_of(model: nn.Module, seed: int = 1) -> dict[str, Tensor]:
    return random_state(model, torch.Generator().manual_seed(seed))


def differ(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / ours.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_a_wider_network_computes_the_same(name: str) -> None:
    small, large = pair(name, 1, 2)
    assert relation(small, large, images(1)) == "width"
    state = state_of(small)
    wider = adapt(small, large, state, images(2))
    assert differ(outputs(small, state, images()), outputs(large, wider, images())) < 1e-12


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MULTIPLES])
def test_any_width_above_computes_the_same_without_norms_over_units(name: str) -> None:
    small, large = pair(name, 2, 3)
    state = state_of(small)
    wider = adapt(small, large, state, images(2))
    assert differ(outputs(small, state, images()), outputs(large, wider, images())) < 1e-12


@pytest.mark.parametrize("name", NAMES)
def test_copies_become_the_units_that_they_were(name: str) -> None:
    small, large = pair(name, 1, 2)
    state = state_of(small)
    wider = adapt(small, large, state, images(2))
    assert relation(large, small, images(1)) == "width"
    back = adapt(large, small, wider, images())
    assert differ(outputs(small, state, images(7)), outputs(small, back, images(7))) < 1e-9
    for key, tensor in state.items():
        torch.testing.assert_close(back[key], tensor, rtol=1e-8, atol=1e-8)


def test_the_same_width_is_the_identity_and_a_copy() -> None:
    first, second = network("cnn@0.25"), network("cnn@0.25")
    state = state_of(first)
    assert relation(first, second, images(1)) == "same"
    found = adapt(first, second, state, images(1))
    assert same(found, state)
    assert all(found[key].data_ptr() != tensor.data_ptr() for key, tensor in state.items())


def sizes(*hidden: int, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    widths = [64, *hidden]
    layers = [[nn.Linear(*pair), activation()] for pair in zip(widths, hidden, strict=False)]
    return nn.Sequential(nn.Flatten(), *(layer for both in layers for layer in both), nn.Linear(hidden[-1], 4)).double()


def test_some_layers_may_be_wider_and_others_narrower() -> None:
    small, source, target = sizes(8, 6, 5), sizes(8, 12, 5), sizes(12, 6, 7)
    state = state_of(small)
    repeated = adapt(small, source, state, images(1))
    assert relation(source, target, images(1)) == "width"
    found = adapt(source, target, repeated, images())
    assert differ(outputs(small, state, images(5)), outputs(target, found, images(5))) < 1e-9


def test_a_norm_over_units_that_are_copied_unevenly_is_nearly_kept() -> None:
    small, large = network("vit@0.5"), network("vit@0.75")
    assert relation(small, large, images(1)) == relation(large, small, images(1)) == "width"
    state = dict(small.state_dict())
    wider = adapt(small, large, state, images(2))
    assert 1e-6 < differ(outputs(small, state, images()), outputs(large, wider, images())) < 0.3


def test_scales_of_both_signs_are_joined_by_what_units_do() -> None:
    """A BatchNorm's negative scale and its layer's negative weights make the unit that positive ones make."""
    small, large = pair("vgg11-bn", 1, 2)
    state = state_of(small)
    wider = adapt(small, large, state, images(2))
    half = len(wider["0.weight"]) // 2
    for key in ("0.weight", "1.weight", "1.running_mean"):
        wider[key][half:] *= -1
    back = adapt(large, small, wider, images())
    assert differ(outputs(small, state, images(7)), outputs(small, back, images(7))) < 1e-9


def test_states_come_fresh_in_their_dtypes_and_the_same_each_time() -> None:
    source, target = (create(f"resnet20@{width}", shape=SHAPE, num_classes=4, seed=0) for width in (0.5, 0.25))
    state = dict(source.state_dict())
    state["1.num_batches_tracked"] = torch.tensor(17)
    before, models = {key: tensor.clone() for key, tensor in state.items()}, [source.state_dict(), target.state_dict()]
    models = [{key: tensor.clone() for key, tensor in model.items()} for model in models]
    first, second = (adapt(source, target, state, images().float()) for _ in range(2))
    assert same(first, second)
    assert same(state, before)
    assert same(dict(source.state_dict()), models[0])
    assert same(dict(target.state_dict()), models[1])
    expected = {key: (tensor.shape, tensor.dtype) for key, tensor in target.state_dict().items()}
    assert {key: (tensor.shape, tensor.dtype) for key, tensor in first.items()} == expected
    assert first["1.num_batches_tracked"] == 17
    target.load_state_dict(first)


class Untraceable(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.layers = sizes(size)

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layers(inputs if inputs.sum() > 0 else -inputs)
        return found


class Activated(nn.Module):
    def __init__(self, size: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation
        self.first, self.second = nn.Linear(64, size), nn.Linear(size, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        logits: Tensor = self.second(self.activation(self.first(inputs.flatten(1))))
        return logits


def strided(size: int, stride: int) -> nn.Module:
    layers = nn.Conv2d(1, size, 3, stride), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(size, 4)
    return nn.Sequential(*layers).double()


STRANGERS: dict[str, tuple[nn.Module, nn.Module]] = {
    "families": (network("mlp@0.1"), network("cnn@0.1")),
    "numbers of layers": (sizes(4, 4), sizes(4, 4, 4)),
    "fewer residual blocks": (network("resnet32@0.1"), network("resnet20@0.1")),
    "classes": (sizes(4), nn.Sequential(*list(sizes(4))[:-1], nn.Linear(4, 5)).double()),
    "strides": (strided(4, 1), strided(8, 2)),
    "strides in one width": (strided(4, 1), strided(4, 2)),
    "activations": (Activated(4, torch.relu), Activated(4, torch.tanh)),
    "classes of activations": (sizes(4), sizes(4, activation=nn.Tanh)),
    "heads of another size": (Attention(8, None).double(), Attention(16, None).double()),
    "what cannot be traced": (Untraceable(4), Untraceable(8)),
    "biases": (nn.Linear(8, 4), nn.Linear(8, 4, bias=False)),
}


@pytest.mark.parametrize("what", STRANGERS)
def test_other_families_are_told_apart_and_refused_by_name(what: str) -> None:
    source, target = (model.double().eval() for model in STRANGERS[what])
    assert relation(source, target, images(2)) is None
    names = rf"{type(source).__name__} of [\d,]+ parameters and {type(target).__name__} of [\d,]+ parameters"
    with pytest.raises(ValueError, match=rf"one family.*{names}: .*[Dd]istil"):
        adapt(source, target, state_of(source), images(2))


def test_the_server_needs_an_image() -> None:
    with pytest.raises(ValueError, match="at least one of the server's images, got none"):
        relation(sizes(4), sizes(5), images(0))


@cache
def of_digits() -> tuple[nn.Module, dict[str, Tensor]]:
    model = create("cnn@0.5", shape=SHAPE, num_classes=10, seed=0)
    state, _ = fit(
        model, model.state_dict(), load("digits").train[:700], LocalTraining(epochs=6), generator=torch.Generator()
    )
    return model.eval(), state


def cut(state: dict[str, Tensor], target: nn.Module) -> dict[str, Tensor]:
    """Magnitude pruning: each layer keeps its units of the largest weights."""
    result, kept = {}, torch.arange(1)
    for key in ("0", "3", "7", "9"):
        weight = state[f"{key}.weight"]
        if key == "7":
            kept = (4 * kept[:, None] + torch.arange(4)).flatten()
        size = len(target.state_dict()[f"{key}.weight"])
        units = weight.flatten(1).norm(dim=1).topk(size).indices.sort().values
        result[f"{key}.weight"], result[f"{key}.bias"] = weight[units][:, kept], state[f"{key}.bias"][units]
        kept = units
    return result


@pytest.mark.parametrize("width", [0.25, 0.125])
def test_joining_units_loses_less_than_cutting_them(width: float) -> None:
    model, state = of_digits()
    target = create(f"cnn@{width}", shape=SHAPE, num_classes=10, seed=0)
    examples = load("digits").train
    server, validation = examples[700:900], examples[900:]
    joined = adapt(model, target, state, server.images)
    losses = [evaluate(target, [found], validation).loss for found in (joined, cut(state, target))]
    assert losses[0] < 0.9 * losses[1]
