"""Objectives: what is learned from labels or from a teacher, and that a method without labels reads none."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import blobs, problem_of, same, trained
from torch import Tensor
from torch.nn import functional

from fedmerge import federation
from fedmerge.catalogue import MERGERS
from fedmerge.compare import Bench
from fedmerge.config import Config
from fedmerge.merge.descent import Candidate, Weights, descend
from fedmerge.merge.objective import TARGETS, Objective
from fedmerge.merge.teacher import RULES, teacher_of
from fedmerge.methods import resolve
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate, log_probabilities


def labels_by(objective: Objective, problem: Problem) -> Problem:
    return objective.teach(problem, trained("mlp@0.1"))


def test_labels_are_the_default_and_leave_the_problem_as_it_is() -> None:
    problem = problem_of("mlp@0.1")
    assert Objective().teach(problem, trained("mlp@0.1")) is problem
    assert resolve("merger", "np", MERGERS).targets == "labels"


@pytest.mark.parametrize("teacher", RULES)
def test_targets_are_the_teachers(teacher: str) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    said = teacher_of(teacher, updates, 1.0)(
        log_probabilities(problem.model, [update.state for update in updates], problem.data.images)
    )
    hard, soft, sharpened, mixed = (
        labels_by(Objective(targets=targets, teacher=teacher, temperature=0.25, label_share=0.3), problem)
        for targets in ("hard", "soft", "sharpened", "mixed")
    )
    assert torch.equal(hard.data.labels, said.argmax(1))
    assert hard.data.targets is None
    torch.testing.assert_close(soft.data.targets, said.exp().float())
    torch.testing.assert_close(sharpened.data.targets, functional.normalize(said.exp() ** 4, p=1, dim=1).float())
    truth = functional.one_hot(problem.data.labels, 3)
    torch.testing.assert_close(mixed.data.targets, (0.3 * truth + 0.7 * said.exp()).float())
    assert torch.equal(mixed.data.labels, problem.data.labels)
    assert [taught.blind for taught in (hard, soft, sharpened, mixed)] == [True, True, True, False]
    assert all(taught.taught for taught in (hard, soft, sharpened, mixed))
    assert Objective(targets="soft").teach(hard, updates) is hard  # a problem is taught once


def test_sharper_targets_lie_between_soft_and_hard() -> None:
    problem = problem_of("mlp@0.1")
    tops = [
        float(labels_by(Objective(targets="sharpened", temperature=temperature), problem).data.targets.amax(1).mean())  # type: ignore[union-attr]
        for temperature in (1.0, 0.5, 0.01)
    ]
    assert tops[0] < tops[1] < tops[2] <= 1


def test_soft_targets_that_are_labels_give_the_steps_of_labels() -> None:
    problem, (update, *_) = problem_of("mlp@0.1"), trained("mlp@0.1")
    data = problem.data
    certain = Examples(data.images, data.labels, functional.one_hot(data.labels, 3).float())
    candidate = Candidate({}, 0.01, lambda: Weights(update.state))
    *_, by_labels = descend(problem, candidate, {}, data, [0, 10], seed=1)
    *_, by_targets = descend(problem, candidate, {}, certain, [0, 10], seed=1)
    for name, tensor in by_labels.items():
        torch.testing.assert_close(by_targets[name], tensor)
    assert evaluate(problem.model, [update.state], certain).loss == pytest.approx(
        evaluate(problem.model, [update.state], data).loss
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "easy"}, "targets must be one of labels, soft, sharpened, hard, mixed, completed"),
        ({"teacher": "best"}, "teacher must be one of mean, counts, counts-geometric, prior, propagated, stacked"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"label_share": 1.5}, r"label_share must be in \[0, 1\]"),
        ({"smoothing": -1.0}, "smoothing must be a number of examples, at least 0"),
        ({"augment": "cutout"}, "augment must be one of none, shifts, flips, both"),
    ],
)
def test_objectives_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Objective(**options)  # type: ignore[arg-type]


# The law of methods without labels.

BLIND = ["np-distill", "finetune-distill", "best-client-distill", "fresh-distill", "np-pairwise:targets=soft"]


def with_labels(problem: Problem, labels: Tensor) -> Problem:
    return replace(problem, data=Examples(problem.data.images, labels))


@pytest.mark.parametrize("align", ["identity", "activations", "auto"])
@pytest.mark.parametrize("merge", BLIND)
@pytest.mark.parametrize("examples", [20, 60, 500])
def test_garbage_in_place_of_the_labels_changes_no_bit_of_a_method_without_labels(
    align: str, merge: str, examples: int
) -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=examples), trained("mlp@0.1")
    garbage = with_labels(problem, (problem.data.labels * 7 + torch.arange(examples)) % 3)
    unknown = replace(problem, data=Examples.unlabelled(problem.data.images))
    first, second, third = (
        merge_updates(server, updates, align=align, merge=f"{merge}:lrs=0.01:steps=20", seed=0)
        for server in (problem, garbage, unknown)
    )
    assert same(first.merged.state, second.merged.state)
    assert same(first.merged.state, third.merged.state)
    assert first.diagnostics == second.diagnostics == third.diagnostics
    assert first.merged.server_labels is False
    assert first.merged.server_examples == examples


def test_a_method_without_labels_shares_no_alignment_with_one_that_has_them() -> None:
    """Side by side, as `fedmerge compare` merges them."""
    config = Config(data="digits", model="mlp@0.1", clients=3, server_examples=60)
    examples = federation.load(config)
    counts = examples.label_counts()
    updates = [
        Update(create("mlp@0.1", shape=(1, 8, 8), num_classes=10, seed=k).state_dict(), sum(of), k, tuple(of))
        for k, of in enumerate(counts)
    ]
    found = []
    for shift in (0, 1):
        bench = Bench(config.to_mapping(), examples, updates)
        labels = (bench.problem.data.labels * (1 + 2 * shift) + shift) % 10
        bench.problem = with_labels(bench.problem, labels)
        bench.answer("activations+np:lrs=0.01:steps=20")  # its reference is chosen by the labels
        found += bench.answer("activations+np-distill:lrs=0.01:steps=20")
    (first, states, _), (second, others, _) = found
    assert first["status"] == "ok"
    assert all(map(same, map(dict, states), map(dict, others)))
    assert first["diagnostics"] == second["diagnostics"]
    assert first["server_labels"] is False


def test_the_law_would_notice_labels() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    garbage = with_labels(problem, (problem.data.labels + 1) % 3)
    for merge in ("np:targets=mixed:steps=20", "finetune:steps=20"):
        first, second = (
            merge_updates(server, updates, align="identity", merge=merge, seed=0) for server in (problem, garbage)
        )
        assert not same(first.merged.state, second.merged.state)
        assert first.merged.server_labels is True


def test_learning_from_the_teacher_comes_near_to_it() -> None:
    problem, updates = problem_of("mlp", server_examples=300), trained("mlp", shared=True)
    test = blobs(400, seed=77)
    mean = merge_updates(problem, updates, align="identity", merge="mean", seed=0).merged
    learned = merge_updates(
        problem, updates, align="identity", merge="np-distill:teacher=prior:groups=channel", seed=0
    ).merged
    assert evaluate(problem.model, learned.states, test).loss < evaluate(problem.model, mean.states, test).loss


# Unlabelled data.


@pytest.mark.parametrize("targets", ["labels", "mixed"])
def test_a_method_that_needs_labels_says_so_where_there_are_none(targets: str) -> None:
    problem = replace(problem_of("mlp@0.1"), data=Examples.unlabelled(problem_of("mlp@0.1").data.images))
    for name in ("np", "finetune", "np-pairwise"):
        with pytest.raises(ConfigurationError, match=r"needs the classes of the server's images.*np-distill"):
            merge_updates(problem, trained("mlp@0.1"), align="identity", merge=f"{name}:targets={targets}", seed=0)


def test_without_labels_nothing_is_chosen_and_the_largest_client_is_the_best() -> None:
    labelled, updates = problem_of("mlp@0.1", server_examples=600), trained("mlp@0.1")
    problem = replace(labelled, data=Examples.unlabelled(labelled.data.images))
    assert labelled.may_choose
    assert not problem.may_choose
    assert problem.folds == ()
    assert problem.learn is problem.data
    outcome = merge_updates(problem, updates, align="activations", merge="best-client", seed=0, screen="off")
    assert outcome.diagnostics["merge"]["client"] == max(updates, key=lambda update: update.num_examples).partition_id
    assert outcome.merged.server_labels is False


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(TARGETS), st.sampled_from(["none", "shifts", "flips", "both"]))
def test_the_objective_of_a_merger_is_its_options_alone(targets: str, augment: str) -> None:
    for name in ("np", "np-pairwise", "finetune"):
        merger = resolve("merger", f"{name}:targets={targets}:augment={augment}:steps=7", MERGERS)
        assert merger.objective == Objective(targets=targets, augment=augment)


def test_targets_go_with_their_images() -> None:
    images, labels = torch.arange(4.0)[:, None], torch.arange(4)
    examples = Examples(images, labels, torch.eye(4))
    part = examples[torch.tensor([2, 0])]
    assert part.targets is not None
    assert part.targets.argmax(1).tolist() == part.labels.tolist() == [2, 0]
    assert examples.to("meta").targets is not None
    with pytest.raises(ValueError, match=r"expected targets of shape \(4, classes\), got \(3, 4\)"):
        Examples(images, labels, torch.eye(4)[:3])
    assert examples.labelled
    assert not Examples.unlabelled(images).labelled


@pytest.mark.parametrize(("targets", "teacher"), list(product(("soft", "sharpened", "mixed"), ("mean", "prior"))))
def test_every_objective_learns_by_every_form(targets: str, teacher: str) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    merge = f"np:groups=channel:lrs=0.01:steps=20:targets={targets}:teacher={teacher}"
    found = merge_updates(problem, updates, align="identity", merge=merge, seed=0)
    assert found.diagnostics["merge"]["targets"] == targets
    assert found.diagnostics["merge"]["teacher"] == teacher
    assert found.diagnostics["merge"]["validation-loss"] <= found.diagnostics["merge"]["start-loss"]
