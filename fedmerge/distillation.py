"""Several models of any architectures teach one: how a federation of several families ends in the server's model.

The teacher is an ensemble, by the rules of `fedmerge.merge.teacher`: of the families' merged models, of the clients'
own models, or of both. Which of them teaches is chosen by validation where at least 500 classes are known, as then no
member was fitted to the validation part; otherwise it is the families' models where classes are known, and the clients'
own where none is.

The student is fine-tuned from the server's own family's model, or a fresh initialisation where there is none. On an
image of known class its target is a mixture of the class and the teacher's probabilities, in shares that validation on
the known classes chooses; on others it is the teacher's most probable class.

Lin, Kong, Stich, Jaggi: Ensemble Distillation for Robust Model Fusion in Federated Learning, NeurIPS 2020, arXiv
2006.07242 (there groups of one architecture are averaged, and each average is fine-tuned on the mean of all clients'
logits; here the families are aligned and merged, one student is wanted, and label counts and labels weigh the teacher).
Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmerge.merge.descent import Candidate, Schedule, Weights, split_state
from fedmerge.merge.finetune import fresh_state
from fedmerge.merge.learning import learn
from fedmerge.merge.pool import pool_of
from fedmerge.merge.teacher import SMOOTHING
from fedmerge.problem import FEWEST_TO_CHOOSE, Combination, Examples, Merged, Problem, Update
from fedmerge.seeds import fork
from fedmerge.state import StateDict
from fedmerge.train import LEAST_LOG_PROBABILITY

LRS = (1e-3, 3e-4, 3e-3)
LABEL_SHARES = (0.5, 0.0)
"""The labels' shares in the targets to choose from; with the learning rates, as many candidates as fine-tuning has."""


@dataclass(frozen=True)
class Lesson:
    """What a teacher says of the server's images.

    Attributes:
        teacher: its name.
        says: (examples, classes) log-probabilities in float64.
        combine: makes them of its members' log-probabilities.
        by_labels: whether the server's labels have a part in it.
        diagnostics: in JSON's types.
    """

    teacher: str
    says: Tensor
    combine: Combination
    by_labels: bool
    diagnostics: Mapping[str, Any]


def choose_teacher(
    problem: Problem, teachers: Mapping[str, tuple[Sequence[Update], str]], default: str, smoothing: float = SMOOTHING
) -> Lesson:
    """Return the teacher of the least validation loss, or the default where none can be chosen.

    Args:
        problem: the server's side, with the architectures.
        teachers: by name, the members and their rule, one of `fedmerge.merge.teacher.TEACHERS`. A member of a rule by
            label counts must have them.
        default: the name of one.
        smoothing: examples added to each label count.
    """
    may_choose = problem.may_choose and not problem.refits
    losses: dict[str, float] = {}
    lessons: dict[str, Lesson] = {}
    for name in teachers if may_choose else [default]:
        members, rule = teachers[name]
        pool = pool_of(rule, problem, members, smoothing)
        says = pool.combine(*pool.own(problem))
        lessons[name] = Lesson(name, says, pool.combine, pool.server_labels, {"teacher": name, "rule": rule})
        if may_choose:
            judges = problem.splits[0][1].to(says.device)
            true = says[judges].clamp(min=LEAST_LOG_PROBABILITY).gather(1, problem.data.labels[judges, None])
            losses[name] = -float(true.mean())
    lesson = lessons[min(losses, key=lambda name: losses[name]) if losses else default]
    return replace(
        lesson,
        by_labels=lesson.by_labels or may_choose,
        diagnostics={**lesson.diagnostics, "teachers' validation-losses": losses} if losses else lesson.diagnostics,
    )


def distil(
    problem: Problem,
    lesson: Lesson,
    start: StateDict | None,
    *,
    steps: int = Schedule.steps,
    generator: torch.Generator,
) -> Merged:
    """Return a model of the server's architecture that has learned what the teacher says, and the known classes.

    Args:
        problem: the server's side, not taught.
        lesson: of the teacher, on the problem's images.
        start: a model of the server's architecture; None: a fresh initialisation.
        steps: most steps.
        generator: the only source of randomness.
    """
    begun = fresh_state(problem, fork(generator)) if start is None else start
    parameters, buffers = split_state(problem, begun)
    candidates = [
        Candidate({"start": "fresh" if start is None else "family"}, lr, lambda: Weights(parameters)) for lr in LRS
    ]
    seed = fork(generator)
    lessons = _taught(problem, lesson)
    found = []
    for taught, share in lessons:
        chance = torch.Generator().manual_seed(seed)  # all see the same batches
        of_share = learn(
            taught, candidates, buffers, Schedule(steps=steps, average=True), generator=chance, task="distillation"
        )
        about = {**lesson.diagnostics, **({} if share is None else {"label-share": share}), **of_share.diagnostics}
        about["candidates"] *= len(lessons)
        found.append(replace(of_share, diagnostics=about))
    return min(found, key=lambda one: one.diagnostics["validation-loss"] or 0.0)


def _taught(problem: Problem, lesson: Lesson) -> list[tuple[Problem, float | None]]:
    """Return the problem with each of the targets to choose from, and the labels' share in them."""
    data, known = problem.data, problem.data.known
    classes = lesson.says.argmax(1)
    if not known.any():
        blind = not lesson.by_labels
        return [(problem.changed(data=Examples(data.images, classes), blind=blind, taught=True), None)]
    number = lesson.says.shape[1]
    truth = functional.one_hot(data.labels.where(known, classes), number).to(lesson.says)
    judged = int(known.sum()) >= FEWEST_TO_CHOOSE
    labels = data.labels if judged else data.labels.where(known, classes)
    found: list[tuple[Problem, float | None]] = []
    for share in LABEL_SHARES if judged else LABEL_SHARES[:1]:
        mixed = torch.lerp(lesson.says.exp(), truth, share).where(known[:, None], truth).to(data.images.dtype)
        examples = Examples(data.images, labels, mixed)
        found.append((problem.changed(data=examples, taught=True, truth_judges=judged), share))
    return found
