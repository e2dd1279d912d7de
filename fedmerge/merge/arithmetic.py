"""Task arithmetic: θ₀ + λ Σ_k (θ_k − θ₀).

Ilharco, Ribeiro, Wortsman, Gururangan, Schmidt, Hajishirzi, Farhadi: Editing Models with Task Arithmetic, ICLR 2023,
arXiv 2212.04089. What differs: θ₀ is where the clients' round started, not a model trained before; λ is given in units
of 1/K, at which it is the mean of the clients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedmerge.merge.choice import Setting, choose_setting
from fedmerge.merge.taskvectors import SCALES, check_scales, departed, start_of, task_vectors
from fedmerge.problem import Merged, Problem, Update


@dataclass(frozen=True)
class TaskArithmetic:
    """Add the task vectors, scaled.

    Attributes:
        scales: λ to choose from, in units of 1/K; the first is the default.
    """

    scales: tuple[float, ...] = SCALES

    def __post_init__(self) -> None:
        check_scales(self.scales)

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Choose the scale and add."""
        start = start_of(problem, "task arithmetic")
        mean = task_vectors(start, updates).mean(0)

        def merge(scale: float) -> dict[str, Tensor]:
            return departed(problem, start, updates, scale * mean)

        return choose_setting(problem, [Setting({"scale": scale}, partial(merge, scale)) for scale in self.scales])
