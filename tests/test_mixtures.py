"""Images mixed of the server's: the teacher tells of them, models learn from them, and they judge nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import hiding, problem_of, trained

from fedmerge.augment import mixtures
from fedmerge.merge.nonuniform import NPMerge
from fedmerge.merge.objective import Objective
from fedmerge.merge.pool import pool_of
from fedmerge.problem import Examples
from fedmerge.train import opinions

TAUGHT = ["soft", "sharpened", "hard", "mixed", "completed"]


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_a_mixture_lies_between_two_images() -> None:
    images = torch.eye(6, dtype=torch.float64).reshape(6, 1, 2, 3)
    found = mixtures(images, 500, stream())
    assert found.shape == (500, 1, 2, 3)
    torch.testing.assert_close(found.sum((1, 2, 3)), torch.ones(500, dtype=torch.float64))
    assert found.min() >= 0
    assert (found > 0).sum((1, 2, 3)).max() == 2
    assert found.mean(0).flatten() == pytest.approx(torch.full((6,), 1 / 6), abs=0.05)
    assert torch.equal(found, mixtures(images, 500, stream()))


@pytest.mark.parametrize("targets", TAUGHT)
def test_the_teacher_tells_of_mixtures_as_of_any_image(targets: str) -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=80), trained("mlp@0.1")
    part = hiding(problem, torch.arange(80) >= 60)
    found = Objective(targets, "counts-geometric", mixtures=30).teach(part, updates)
    assert found.mixtures is not None
    assert found.mixtures.targets is not None
    combine = pool_of("counts-geometric", part, updates, 1.0).combine
    told = combine(opinions(part, updates, found.mixtures.images)).exp()
    torch.testing.assert_close(found.mixtures.targets, told.to(found.mixtures.targets))
    assert len(found.data) == 80, "they are no images of the server's"
    without = Objective(targets, "counts-geometric", mixtures=0).teach(part, updates)
    assert without.mixtures is None
    for (_, judge), (_, other) in zip(found.folds, without.folds, strict=True):
        assert torch.equal(judge.images, other.images)


def test_what_is_learned_depends_on_the_mixtures_and_their_targets() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=80), trained("mlp@0.1")
    merger = NPMerge(targets="soft", mixtures=40, lrs=(0.01,), steps=20)
    taught = merger.teach(problem, updates)
    assert taught.mixtures is not None
    wrong = replace(taught.mixtures, targets=torch.full((40, 3), 1 / 3))
    states = [
        merger(replace(taught, mixtures=extra), updates, generator=stream()).state
        for extra in (taught.mixtures, taught.mixtures, wrong, None)
    ]
    first, again, mistaught, without = (torch.cat([item.flatten() for item in state.values()]) for state in states)
    assert torch.equal(first, again)
    assert not torch.equal(first, mistaught)
    assert not torch.equal(first, without)


def test_where_labels_alone_are_learned_from_there_are_none() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    assert Objective("labels").teach(problem, updates).mixtures is None
    assert Objective("completed").teach(problem, updates).mixtures is None, "every class is known"
    with pytest.raises(ValueError, match="mixtures must be a number of images, at least 0, got -1"):
        Objective("soft", mixtures=-1)


def test_examples_are_joined_with_their_labels_as_targets() -> None:
    images = torch.arange(3.0)[:, None]
    plain, soft = Examples(images, torch.tensor([0, 2, 1])), Examples(images, torch.zeros(3, dtype=torch.int64))
    joined = plain.joined(replace(soft, targets=torch.full((3, 3), 1 / 3)), 3)
    assert joined.targets is not None
    assert joined.targets.tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0], *[[pytest.approx(1 / 3)] * 3] * 3]
    assert joined.images.flatten().tolist() == [0, 1, 2, 0, 1, 2]
