"""RegMean: on a linear model the exact least squares of all clients' data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import SHAPE, problem_of, trained, with_statistics
from torch import Tensor, nn

from fedmerge.merge.average import mean_state
from fedmerge.merge.regmean import RegMean
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.statistics import gram_matrices


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def close(first: dict[str, Tensor], second: dict[str, Tensor], atol: float = 1e-8) -> None:
    for name, tensor in second.items():
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=atol)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("convolution", [True, False])
def test_on_a_linear_model_it_is_the_least_squares_of_all_clients_data(bias: bool, convolution: bool) -> None:
    chance = stream()
    layer = nn.Conv2d(1, 3, 3, stride=3, bias=bias) if convolution else nn.Linear(36, 3, bias=bias)
    model = (
        nn.Sequential(layer if convolution else nn.Flatten(), nn.Flatten() if convolution else layer).double().eval()
    )
    place = 0 if convolution else 1
    images = [torch.randn(count, *SHAPE, generator=chance, dtype=torch.float64) for count in (50, 90, 70)]

    def design(of: Tensor) -> Tensor:
        flat = of.unfold(2, 3, 3).unfold(3, 3, 3).reshape(-1, 9) if convolution else of.flatten(1)
        return torch.cat([flat, flat.new_ones(len(flat), 1)], 1) if bias else flat

    truths = [torch.randn(len(design(of)), 3, generator=chance, dtype=torch.float64) for of in images]

    def fitted(inputs: Tensor, outputs: Tensor) -> dict[str, Tensor]:
        solution = torch.linalg.lstsq(inputs, outputs).solution
        weight = solution[:-1] if bias else solution
        shape = model.state_dict()[f"{place}.weight"].shape
        return {f"{place}.weight": weight.T.reshape(shape)} | ({f"{place}.bias": solution[-1]} if bias else {})

    states = [fitted(design(of), truth) for of, truth in zip(images, truths, strict=True)]
    updates = [
        Update(state, len(of), client, statistics={"gram": gram_matrices(model, state, of)})
        for client, (state, of) in enumerate(zip(states, images, strict=True))
    ]
    problem = Problem(model, Examples(images[0], torch.zeros(50, dtype=torch.int64)))
    found = RegMean(factors=(1.0,), ridge=1e-13)(problem, updates, generator=stream())
    close(found.state, fitted(torch.cat([design(of) for of in images]), torch.cat(truths)))


def test_without_the_entries_off_the_diagonal_each_input_is_weighted_by_its_size() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    updates = with_statistics(problem, updates, ["gram"])
    found = RegMean(factors=(0.0,), ridge=1e-12)(problem, updates, generator=stream()).state
    sizes = torch.stack(
        [update.num_examples * update.statistics["gram"]["3.weight"].diagonal()[:-1] for update in updates]
    )
    alive = sizes.sum(0) > 0
    weights = torch.stack([update.state["3.weight"] for update in updates])
    expected = (sizes[:, None] * weights).sum(0) / sizes.sum(0)
    torch.testing.assert_close(found["3.weight"][:, alive], expected[:, alive], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("factor", [0.0, 0.5, 1.0])
def test_equal_gram_matrices_give_the_mean(factor: float) -> None:
    problem = problem_of("cnn@0.1")
    (first, *others) = with_statistics(problem, trained("cnn@0.1"), ["gram"])
    updates = [first, *(replace(update, statistics=first.statistics) for update in others)]
    found = RegMean(factors=(factor,), weights="uniform")(problem, updates, generator=stream()).state
    close(found, mean_state([update.state for update in updates]), atol=1e-5)


def test_it_is_never_chosen_worse_than_any_factor_alone() -> None:
    problem, updates = problem_of("resnet20@0.25"), trained("resnet20@0.25", 2)
    told = with_statistics(problem, updates, ["gram"])
    found = merge_updates(problem, told, align="activations", merge="regmean", seed=0).diagnostics["merge"]
    assert found["candidates"] == 6
    for factor in (0.9, 0.1):
        alone = merge_updates(problem, told, align="activations", merge=f"regmean:factors={factor}/{factor}", seed=0)
        assert alone.diagnostics["merge"]["validation-loss"] >= found["validation-loss"] - 1e-6


def test_clients_must_have_sent_their_gram_matrices() -> None:
    with pytest.raises(ConfigurationError, match=r"RegMean needs the statistic 'gram'.*--client-statistics gram"):
        merge_updates(problem_of("mlp@0.1"), trained("mlp@0.1"), align="identity", merge="regmean", seed=0)


def test_settings_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"factors must be numbers in \[0, 1\]"):
        RegMean(factors=(1.1,))
    with pytest.raises(ValueError, match="ridge must be greater than 0"):
        RegMean(ridge=0.0)
    with pytest.raises(ValueError, match="weights must be one of"):
        RegMean(weights="none")
