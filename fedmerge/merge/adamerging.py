"""AdaMerging: the coefficient of each task vector in each layer is learned, θ = θ₀ + Σ_k λ_kl (θ_k − θ₀).

Yang, Wang, Shen, Liu, Guo, Wang, Tao: AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024, arXiv
2310.02575, layer-wise form. It minimises the entropy of the predictions on unlabelled images; that is the option here,
and the default learns from labels (or a teacher), as all learned merges do. What differs: λ starts at 1/K, the mean of
the clients, and is not clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedmerge.merge.average import mean_state
from fedmerge.merge.descent import Candidate, Schedule, check_budget, descend, split_state
from fedmerge.merge.learning import learn
from fedmerge.merge.objective import Objective
from fedmerge.merge.starts import Start
from fedmerge.merge.streamed import Ingredients, Tied
from fedmerge.merge.taskvectors import start_of
from fedmerge.problem import Merged, Problem, Update
from fedmerge.seeds import fork


@dataclass(frozen=True)
class AdaMerging(Objective):
    """Learn a coefficient for each client and tensor; the options of `Objective` say what from.

    Attributes:
        entropy: learn from the entropy of the predictions alone. Nothing can then be chosen: the first learning rate
            and the default number of steps are taken.
        lrs: Adam's learning rates to choose from, in units of λ; the first is the default.
        steps: most steps.
    """

    entropy: bool = False
    lrs: tuple[float, ...] = (1e-2, 1e-3, 3e-3, 3e-2, 1e-1, 3e-4)
    steps: int = Schedule.steps

    def __post_init__(self) -> None:
        super().__post_init__()
        check_budget(self.lrs, self.steps)
        if self.entropy and self.targets != "labels":
            raise ValueError(f"entropy has no targets, got targets={self.targets}: leave one of them out")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Learn the coefficients."""
        start = start_of(problem, "AdaMerging")
        states = [update.state for update in updates]
        mean, buffers = split_state(problem, mean_state(states))
        shares = Start(torch.ones(len(states))).shares(start)
        given = Ingredients(mean, states, shares, centre=start)
        candidates = [Candidate({}, lr, lambda: Tied(given, "tensor")) for lr in self.lrs]
        schedule = Schedule(steps=self.steps, average=self.average, augment=self.augment, entropy=self.entropy)
        if self.entropy:
            steps = min(schedule.default_steps, self.steps)
            course = descend(
                problem, candidates[0], buffers, problem.data, [steps], seed=fork(generator), schedule=schedule
            )
            diagnostics = {"objective": "entropy", "lr": self.lrs[0], "steps": steps, "candidates": 1}
            return Merged((next(course),), server_examples=len(problem.data), diagnostics=diagnostics)
        problem = self.teach(problem, updates)
        found = learn(problem, candidates, buffers, schedule, generator=generator, task="AdaMerging")
        return replace(found, diagnostics={**self.description, **found.diagnostics})
