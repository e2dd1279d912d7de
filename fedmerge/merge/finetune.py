"""Fine-tuning on the server's examples: the controls with the same data, steps and choices as a learned merge."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedmerge.merge.average import mean_state
from fedmerge.merge.best import best_client
from fedmerge.merge.descent import Candidate, Schedule, Weights, check_budget, split_state
from fedmerge.merge.heads import find_head
from fedmerge.merge.learning import learn
from fedmerge.merge.objective import Objective
from fedmerge.problem import Merged, Problem, Update
from fedmerge.seeds import default_generator, fork
from fedmerge.settings import ConfigurationError

STARTS = ("mean", "best", "fresh")
LAYERS: Mapping[str, tuple[float, ...]] = {
    "all": (1e-3, 3e-4, 3e-3, 1e-4, 1e-2, 3e-5),
    "head": (3e-2, 1e-1, 1e-2, 3e-1, 3e-3, 1e-3),
}
"""What is trained, and the learning rates for it: the last layer by itself learns at much higher ones."""


@dataclass(frozen=True)
class FineTune(Objective):
    """Train weights on the server's examples; the options of `Objective` say what for.

    Attributes:
        start: "mean" (of the clients), "best" (client), or "fresh" (a new initialisation: server-only training).
        lrs: learning rates to choose from; the first is the default. As many as NP Merge has candidates. Empty: those
            of `LAYERS`.
        steps: most steps.
        layers: "all" weights, or those of the "head" alone, whose rows are the classes.
    """

    start: str = "mean"
    lrs: tuple[float, ...] = ()
    steps: int = Schedule.steps
    layers: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, names in (("start", STARTS), ("layers", LAYERS)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}")
        if not self.lrs:
            object.__setattr__(self, "lrs", LAYERS[self.layers])
        check_budget(self.lrs, self.steps)

    @property
    def takes_parts(self) -> bool:
        """Whether no single client's model is looked at."""
        return self.start in ("mean", "fresh")

    @property
    def takes_architectures(self) -> bool:
        """Whether clients' models of other architectures than the server's are of use as they are: as teachers."""
        return self.start in ("best", "fresh")

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Fine-tune from the start."""
        problem = self.teach(problem, updates)
        start = self._start(problem, updates, generator)
        parameters, buffers = split_state(problem, start)
        moving = find_head(problem.model, start, problem.data.images.shape[1:]) if self.layers == "head" else None
        candidates = [Candidate({"start": self.start}, lr, lambda: Weights(parameters, moving)) for lr in self.lrs]
        schedule = Schedule(steps=self.steps, average=self.average, augment=self.augment)
        found = learn(problem, candidates, buffers, schedule, generator=generator, task="fine-tuning")
        uses_clients = self.start != "fresh" or problem.taught
        return replace(found, uses_clients=uses_clients, diagnostics={**self.description, **found.diagnostics})

    def held(self, count: int) -> int:
        """Return how many states of a model's size are held beside the models, at least.

        Args:
            count: of the models.
        """
        return 6

    def _start(self, problem: Problem, updates: Sequence[Update], generator: torch.Generator) -> dict[str, Tensor]:
        if self.start == "mean":
            return mean_state([update.state for update in updates])
        if self.start == "best":
            fitting = [update for update in updates if not update.model]
            if not fitting:
                raise ConfigurationError("no client has the server's model (--model): none can be fine-tuned")
            return dict(fitting[best_client(problem, fitting)[0]].state)
        return fresh_state(problem, fork(generator))


def fresh_state(problem: Problem, seed: int) -> dict[str, Tensor]:
    """Return a new initialisation of the architecture, by its modules' own `reset_parameters`.

    Args:
        problem: the architecture, and the device.
        seed: of the initialisation.

    Raises:
        ValueError: if a module holds parameters and cannot initialise them itself.
    """
    model = copy.deepcopy(problem.model).cpu()
    with default_generator(seed):
        for name, module in model.named_modules():
            if any(True for _ in module.parameters(recurse=False)):
                reset = getattr(module, "reset_parameters", None)
                if reset is None:
                    raise ValueError(
                        "server-only training needs a new initialisation, and "
                        f"module '{name}' ({type(module).__name__}) has parameters but no reset_parameters()"
                    )
                reset()
    return {name: tensor.detach().to(problem.data.images.device) for name, tensor in model.state_dict().items()}
