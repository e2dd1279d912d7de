"""NP Merge: the contribution of each parameter of each model is learned on the server's examples.

Orozco Camacho, Horoi, Wolf, Belilovsky: Non-Uniform Parameter-Wise Model Merging, arXiv 2412.15467. The paper merges
two models as W = α ⊙ W_A + (1 − α) ⊙ W_B, α = σ(a), with a learned by gradient descent, and more than two by successive
pairs: `PairwiseNPMerge`. `NPMerge` joins all K models at once, θ = Σ_k α_k ⊙ θ_k with Σ_k α_k = 1 and no bounds; two
models then are a pair without the sigmoid. It also ties coefficients by output channel, tensor or model, which is what
few examples want; between channels and parameters validation chooses. Other forms, starts and groups are its options.

No autograd graph runs through the merge: dL/dα_k = θ_k ⊙ dL/dθ, summed over what is tied.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fedmerge.calibrate import calibrate
from fedmerge.merge.average import mean_state
from fedmerge.merge.best import best_client
from fedmerge.merge.coordinates import Coordinates
from fedmerge.merge.descent import Candidate, Schedule, check_budget, split_state
from fedmerge.merge.learning import learn
from fedmerge.merge.mixture import GROUPS, AffineMixture, FreeMixture, Mixture
from fedmerge.merge.objective import Objective
from fedmerge.merge.pair import SigmoidPair
from fedmerge.merge.probing import WANTS_UNITS
from fedmerge.merge.starts import STARTS, starting
from fedmerge.merge.streamed import Box, Channels, Ingredients, Shrunk, Span, Tied
from fedmerge.problem import FEWEST_TO_SPLIT, LABEL_COUNTS, Merged, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict
from fedmerge.train import evaluate

FORMS = ("affine", "shrink", "box", "simplex", "free")
ORDERS = ("given", "best-first", "tree")
PACES = (20, 60)
"""Steps after which coarse-to-fine coefficients get finer; the protocol chooses."""

__all__ = ["FORMS", "GROUPS", "ORDERS", "STARTS", "NPMerge", "PairwiseNPMerge"]


@dataclass(frozen=True)
class NPMerge(Objective):
    """Joint K-way NP Merge; the options of `Objective` say what is learned from.

    Attributes:
        groups: what shares a coefficient: "model", "tensor", "channel" (of the output), "parameter"; "in-out": the sum
            of a number for the output channel and one for the input channel; "coarse-to-fine": tensor, and after some
            steps channel and parameter; or "auto": the better of channel and parameter; below 500 examples
            channel, or parameter if the teacher needed the clients' hidden units (`fedmerge.merge.probing`).
        lrs: Adam's learning rates to choose from, in units of α; the first is the default.
        steps: most steps.
        form: "affine" (Σ_k α_k = 1), "shrink" (affine times a learned factor), "box" (affine, low ≤ α ≤ high),
            "simplex" (box from 0 to 1), or "free".
        low: least α of a box, at most 1/K.
        high: greatest α of a box, at least 1/K.
        start: α before the first step: "mean" (1/K), "examples" (FedAvg's), "counts" (FedAvg's, in the last layer's
            rows by label counts), "best" (`best_share` for the best client, the rest for the others alike), or "auto":
            "counts" where they are known, else "mean".
        best_share: the best client's α at the start "best", in [0, 1].
        decay: pull toward the start, as a share of the learning rate (AdamW's weight decay).
    """

    groups: str = "auto"
    lrs: tuple[float, ...] = (1e-2, 3e-3, 3e-2)
    steps: int = Schedule.steps
    form: str = "affine"
    low: float = -1.0
    high: float = 2.0
    start: str = "auto"
    best_share: float = 0.6
    decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        groups = (*GROUPS, "in-out", "coarse-to-fine")
        if self.groups not in ("auto", *groups):
            raise ValueError(f"groups must be auto or one of {', '.join(groups)}, got {self.groups!r}")
        for name, names in (("form", FORMS), ("start", STARTS)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}")
        if not 0 <= self.best_share <= 1:
            raise ValueError(f"best_share must be in [0, 1], got {self.best_share}")
        if not 0 <= self.decay < math.inf:
            raise ValueError(f"decay must be at least 0, got {self.decay}")
        several = (self._coarse and self.start == "counts") or self.groups in ("in-out", "coarse-to-fine")
        if several and self.bounds is not None:
            raise ValueError(
                f"form={self.form} bounds each coefficient by itself, and groups={self.groups} with "
                f"start={self.start} make it of several numbers; use groups=channel or parameter"
            )
        check_budget(self.lrs, self.steps)

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Learn the coefficients.

        Raises:
            ConfigurationError: if memory is short and coefficients are asked for that are not of channels.
        """
        states = [update.state for update in updates]
        if len(states) == 1:
            return Merged(({name: tensor.clone() for name, tensor in states[0].items()},))
        if problem.low_memory and self.groups not in ("auto", "channel"):
            raise ConfigurationError(
                f"groups={self.groups} keeps more than --low-memory allows, which is a coefficient for each channel: "
                "leave out groups, or --low-memory"
            )
        problem = self.teach(problem, updates)
        name = "mean" if self.start == "auto" and self.bounds is not None and self._coarse else self.start
        start = starting(name, problem, updates, best_share=self.best_share, smoothing=self.smoothing)
        if self.bounds is not None:
            start = start.within(*self.bounds)
        first = problem.kept(start.state(states))
        parameters, buffers = split_state(problem, first)
        centre = None if self.form == "free" else problem.kept(mean_state(states))
        given = Ingredients(parameters, states, start.shares(parameters), centre, affine=centre is not None)
        candidates = [
            Candidate({"groups": groups} | ({"pace": pace} if pace else {}), lr, make)
            for groups in self._groups(problem)
            for pace in (PACES if groups == "coarse-to-fine" else (0,))
            for make in [self._mixture(given, groups, pace, problem.low_memory)]
            for lr in self.lrs
        ]
        schedule = Schedule(steps=self.steps, decay=self.decay, average=self.average, augment=self.augment)
        found = learn(problem, candidates, buffers, schedule, generator=generator, task="NP Merge")
        diagnostics = {**self.description, **found.diagnostics}
        diagnostics["findings"] = [*_incompatible(problem, updates, first), *diagnostics["findings"]]
        return replace(found, diagnostics=diagnostics)

    @property
    def takes_parts(self) -> bool:
        """Whether no single client's model is looked at before the first step."""
        return self.start in ("auto", "mean")

    @property
    def needs(self) -> frozenset[str]:
        """What cannot be done without."""
        return super().needs | frozenset([LABEL_COUNTS] if self.start == "counts" else [])

    def held(self, count: int) -> int:
        """Return how many states of a model's size are held beside the models, at least.

        Args:
            count: of the models.
        """
        if self.groups == "coarse-to-fine":
            return 5 * count  # stacked directions, and β, its gradient and its moments one by one
        if self.groups == "in-out":
            return 2 * count
        if self.groups in ("auto", "parameter"):
            return 7 + (count if self.bounds is not None else 0)
        return 5

    @property
    def held_low(self) -> int:
        """As `held`, where memory is short: the mixture, its gradient, and a finished model."""
        return 3

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the greatest α."""
        return {"box": (self.low, self.high), "simplex": (0.0, 1.0)}.get(self.form)

    @property
    def _coarse(self) -> bool:
        """Whether the head's rows, which the start by label counts tells apart, share their coefficients."""
        return self.groups in ("model", "tensor")

    def _groups(self, problem: Problem) -> tuple[str, ...]:
        if self.groups != "auto":
            return (self.groups,)
        if problem.low_memory:
            return ("channel",)
        if len(problem.data) < FEWEST_TO_SPLIT:
            return ("parameter",) if problem.lesson.get(WANTS_UNITS) else ("channel",)
        return ("channel", "parameter")

    def _mixture(self, given: Ingredients, groups: str, pace: int, light: bool) -> Callable[[], Coordinates]:
        def make() -> Coordinates:
            found: Span | Channels | Tied
            if groups == "parameter" and self.bounds is not None:
                return Box(given, self.bounds)
            if groups == "parameter":
                found = Span(given)
            elif groups == "channel":
                found = Channels(given, self.bounds, light=light)
            elif groups in ("model", "tensor"):
                found = Tied(given, groups, self.bounds)
            else:
                return self._stacked(given, groups, pace)
            return Shrunk(found) if self.form == "shrink" else found

        return make

    def _stacked(self, given: Ingredients, groups: str, pace: int) -> Mixture:
        models = {name: torch.stack([state[name] for state in given.models]) for name in given.start}
        if given.centre is None:
            return FreeMixture(given.start, models, groups, shares=given.shares, pace=pace)
        deviations = {name: tensor - given.centre[name] for name, tensor in models.items()}
        shrinks = self.form == "shrink"
        return AffineMixture(given.start, deviations, groups, shares=given.shares, shrinks=shrinks, pace=pace)


@dataclass(frozen=True)
class PairwiseNPMerge(Objective):
    """The paper's NP Merge: α = σ(a) for each parameter, starting at ½; successive pairs.

    Attributes:
        lrs: Adam's learning rates to choose from, in units of a; the first is the default.
        steps: most steps for each pair.
        order: "given" (the clients'), "best-first" (by validation loss; most examples first where nothing can be
            chosen), or "tree": neighbours in pairs, then their results in pairs, and so on.
    """

    lrs: tuple[float, ...] = (3e-2, 1e-1, 3e-1)
    steps: int = Schedule.steps
    order: str = "given"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        check_budget(self.lrs, self.steps)

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Merge the first two models, then the result with the third, and so on; or neighbours, level by level."""
        if len(updates) == 1:
            return Merged(({name: tensor.clone() for name, tensor in updates[0].state.items()},))
        problem = self.teach(problem, updates)
        queue = [Merged((dict(update.state),)) for update in updates]
        if self.order == "best-first":
            queue = [queue[index] for index in ranking(problem, updates)]
        pairs: list[dict[str, Any]] = []
        merged = queue[0]
        while len(queue) > 1:
            level: list[Merged] = []
            for place in range(0, len(queue) - 1, 2) if self.order == "tree" else [0]:
                merged = self._pair(problem, queue[place].state, queue[place + 1].state, generator)
                pairs.append(dict(merged.diagnostics))
                level.append(merged)
            queue = level + queue[2 * len(level) :]
        return replace(merged, diagnostics={**self.description, "pairs": pairs})

    def held(self, count: int) -> int:
        """Return how many states of a model's size are held beside the models, at least.

        Args:
            count: of the models.
        """
        return 6 + (count // 2 if self.order == "tree" else 0)

    def _pair(self, problem: Problem, first: StateDict, second: StateDict, generator: torch.Generator) -> Merged:
        _, buffers = split_state(problem, mean_state([first, second]))
        ours, _ = split_state(problem, first)
        theirs, _ = split_state(problem, second)
        candidates = [Candidate({}, lr, lambda: SigmoidPair(ours, theirs)) for lr in self.lrs]
        schedule = Schedule(steps=self.steps, average=self.average, augment=self.augment)
        return learn(problem, candidates, buffers, schedule, generator=generator, task="NP Merge of a pair")


def ranking(problem: Problem, updates: Sequence[Update]) -> list[int]:
    """Return the clients' indices, the best first.

    Args:
        problem: the server's side.
        updates: at least one.
    """
    _, losses = best_client(problem, updates)
    worth = losses or [-float(update.num_examples) for update in updates]
    return sorted(range(len(updates)), key=lambda index: worth[index])


def _incompatible(problem: Problem, updates: Sequence[Update], start: StateDict) -> list[str]:
    """Say so, if the start of the merge classifies fewer validation images correctly than every client."""
    if not problem.may_choose:
        return []
    model, data = problem.model, problem.validation
    mixed = evaluate(model, [calibrate(model, start, problem.learn.images)], data).accuracy
    worst = min(evaluate(model, [update.state], data).accuracy for update in updates)
    if mixed >= worst:
        return []
    return [
        f"incompatible models: their mixture starts at an accuracy of {mixed:.3f}, the worst client has {worst:.3f}"
    ]
