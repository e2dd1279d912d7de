"""Training side by side against training one after the other, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmerge import batched
from fedmerge.batched import Training, fit_many, stackable
from fedmerge.configcheck import SCHEDULES
from fedmerge.examples import Part
from fedmerge.models import create
from fedmerge.problem import Examples
from fedmerge.seeds import default_generator, generator
from fedmerge.sgd import Diverged, LocalTraining
from fedmerge.train import fit

SIZES = (1, 2, 3, 4, 5, 9, 13, 40)


def chain(dtype: torch.dtype = torch.float64, *, bias: bool = True) -> nn.Module:
    with default_generator(0):
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(4, 6, bias=bias),
            nn.Sequential(nn.Tanh(), nn.Linear(6, 5)),
            nn.ReLU(),
            nn.Linear(5, 3),
        ).to(dtype)


def convolutional() -> nn.Module:
    return create("lenet5", shape=(1, 8, 8), num_classes=3, seed=0).double()


def trainings(
    model: nn.Module, sizes: Sequence[int], recipe: LocalTraining, shape: tuple[int, ...] = (1, 2, 2)
) -> list[Training]:
    """Clients with starts, examples and orders of their own; to be made again for each use of their generators."""
    found = []
    for client, size in enumerate(sizes):
        stream = generator(0, "client", client)
        dtype = next(model.parameters()).dtype
        start = {
            name: tensor + 0.1 * torch.randn(tensor.shape, generator=stream, dtype=dtype)
            for name, tensor in model.state_dict().items()
        }
        images = torch.randn(size, *shape, generator=stream, dtype=dtype)
        labels = torch.randint(3, (size,), generator=stream)
        epochs = recipe.epochs + client % 2
        own = LocalTraining(**{**vars(recipe), "epochs": epochs})
        part = Part.of_all(Examples(images, labels))
        found.append(Training(start, part, own, generator(1, "client", client)))
    return found


def alone(model: nn.Module, training: Training) -> dict[str, Tensor]:
    return fit(model, training.start, training.part.copied(), training.recipe, generator=training.generator)[0]


def assert_equal_to_rounding(
    model: nn.Module, sizes: Sequence[int], recipe: LocalTraining, shape: tuple[int, ...] = (1, 2, 2)
) -> None:
    together = fit_many(model, trainings(model, sizes, recipe, shape))
    for training, found in zip(trainings(model, sizes, recipe, shape), together, strict=True):
        assert isinstance(found, dict)
        expected = alone(model, training)
        assert list(found) == list(expected)
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-13)
            assert found[name].is_contiguous()


@settings(deadline=None, max_examples=25)
@given(
    sizes=st.lists(st.sampled_from(SIZES), min_size=1, max_size=6),
    batch_size=st.integers(1, 6),
    epochs=st.integers(1, 2),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    proximal_mu=st.sampled_from([0.0, 0.7]),
    schedule=st.sampled_from(SCHEDULES),
    warmup=st.sampled_from([0, 0.1, 0.5]),
    bias=st.booleans(),
)
def test_clients_of_any_sizes_train_together_as_alone(
    sizes: list[int],
    batch_size: int,
    epochs: int,
    momentum: float,
    weight_decay: float,
    proximal_mu: float,
    schedule: str,
    warmup: float,
    bias: bool,
) -> None:
    recipe = LocalTraining(epochs, batch_size, 0.1, momentum, weight_decay, proximal_mu, schedule, warmup)
    assert_equal_to_rounding(chain(bias=bias), sizes, recipe)


@pytest.mark.parametrize("model", [nn.Linear(4, 3).double(), create("mlp@0.1", shape=(1, 2, 2), num_classes=3, seed=0)])
def test_single_layers_and_the_librarys_mlp_train_together(model: nn.Module) -> None:
    shape = (4,) if isinstance(model, nn.Linear) else (1, 2, 2)
    assert_equal_to_rounding(model.double(), SIZES, LocalTraining(2, 4, 0.1), shape)


@pytest.mark.parametrize("most", [1, 3])
def test_more_models_than_a_processors_caches_hold_train_in_several_stacks(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stacks = chain(), list[int]()
    size = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(batched, "STACK_BYTES", most * size + 1)
    run = batched._Group.run

    def counted(group: batched._Group) -> list[dict[str, Tensor] | Diverged]:
        stacks.append(len(group._trainings))
        return run(group)

    monkeypatch.setattr(batched._Group, "run", counted)
    assert_equal_to_rounding(model, SIZES, LocalTraining(2, 4, 0.1))
    assert sum(stacks) == len(SIZES)
    assert max(stacks) == most


def test_convolutions_train_together_by_vmap() -> None:
    model = convolutional()
    assert not stackable(model)
    assert stackable(model, convolutions=True)
    assert_equal_to_rounding(model, (1, 5, 9), LocalTraining(1, 4, 0.1), (1, 8, 8))


def test_who_trains_beside_a_client_changes_nothing_but_rounding_and_the_same_group_gives_the_same_bits() -> None:
    model, recipe = chain(), LocalTraining(2, 4, 0.1)
    first, again = (fit_many(model, trainings(model, SIZES, recipe)) for _ in range(2))
    reordered = fit_many(model, trainings(model, SIZES, recipe)[::-1])[::-1]
    for one, two, other in zip(first, again, reordered, strict=True):
        assert isinstance(one, dict)
        assert isinstance(two, dict)
        assert isinstance(other, dict)
        for name, tensor in one.items():
            assert torch.equal(tensor, two[name])
            torch.testing.assert_close(tensor, other[name], rtol=1e-12, atol=1e-13)


def test_parts_of_the_same_examples_give_the_bits_of_their_copies() -> None:
    model, recipe = chain(), LocalTraining(2, 4, 0.1)
    apart = trainings(model, (9, 3, 14, 2), recipe)
    order = torch.randperm(28, generator=generator(7))
    images = torch.cat([training.part.whole.images for training in apart])[order]
    labels = torch.cat([training.part.whole.labels for training in apart])[order]
    whole = Examples(images, labels)
    places = torch.split(order.argsort(), [9, 3, 14, 2])
    shared = [
        replace(training, part=Part(whole, index))
        for training, index in zip(trainings(model, (9, 3, 14, 2), recipe), places, strict=True)
    ]
    for found, expected in zip(fit_many(model, shared), fit_many(model, apart), strict=True):
        assert isinstance(found, dict)
        assert isinstance(expected, dict)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


def test_a_client_that_diverges_does_so_alone() -> None:
    model, recipe = chain(), LocalTraining(2, 4, 0.1)
    group = trainings(model, (5, 9, 5), recipe)
    group[1].part.whole.images[0] = torch.inf
    results = fit_many(model, group)
    assert isinstance(results[1], Diverged)
    assert "the training loss became nan; lower --lr (it is 0.1)" in str(results[1])
    apart = trainings(model, (5, 9, 5), recipe)
    for place in (0, 2):
        expected, found = alone(model, apart[place]), results[place]
        assert isinstance(found, dict)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_a_client_without_examples_is_refused() -> None:
    model = chain()
    with pytest.raises(ValueError, match="there are no examples to train on"):
        fit_many(model, trainings(model, (3, 0), LocalTraining(1, 4, 0.1)))


def test_what_has_statistics_chance_or_weights_in_two_places_is_not_stacked() -> None:
    shared = nn.Linear(4, 4)
    tied = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tied[1].weight = tied[0].weight

    class Own(nn.Module):
        pass

    for layers in ([nn.BatchNorm1d(4)], [nn.Dropout()], [shared, nn.ReLU(), shared], [tied], [nn.Flatten(0)], [Own()]):
        assert not stackable(nn.Sequential(nn.Linear(4, 4), *layers), convolutions=True)
    assert stackable(chain())
    assert stackable(nn.Sequential(nn.Conv2d(1, 1, 1), nn.GroupNorm(1, 1)), convolutions=True)
