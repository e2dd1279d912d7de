"""The propagated teacher: laws of its steps, and what it is for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import problem_of, trained
from torch import Tensor
from torch.nn import functional

from fedmerge.merge.objective import Objective
from fedmerge.merge.pool import pool_of
from fedmerge.merge.propagation import (
    FEWEST,
    PENALTY,
    SPREAD,
    nearest,
    propagated,
    propagated_classes,
    scaled,
    spread,
    views,
)
from fedmerge.merge.stacking import stack
from fedmerge.merge.teacher import Teacher, teacher_of
from fedmerge.problem import UNKNOWN, Examples
from fedmerge.train import log_probabilities

PRIOR = Teacher("counts-geometric", ((50, 0, 1), (0, 50, 1)), 1.0)


def graph(examples: int = 40, count: int = 3, seed: int = 0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return nearest(functional.normalize(torch.randn(examples, 5, generator=stream, dtype=torch.float64), dim=1), count)


def two_kinds(examples: int = 200, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Opinions of two clients, each sure of its own class, whom images of the other's class mislead; and the truth.

    What the clients see differs between the kinds more than within them, in a third class that neither decides by.
    """
    stream = torch.Generator().manual_seed(seed)
    truth = torch.arange(examples) % 2
    logits = 0.3 * torch.randn(2, examples, 3, generator=stream, dtype=torch.float64)
    misled = torch.rand(examples, generator=stream) < 0.3
    logits[0, :, 0] += torch.where((truth == 0) | misled, 3.0, -3.0)
    logits[1, :, 1] += torch.where(truth == 1, 2.0, -2.0)
    logits[:, :, 2] -= 8.0 * truth
    return logits.log_softmax(2), truth


def test_spreading_solves_its_equation() -> None:
    neighbours = graph()
    classes = torch.arange(40) % 4
    weights = torch.zeros(40, 40, dtype=torch.float64)
    for row, others in enumerate(neighbours.tolist()):
        weights[row, others] += 1
        weights[others, row] += 1
    scale = weights.sum(1).rsqrt()
    operator = torch.eye(40, dtype=torch.float64) - SPREAD * scale[:, None] * weights * scale
    expected = torch.linalg.solve(operator, (1 - SPREAD) * functional.one_hot(classes, 4).double())
    torch.testing.assert_close(spread(neighbours, classes, 4), expected, rtol=0, atol=1e-5)


def test_neighbours_are_the_most_alike_and_never_the_image_itself() -> None:
    rows = functional.normalize(torch.randn(1203, 4, generator=torch.Generator().manual_seed(0)).double(), dim=1)
    products = (rows @ rows.T).fill_diagonal_(-2)
    assert torch.equal(nearest(rows, 2), products.topk(2).indices)


def test_scaling_gives_the_shares_and_adds_one_number_to_each_class() -> None:
    scores = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    found = scaled(scores, shares)
    torch.testing.assert_close(found.softmax(1).mean(0), shares, rtol=0, atol=1e-5)
    moved = found - scores
    torch.testing.assert_close(moved, moved[:1].expand(50, -1))


def test_a_view_does_not_depend_on_the_scale_of_a_client_or_on_what_all_classes_have() -> None:
    opinions = torch.randn(2, 30, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = torch.stack([7 * opinions[0] + 3, opinions[1] - torch.arange(30.0)[:, None]])
    torch.testing.assert_close(views(other), views(opinions))


def test_neighbours_mend_what_clients_mistake() -> None:
    opinions, truth = two_kinds()
    before = (PRIOR(opinions).argmax(1) == truth).double().mean()
    after = (propagated_classes(PRIOR, opinions) == truth).double().mean()
    assert before < 0.9 < 0.97 < after


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1] + [UNKNOWN] * 198)])
def test_the_order_of_clients_and_of_images_does_not_matter(labels: Tensor | None) -> None:
    opinions, _ = two_kinds()
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    first = propagated(PRIOR, opinions, labels)
    second = propagated(
        Teacher("counts-geometric", PRIOR.label_counts[::-1]),
        opinions[[1, 0]][:, order],
        None if labels is None else labels[order],
    )
    torch.testing.assert_close(second(opinions[[1, 0]]), first(opinions), rtol=0, atol=1e-5)


def test_classes_that_are_known_stand_and_spread() -> None:
    opinions, truth = two_kinds()
    labels = (1 - truth).where(torch.arange(200) % 10 < 8, UNKNOWN)
    found = propagated_classes(PRIOR, opinions, labels)
    assert torch.equal(found[labels != UNKNOWN], labels[labels != UNKNOWN])
    assert (found == truth).double().mean() < 0.1


def test_the_stacker_learns_the_propagated_classes() -> None:
    opinions, _ = two_kinds()
    found, expected = propagated(PRIOR, opinions), stack(PRIOR, opinions, propagated_classes(PRIOR, opinions), PENALTY)
    assert torch.equal(found(opinions), expected(opinions))


def test_a_class_that_nobody_has_seen_is_nobodys_class() -> None:
    opinions, _ = two_kinds()
    found = propagated(Teacher("counts-geometric", ((50, 0, 0), (0, 50, 0))), opinions)
    assert bool((found(opinions)[:, 2] == -torch.inf).all())


def test_few_images_teach_by_the_prior_alone() -> None:
    opinions, _ = two_kinds(FEWEST - 1)
    torch.testing.assert_close(propagated(PRIOR, opinions)(opinions), PRIOR(opinions))


def test_labels_count_only_where_the_objective_has_them() -> None:
    updates, problem = list(trained("mlp")), problem_of("mlp")
    labels = problem.data.labels.clone()
    labels[::2] = UNKNOWN
    some = replace(problem, data=Examples(problem.data.images, labels))
    garbage = replace(problem, data=Examples(problem.data.images, labels.where(labels == UNKNOWN, 0)))
    for objective, same in ((Objective("hard", "propagated"), True), (Objective("completed", "propagated"), False)):
        first, second = (objective.teach(given, updates).data for given in (some, garbage))
        target = [data.labels if data.targets is None else data.targets for data in (first, second)]
        assert torch.equal(*target) is same
        assert objective.teach(some, updates).blind is same


def test_on_trained_clients_it_is_the_stacker_of_their_opinions() -> None:
    updates, problem = list(trained("mlp")), problem_of("mlp")
    said = log_probabilities(problem.model, [update.state for update in updates], problem.data.images)
    pool = pool_of("propagated", problem, updates, 1.0)
    expected = propagated(teacher_of("counts-geometric", updates, 1.0), said)
    assert torch.equal(pool.combine(said), expected(said))
    assert (pool.server_examples, pool.server_labels) == (len(problem.data), False)
