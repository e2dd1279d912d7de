"""Flower's strategies as mergers, against their formulas written by hand in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from problems import problem_of, same, trained

from fedmerge.catalogue import MERGERS
from fedmerge.merge.average import mean_state
from fedmerge.merge.taskvectors import start_of, task_vectors
from fedmerge.methods import needs, resolve
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Merger, Problem, Update
from fedmerge.settings import ConfigurationError

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return problem_of("mlp@0.1")


@pytest.fixture(scope="module")
def updates() -> list[Update]:
    return trained("mlp@0.1", 5, shared=True)


def flat(problem: Problem, updates: list[Update]) -> Array:
    zero = {name: torch.zeros_like(tensor) for name, tensor in start_of(problem, "it").items()}
    return np.asarray(task_vectors(zero, updates).double().numpy())


def merged(problem: Problem, updates: list[Update], name: str) -> Array:
    method: Merger = resolve("merger", name, MERGERS)
    state = method(problem, updates, generator=torch.Generator()).state
    return np.asarray(flat(problem, [Update(state, 1, 0)])[0])


def test_the_adaptive_ones_are_their_first_step(problem: Problem, updates: list[Update]) -> None:
    clients, start = flat(problem, updates), flat(problem, [Update(start_of(problem, "it"), 1, 0)])[0]
    sizes = np.array([update.num_examples for update in updates], dtype=float)
    change = (sizes[:, None] * clients).sum(0) / sizes.sum() - start
    rate, tau = 0.01, 1e-3
    adam = rate * np.sqrt(1 - 0.99**2) / (1 - 0.9**2) * 0.1 * change / (np.sqrt(0.01 * change**2) + tau)
    yogi = rate * 0.1 * change / (np.sqrt(0.01 * change**2) + tau)
    adagrad = rate * change / (np.sqrt(change**2) + tau)
    for name, step in (("fedadam", adam), ("fedyogi", yogi), ("fedadagrad", adagrad), ("fedavgm", rate * change)):
        np.testing.assert_allclose(
            merged(problem, updates, f"flower-{name}:rates={rate}"), start + step, rtol=1e-3, atol=1e-6, err_msg=name
        )


def test_the_median_and_the_trimmed_mean_are_numpys(problem: Problem, updates: list[Update]) -> None:
    clients = flat(problem, updates)
    np.testing.assert_allclose(merged(problem, updates, "flower-median"), np.median(clients, 0), atol=1e-7)
    trimmed = np.sort(clients, 0)[1:-1].mean(0)
    np.testing.assert_allclose(merged(problem, updates, "flower-trimmed-mean"), trimmed, atol=1e-7)
    plain = merged(problem, updates, "flower-trimmed-mean:beta=0")
    np.testing.assert_allclose(plain, clients.mean(0), atol=1e-7)


def test_krum_keeps_the_clients_that_are_nearest_to_the_others(problem: Problem, updates: list[Update]) -> None:
    clients = flat(problem, updates)
    distances = ((clients[:, None] - clients[None]) ** 2).sum(2)
    scores = np.sort(distances, 1)[:, 1 : 1 + 5 - 1 - 2].sum(1)
    chosen = int(scores.argmin())
    assert same(
        resolve("merger", "flower-krum:num_malicious_nodes=1", MERGERS)(
            problem, updates, generator=torch.Generator()
        ).state,
        dict(updates[chosen].state),
    )
    few = scores.argsort()[:2]
    sizes = np.array([updates[index].num_examples for index in few], dtype=float)
    found = merged(problem, updates, "flower-multikrum:num_malicious_nodes=1:num_nodes_to_select=2")
    np.testing.assert_allclose(found, (sizes[:, None] * clients[few]).sum(0) / sizes.sum(), atol=1e-6)


def test_a_malicious_client_moves_the_mean_and_not_the_robust_aggregates(
    problem: Problem, updates: list[Update]
) -> None:
    evil = replace(updates[2], state={name: 100 + tensor for name, tensor in updates[2].state.items()})
    attacked = [*updates[:2], evil, *updates[3:]]
    honest = flat(problem, [updates[index] for index in (0, 1, 3, 4)])
    low, high = honest.min(0) - 1e-6, honest.max(0) + 1e-6
    assert (merged(problem, attacked, "mean") > high).all()
    for name in ("median", "trimmed-mean", "krum:num_malicious_nodes=1"):
        found = merged(problem, attacked, f"flower-{name}")
        assert ((low <= found) & (found <= high)).all(), name


def test_bulyan_without_malicious_clients_is_the_mean_and_says_if_clients_are_few(
    problem: Problem, updates: list[Update]
) -> None:
    np.testing.assert_allclose(
        merged(problem, updates, "flower-bulyan"), flat(problem, updates).mean(0), rtol=1e-4, atol=1e-6
    )
    with pytest.raises(ConfigurationError, match="Bulyan makes nothing of 5 clients"):
        merged(problem, updates, "flower-bulyan:num_malicious_nodes=1")


def test_fedavgm_at_rate_one_is_fedavg(problem: Problem, updates: list[Update]) -> None:
    found = merge_updates(problem, updates, align="identity", merge="flower-fedavgm:rates=1", seed=0).merged.state
    expected = mean_state([update.state for update in updates], [update.num_examples for update in updates])
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_adaptive_strategies_need_the_start(problem: Problem, updates: list[Update]) -> None:
    assert needs(["flower-fedadam", "flower-krum"]) == {"start"}
    with pytest.raises(ConfigurationError, match=r"Flower's FedAdam needs the weights that all clients started from"):
        merged(replace(problem, start=None), updates, "flower-fedadam")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("flower-trimmed-mean:beta=0.5", r"beta must be in \[0, 0.5\)"),
        ("flower-krum:num_malicious_nodes=-1", "num_malicious_nodes must be at least 0"),
        ("flower-median:beta=0.1", "Flower's FedMedian has no beta: leave it out"),
    ],
)
def test_arguments_that_cannot_be_are_refused(name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        resolve("merger", name, MERGERS)
