"""The gate: alignments are tried, and the one whose mean model does best on validation data is kept.

Alignment can hurt (clients that share an initialisation; very wide nets), so no alignment is always among those tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedmerge.align.activations import Activations
from fedmerge.align.identity import Identity
from fedmerge.calibrate import calibrate
from fedmerge.merge.average import mean_state
from fedmerge.problem import Aligned, Aligner, Problem
from fedmerge.seeds import fork
from fedmerge.state import StateDict
from fedmerge.train import evaluate


@dataclass(frozen=True)
class Auto:
    """Try each aligner; keep the one with the lowest validation loss of the uniform mean."""

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align by the best of the aligners; below 50 examples there is no choice, and activations are matched."""
        tried: dict[str, Aligner] = {"identity": Identity(), "activations": Activations()}
        if not problem.may_choose:
            del tried["identity"]
        seed = fork(generator)
        found: dict[str, Aligned] = {}
        losses: dict[str, float] = {}
        for name, aligner in tried.items():
            found[name] = aligner(problem, states, reference, generator=torch.Generator().manual_seed(seed))
            if problem.may_choose:
                mean = calibrate(problem.model, mean_state(found[name].states), problem.learn.images)
                losses[name] = evaluate(problem.model, [mean], problem.validation).loss
        chosen = min(found, key=lambda name: losses.get(name, 0.0))
        return Aligned(
            found[chosen].states,
            server_examples=len(problem.data),
            server_labels=problem.may_choose,
            diagnostics={"chosen": chosen, "validation-losses": losses, **found[chosen].diagnostics},
        )
