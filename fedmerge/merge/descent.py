"""Gradient descent on the server's examples: what every learned merge and its controls share.

A learned merge moves coordinates c of a map c ↦ θ(c) into weight space: the coefficients of the clients' models
(NP Merge), or the weights themselves (fine-tuning). Everything else, the batches, the optimiser, the steps and
the budget of choices, is the same for all of them, so that a comparison compares the maps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge.augment import augmented
from fedmerge.calibrate import calibrate
from fedmerge.merge.adam import Adam
from fedmerge.merge.coordinates import Coordinates, Weights
from fedmerge.merge.mixture import Mixture
from fedmerge.problem import Examples, Problem
from fedmerge.reordered import reordered
from fedmerge.replay import Replay, records
from fedmerge.seeds import default_generator, derive
from fedmerge.state import StateDict
from fedmerge.train import batches

__all__ = ["Candidate", "Schedule", "Weights", "check_budget", "descend", "gradients", "split_state"]


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
        patience: looks without a new best after which it ends, where it has 300 steps or fewer (see `waits`).
        default_steps: steps where nothing can be chosen.
        decay: pull of the coordinates toward 0, as a share of the learning rate (AdamW's weight decay).
        average: look at the mean of the coordinates over the steps since the last look, not at where they are.
        augment: what is done to the images of a step (`fedmerge.augment`).
        entropy: descend the entropy of the predictions; labels and targets are not read.
    """

    steps: int = 300
    check_every: int = 20
    patience: int = 4
    default_steps: int = 60
    decay: float = 0.0
    average: bool = False
    augment: str = "none"
    entropy: bool = False

    @property
    def waits(self) -> int:
        """Steps without a new best after which it ends: as many more as it has more steps."""
        return self.check_every * max(self.patience, round(self.patience * self.steps / Schedule.steps))


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

    def slower(self) -> Candidate:
        """Return the same with a tenth of the learning rate."""
        return replace(self, lr=self.lr / 10)


def descend(
    problem: Problem,
    candidate: Candidate,
    buffers: StateDict,
    data: Examples,
    looks: Sequence[int],
    *,
    seed: int,
    schedule: Schedule | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Descend the cross-entropy on `data` by Adam from the candidate's start, and yield the model at each look.

    Args:
        problem: the architecture and the batch size.
        candidate: the coordinates and the learning rate.
        buffers: the start's buffers by name; BatchNorm statistics are re-estimated on `data` at each look.
        data: what to learn on.
        looks: numbers of steps at which to yield, increasing, from 0.
        seed: of the batches, of dropout and of the augmentation.
        schedule: says whether to decay, average and augment; default: none of them.
    """
    schedule = schedule or Schedule()
    coordinates = candidate.coordinates()
    training_buffers = {name: tensor.clone() for name, tensor in buffers.items()}  # training mode changes them in place
    rule = Adam(candidate.lr, schedule.decay)
    chance = torch.Generator().manual_seed(derive(seed, "augment"))
    lessons = data
    if problem.mixtures is not None and problem.mixtures.targets is not None:
        lessons = data.joined(problem.mixtures, problem.mixtures.targets.shape[1])
    device = data.images.device
    order = _forever(len(lessons), problem.batch_size, torch.Generator().manual_seed(seed), device)
    with _training(problem.model):
        replay = Replay(records(problem.model, device) and not (isinstance(coordinates, Mixture) and coordinates.pace))

    def step(images: Tensor, wanted: Tensor) -> list[Tensor]:
        found = gradients(problem, coordinates, training_buffers, images, wanted, schedule.entropy)
        coordinates.step(found, rule)
        return []

    done = 0
    for look in looks:
        means = [value.clone() for value in coordinates.values] if schedule.average else []
        with _training(problem.model), default_generator(derive(seed, look), device):
            for number in range(1, look - done + 1):
                batch = lessons[next(order)]
                images = augmented(batch.images, schedule.augment, chance)
                replay(step, images, batch.labels if batch.targets is None else batch.targets)
                if means:
                    torch._foreach_lerp_(means, coordinates.values, 1 / number)
        with _at(coordinates, means) if means else nullcontext():
            found = {**coordinates.parameters(), **buffers}
            reached = [
                calibrate(problem.model, {name: found[name] for name in problem.model.state_dict()}, data.images)
            ]
        done = look
        means.clear()
        yield reached.pop()  # it is the caller's alone


def gradients(
    problem: Problem,
    coordinates: Coordinates,
    buffers: Mapping[str, Tensor],
    images: Tensor,
    wanted: Tensor,
    entropy: bool = False,
) -> dict[str, Tensor]:
    """Return dL/dθ of the parameters that a step of the coordinates needs.

    Args:
        problem: the architecture.
        coordinates: say where θ is.
        buffers: by name; training mode changes them in place.
        images: of the step.
        wanted: their labels, or their targets.
        entropy: whether the loss is the entropy of the predictions.
    """
    parameters = {name: tensor.detach() for name, tensor in coordinates.parameters().items()}
    leaves = [parameters[name].requires_grad_() for name in coordinates.names]
    logits = functional_call(reordered(problem.model), {**parameters, **buffers}, (images,))
    loss = functional.cross_entropy(logits, logits.softmax(1) if entropy else wanted)
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    return dict(zip(coordinates.names, found, strict=True))


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


@contextmanager
def _at(coordinates: Coordinates, values: Sequence[Tensor]) -> Iterator[None]:
    """Move the coordinates to some values inside the block; `values` hold theirs meanwhile, which takes no memory."""
    _exchange(coordinates.values, values)
    try:
        yield
    finally:
        _exchange(coordinates.values, values)


def _exchange(some: Sequence[Tensor], others: Sequence[Tensor]) -> None:
    for one, other in zip(some, others, strict=True):
        was = one.clone()
        one.copy_(other)
        other.copy_(was)


def _forever(num_examples: int, batch_size: int, generator: torch.Generator, device: torch.device) -> Iterator[Tensor]:
    while True:
        yield from batches(num_examples, batch_size, generator, device)
