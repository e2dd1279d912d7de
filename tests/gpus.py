"""Problems on a GPU, beside the same ones on the CPU."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from problems import problem_of, trained
from torch import Tensor

from fedmerge.problem import Examples, Problem, Update

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: run pytest -m gpu on a machine with one"),
]
DEVICE = "cuda"


def moved(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(DEVICE) for name, tensor in state.items()}


def in_doubles(name: str, server_examples: int = 60, *, shared: bool = False) -> tuple[Problem, list[Update]]:
    """A problem and its clients in float64, on the CPU."""
    problem = problem_of(name, server_examples)
    start = {key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in problem.start.items()}  # type: ignore[union-attr]
    data = Examples(problem.data.images.double(), problem.data.labels)
    problem = replace(problem, model=problem.model.double(), data=data, start=start)
    updates = [
        replace(
            update,
            state={
                key: tensor.double() if tensor.is_floating_point() else tensor for key, tensor in update.state.items()
            },
        )
        for update in trained(name, shared=shared)
    ]
    return problem, updates


def on_gpu(problem: Problem) -> Problem:
    """The same problem where a GPU merges it."""
    model = copy.deepcopy(problem.model).to(DEVICE)
    start = None if problem.start is None else moved(problem.start)
    return replace(problem, model=model, data=problem.data.to(DEVICE), start=start)


def assert_close(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, rtol: float = 1e-10, atol: float = 1e-10
) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        torch.testing.assert_close(found[name].cpu(), tensor.cpu(), rtol=rtol, atol=atol)
