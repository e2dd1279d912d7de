"""CCA Merge: units are mixed, so that they correlate most with the reference's.

Horoi, Orozco Camacho, Belilovsky, Wolf: Harmony in Diversity: Merging Neural Networks with Canonical Correlation
Analysis, ICML 2024, arXiv 2407.05385. With the covariances of a space's features in the reference (x) and in another
model (y), the canonical directions of both are matched: T = S_yy^-1/2 V Uᵀ S_xx^1/2, where U Σ Vᵀ = S_xx^-1/2 S_xy
S_yy^-1/2.

What differs:
- The ridge is relative to the features' variance, and chosen on the server's validation data (the paper's code
  searches absolute values on the test set).
- The ridge is added to S_xy too, between units that a permutation matches (`anchor`). That is what imagined samples
  would add in which matched units, and they alone, fire together: the larger the ridge, the nearer T is to that
  permutation. Without it, T nears a rotation that the small differences of S_xy decide, and the changed model
  forgets.
- BatchNorm is folded into the layer before, and restored after the change (`fedmerge.folding`).
- A space with other weights that act unit by unit (LayerNorm, depthwise convolutions) is permuted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float64
from torch import Tensor

from fedmerge.align.choice import Candidates
from fedmerge.align.comparison import Comparison, aligned_by_choice
from fedmerge.basis import Linear, Permutation
from fedmerge.covariances import Moments
from fedmerge.problem import Aligned, Problem
from fedmerge.state import StateDict

ANCHORS = ("permutation", "none")


@dataclass(frozen=True)
class CCA:
    """Mix the units by canonical correlation analysis of their activations.

    Attributes:
        ridges: multiples of the mean variance of a space's features to choose from; the first is the default.
        anchor: what a growing ridge draws T to: the "permutation" that matches the units, or "none", as in the paper.
    """

    ridges: tuple[float, ...] = (3.0, 0.1, 1.0, 10.0, 100.0)
    anchor: str = "permutation"

    def __post_init__(self) -> None:
        if not self.ridges or not all(0 < ridge < float("inf") for ridge in self.ridges):
            raise ValueError(f"ridges must be numbers greater than 0, at least one, got {self.ridges}")
        if self.anchor not in ANCHORS:
            raise ValueError(f"anchor must be one of {', '.join(ANCHORS)}, got {self.anchor!r}")

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align all models to `states[reference]` by the activations on the server's images."""
        return aligned_by_choice(Comparison(problem, states, reference, folded=True), self.candidates)

    def candidates(self, comparison: Comparison) -> Candidates:
        """Return an alignment for each ridge."""
        return {
            f"cca:ridges={ridge:g}": lambda ridge=ridge: comparison.solved(  # type: ignore[misc]
                lambda found, permutation: self.change(found, ridge, permutation)
            )
            for ridge in self.ridges
        }

    def change(self, found: Moments, ridge: float, permutation: Permutation) -> Linear:
        """Return the basis change of a space, by `canonical_map` of the regularised covariances.

        Args:
            found: of the space's features.
            ridge: multiple of their mean variance.
            permutation: that matches the units.
        """
        identity = torch.eye(len(found.cross), dtype=torch.float64)
        reference, other = found.own
        of_reference, of_other = (
            ridge * max(float(variances.mean()), torch.finfo(torch.float32).tiny) for variances in found.variances
        )
        cross = found.cross
        if self.anchor == "permutation":
            cross = cross + (of_reference * of_other) ** 0.5 * identity[permutation.index]
        return Linear(canonical_map(reference + of_reference * identity, cross, other + of_other * identity))


def canonical_map(
    reference: Float64[Tensor, "units units"],
    cross: Float64[Tensor, "units units"],
    other: Float64[Tensor, "units units"],
) -> Float64[Tensor, "units units"]:
    """Return T = S_yy^-1/2 V Uᵀ S_xx^1/2, where U Σ Vᵀ = S_xx^-1/2 S_xy S_yy^-1/2.

    Any roots give the same T: here S = L Lᵀ (Cholesky), T = L_y⁻ᵀ V Uᵀ L_xᵀ, where U Σ Vᵀ = L_x⁻¹ S_xy L_y⁻ᵀ.

    Args:
        reference: S_xx, positive definite.
        cross: S_xy, rows for x.
        other: S_yy, positive definite.

    Example:
        >>> identity = torch.eye(2, dtype=torch.float64)
        >>> canonical_map(4 * identity, 2 * identity, identity)
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """
    of_reference, of_other = torch.linalg.cholesky(reference), torch.linalg.cholesky(other)
    half = torch.linalg.solve_triangular(of_reference, cross, upper=False)
    u, _, vh = torch.linalg.svd(torch.linalg.solve_triangular(of_other, half.T, upper=False).T)
    change: Tensor = torch.linalg.solve_triangular(of_other.T, vh.T @ (of_reference @ u).T, upper=True)
    return change
