"""Gradient descent on the server's examples, by the protocol: what every learned merge and its controls share.

A learned merge moves coordinates c of a map c ↦ θ(c) into weight space: the coefficients of the clients' models
(NP Merge), or the weights themselves (fine-tuning). Everything else, the batches, the optimiser, the steps and
the budget of choices, is the same for all of them, so that a comparison compares the maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge.calibrate import calibrate
from fedmerge.problem import Examples, Merged, Problem
from fedmerge.seeds import default_generator, derive, fork
from fedmerge.state import StateDict
from fedmerge.train import batches, evaluate


def check_budget(lrs: Sequence[float], steps: int) -> None:
    """Raise unless there is a learning rate, all are positive, and at least one step may be taken.

    Raises:
        ValueError: says what was expected.
    """
    if not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise ValueError(f"lrs must be numbers greater than 0, at least one, got {lrs}")
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")


@dataclass(frozen=True)
class Schedule:
    """How long a descent may go on.

    Attributes:
        steps: most steps.
        check_every: steps between two looks at the validation loss.
        patience: looks without a new best after which it ends.
        default_steps: steps where nothing can be chosen.
    """

    steps: int = 300
    check_every: int = 20
    patience: int = 4
    default_steps: int = 60


class Coordinates(Protocol):
    """A map from coordinates to the parameters of a model."""

    values: list[Tensor]
    """The coordinates, moved in place by the optimiser."""

    def parameters(self) -> dict[str, Tensor]:
        """Return θ(c), fresh tensors by parameter name."""

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Return dL/dc, one tensor for each of `values`, from dL/dθ."""


