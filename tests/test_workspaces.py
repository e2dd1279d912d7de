"""Lent models: what one client leaves behind, the next does not see."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedmerge import models, workspaces
from fedmerge.architectures import Shape
from fedmerge.partial import last_layers
from fedmerge.problem import Examples
from fedmerge.seeds import generator
from fedmerge.train import LocalTraining, fit
from fedmerge.workspaces import lent

SHAPE = (1, 8, 8)
EXAMPLES = Examples(torch.randn(9, *SHAPE, generator=generator(0)), torch.arange(9) % 3)


@pytest.fixture(autouse=True)
def nothing_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspaces, "_kept", {})


def build(shape: Shape, num_classes: int) -> nn.Module:
    """A user's own model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(shape[1] * shape[2], num_classes))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "resnet20@0.25"])
def test_training_on_a_lent_model_gives_the_bits_of_a_new_one_whatever_was_done_with_it_before(name: str) -> None:
    new = models.create(name, shape=SHAPE, num_classes=3, seed=4)
    start = {key: tensor.clone() for key, tensor in new.state_dict().items()}
    recipe = LocalTraining(2, 4, 0.1)
    expected, _ = fit(new, start, EXAMPLES, recipe, generator=generator(1))
    with lent(name, shape=SHAPE, num_classes=3) as model:
        fit(model, start, EXAMPLES, replace(recipe, lr=1.0), generator=generator(2), moving=last_layers(start, 1))
    with lent(name, shape=SHAPE, num_classes=3) as again:
        assert again is model
        assert not any(module.training for module in again.modules())
        assert all(parameter.requires_grad and parameter.grad is None for parameter in again.parameters())
        found, _ = fit(again, start, EXAMPLES, recipe, generator=generator(1))
    assert all(torch.equal(tensor, expected[key]) for key, tensor in found.items())


def test_buffers_that_no_state_dict_holds_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def made(*_: object, **__: object) -> nn.Module:
        model = nn.Sequential(nn.Linear(2, 2))
        model.register_buffer("seen", torch.zeros(()), persistent=False)
        return model

    monkeypatch.setattr(models, "create", made)
    with lent("some", shape=SHAPE, num_classes=2) as model:
        model.get_buffer("seen").add_(3)
    with lent("some", shape=SHAPE, num_classes=2) as again:
        assert again is model
        assert float(again.get_buffer("seen")) == 0


def test_a_model_is_lent_to_one_at_a_time_and_not_taken_back_after_an_error() -> None:
    with lent("mlp", shape=SHAPE, num_classes=3) as first, lent("mlp", shape=SHAPE, num_classes=3) as second:
        assert first is not second
    with pytest.raises(ZeroDivisionError), lent("mlp", shape=SHAPE, num_classes=3) as broken:
        raise ZeroDivisionError
    with lent("mlp", shape=SHAPE, num_classes=3) as model:
        assert model is not broken


def test_a_users_own_model_is_built_anew_and_no_more_are_kept_than_a_few() -> None:
    for _ in range(2):
        with lent(f"{__name__}:build", shape=SHAPE, num_classes=3):
            pass
    assert workspaces._kept == {}
    for classes in range(2, 9):
        with lent("mlp@0.1", shape=SHAPE, num_classes=classes):
            pass
    assert len(workspaces._kept) == workspaces.MOST
