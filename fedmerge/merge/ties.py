"""TIES merging: task vectors are trimmed, each number's sign is elected, and those that agree with it are averaged.

Yadav, Tam, Choshen, Raffel, Bansal: TIES-Merging: Resolving Interference When Merging Models, NeurIPS 2023, arXiv
2306.01708. What differs: where the trimmed changes of a number sum to exactly 0 no sign is elected, and it stays at the
start; the share that is kept and the scale are chosen by the protocol.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.taskvectors import check_scales, departed, start_of, task_vectors
from fedmerge.problem import Merged, Problem, Update


@dataclass(frozen=True)
class TIES:
    """Trim, elect signs, average what agrees.

    Attributes:
        keeps: shares of each task vector's numbers, the greatest in size, to choose from, in (0, 1].
        scales: λ, the factors of the merged task vector, to choose from. The first of both are the default.
    """

    keeps: tuple[float, ...] = (0.2, 1.0)
    scales: tuple[float, ...] = (1.0, 0.5, 1.5)

    def __post_init__(self) -> None:
        check_scales(self.scales)
        if not self.keeps or not all(0 < keep <= 1 for keep in self.keeps):
            raise ValueError(f"keeps must be numbers in (0, 1], at least one, got {self.keeps}")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the share and the scale, and merge."""
        start = start_of(problem, "TIES")
        vectors = task_vectors(start, updates)
        merged = {keep: elected_mean(trimmed(vectors, keep)) for keep in self.keeps}

        def merge(keep: float, scale: float) -> dict[str, Tensor]:
            return departed(problem, start, updates, scale * merged[keep])

        settings = [
            Setting({"keep": keep, "scale": scale}, partial(merge, keep, scale))
            for keep in self.keeps
            for scale in self.scales
        ]
        return choose_setting(problem, settings)


def trimmed(vectors: Float[Tensor, "clients parameters"], keep: float) -> Float[Tensor, "clients parameters"]:
    """Return the vectors with all but their numbers of the greatest size set to 0.

    Args:
        vectors: of each client.
        keep: share of the numbers that stays, in (0, 1].

    Example:
        >>> trimmed(torch.tensor([[1.0, -3.0, 2.0, 0.5]]), 0.5)
        tensor([[ 0., -3.,  2.,  0.]])
    """
    count = vectors.shape[1]
    sizes = vectors.abs()
    least = sizes.kthvalue(count - max(1, round(keep * count)) + 1, dim=1, keepdim=True).values
    return torch.where(sizes >= least, vectors, 0.0)


def elected_mean(vectors: Float[Tensor, "clients parameters"]) -> Float[Tensor, " parameters"]:
    """Return for each number the mean over the clients whose sign is that of the sum; 0 where the sum is 0.

    Args:
        vectors: of each client.

    Example:
        >>> elected_mean(torch.tensor([[1.0, 0.0], [3.0, -2.0], [-1.0, 1.0]]))
        tensor([ 2., -2.])
    """
    agree = (vectors.sign() == vectors.sum(0).sign()) & (vectors != 0)
    return torch.where(agree, vectors, 0.0).sum(0) / agree.sum(0).clamp(min=1)