class Weights:
    """The weights themselves are the coordinates: fine-tuning.

    Args:
        start: parameters by name.
    """

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        self.names = list(start)
        self.values = [tensor.detach().clone() for tensor in start.values()]

    def parameters(self) -> dict[str, Tensor]:
        """Return the weights."""
        return {name: value.clone() for name, value in zip(self.names, self.values, strict=True)}

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the gradients as they are."""
        return [gradients[name] for name in self.names]


@dataclass(frozen=True)
class Candidate:
    """One setting that the protocol may choose.

    Attributes:
        settings: what it is, for the diagnostics.
        lr: Adam's learning rate.
        coordinates: makes its coordinates, at the start.
    """

    settings: Mapping[str, Any]
    lr: float
    coordinates: Callable[[], Coordinates]


def learn(
    problem: Problem,
    candidates: Sequence[Candidate],
    buffers: StateDict,
    schedule: Schedule,
    *,
    generator: torch.Generator,
    task: str,
) -> Merged:
    """Choose among candidates and numbers of steps by the protocol, and return the model learned.

    All candidates see the same batches. The start (step 0) is among what may be chosen, so on validation data the
    choice is never worse than the start.

    Args:
        problem: the server's side.
        candidates: at least one; the first is the default where nothing can be chosen.
        buffers: the start's buffers by name; BatchNorm statistics are re-estimated.
        schedule: how long to go on.
        generator: decides the batches.
        task: what is learned, for the progress.
    """
    seed = fork(generator)
    chosen, steps = candidates[0], min(schedule.default_steps, schedule.steps)
    best: Course | None = None
    if problem.may_choose:
        for number, candidate in enumerate(candidates):
            course = _course(problem, candidate, buffers, schedule, seed)
            if best is None or course.loss < best.loss:
                best, chosen, steps = course, candidate, course.steps
            problem.progress(task, number + 1, len(candidates))
    if best is None or problem.refits:
        *_, state = descend(problem, chosen, buffers, problem.data, [0, steps], seed=seed)
    else:
        state = best.state
    diagnostics = {
        **chosen.settings,
        "lr": chosen.lr,
        "steps": steps,
        "candidates": len(candidates) if best else 1,
        "start-loss": best.losses[0] if best else None,
        "validation-loss": best.loss if best else None,
    }
    return Merged((state,), server_examples=len(problem.data), server_labels=True, diagnostics=diagnostics)


@dataclass(frozen=True)
class Course:
    """The course of a candidate's descents on all folds.

    Attributes:
        losses: mean validation loss over the folds at each look; infinite once one has diverged.
        steps: steps at the best look.
        state: the first fold's model there.
    """

    losses: list[float]
    steps: int
    state: dict[str, Tensor]

    @property
    def loss(self) -> float:
        """The least validation loss."""
        return min(self.losses)


def _course(problem: Problem, candidate: Candidate, buffers: StateDict, schedule: Schedule, seed: int) -> Course:
    """Descend on all folds side by side, until their mean validation loss has not fallen for some looks."""
    looks = range(0, schedule.steps + 1, schedule.check_every)
    descents = [descend(problem, candidate, buffers, data, looks, seed=seed) for data, _ in problem.folds]
    losses: list[float] = []
    best = Course([math.inf], 0, {})
    for steps, states in zip(looks, zip(*descents, strict=True), strict=False):
        found = [
            evaluate(problem.model, [state], validation).loss
            for state, (_, validation) in zip(states, problem.folds, strict=True)
        ]
        mean = sum(found) / len(found)
        losses.append(mean if math.isfinite(mean) else math.inf)
        if not best.state or losses[-1] < best.loss:
            best = Course(losses.copy(), steps, states[0])
        if steps - best.steps >= schedule.patience * schedule.check_every:
            break
    return best


def descend(
    problem: Problem,
    candidate: Candidate,
    buffers: StateDict,
    data: Examples,
    looks: Sequence[int],
    *,
    seed: int,
) -> Iterator[dict[str, Tensor]]:
    """Descend the cross-entropy on `data` by Adam from the candidate's start, and yield the model at each look.

    Args:
        problem: the architecture and the batch size.
        candidate: the coordinates and the learning rate.
        buffers: the start's buffers by name; BatchNorm statistics are re-estimated on `data` at each look.
        data: what to learn on.
        looks: numbers of steps at which to yield, increasing, from 0.
        seed: of the batches and of dropout.
    """
    coordinates = candidate.coordinates()
    training_buffers = {name: tensor.clone() for name, tensor in buffers.items()}  # training mode changes them in place
    optimizer = torch.optim.Adam(coordinates.values, lr=candidate.lr, foreach=True)
    order = _forever(len(data), problem.batch_size, torch.Generator().manual_seed(seed))
    done = 0
    for look in looks:
        with _training(problem.model), default_generator(derive(seed, look), data.images.device):
            for _ in range(look - done):
                batch = data[next(order).to(data.images.device)]
                gradients = _gradients(problem, coordinates.parameters(), training_buffers, batch)
                for value, gradient in zip(coordinates.values, coordinates.pull_back(gradients), strict=True):
                    value.grad = gradient
                optimizer.step()
        done = look
        state = {**coordinates.parameters(), **{name: tensor.clone() for name, tensor in buffers.items()}}
        yield calibrate(problem.model, {name: state[name] for name in problem.model.state_dict()}, data.images)


def split_state(problem: Problem, state: StateDict) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a state dict's parameters and its buffers."""
    names = {name for name, _ in problem.model.named_parameters()}
    parameters = {name: tensor for name, tensor in state.items() if name in names}
    return parameters, {name: tensor for name, tensor in state.items() if name not in names}


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)


def _gradients(
    problem: Problem, parameters: Mapping[str, Tensor], buffers: Mapping[str, Tensor], batch: Examples
) -> dict[str, Tensor]:
    leaves = {name: tensor.requires_grad_() for name, tensor in parameters.items()}
    logits = functional_call(problem.model, {**leaves, **buffers}, (batch.images,))
    loss = functional.cross_entropy(logits, batch.labels)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def _forever(num_examples: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    while True:
        yield from batches(num_examples, batch_size, generator)
