"""Optimal transport: Sinkhorn's plan and what a soft assignment does to a model."""

import pytest
import torch
from problems import problem_of, shuffled, trained
from torch import Tensor

from fedmerge.align.matching import match
from fedmerge.align.ot import OptimalTransport, sinkhorn
from fedmerge.basis import Permutation, Transport
from fedmerge.merge.average import mean_state
from fedmerge.train import predict


def costs(size: int, seed: int = 0) -> Tensor:
    return torch.rand(size, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [0.005, 0.05, 1.0, 100.0])
def test_a_plan_gives_every_row_and_column_the_same_mass(epsilon: float) -> None:
    plan = sinkhorn(costs(12), epsilon)
    assert bool((plan >= 0).all())
    equal = torch.full((12,), 1 / 12, dtype=torch.float64)
    torch.testing.assert_close(plan.sum(1), equal)
    torch.testing.assert_close(plan.sum(0), equal)


def test_a_plan_is_that_of_plain_iterations() -> None:
    cost, epsilon = costs(7), 0.2
    kernel = (-cost / epsilon).exp()
    columns = torch.ones(7, dtype=torch.float64)
    for _ in range(500):
        rows = (1 / 7) / (kernel @ columns)
        columns = (1 / 7) / (kernel.T @ rows)
    torch.testing.assert_close(sinkhorn(cost, epsilon), rows[:, None] * kernel * columns, rtol=1e-3, atol=1e-6)


def test_hardly_any_entropy_gives_the_assignment_and_much_gives_all_to_all() -> None:
    cost = costs(8)
    expected = torch.eye(8, dtype=torch.float64)[match(-cost).index] / 8
    torch.testing.assert_close(sinkhorn(cost, 2e-3), expected, rtol=0, atol=1e-2)
    torch.testing.assert_close(sinkhorn(cost, 1e6), torch.full_like(cost, 1 / 64), rtol=1e-4, atol=1e-6)


def test_transport_by_a_permutation_matrix_is_the_permutation() -> None:
    index = torch.tensor([2, 0, 3, 1])
    weights = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(0))
    change = Transport(torch.eye(4, dtype=torch.float64)[index].T)
    for found, expected in ((change.write, Permutation(index).write), (change.read, Permutation(index).read)):
        torch.testing.assert_close(found(weights), expected(weights))
    assert change.size == 4
    with pytest.raises(ValueError, match="unit by unit"):
        change.scale(weights)


@pytest.mark.parametrize("name", ["mlp@0.1", "resnet20@0.25"])
def test_a_shuffled_copy_is_transported_back(name: str) -> None:
    problem = problem_of(name)
    (update,) = trained(name, 1)
    states = [update.state, shuffled(problem, update, 3).state]
    found = OptimalTransport(epsilons=(1e-4,))(problem, states, 0, generator=torch.Generator())
    merged = predict(problem.model, mean_state(found.states), problem.data.images)
    torch.testing.assert_close(merged, predict(problem.model, update.state, problem.data.images), rtol=1e-3, atol=1e-3)


def test_a_softer_plan_leaves_less_of_the_other_models_and_says_so() -> None:
    problem = problem_of("mlp")
    states = [update.state for update in trained("mlp")]
    left = [
        OptimalTransport(epsilons=(epsilon,))(problem, states, 0, generator=torch.Generator()).diagnostics
        for epsilon in (1e-3, 0.1, 1.0)
    ]
    hard, soft, softest = (item["left-of-weights"] for item in left)
    assert len(hard) == 2
    assert all(a > b > c for a, b, c in zip(hard, soft, softest, strict=True))


@pytest.mark.parametrize("epsilons", [(), (0.0,), (-0.1,), (float("inf"),)])
def test_unusable_strengths_are_refused(epsilons: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="epsilons must be numbers greater than 0"):
        OptimalTransport(epsilons=epsilons)
