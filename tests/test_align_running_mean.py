"""Matching with the mean of the other models, until nothing changes."""

from itertools import pairwise

import pytest
import torch
from problems import problem_of, same, shuffled, trained
from torch import Tensor

from fedmerge.align.activations import Activations
from fedmerge.align.running_mean import matched_with_mean
from fedmerge.align.weights import Weights, match_weights
from fedmerge.basis import Permutation, rebase
from fedmerge.merge.average import mean_state
from fedmerge.problem import Problem
from fedmerge.state import StateDict
from fedmerge.train import predict

ALIGNERS: dict[str, Activations | Weights] = {
    "activations": Activations(passes=5),
    "weights": Weights(start="activations", passes=5),
}


def stream(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def wide(states: list[StateDict]) -> list[dict[str, Tensor]]:
    return [{name: tensor.double() for name, tensor in state.items()} for state in states]


def agreement(states: tuple[dict[str, Tensor], ...] | list[dict[str, Tensor]]) -> float:
    """The inner products of all pairs, summed, of everything that spaces touch or not (that is constant)."""
    flat = torch.stack([torch.cat([tensor.flatten() for tensor in state.values()]) for state in states])
    products = flat @ flat.T
    return float(products.sum() - products.trace()) / 2


def renamed(
    problem: Problem, states: list[dict[str, Tensor]], changes: list[list[Permutation]]
) -> list[dict[str, Tensor]]:
    return [rebase(state, problem.spaces, of_model) for state, of_model in zip(states, changes, strict=True)]


def by_weights(problem: Problem, seen: list[float], states: list[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    def matching(mean: StateDict, state: StateDict) -> list[Permutation]:
        return match_weights(mean, state, problem.spaces, rounds=100, generator=stream())[0]

    for passes in range(6):
        changes, done = matched_with_mean(states, 0, problem.spaces, matching, passes=passes, generator=stream(1))
        found = renamed(problem, states, changes)
        assert done <= passes
        seen.append(agreement(found))
    return found


def test_the_similarity_of_all_pairs_never_falls() -> None:
    problem = problem_of("mlp@0.1")
    states = wide([update.state for update in trained("mlp@0.1", 4)])
    seen: list[float] = []
    found = by_weights(problem, seen, states)
    assert all(after >= before - 1e-9 for before, after in pairwise(seen))
    assert seen[-1] > seen[0] + 1e-3
    assert same(found[0], states[0]), "the reference's order is kept"


def test_it_ends_where_no_model_fits_the_mean_of_the_others_better() -> None:
    problem = problem_of("mlp@0.1")
    states = wide([update.state for update in trained("mlp@0.1", 3)])
    found = by_weights(problem, [], states)
    again, done = matched_with_mean(
        found,
        0,
        problem.spaces,
        lambda mean, state: match_weights(mean, state, problem.spaces, rounds=100, generator=stream(9))[0],
        passes=1,
        generator=stream(2),
    )
    assert done == 0
    assert all(map(same, renamed(problem, found, again), found))


@pytest.mark.parametrize("method", ALIGNERS)
@pytest.mark.parametrize("name", ["mlp@0.1", "resnet20@0.25"])
def test_shuffled_copies_come_back(method: str, name: str) -> None:
    problem = problem_of(name)
    (update,) = trained(name, 1)
    states = [update.state, *(shuffled(problem, update, seed).state for seed in (3, 4))]
    found = ALIGNERS[method](problem, states[::-1], 2, generator=stream())
    assert found.diagnostics["passes"] == 0
    assert same(found.states[2], dict(update.state))
    for key, tensor in mean_state(found.states).items():
        torch.testing.assert_close(tensor, update.state[key])


@pytest.mark.parametrize("method", ALIGNERS)
def test_functions_inputs_and_the_reference_are_kept_and_bits_repeat(method: str) -> None:
    problem = problem_of("cnn@0.1")
    states = [dict(update.state) for update in trained("cnn@0.1")]
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    found, again = (ALIGNERS[method](problem, states, 1, generator=stream()) for _ in range(2))
    assert found.diagnostics["passes"] > 0
    assert all(map(same, states, before))
    assert same(found.states[1], states[1])
    assert all(map(same, found.states, again.states))
    for state, aligned in zip(states, found.states, strict=True):
        ours, theirs = (predict(problem.model, item, problem.data.images) for item in (state, aligned))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ALIGNERS)
def test_one_model_and_no_pass_are_as_without(method: str) -> None:
    problem = problem_of("mlp@0.1")
    states = [update.state for update in trained("mlp@0.1", 1)]
    assert same(ALIGNERS[method](problem, states, 0, generator=stream()).states[0], dict(states[0]))
    with pytest.raises(ValueError, match="passes must be at least 0, got -1"):
        type(ALIGNERS[method])(passes=-1)
