"""A sealed model's parts: whatever is done with them is what torch does with the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedmerge import parts
from fedmerge.seeds import generator


def build() -> nn.Sequential:
    """A network with statistics, and with a weight that has two names."""
    net = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 12))
    net[4].weight = net[3].weight
    return net


def other_weights() -> dict[str, Tensor]:
    """A state dict of such a network."""
    state = {name: tensor.clone() for name, tensor in build().state_dict().items()}
    chance = generator(0)
    for name in ("0.weight", "1.running_mean", "4.bias"):
        state[name] = torch.randn(state[name].shape, generator=chance)
    state["4.weight"] = state["3.weight"]
    state["1.num_batches_tracked"] = torch.tensor(7)
    return state


@pytest.mark.parametrize("sealed", [True, False])
def test_a_state_that_is_loaded_is_the_models_own_and_copies_are_nobodys(sealed: bool) -> None:
    model, state = build(), other_weights()
    if sealed:
        parts.seal(model)
    parts.load(model, state)
    copied = parts.copied(model)
    assert list(copied) == list(model.state_dict())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    parts.train(model)
    model(torch.randn(4, 1, 4, 4, generator=generator(1)))
    assert all(torch.equal(tensor, state[name]) for name, tensor in copied.items())
    assert int(parts.copied(model)["1.num_batches_tracked"]) == 8
    assert not torch.equal(parts.copied(model)["1.running_mean"], state["1.running_mean"])


@pytest.mark.parametrize("sealed", [True, False])
def test_modes_modules_and_parameters_are_torchs(sealed: bool) -> None:
    model = build()
    if sealed:
        parts.seal(model)
    assert list(parts.modules(model)) == list(model.modules())
    assert [id(found) for found in parts.parameters(model)] == [id(known) for known in model.parameters()]
    model[1].eval()
    parts.train(model)
    assert all(module.training for module in model.modules())
    parts.train(model, False)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("spoil", ["a name is missing", "a shape differs"])
@pytest.mark.parametrize("sealed", [True, False])
def test_a_state_of_another_architecture_is_torchs_error_and_no_broadcast(sealed: bool, spoil: str) -> None:
    model, state = build(), other_weights()
    if sealed:
        parts.seal(model)
    if spoil == "a shape differs":
        state["4.bias"] = torch.zeros(1)
    else:
        del state["4.bias"]
    with pytest.raises(RuntimeError, match=r"4\.bias"):
        parts.load(model, state)


def test_a_model_that_is_not_sealed_is_looked_through_each_time() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    assert len(parts.modules(model)) == 2
    model.append(nn.Linear(2, 2))
    assert len(parts.modules(model)) == 3
    assert len(parts.copied(model)) == 4


@pytest.mark.parametrize("sealed", [True, False])
def test_a_sealed_model_is_asked_once_and_any_other_each_time(sealed: bool) -> None:
    model, asked = nn.Linear(2, 2), list[nn.Module]()
    if sealed:
        parts.seal(model)

    def find(model: nn.Module) -> int:
        asked.append(model)
        return 3

    assert [parts.once(find, model), parts.once(find, model)] == [3, 3]
    assert asked == [model] * (1 if sealed else 2)
