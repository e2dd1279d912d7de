"""Task arithmetic and TIES: their laws, and what they refuse."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from problems import problem_of, same, trained
from torch import Tensor

from fedmerge.merge.arithmetic import TaskArithmetic
from fedmerge.merge.average import mean_state
from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.taskvectors import start_of, task_vectors
from fedmerge.merge.ties import TIES, elected_mean, trimmed
from fedmerge.methods import needs
from fedmerge.problem import Merger, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def in_doubles(name: str, examples: int = 60) -> tuple[Problem, list[Update]]:
    problem = problem_of(name, server_examples=examples)
    updates = [replace(update, state=doubled(dict(update.state))) for update in trained(name, shared=True)]
    assert problem.start is not None
    data = replace(problem.data, images=problem.data.images.double())
    return replace(problem, model=problem.model.double(), data=data, start=doubled(dict(problem.start))), updates


def doubled(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in state.items()}


def close(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-10, atol=1e-12)


def test_task_arithmetic_at_a_kth_is_the_mean() -> None:
    problem, updates = in_doubles("mlp@0.1")
    found = TaskArithmetic(scales=(1.0,))(problem, updates, generator=stream())
    close(found.state, mean_state([update.state for update in updates]))
    assert (found.server_examples, found.server_labels) == (0, False)


def test_task_arithmetic_of_no_scale_is_the_start_and_of_k_the_sum_of_the_task_vectors() -> None:
    problem, updates = in_doubles("mlp@0.1")
    start = start_of(problem, "it")
    close(TaskArithmetic(scales=(0.0,))(problem, updates, generator=stream()).state, start)
    total = {name: tensor + sum(update.state[name] - tensor for update in updates) for name, tensor in start.items()}
    close(TaskArithmetic(scales=(3.0,))(problem, updates, generator=stream()).state, total)


def test_ties_that_keeps_all_changes_of_one_sign_is_the_mean() -> None:
    problem, updates = in_doubles("mlp@0.1")
    start = start_of(problem, "it")
    signs = {name: torch.where(tensor > 0, 1.0, -1.0).double() for name, tensor in start.items()}
    agreeing = [
        replace(
            update, state={k: start[k] + signs[k] * (update.state[k] - start[k]).abs().clamp(min=1e-6) for k in start}
        )
        for update in updates
    ]
    found = TIES(keeps=(1.0,), scales=(1.0,))(problem, agreeing, generator=stream())
    close(found.state, mean_state([update.state for update in agreeing]))


def test_ties_is_its_definition_number_by_number() -> None:
    vectors = torch.randn(4, 57, generator=stream(), dtype=torch.float64)
    kept = trimmed(vectors, 0.3)
    assert [int((row != 0).sum()) for row in kept] == [17] * 4
    for row, of_kept in zip(vectors, kept, strict=True):
        largest = row.abs().topk(17).indices
        assert torch.equal(of_kept[largest], row[largest])
    merged = elected_mean(kept)
    for number in range(57):
        column = [float(value) for value in kept[:, number]]
        sign = (sum(column) > 0) - (sum(column) < 0)
        agreeing = [value for value in column if value * sign > 0]
        assert merged[number] == pytest.approx(sum(agreeing) / len(agreeing) if agreeing else 0.0)


def test_one_clients_task_vector_is_its_own_election() -> None:
    problem, (update, *_) = in_doubles("mlp@0.1")
    found = TIES(keeps=(1.0,), scales=(1.0,))(problem, [update], generator=stream())
    close(found.state, dict(update.state))


@pytest.mark.parametrize("method", [TaskArithmetic(), TIES()])
def test_the_scale_with_the_least_validation_loss_is_chosen(method: TaskArithmetic | TIES) -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=600), trained("mlp@0.1", shared=True)
    found = method(problem, updates, generator=stream())
    assert found.diagnostics["candidates"] == 6
    assert found.server_labels
    kept = evaluate(problem.model, found.states, problem.validation).loss
    assert kept == pytest.approx(found.diagnostics["validation-loss"])
    chosen = found.diagnostics
    options: dict[str, Any] = {f"{name}s": (chosen[name],) for name in ("scale", "keep") if name in chosen}
    assert same(found.state, replace(method, **options)(problem, updates, generator=stream()).state)
    for scale in (1.0, 0.5, 1.5):
        alone = replace(method, scales=(scale,))(problem, updates, generator=stream())
        assert evaluate(problem.model, alone.states, problem.validation).loss >= kept - 1e-9


@pytest.mark.parametrize("method", [TaskArithmetic(), TIES()])
def test_without_a_shared_start_there_are_no_task_vectors(method: Merger) -> None:
    problem = replace(problem_of("mlp@0.1"), start=None)
    with pytest.raises(ConfigurationError, match=r"started from.*--init shared"):
        method(problem, trained("mlp@0.1"), generator=stream())


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="scales must be finite"):
        TaskArithmetic(scales=())
    with pytest.raises(ValueError, match="scales must be finite"):
        TIES(scales=(float("inf"),))
    with pytest.raises(ValueError, match=r"keeps must be numbers in \(0, 1\]"):
        TIES(keeps=(0.0,))


def test_a_setting_without_a_finite_loss_is_never_chosen() -> None:
    problem = problem_of("mlp@0.1")
    good = dict(trained("mlp@0.1", 1)[0].state)
    broken = {name: tensor * float("nan") for name, tensor in good.items()}
    found = choose_setting(
        problem, [Setting({"is": "broken"}, lambda: dict(broken)), Setting({"is": "good"}, lambda: good)]
    )
    assert found.diagnostics["is"] == "good"


def test_task_vectors_are_differences_in_the_starts_order() -> None:
    start = {"b": torch.zeros(2), "a": torch.ones(1)}
    update = Update({"a": torch.tensor([3.0]), "b": torch.tensor([1.0, 2.0])}, 1, 0)
    assert task_vectors(start, [update]).tolist() == [[1.0, 2.0, 2.0]]


def test_what_methods_need_is_known_by_name() -> None:
    assert needs(["mean", "activations+ties:keeps=0.5/1", "np"]) == {"start"}
    assert needs(["fedavg"]) == frozenset()
