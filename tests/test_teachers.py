"""Teachers: what the clients' ensemble says of unlabelled images."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import blobs, problem_of, trained
from torch import Tensor
from torch.nn import functional

from fedmerge.catalogue import MERGERS
from fedmerge.merge.teacher import RULES, Teacher, class_weights, teacher_of
from fedmerge.methods import resolve
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate, log_probabilities

BY_COUNTS = [rule for rule in RULES if rule != "mean"]
counted = st.integers(2, 5).flatmap(
    lambda classes: st.lists(
        st.lists(st.integers(0, 9), min_size=classes, max_size=classes).filter(any), min_size=1, max_size=4
    )
)


def opinions(clients: int, classes: int, examples: int = 6, seed: int = 0) -> Tensor:
    stream = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(clients, examples, classes, generator=stream, dtype=torch.float64)).log_softmax(2)


def counts_of(rows: list[list[int]]) -> tuple[tuple[int, ...], ...]:
    return tuple(map(tuple, rows))


# Rules.


@settings(deadline=None)
@given(counted, st.sampled_from([0.0, 0.1, 1.0]), st.sampled_from(RULES), st.integers(0, 99))
def test_a_teacher_gives_probabilities_and_none_to_a_class_that_nobody_has_seen(
    counts: list[list[int]], smoothing: float, rule: str, seed: int
) -> None:
    found = Teacher(rule, counts_of(counts), smoothing)(opinions(len(counts), len(counts[0]), seed=seed)).exp()
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found.sum(1), torch.ones(len(found), dtype=torch.float64))
    if rule != "mean":
        unseen = torch.tensor(counts).sum(0) == 0
        assert (found[:, unseen] == 0).all()
        assert (found[:, ~unseen] >= 0).all()


@settings(deadline=None)
@given(counted, st.sampled_from([0.0, 1.0]), st.sampled_from(RULES), st.randoms(use_true_random=False))
def test_the_order_of_clients_does_not_matter(
    counts: list[list[int]], smoothing: float, rule: str, chance: object
) -> None:
    said = opinions(len(counts), len(counts[0]))
    order = list(range(len(counts)))
    chance.shuffle(order)  # type: ignore[attr-defined]
    first = Teacher(rule, counts_of(counts), smoothing)(said)
    second = Teacher(rule, counts_of([counts[index] for index in order]), smoothing)(said[order])
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("rule", RULES)
def test_clients_who_say_and_have_seen_the_same_are_one_client(rule: str) -> None:
    said = opinions(1, 4)
    teacher = Teacher(rule, ((7, 7, 7, 7),) * 3, 1.0)
    torch.testing.assert_close(teacher(said.expand(3, -1, -1)), said[0])


def test_the_rules_are_their_formulas() -> None:
    counts, smoothing = ((4, 2, 1), (0, 5, 3)), 0.5
    said = opinions(2, 3)
    n = torch.tensor(counts, dtype=torch.float64) + smoothing
    w = n / n.sum(0)
    p = said.exp()
    arithmetic = torch.einsum("kc,kec->ec", w, p)
    geometric = torch.einsum("kc,kec->ec", w, said)
    prior = n / n.sum(1, keepdim=True)
    prior[1, 0] = 1  # client 1 has not seen class 0
    balanced = (said - prior.log()[:, None]).log_softmax(2)
    corrected = torch.einsum("kc,kec->ec", w, balanced)
    torch.testing.assert_close(Teacher("mean")(said).exp(), p.mean(0))
    torch.testing.assert_close(
        Teacher("counts", counts, smoothing)(said).exp(), arithmetic / arithmetic.sum(1, keepdim=True)
    )
    torch.testing.assert_close(Teacher("counts-geometric", counts, smoothing)(said), geometric.log_softmax(1))
    torch.testing.assert_close(Teacher("prior", counts, smoothing)(said), corrected.log_softmax(1))


@pytest.mark.parametrize("rule", BY_COUNTS)
def test_a_client_that_knows_one_class_alone_does_not_pull_all_images_to_it(rule: str) -> None:
    knows = torch.tensor([[0.0, 0.98, 0.02], [0.0, 0.01, 0.99]], dtype=torch.float64).clamp(min=1e-9)
    single = torch.tensor([[1.0, 0.0, 0.0]] * 2, dtype=torch.float64).clamp(min=1e-9)  # on every image
    said = torch.stack([single, knows]).log().log_softmax(2)
    found = Teacher(rule, ((30, 0, 0), (0, 30, 30)), 0.0)(said)
    assert found.argmax(1).tolist() == [1, 2]


def test_say_in_a_class_is_shared_by_examples_and_alike_where_there_are_none() -> None:
    counts = torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 2.0]])
    assert class_weights(counts, 0.0).tolist() == [[0.75, 0.5, 0.0], [0.25, 0.5, 1.0]]
    torch.testing.assert_close(class_weights(counts, 2.5).sum(0), torch.ones(3))
    torch.testing.assert_close(class_weights(counts, 1e9), torch.full((2, 3), 0.5))


@pytest.mark.parametrize("rule", BY_COUNTS)
def test_label_counts_that_a_client_keeps_to_itself_are_asked_for(rule: str) -> None:
    updates = trained("mlp@0.1")
    secret = [updates[0], replace(updates[1], label_counts=None), updates[2]]
    with pytest.raises(ConfigurationError, match=r"1 of 3 clients .*client 1.*switch them on .*teacher=mean"):
        teacher_of(rule, secret, 1.0)
    assert teacher_of("mean", secret, 1.0) == Teacher("mean", (), 1.0)


def test_label_counts_of_other_classes_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="expected label counts of 2 clients and 4 classes, got 2 × 3"):
        Teacher("counts", ((1, 2, 3),) * 2)(opinions(2, 4))


# Ensembles.


def test_an_ensemble_by_counts_is_its_teacher() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    test = blobs(200, seed=5)
    for name, rule in (("ensemble-counts", "counts"), ("ensemble-geometric", "counts-geometric")):
        merged = resolve("merger", name, MERGERS)(problem, updates, generator=torch.Generator())
        found = evaluate(problem.model, merged.states, test, merged.combine)
        taught = teacher_of(rule, updates, 1.0)(log_probabilities(problem.model, merged.states, test.images))
        assert found.accuracy == float((taught.argmax(1) == test.labels).double().mean())
        assert found.loss == pytest.approx(float(functional.nll_loss(taught, test.labels)))
        plain = evaluate(problem.model, merged.states, test)
        assert found.loss < plain.loss


def test_a_class_that_nobody_has_seen_costs_an_ensemble_a_finite_loss() -> None:
    problem = problem_of("mlp@0.1")
    updates = [replace(update, label_counts=(30, 30, 0)) for update in trained("mlp@0.1")]
    combine = teacher_of("counts", updates, 1.0)
    found = evaluate(problem.model, [update.state for update in updates], problem.data, combine)
    assert 100 < found.loss < math.inf
    assert found.per_class_accuracy[2] == 0
