"""How an aligner chooses among settings, and the gate among aligners: by the loss of the uniform mean.

A candidate is fitted on the part to learn on of each fold and judged on its validation part; the one with the lowest
mean loss is fitted again where the protocol refits. All candidates of a fold may share what they are made of. To be
judged, a mean model has its BatchNorm statistics re-estimated on at most 1,024 images, evenly spread over that part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from fedmerge.calibrate import calibrate
from fedmerge.merge.average import mean_state
from fedmerge.problem import Aligned, Problem
from fedmerge.spaces import UnsupportedOperation
from fedmerge.train import evaluate

MOST_TO_CALIBRATE = 1024
"""Images on which a candidate's BatchNorm statistics are estimated: a candidate is judged at that price."""

Candidates = Mapping[str, Callable[[], Aligned]]
"""Named alignments of the same models, computed when called; the name is that of an aligner with its options."""


class Unusable(ArithmeticError):
    """An alignment whose mean has no finite loss."""


FAILURES: tuple[type[Exception], ...] = (UnsupportedOperation, torch.linalg.LinAlgError, Unusable)  # type: ignore[attr-defined]
"""What leaves a candidate out; anything else is a fault of ours, or of the input."""


@dataclass(frozen=True)
class Choice:
    """A choice that was made.

    Attributes:
        name: of the candidate.
        aligned: what it gave.
        losses: mean validation loss of each candidate's mean model; empty where nothing can be chosen.
        failed: why each candidate that is left out failed.
    """

    name: str
    aligned: Aligned
    losses: dict[str, float]
    failed: dict[str, str]

    @property
    def diagnostics(self) -> dict[str, Any]:
        """The choice in JSON's types."""
        return {"chosen": self.name, "validation-losses": self.losses, "failed": self.failed}


def choose(problem: Problem, candidates: Callable[[Problem], Candidates], *, default: str | None = None) -> Choice:
    """Return the alignment whose mean model does best on validation data.

    A candidate that fails, because it cannot follow the model or numerically, is left out and named.

    Args:
        problem: the server's side.
        candidates: given a problem whose `learn` is to be learned on, the alignments to choose from; the same names
            each time.
        default: taken where nothing can be chosen: the first by default; if it fails, the next of all.

    Raises:
        UnsupportedOperation: or another of `FAILURES`, the last one, if every candidate fails.
    """
    final = candidates(problem)
    failed: dict[str, Exception] = {}
    sums = dict.fromkeys(final, 0.0) if problem.may_choose and len(final) > 1 else {}
    for learn, validation in problem.folds if sums else ():
        fitted = candidates(problem.restricted(learn)) if problem.refits else final
        images = learn.images[:: math.ceil(len(learn) / MOST_TO_CALIBRATE)]
        for name in sums:
            if name in failed:
                continue
            try:
                mean = calibrate(problem.model, mean_state(fitted[name]().states), images)
                loss = evaluate(problem.model, [mean], validation).loss
                if not math.isfinite(loss):
                    raise Unusable(f"the mean model's validation loss is {loss}")
                sums[name] += loss / len(problem.folds)
            except FAILURES as error:
                failed[name] = error
    losses = {name: total for name, total in sums.items() if name not in failed}
    order = sorted(final, key=lambda name: losses.get(name, math.inf) if sums else name != default)
    for name in order:
        if name not in failed:
            try:
                aligned = final[name]()
            except FAILURES as error:
                failed[name] = error
                losses.pop(name, None)
                continue
            return Choice(name, aligned, losses, {name: str(error) for name, error in failed.items()})
    raise list(failed.values())[-1]
