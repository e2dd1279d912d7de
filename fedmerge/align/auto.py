"""The gate: alignments are tried, and the one whose mean model does best on validation data is kept.

Alignment can hurt (clients that share an initialisation; very wide nets), so no alignment is always among those
tried. Optimal transport is not: the softer it is, the more it fades all models but the reference, and the mean's
validation loss rewards that. ZipIt is tried only when asked for (`zipit=true`): its mean is often the best, but what it
makes of each client is a part of that mean and no model, of no use to a merger that looks at single clients.

The models are compared in one pass over the images for all aligners.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from fedmerge.align.activations import Activations
from fedmerge.align.cca import CCA
from fedmerge.align.choice import Candidates, choose
from fedmerge.align.comparison import Comparison
from fedmerge.align.identity import Identity
from fedmerge.align.universe import Universe
from fedmerge.align.weights import Weights
from fedmerge.align.zipit import ZipIt
from fedmerge.problem import Aligned, Problem
from fedmerge.seeds import fork
from fedmerge.spaces import UnsupportedOperation
from fedmerge.state import StateDict


@dataclass(frozen=True)
class Auto:
    """Try each aligner; keep the one with the lowest validation loss of the uniform mean.

    Attributes:
        zipit: try ZipIt too; for mergers that start at the mean of all (`mean`, `np`, `finetune`).
    """

    zipit: bool = False

    @property
    def parts(self) -> bool:
        """Whether what is returned may be parts of a mean, and no models."""
        return self.zipit

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align by the best of the aligners; below 50 examples there is no choice, and activations are matched.

        An aligner that cannot follow the model, or fails numerically, is left out and named in the diagnostics.
        """
        if len(states) == 1:
            return Identity()(problem, states, reference, generator=generator)
        seed = fork(generator)

        def candidates(part: Problem) -> Candidates:
            comparison = Comparison(part, states, reference, every_pair=len(states) > 2, folded=True)
            dense = CCA().candidates(comparison)
            if self.zipit:
                dense = {**dense, **ZipIt().candidates(comparison)}
            tried: dict[str, Callable[[torch.Generator], Aligned]] = {
                "identity": lambda stream: Identity()(part, states, reference, generator=stream),
                "activations": lambda stream: Activations().aligned(comparison, generator=stream),
                "weights": lambda stream: Weights().aligned(comparison, generator=stream),
                "weights:start=activations": lambda stream: Weights(start="activations").aligned(
                    comparison, generator=stream
                ),
            }
            if len(states) > 2:
                tried["universe"] = lambda _: Universe().aligned(comparison)
            simple = {
                name: lambda aligned=aligned: aligned(torch.Generator().manual_seed(seed))
                for name, aligned in tried.items()
            }
            return {**simple, **dense}

        with suppress(UnsupportedOperation):
            _ = problem.spaces  # derived once for all folds
        found = choose(problem, candidates, default="activations")
        return replace(
            found.aligned,
            server_examples=len(problem.data),
            server_labels=bool(found.losses),
            diagnostics=found.diagnostics,
        )
