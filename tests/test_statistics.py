"""Statistics of a client's data under its model: oracles, and how they follow a renaming of units."""

from __future__ import annotations

import itertools

import pytest
import torch
from problems import TwoLayers, blobs, problem_of, same, trained, with_statistics
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge.basis import Permutation, rebase
from fedmerge.catalogue import ALIGNERS, STATISTICS
from fedmerge.layers import from_matrix, linear_layers, matrix, rows
from fedmerge.oneshot import align_updates
from fedmerge.problem import Update
from fedmerge.seeds import default_generator, generator
from fedmerge.settings import ConfigurationError
from fedmerge.statistics import collect, diagonal_fisher, expected_shape, gram_matrices, known_statistics, rebased


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def test_the_mean_over_all_signs_is_the_exact_fisher_information() -> None:
    model = TwoLayers().double().eval()
    state, images = model.state_dict(), blobs(6, seed=1).images.double()
    patterns = [torch.tensor(signs, dtype=torch.float64) for signs in itertools.product((-1, 1), repeat=3)]
    found = [diagonal_fisher(model, state, images, signs.expand(6, 3)) for signs in patterns]
    exact = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    for image in images:
        for label in range(3):
            leaves = {name: tensor.clone().requires_grad_() for name, tensor in state.items()}
            score = functional_call(model, leaves, (image[None],)).log_softmax(1)[0, label]
            for name, slope in zip(leaves, torch.autograd.grad(score, list(leaves.values())), strict=True):
                exact[name] += score.detach().exp() * slope**2 / len(images)
    for name, tensor in exact.items():
        mean = torch.stack([of_pattern[name] for of_pattern in found]).mean(0)
        torch.testing.assert_close(mean, tensor, rtol=1e-10, atol=1e-14)


def test_a_sure_models_fisher_is_found_without_drawing_its_classes() -> None:
    with default_generator(0):
        model = TwoLayers().double().eval()
    state = {name: 6 * tensor for name, tensor in model.state_dict().items()}
    images = blobs(400, seed=2).images.double()
    estimates = [
        sum(
            float(tensor.sum())
            for tensor in diagonal_fisher(
                model, state, images, torch.randint(0, 2, (400, 3), generator=chance).double() * 2 - 1
            ).values()
        )
        for chance in [generator(0, "signs", draw) for draw in range(6)]
    ]
    assert max(estimates) < 1.5 * min(estimates)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"padding": 1}, {"stride": 2, "padding": (0, 1)}, {"dilation": 2}],
    ids=["plain", "padded", "strided", "dilated"],
)
def test_a_convolution_is_linear_in_its_patches(options: dict[str, int], bias: bool) -> None:
    layer = nn.Conv2d(2, 5, 3, bias=bias, **options).double()  # type: ignore[arg-type]
    images = torch.randn(3, 2, 7, 6, generator=stream(), dtype=torch.float64)
    state = {"weight": layer.weight.detach()} | ({"bias": layer.bias.detach()} if layer.bias is not None else {})
    output = layer(images).detach()
    found = (rows(layer, images) @ matrix("weight", state)).reshape(3, *output.shape[2:], 5)
    torch.testing.assert_close(found.movedim(-1, 1), output)
    assert same(from_matrix(matrix("weight", state), "weight", state), state)


def test_layers_that_are_not_linear_in_plain_patches_are_left_out() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 2, 3, groups=2),
        nn.Conv2d(2, 2, 3, padding="same"),
        nn.Conv2d(2, 2, 3, padding_mode="circular"),
        nn.Linear(3, 3),
    )
    assert list(linear_layers(model)) == ["3.weight"]


def test_gram_matrices_are_the_mean_outer_products_of_each_layers_inputs() -> None:
    model = TwoLayers().double().eval()
    state, images = model.state_dict(), blobs(300, seed=1).images.double()
    found = gram_matrices(model, state, images)
    ones = torch.ones(300, 1, dtype=torch.float64)
    inputs = torch.cat([images.flatten(1), ones], 1)
    hidden = torch.cat([torch.tanh(functional.linear(images.flatten(1), state["1.weight"], state["1.bias"])), ones], 1)
    torch.testing.assert_close(found["1.weight"], inputs.T @ inputs / 300)
    torch.testing.assert_close(found["3.weight"], hidden.T @ hidden / 300)


@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "resnet20@0.25"])
def test_statistics_of_a_renamed_model_are_the_renamed_statistics(name: str) -> None:
    problem = problem_of(name)
    problem.model.double()
    state = {
        key: tensor.double() if tensor.is_floating_point() else tensor
        for key, tensor in trained(name, 1)[0].state.items()
    }
    spaces = problem_of(name).spaces
    changes = [Permutation(torch.randperm(space.size, generator=stream())) for space in spaces]
    renamed = rebase(state, spaces, changes)
    images = blobs(20, seed=1).images.double()
    before, expected = (
        collect(STATISTICS, problem.model, weights, images, generator=stream()) for weights in (state, renamed)
    )
    found = rebased(before, state, spaces, changes)
    assert {kind: list(found[kind]) for kind in found} == {kind: list(expected[kind]) for kind in expected}
    for kind in STATISTICS:
        for key, tensor in expected[kind].items():
            torch.testing.assert_close(found[kind][key], tensor, rtol=1e-4, atol=1e-10)


@pytest.mark.parametrize("align", [*ALIGNERS, "weights:start=activations"])
def test_statistics_follow_permutations_and_are_lost_to_dense_changes(align: str) -> None:
    problem = problem_of("mlp@0.1")
    updates = with_statistics(problem, trained("mlp@0.1"))
    found = align_updates(problem, updates, align=align, seed=0)
    dense = align in ("cca", "ot", "zipit") or found.diagnostics.get("chosen", "").startswith("cca")
    for update in found.updates:
        assert set(update.statistics) == (set() if dense else set(STATISTICS))
        if dense:
            continue
        images, chance = blobs(20, seed=update.partition_id).images, generator(update.partition_id, "statistics")
        again = collect(STATISTICS, problem.model, update.state, images, generator=chance)
        for kind in STATISTICS:
            for name, tensor in again[kind].items():
                torch.testing.assert_close(update.statistics[kind][name], tensor, rtol=1e-3, atol=1e-6)


def test_a_shape_is_expected_of_weights_alone() -> None:
    state = {
        "w": torch.zeros(3, 2),
        "bias": torch.zeros(3),
        "n": torch.tensor(0),
        "a.weight": torch.zeros(4, 2, 3, 3),
        "a.bias": torch.zeros(4),
    }
    assert expected_shape("fisher", "w", state) == (3, 2)
    assert expected_shape("gram", "w", state) == (2, 2)
    assert expected_shape("gram", "a.weight", state) == (19, 19)
    for kind, name in (("fisher", "n"), ("gram", "bias"), ("gram", "no"), ("fisher", "no")):
        assert expected_shape(kind, name, state) is None


def test_a_client_without_a_statistic_is_named() -> None:
    empty: dict[str, Tensor] = {}
    updates = [Update({}, 1, 0, statistics={"fisher": empty}), Update({}, 1, 7)]
    with pytest.raises(ConfigurationError, match=r"it needs .*'fisher'.*1 of 2.*client 7.*--client-statistics fisher"):
        known_statistics(updates, "fisher", "it")
    odd = [
        Update({}, 1, 0, statistics={"gram": empty}),
        Update({}, 1, 3, statistics={"gram": {"w": torch.zeros(1, 1)}}),
    ]
    with pytest.raises(ConfigurationError, match=r"same tensors.*client 3 differs from client 0"):
        known_statistics(odd, "gram", "it")
