"""PLeaS: its laws, and what it refuses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import SHAPE, problem_of, same, shuffled, trained
from torch import nn

from fedmerge.merge.average import mean_state
from fedmerge.merge.pleas import PLeaS
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "resnet20@0.25"])
def test_equal_models_merge_to_themselves_also_when_their_units_are_renamed(name: str) -> None:
    problem, (update,) = problem_of(name), trained(name, 1)
    other = shuffled(problem, update, 3)
    outcome = merge_updates(problem, [update, other], align="activations", merge="pleas", seed=0, screen="off")
    reference = update if outcome.diagnostics["align"]["reference"] == update.partition_id else other
    images = problem.data.images
    ours, merged = (
        torch.func.functional_call(problem.model, dict(state), (images,))
        for state in (reference.state, outcome.merged.state)
    )
    if name == "resnet20@0.25":  # its BatchNorm statistics are estimated again
        for key, _ in problem.model.named_parameters():
            torch.testing.assert_close(outcome.merged.state[key], reference.state[key], rtol=1e-4, atol=1e-5)
    else:  # units that are dead on these images may be swapped
        torch.testing.assert_close(merged, ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_on_one_linear_layer_it_is_the_least_squares_of_the_mean_outputs(kind: str) -> None:
    layer = nn.Linear(36, 3) if kind == "linear" else nn.Conv2d(1, 3, 6)
    model = nn.Sequential(nn.Flatten() if kind == "linear" else nn.Identity(), layer, nn.Flatten()).double().eval()
    images = torch.randn(80, *SHAPE, generator=stream(), dtype=torch.float64)
    chance = stream()
    states = [
        {name: torch.randn(tensor.shape, generator=chance).double() for name, tensor in model.state_dict().items()}
        for _ in range(3)
    ]
    inputs = torch.cat([images.flatten(1), torch.ones(80, 1, dtype=torch.float64)], 1)
    outputs = torch.stack([torch.func.functional_call(model, state, (images,)) for state in states]).mean(0)
    solution = torch.linalg.lstsq(inputs, outputs).solution
    problem = Problem(model, Examples.unlabelled(images))
    updates = [Update(state, 1, client) for client, state in enumerate(states)]
    found = PLeaS(ridges=(1e-13,))(problem, updates, generator=stream()).state
    torch.testing.assert_close(found["1.weight"].flatten(1).T, solution[:-1], rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(found["1.bias"], solution[-1], rtol=1e-7, atol=1e-8)


def test_a_hidden_layer_maps_the_mean_of_the_inputs_to_the_mean_of_the_outputs() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=40), trained("mlp@0.1", shared=True)
    problem.model.double()
    data = Examples.unlabelled(problem.data.images.double())
    updates = [replace(update, state={k: t.double() for k, t in update.state.items()}) for update in updates]
    found = PLeaS(ridges=(1e-12,))(replace(problem, data=data), updates, generator=stream()).state
    hidden = [
        torch.relu(data.images.flatten(1) @ update.state["1.weight"].T + update.state["1.bias"]) for update in updates
    ]
    outputs = [
        of @ update.state["3.weight"].T + update.state["3.bias"] for of, update in zip(hidden, updates, strict=True)
    ]
    mean = torch.stack(hidden).mean(0)
    residual = mean @ found["3.weight"].T + found["3.bias"] - torch.stack(outputs).mean(0)
    design = torch.cat([mean, mean.new_ones(len(mean), 1)], 1)
    assert float((design.T @ residual).abs().max()) < 1e-6  # the normal equations
    plain = mean_state([update.state for update in updates])
    before = mean @ plain["3.weight"].T + plain["3.bias"] - torch.stack(outputs).mean(0)
    assert float(residual.norm()) < float(before.norm())


def test_a_strong_ridge_leaves_the_mean() -> None:
    problem, updates = problem_of("cnn@0.1"), trained("cnn@0.1", shared=True)
    found = PLeaS(ridges=(1e9,))(problem, updates, generator=stream()).state
    for name, tensor in mean_state([update.state for update in updates]).items():
        torch.testing.assert_close(found[name], tensor)


def test_labels_choose_the_ridge_and_are_not_needed() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=600), trained("mlp@0.1", shared=True)
    found = PLeaS()(problem, updates, generator=stream())
    assert (found.server_labels, found.diagnostics["candidates"]) == (True, 6)
    blind = replace(problem, data=Examples.unlabelled(problem.data.images))
    chosen = PLeaS()(blind, updates, generator=stream())
    assert (chosen.server_labels, chosen.diagnostics["ridge"]) == (False, 1e-2)
    assert same(chosen.state, PLeaS(ridges=(1e-2,))(blind, updates, generator=stream()).state)


def test_ridges_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="ridges must be numbers greater than 0"):
        PLeaS(ridges=(0.0,))
