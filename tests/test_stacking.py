"""The stacker: laws of the learned combination of the clients' predictions, and how it is chosen."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import blobs, problem_of, same, trained
from torch import Tensor
from torch.nn import functional

from fedmerge.catalogue import MERGERS
from fedmerge.merge.pool import pool_of
from fedmerge.merge.stacking import Stacker, stack
from fedmerge.merge.teacher import Teacher
from fedmerge.methods import resolve
from fedmerge.oneshot import merge_updates
from fedmerge.problem import UNKNOWN, Examples, Merged, Problem
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate, log_probabilities

PRIORS = [Teacher("mean"), Teacher("counts-geometric", ((5, 0, 3, 1), (0, 9, 1, 9), (1, 2, 3, 4)))]


def said(examples: int = 120, seed: int = 0) -> tuple[Tensor, Tensor]:
    """What three clients say of images of four classes, not quite at random; and the truth."""
    stream = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (examples,), generator=stream)
    noise = 2 * torch.randn(3, examples, 4, generator=stream, dtype=torch.float64)
    return (noise + functional.one_hot(labels, 4)).log_softmax(2), labels


def loss_of(combined: Tensor, labels: Tensor) -> float:
    return float(functional.nll_loss(combined, labels))


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.rule)
@pytest.mark.parametrize("penalty", [1e-3, 1.0, 1e3])
def test_a_fit_is_the_minimum_of_its_equation(prior: Teacher, penalty: float) -> None:
    opinions, labels = said()
    found = stack(prior, opinions, labels, penalty)
    weights, bias = found.weights.clone().requires_grad_(), found.bias.clone().requires_grad_()
    scores = prior(opinions) + sum(weights[k] * opinions[k] for k in range(3)) + bias
    loss = functional.cross_entropy(scores, labels, reduction="sum")
    loss = loss + penalty / 2 * (weights.square().sum() + bias.square().sum())
    for gradient in torch.autograd.grad(loss, [weights, bias]):
        assert float(gradient.abs().max()) < 1e-5
    torch.testing.assert_close(found(opinions), scores.detach().log_softmax(1))
    assert loss_of(found(opinions), labels) < loss_of(prior(opinions), labels)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.rule)
def test_a_huge_penalty_leaves_the_prior(prior: Teacher) -> None:
    opinions, labels = said()
    torch.testing.assert_close(stack(prior, opinions, labels, 1e12)(opinions), prior(opinions), rtol=0, atol=1e-8)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.rule)
def test_a_member_that_is_always_right_gets_the_weight(prior: Teacher) -> None:
    opinions, labels = said()
    opinions[1] = torch.where(functional.one_hot(labels, 4).bool(), 0.97, 0.01).double().log()
    found = stack(prior, opinions, labels, 1e-2)
    assert bool((found.weights[1] > found.weights[[0, 2]].max(0).values + 0.5).all())
    assert torch.equal(found(opinions).argmax(1), labels)


@pytest.mark.parametrize("prior", PRIORS, ids=lambda prior: prior.rule)
def test_the_order_of_clients_changes_the_order_of_weights_alone(prior: Teacher) -> None:
    opinions, labels = said()
    order = [2, 0, 1]
    other = replace(prior, label_counts=tuple(prior.label_counts[k] for k in order) if prior.label_counts else ())
    first, second = stack(prior, opinions, labels, 1.0), stack(other, opinions[order], labels, 1.0)
    torch.testing.assert_close(second.weights, first.weights[order], rtol=0, atol=1e-6)
    torch.testing.assert_close(second(opinions[order]), first(opinions), rtol=0, atol=1e-6)


def test_a_class_that_nobody_has_seen_stays_excluded_and_its_images_teach_nothing() -> None:
    opinions, labels = said()
    prior = Teacher("counts-geometric", ((5, 5, 5, 0),) * 3)
    found = stack(prior, opinions, labels, 1.0)
    assert bool((found(opinions)[:, 3] == -torch.inf).all())
    without = stack(prior, opinions[:, labels != 3], labels[labels != 3], 1.0)
    assert torch.equal(found.weights, without.weights)
    nothing = stack(prior, opinions, torch.full_like(labels, 3), 1.0)
    assert not nothing.weights.any()


# Chosen by the protocol.


def ensemble(problem: Problem, *, counts: bool = True) -> Merged:
    updates = trained("mlp@0.1")
    updates = updates if counts else [replace(update, label_counts=None) for update in updates]
    merger = resolve("merger", "ensemble-stacked", MERGERS)
    found: Merged = merger(problem, updates, generator=torch.Generator())
    return found


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize("examples", [60, 600])
def test_on_validation_data_a_stacker_is_never_worse_than_its_prior(examples: int, counts: bool) -> None:
    found = ensemble(problem_of("mlp@0.1", server_examples=examples), counts=counts)
    losses = found.diagnostics["validation-losses"]
    penalty = found.diagnostics["penalty"]
    assert min(losses.values()) == losses["none" if penalty is None else f"{penalty:g}"]
    assert found.diagnostics["prior"] == ("counts-geometric" if counts else "mean")
    assert (found.server_examples, found.server_labels) == (examples, True)


def test_stacking_clients_helps_where_there_are_labels() -> None:
    problem, updates, test = problem_of("mlp@0.1", server_examples=400), trained("mlp@0.1"), blobs(400, seed=5)
    found = ensemble(problem, counts=False)
    plain = evaluate(problem.model, [update.state for update in updates], test)
    assert evaluate(problem.model, found.states, test, found.combine).loss < plain.loss - 0.05


def test_below_50_labels_nothing_is_learned_and_no_label_counts() -> None:
    problem = problem_of("mlp@0.1", server_examples=49)
    found = ensemble(problem)
    assert (found.server_examples, found.server_labels, found.diagnostics["penalty"]) == (0, False, None)
    opinions = log_probabilities(problem.model, found.states, problem.data.images)
    assert isinstance(found.combine, Stacker)
    torch.testing.assert_close(found.combine(opinions), found.combine.prior(opinions))


def test_only_labelled_images_teach_the_stacker() -> None:
    problem = problem_of("mlp@0.1", server_examples=100)
    hidden = problem.data.labels.where(torch.arange(100) % 5 > 0, UNKNOWN)
    partly = replace(problem, data=Examples(problem.data.images, hidden))
    alone = problem.restricted(problem.data[hidden != UNKNOWN])
    first, second = (ensemble(side).combine for side in (partly, alone))
    assert isinstance(first, Stacker)
    assert isinstance(second, Stacker)
    assert torch.equal(first.weights, second.weights)
    assert bool(first.weights.any())


def test_a_stacker_without_any_label_is_refused() -> None:
    problem = replace(problem_of("mlp@0.1"), data=Examples.unlabelled(problem_of("mlp@0.1").data.images))
    with pytest.raises(ConfigurationError, match=r"'stacked' needs classes of the server's images.*teacher=mean"):
        pool_of("stacked", problem, trained("mlp@0.1"), 1.0)


@pytest.mark.parametrize("targets", ["soft", "hard", "sharpened", "completed"])
def test_a_stacker_may_be_the_teacher_and_then_labels_were_used(targets: str) -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=100), trained("mlp@0.1")
    hidden = problem.data.labels.where(torch.arange(100) % 5 > 0, UNKNOWN)
    partly = replace(problem, data=Examples(problem.data.images, hidden))
    merge = f"np:targets={targets}:teacher=stacked:groups=channel:lrs=0.01:steps=20"
    first, second = (merge_updates(partly, updates, align="identity", merge=merge, seed=0).merged for _ in range(2))
    assert (first.server_examples, first.server_labels) == (100, True)
    assert same(first.state, second.state)
    few = replace(problem, data=Examples(problem.data.images, problem.data.labels.where(torch.arange(100) < 9, -1)))
    if targets != "completed":
        assert not merge_updates(few, updates, align="identity", merge=merge, seed=0).merged.server_labels
