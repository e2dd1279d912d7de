"""Activation matching: units that correlate most over the server's images are the same unit.

Li, Yosinski, Clune, Lipson, Hopcroft: Convergent Learning: Do Different Neural Networks Learn the Same
Representations?, ICLR 2016, arXiv 1511.07543; Ainsworth, Hayase, Srinivasa: Git Re-Basin, ICLR 2023, arXiv 2209.04836,
section 3.1. The permutation of each feature space maximises the sum of the correlations (a linear assignment). The
spaces come from tracing the model, and a space is matched at its last node before pooling.

With `passes`, each model is then matched with the mean of the others (`fedmerge.align.running_mean`), by the features
of both after their BatchNorm statistics are re-estimated. A model is renamed only where it correlates more with them;
as the mean's features are not the features' mean, nothing says that all pairs agree better for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.align.comparison import Comparison
from fedmerge.align.matching import composed, correlation, match, matched
from fedmerge.align.running_mean import matched_with_mean
from fedmerge.basis import Permutation
from fedmerge.calibrate import calibrate
from fedmerge.covariances import Moments
from fedmerge.features import moments
from fedmerge.problem import Aligned, Problem
from fedmerge.state import StateDict

LEAST_GAIN = 1e-5
"""Of the mean correlation, for another permutation: what is below is the rounding of features in float32."""


@dataclass(frozen=True)
class Activations:
    """Permute the units by the correlation of their activations.

    Attributes:
        passes: most passes in which each model is matched with the mean of the others, after all with the reference.
    """

    passes: int = 0

    def __post_init__(self) -> None:
        if self.passes < 0:
            raise ValueError(f"passes must be at least 0, got {self.passes}")

    def __call__(
        self,
        problem: Problem,
        states: Sequence[StateDict],
        reference: int,
        *,
        generator: torch.Generator,
    ) -> Aligned:
        """Align all models to `states[reference]` by the activations on the server's images."""
        return self.aligned(Comparison(problem, states, reference, own=False), generator=generator)

    def aligned(self, comparison: Comparison, *, generator: torch.Generator) -> Aligned:
        """Align models that are compared already.

        Args:
            comparison: of the models.
            generator: decides the order of the models in a pass.
        """
        problem = comparison.problem
        found = [
            matched(correlation(moments), change)
            for model, changes in enumerate(comparison.matches)
            if model != comparison.reference
            for moments, change in zip(comparison.moments(model), changes, strict=True)
        ]
        diagnostics = {"matched-correlation": round(sum(found) / len(found), 6) if found else 1.0}
        changes = comparison.matches
        if self.passes and len(changes) > 1:
            further, done = matched_with_mean(
                comparison.permuted(changes),
                comparison.reference,
                problem.spaces,
                lambda mean, state: _matched_features(problem, mean, state),
                passes=self.passes,
                generator=generator,
                kept=problem.kept,
            )
            changes = list(map(composed, changes, further))
            diagnostics["passes"] = done
        return Aligned(
            comparison.permuted(changes),
            server_examples=len(problem.learn),
            diagnostics=diagnostics,
            changes=tuple(changes),
        )


def _matched_features(problem: Problem, mean: StateDict, state: StateDict) -> list[Permutation]:
    images = problem.learn.images
    calibrated = [calibrate(problem.model, item, images) for item in (mean, state)]
    _, compared = moments(problem.model, problem.spaces, calibrated, 0, images, own=False)
    return [_better(found) for found in compared]


def _better(found: Moments) -> Permutation:
    """Return the best permutation, or none if it gains nothing but rounding."""
    scores = correlation(found)
    best, none = match(scores), Permutation(torch.arange(len(scores)))
    return best if matched(scores, best) > matched(scores, none) + LEAST_GAIN else none
