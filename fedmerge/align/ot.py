"""Optimal transport: units are assigned softly, by an entropic transport plan between the two models' units.

Singh, Jaggi: Model Fusion via Optimal Transport, NeurIPS 2020, arXiv 1910.05653; Cuturi: Sinkhorn Distances, NIPS
2013, arXiv 1306.0895. With cost C_ij = 1 − corr(x_i, y_j), the plan Π minimises ⟨C, Π⟩ + ε Σ Π log Π with equal
masses for all units. Its multiple n Π sums to 1 by row and by column: writers become n Π W, and readers alike
(`fedmerge.basis.Transport`), as in OTFusion. Towards ε = 0 it is the permutation of activation matching.

What differs: the costs are correlations (OTFusion's are Euclidean distances), all models are transported to a
reference, ε is chosen on the server's validation data, and BatchNorm is folded and restored (`fedmerge.folding`). A
space with other weights that act unit by unit is permuted.

Beware of soft plans: averages of units that differ are small, so the softer the plan, the more the transported model
fades, and the mean of all becomes the reference. A mean that validates better for it has not merged more. Hence no
large ε is among the defaults, and the diagnostics tell what is left of the other models' weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge.align.choice import Candidates
from fedmerge.align.comparison import Comparison, aligned_by_choice
from fedmerge.align.matching import correlation
from fedmerge.basis import Transport
from fedmerge.covariances import Moments
from fedmerge.problem import Aligned, Problem
from fedmerge.state import StateDict

MOST_ITERATIONS = 200
TOLERANCE = 1e-4


@dataclass(frozen=True)
class OptimalTransport:
    """Assign the units softly by the correlation of their activations.

    Attributes:
        epsilons: strengths of the entropy to choose from, on the scale of correlations; the first is the default.
    """

    epsilons: tuple[float, ...] = (0.01, 0.005, 0.02)

    def __post_init__(self) -> None:
        if not self.epsilons or not all(0 < epsilon < math.inf for epsilon in self.epsilons):
            raise ValueError(f"epsilons must be numbers greater than 0, at least one, got {self.epsilons}")

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align all models to `states[reference]` by the activations on the server's images."""
        found = aligned_by_choice(Comparison(problem, states, reference, folded=True), self.candidates)
        left = _left(found.states, reference)
        return replace(found, diagnostics={**found.diagnostics, "left-of-weights": left})

    def candidates(self, comparison: Comparison) -> Candidates:
        """Return an alignment for each ε."""
        return {
            f"ot:epsilons={epsilon:g}": lambda epsilon=epsilon: comparison.solved(  # type: ignore[misc]
                lambda found, _: soft_assignment(found, epsilon)
            )
            for epsilon in self.epsilons
        }


def _left(states: Sequence[StateDict], reference: int) -> list[float]:
    """Return for each model but the reference the size of its weights (not of vectors), relative to the reference's."""
    sizes = [
        sum(float(tensor.double().square().sum()) for tensor in state.values() if tensor.ndim > 1) ** 0.5
        for state in states
    ]
    others = [size for index, size in enumerate(sizes) if index != reference]
    return [round(size / sizes[reference], 6) if sizes[reference] else 0.0 for size in others]


def soft_assignment(found: Moments, epsilon: float) -> Transport:
    """Return the transport of a space's units to the reference's."""
    plan = sinkhorn(1 - correlation(found), epsilon)
    return Transport(len(plan) * plan.T)


def sinkhorn(cost: Float64[Tensor, "rows rows"], epsilon: float) -> Float64[Tensor, "rows rows"]:
    """Return the entropic transport plan between equal masses, by Sinkhorn's iterations on logarithms.

    There are at most 200 iterations; what they leave unequal in the masses is made good by the smallest shift of mass
    (Altschuler, Weed, Rigollet, NIPS 2017, arXiv 1705.09634, algorithm 2), so the masses are exact.

    Args:
        cost: of the transport from each row to each column.
        epsilon: strength of the entropy, more than 0.

    Example:
        >>> plan = sinkhorn(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64), 0.01)
        >>> plan.round(decimals=6)
        tensor([[0.5000, 0.0000],
                [0.0000, 0.5000]], dtype=torch.float64)
    """
    kernel = -cost / epsilon
    mass = 1 / len(cost)
    rows, columns = kernel.new_zeros(len(kernel)), kernel.new_zeros(len(kernel))
    for _ in range(MOST_ITERATIONS):
        rows = math.log(mass) - (kernel + columns).logsumexp(1)
        before = columns
        columns = math.log(mass) - (kernel + rows[:, None]).logsumexp(0)
        if float((columns - before).abs().max()) < TOLERANCE:
            break
    plan = (kernel + rows[:, None] + columns).exp()
    plan = plan * (mass / plan.sum(1, keepdim=True)).clamp(max=1)
    plan = plan * (mass / plan.sum(0, keepdim=True)).clamp(max=1)
    missing_rows, missing_columns = mass - plan.sum(1), mass - plan.sum(0)
    missing = float(missing_rows.sum())
    return plan + torch.outer(missing_rows, missing_columns) / missing if missing > 0 else plan
