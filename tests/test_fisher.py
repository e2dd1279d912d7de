"""Fisher merging and FedFisher's diagonal form: their laws, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import problem_of, trained, with_statistics
from torch import Tensor

from fedmerge.merge.average import mean_state
from fedmerge.merge.fedfisher import FedFisher
from fedmerge.merge.fisher import FisherMerge
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Problem, Update
from fedmerge.settings import ConfigurationError


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def in_doubles(seed: int = 0) -> tuple[Problem, list[Update]]:
    problem, chance = problem_of("mlp@0.1"), torch.Generator().manual_seed(seed)
    updates = []
    for update in trained("mlp@0.1"):
        state = {name: tensor.double() for name, tensor in update.state.items()}
        fisher = {name: torch.rand(tensor.shape, generator=chance).double() ** 8 for name, tensor in state.items()}
        updates.append(replace(update, state=state, statistics={"fisher": fisher}))
    return replace(problem, model=problem.model.double()), updates


def merged(method: FisherMerge | FedFisher, updates: list[Update]) -> dict[str, Tensor]:
    return method(in_doubles()[0], updates, generator=stream()).state


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", [FisherMerge(floors=(0.0,)), FisherMerge(floors=(0.1,)), FedFisher(times=(3.0,))])
def test_equal_fishers_give_the_mean(method: FisherMerge | FedFisher) -> None:
    _, updates = in_doubles()
    equal = [replace(update, statistics=updates[0].statistics) for update in updates]
    states = [update.state for update in updates]
    close(merged(method, equal), mean_state(states, [update.num_examples for update in updates]))
    close(merged(replace(method, weights="uniform"), equal), mean_state(states))


def test_fisher_merging_is_its_equation() -> None:
    _, updates = in_doubles()
    found = merged(FisherMerge(floors=(0.0,)), updates)
    for name, tensor in found.items():
        weights = torch.stack([update.num_examples * update.statistics["fisher"][name] for update in updates])
        states = torch.stack([update.state[name] for update in updates])
        torch.testing.assert_close(tensor, (weights * states).sum(0) / weights.sum(0), rtol=1e-8, atol=1e-10)


def test_a_parameter_that_no_client_hangs_on_is_the_mean() -> None:
    _, updates = in_doubles()
    for update in updates:
        update.statistics["fisher"]["1.weight"].zero_()
    mean = mean_state([update.state for update in updates], [update.num_examples for update in updates])
    for method in (FisherMerge(floors=(0.0,)), FedFisher(times=(1e4,))):
        torch.testing.assert_close(merged(method, updates)["1.weight"], mean["1.weight"], rtol=0, atol=1e-15)


def test_fedfisher_is_gradient_descent_from_the_mean() -> None:
    _, updates = in_doubles()
    total = sum(update.num_examples for update in updates)
    states = [update.state for update in updates]
    mean = mean_state(states, [update.num_examples for update in updates])
    fishers = [
        {name: update.num_examples / total * tensor for name, tensor in update.statistics["fisher"].items()}
        for update in updates
    ]
    strength = {name: torch.stack([fisher[name] for fisher in fishers]).sum(0) for name in mean}
    level = sum(float(tensor.sum()) for tensor in strength.values()) / sum(tensor.numel() for tensor in mean.values())
    point = {name: tensor.clone() for name, tensor in mean.items()}
    steps, time = 20_000, 2.0
    for name, tensor in point.items():
        pull = sum(fisher[name] * state[name] for fisher, state in zip(fishers, states, strict=True))
        for _ in range(steps):
            tensor -= time / level / steps * (strength[name] * tensor - pull)
    found = merged(FedFisher(times=(time,)), updates)
    for name, tensor in point.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-4 * float((tensor - mean[name]).abs().max()))


def test_fedfisher_begins_at_the_mean_and_ends_at_fisher_merging() -> None:
    _, updates = in_doubles()
    for update in updates:
        for tensor in update.statistics["fisher"].values():
            tensor += 1e-3
    mean = mean_state([update.state for update in updates], [update.num_examples for update in updates])
    close(merged(FedFisher(times=(0.0,)), updates), mean)
    close(merged(FedFisher(times=(1e9,)), updates), merged(FisherMerge(floors=(0.0,)), updates))


@pytest.mark.parametrize("name", ["fisher", "fedfisher"])
def test_clients_must_have_sent_their_fishers(name: str) -> None:
    problem = problem_of("mlp@0.1")
    with pytest.raises(ConfigurationError, match=r"'fisher' of every client, and 3 of 3 have none"):
        merge_updates(problem, trained("mlp@0.1"), align="identity", merge=name, seed=0)
    told = with_statistics(problem, trained("mlp@0.1"), ["fisher"])
    assert merge_updates(problem, told, align="activations", merge=name, seed=0).diagnostics["merge"]["candidates"] == 6
    with pytest.raises(ConfigurationError, match="dense change of basis"):
        merge_updates(problem, told, align="cca", merge=name, seed=0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="floors must be numbers of at least 0"):
        FisherMerge(floors=(-1.0,))
    with pytest.raises(ValueError, match="times must be numbers of at least 0"):
        FedFisher(times=())
    for method in (FisherMerge, FedFisher):
        with pytest.raises(ValueError, match="weights must be one of examples, uniform, got 'best'"):
            method(weights="best")
