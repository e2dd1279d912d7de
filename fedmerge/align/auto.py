"""The gate: alignments are tried, and the one whose mean model does best on validation data is kept.

Alignment can hurt (clients that share an initialisation; very wide nets), so no alignment is always among those
tried. Optimal transport is not: the softer it is, the more it fades all models but the reference, and the mean's
validation loss rewards that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from fedmerge.align.activations import Activations
from fedmerge.align.cca import CCA
from fedmerge.align.choice import Candidates, choose
from fedmerge.align.dense import Comparison
from fedmerge.align.identity import Identity
from fedmerge.align.universe import Universe
from fedmerge.align.weights import Weights
from fedmerge.problem import Aligned, Aligner, Problem
from fedmerge.seeds import fork
from fedmerge.spaces import UnsupportedOperation
from fedmerge.state import StateDict


@dataclass(frozen=True)
class Auto:
    """Try each aligner; keep the one with the lowest validation loss of the uniform mean."""

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align by the best of the aligners; below 50 examples there is no choice, and activations are matched.

        An aligner that cannot follow the model, or fails numerically, is left out and named in the diagnostics.
        """
        if len(states) == 1:
            return Identity()(problem, states, reference, generator=generator)
        seed = fork(generator)
        tried: dict[str, Aligner] = {
            "identity": Identity(),
            "activations": Activations(),
            "weights": Weights(),
            "weights:start=activations": Weights(start="activations"),
        }
        if len(states) > 2:
            tried["universe"] = Universe()

        def candidates(part: Problem) -> Candidates:
            simple = {
                name: lambda aligner=aligner: (
                    aligner(part, states, reference, generator=torch.Generator().manual_seed(seed)).states
                )
                for name, aligner in tried.items()
            }
            return {**simple, **CCA().candidates(Comparison(part, states, reference))}

        with suppress(UnsupportedOperation):
            _ = problem.spaces  # derived once for all folds
        found = choose(problem, candidates, default="activations")
        return Aligned(
            found.states,
            server_examples=len(problem.data),
            server_labels=bool(found.losses),
            diagnostics=found.diagnostics,
        )
