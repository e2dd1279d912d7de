"""Learning by the protocol: candidates are compared on validation data, and the best state is restored.

The budget of choices, the stopping, and what is done about divergence are the same for all learned merges and their
controls.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.merge.descent import Candidate, Schedule, descend
from fedmerge.problem import Merged, Problem
from fedmerge.seeds import fork
from fedmerge.state import StateDict
from fedmerge.train import evaluate

BACK_OFFS = 3
OVERFITTING = 1.1
"""The last validation loss over the best, above which a descent is said to overfit."""


def learn(
    problem: Problem,
    candidates: Sequence[Candidate],
    buffers: StateDict,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    task: str,
) -> Merged:
    """Choose among candidates and numbers of steps by the protocol, and return the model learned.

    All candidates see the same batches. The start (step 0) is among what may be chosen, so on validation data the
    choice is never worse than the start. If every candidate diverges (its loss is above the start's, or not finite, at
    every look), the least learning rate is backed off, up to `BACK_OFFS` times. What went wrong is named in the
    diagnostics' findings.

    Args:
        problem: the server's side, taught.
        candidates: at least one; the first is the default where nothing can be chosen.
        buffers: the start's buffers by name; BatchNorm statistics are re-estimated.
        schedule: how long to go on.
        generator: decides the batches.
        task: what is learned, for the progress.
    """
    seed = fork(generator)
    findings: list[str] = []
    chosen, steps = candidates[0], min(schedule.default_steps, schedule.steps)
    best: Course | None = None
    if problem.may_choose:
        chosen, best = _choose(problem, candidates, buffers, schedule, seed, task, findings)
        steps = best.steps
    if best is None or problem.refits:
        state = _fitted(problem, chosen, buffers, schedule, steps, seed, findings)
    else:
        state = dict(best.state)
    diagnostics = {
        **chosen.settings,
        "lr": chosen.lr,
        "steps": steps,
        "candidates": len(candidates) if best else 1,
        "start-loss": best.losses[0] if best else None,
        "validation-loss": best.loss if best else None,
        "findings": findings,
    }
    if problem.lesson:
        diagnostics["lesson"] = dict(problem.lesson)
    return Merged((state,), server_examples=len(problem.data), server_labels=not problem.blind, diagnostics=diagnostics)


def _choose(
    problem: Problem,
    candidates: Sequence[Candidate],
    buffers: StateDict,
    schedule: Schedule,
    seed: int,
    task: str,
    findings: list[str],
) -> tuple[Candidate, Course]:
    courses = []
    for number, candidate in enumerate(candidates):
        courses.append((candidate, _course(problem, candidate, buffers, schedule, seed)))
        problem.progress(task, number + 1, len(candidates))
    diverged = [candidate.lr for candidate, course in courses if course.diverged]
    if diverged:
        findings.append(f"diverged with lr {', '.join(f'{lr:g}' for lr in dict.fromkeys(diverged))}")
    slower = min(candidates, key=lambda candidate: candidate.lr)
    for _ in range(BACK_OFFS if len(diverged) == len(courses) else 0):
        slower = slower.slower()
        course = _course(problem, slower, buffers, schedule, seed)
        courses.append((slower, course))
        findings.append(f"backed off to lr {slower.lr:g}" + (", and diverged" if course.diverged else ""))
        if not course.diverged:
            break
    chosen, best = min(courses, key=lambda pair: pair[1].loss)
    if best.last > OVERFITTING * best.loss:
        findings.append(f"overfitting: the validation loss rose from {best.loss:.4g} to {best.last:.4g}")
    return chosen, best


def _fitted(
    problem: Problem,
    candidate: Candidate,
    buffers: StateDict,
    schedule: Schedule,
    steps: int,
    seed: int,
    findings: list[str],
) -> dict[str, Tensor]:
    """Descend on all examples; if that does not even lower their own loss, back off, and at last return the start."""
    for _ in range(BACK_OFFS + 1):
        start, state = descend(problem, candidate, buffers, problem.data, [0, steps], seed=seed, schedule=schedule)
        before, after = (evaluate(problem.model, [found], problem.data).loss for found in (start, state))
        if after <= before:
            return state
        findings.append(f"diverged with lr {candidate.lr:g} on all examples")
        candidate = candidate.slower()
    return start


@dataclass(frozen=True)
class Course:
    """The course of a candidate's descents on all folds.

    Attributes:
        losses: mean validation loss over the folds at each look up to the best; infinite once one has diverged.
        steps: steps at the best look.
        state: the first fold's model there.
        last: mean validation loss at the last look, which may come after the best one.
    """

    losses: list[float]
    steps: int
    state: StateDict
    last: float

    @property
    def diverged(self) -> bool:
        """Whether nothing but the start is finite and as good as the start."""
        return self.steps == 0 and self.last > self.losses[0]

    @property
    def loss(self) -> float:
        """The least validation loss."""
        return min(self.losses)


def _course(problem: Problem, candidate: Candidate, buffers: StateDict, schedule: Schedule, seed: int) -> Course:
    """Descend on all folds side by side, until their mean validation loss has not fallen for some looks."""
    looks = range(0, schedule.steps + 1, schedule.check_every)
    descents = [
        descend(side, candidate, buffers, data, looks, seed=seed, schedule=schedule)
        for side, (data, _) in zip(problem.sides, problem.folds, strict=True)
    ]
    losses: list[float] = []
    best = Course([math.inf], 0, {}, math.inf)
    for steps in looks:
        states = [next(descent) for descent in descents]
        found = [
            evaluate(problem.model, [state], validation).loss
            for state, (_, validation) in zip(states, problem.folds, strict=True)
        ]
        mean = sum(found) / len(found)
        losses.append(mean if math.isfinite(mean) else math.inf)
        if not best.state or losses[-1] < best.loss:
            best = Course(losses.copy(), steps, problem.kept(states[0]), losses[-1])
        del states  # they would be held in all the steps to come
        if steps - best.steps >= schedule.waits:
            break
    return replace(best, last=losses[-1])
