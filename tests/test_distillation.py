"""Several models teach one: who teaches, what is learned, and by whom it is judged."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import problem_of, same, trained

from fedmerge.distillation import choose_teacher, distil
from fedmerge.merge.teacher import Teacher
from fedmerge.problem import UNKNOWN, Examples, Problem
from fedmerge.seeds import generator
from fedmerge.train import evaluate, opinions, predict

NAME = "mlp@0.1"


def problem(server_examples: int, known: int | None = None) -> Problem:
    """A server that knows the classes of the first `known` of its images, or of all."""
    of = problem_of(NAME, server_examples)
    known = server_examples if known is None else known
    labels = of.data.labels.where(torch.arange(server_examples) < known, UNKNOWN)
    return of.restricted(Examples(of.data.images, labels))


def wrong() -> list:  # type: ignore[type-arg]
    """Clients that say the opposite of what they have learned."""
    updates = trained(NAME)
    return [
        replace(
            update, state={name: -tensor if name.startswith("5.") else tensor for name, tensor in update.state.items()}
        )
        for update in updates
    ]


def test_the_teacher_of_the_least_validation_loss_is_chosen_and_one_that_is_wrong_is_not() -> None:
    of, updates = problem(500), trained(NAME)
    teachers = {"good": (updates, "counts"), "wrong": (wrong(), "counts"), "alike": (updates, "mean")}
    lesson = choose_teacher(of, teachers, "wrong")
    losses = lesson.diagnostics["teachers' validation-losses"]
    said = opinions(of, updates, of.data.images)
    judges = of.splits[0][1]
    for name, teacher in (
        ("good", Teacher("counts", tuple(update.label_counts or () for update in updates))),
        ("alike", Teacher("mean")),
    ):
        expected = -teacher(said)[judges].gather(1, of.data.labels[judges, None]).mean()
        assert losses[name] == pytest.approx(float(expected))
    assert lesson.teacher == min(losses, key=lambda name: losses[name]) != "wrong"
    assert lesson.by_labels


@pytest.mark.parametrize("of", [problem(300), problem(40), problem(600, 100)])
def test_below_five_hundred_known_classes_the_default_teaches_and_no_label_has_a_part_in_that(of: Problem) -> None:
    updates = trained(NAME)
    lesson = choose_teacher(of, {"one": (updates, "mean"), "other": (updates, "counts")}, "other")
    assert lesson.teacher == "other"
    assert not lesson.by_labels
    assert "teachers' validation-losses" not in lesson.diagnostics


def student(of: Problem, steps: int = 20, fresh: bool = False):  # type: ignore[no-untyped-def] # noqa: ANN201
    updates = trained(NAME)
    lesson = choose_teacher(of, {"clients": (updates, "counts-geometric")}, "clients")
    start = None if fresh else updates[0].state
    return distil(of, lesson, start, steps=steps, generator=generator(1, "test"))


@pytest.mark.parametrize("fresh", [False, True])
def test_the_student_learns_what_the_teacher_knows_and_the_start_does_not(fresh: bool) -> None:
    of = problem(200, 0)
    found = student(of, steps=100, fresh=fresh)
    updates = trained(NAME)
    teacher = Teacher("counts-geometric", tuple(update.label_counts or () for update in updates))
    classes = teacher(opinions(of, updates, of.data.images)).argmax(1)
    taught = Examples(of.data.images, classes)
    learned, before = (evaluate(of.model, [state], taught).accuracy for state in (found.state, updates[0].state))
    assert learned > max(before, 0.7)
    assert not found.server_labels
    assert found.diagnostics["start"] == ("fresh" if fresh else "family")


def test_same_seed_same_bits_and_nothing_that_is_given_is_changed() -> None:
    of = problem(60)
    before = {name: tensor.clone() for name, tensor in of.model.state_dict().items()}
    assert same(student(of).state, student(of).state)
    assert same(dict(of.model.state_dict()), before)


def test_the_labels_share_is_chosen_by_the_known_classes() -> None:
    of = problem(500)
    found = student(of)
    assert found.diagnostics["label-share"] in (0.5, 0.0)
    assert found.diagnostics["candidates"] == 6, "as many as fine-tuning has"
    loss = evaluate(of.model, [found.state], of.validation).loss
    assert found.diagnostics["validation-loss"] == pytest.approx(loss), "not by the targets, which are half a teacher's"
    assert loss <= evaluate(of.model, [trained(NAME)[0].state], of.validation).loss
    assert found.server_labels


def test_where_the_truth_judges_validation_parts_have_no_targets_and_learning_parts_do() -> None:
    of = problem(500)
    targets = torch.full((500, 3), 1 / 3)
    taught = of.changed(data=Examples(of.data.images, of.data.labels, targets), truth_judges=True)
    (learn, judge), (_, plain) = taught.folds[0], of.folds[0]
    assert learn.targets is not None
    assert judge.targets is None
    assert torch.equal(judge.labels, plain.labels)
    assert of.changed(data=taught.data).folds[0][1].targets is not None


def test_with_few_known_classes_all_images_are_learned_from_and_nothing_is_nan() -> None:
    for of in (problem(100, 20), problem(20, 20), problem(120, 60)):
        found = student(of)
        assert found.server_examples == len(of.data)
        assert math.isfinite(float(predict(of.model, found.state, of.data.images).sum()))
        assert found.server_labels
