"""Mini-batch SGD with momentum, as clients train: the recipe, the batches and the steps."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.errors import FedmergeError


class Diverged(FedmergeError, ArithmeticError):
    """A training whose loss is no longer a finite number."""


@dataclass(frozen=True)
class LocalTraining:
    """A client's local training: SGD with momentum and a learning rate that decays to 0, after a warm-up or without.

    Attributes:
        epochs: passes over the client's examples.
        batch_size: examples a step; the last batch of an epoch may be smaller (never of size 1 where there is another).
        lr: the highest learning rate: of the first step, if there is no warm-up.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 penalty's factor.
        proximal_mu: μ of FedProx: the penalty μ/2 ‖θ − start‖² holds the weights near the start.
        schedule: how the learning rate decays to 0: "cosine" (half a period) or "linear".
        warmup: share of the steps, in [0, 1), in which the learning rate first rises linearly. Without it, 2 of the
            25 clients of a shared start in experiments/unlabelled.py collapsed (`--warmup 0`); with it, these did not.
        augment: what is done to the images of a step (`fedmerge.augment`).
    """

    epochs: int = 10
    batch_size: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    weight_decay: float = 0.0
    proximal_mu: float = 0.0
    schedule: str = "cosine"
    warmup: float = 0.1
    augment: str = "none"


def share_of_rate(recipe: LocalTraining, step: int, steps: int) -> float:
    """Return which share of the highest learning rate a step has, more than 0.

    With W steps of warm-up, step i < W has (i + 1) / (W + 1), and from step W on the share decays from 1 to 0.

    Args:
        recipe: the hyper-parameters.
        step: from 0.
        steps: of the whole training.

    Raises:
        ValueError: if there is no such schedule.

    Example:
        >>> recipe = LocalTraining(epochs=4, schedule="linear", warmup=0.25)
        >>> [share_of_rate(recipe, step, 4) for step in range(4)]
        [0.5, 1.0, 0.6666666666666667, 0.33333333333333337]
    """
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / (warmup + 1)
    if recipe.schedule == "linear":
        return 1 - (step - warmup) / (steps - warmup)
    if recipe.schedule != "cosine":
        raise ValueError(f"expected the schedule 'cosine' or 'linear', got '{recipe.schedule}'")
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))


def num_batches(num_examples: int, batch_size: int) -> int:
    """Return the number of batches of one epoch of `batches`."""
    whole, rest = divmod(num_examples, batch_size)
    return max(1, whole + (rest > 1))


def batches(
    num_examples: int, batch_size: int, generator: torch.Generator, device: torch.device | str = "cpu"
) -> Iterator[Tensor]:
    """Yield one epoch's batches of indices, in random order.

    A last batch of one example joins the one before: batch normalisation cannot train on it.

    Args:
        num_examples: examples in all.
        batch_size: examples in a batch.
        generator: decides the order.
        device: where the indices go, all at once: a copy for each batch would wait for the one before.

    Example:
        >>> [len(batch) for batch in batches(9, 4, torch.Generator())]
        [4, 5]
    """
    order = torch.randperm(num_examples, generator=generator).to(device)
    count = num_batches(num_examples, batch_size)
    for number in range(count):
        yield order[number * batch_size : None if number == count - 1 else (number + 1) * batch_size]


def diverged(loss: float, recipe: LocalTraining) -> Diverged:
    """Return the error of a training whose loss is no longer finite."""
    prox = f" or --proximal-mu (it is {recipe.proximal_mu})" if recipe.proximal_mu else ""
    return Diverged(f"the training loss became {loss}; lower --lr (it is {recipe.lr}){prox}")


class Descent:
    """SGD with momentum, weight decay, FedProx's pull and the schedule of the learning rate.

    The numbers are those of `torch.optim.SGD` to the bit, without the cost of an optimizer object in each step.

    Args:
        parameters: changed in place.
        recipe: the hyper-parameters.
        steps: of the whole training.
    """

    def __init__(self, parameters: Sequence[Tensor], recipe: LocalTraining, *, steps: int) -> None:
        self._parameters, self._recipe, self._steps = list(parameters), recipe, steps
        self._start = [parameter.detach().clone() for parameter in parameters] if recipe.proximal_mu else []
        self._velocity: list[Tensor | None] = [None] * len(self._parameters)
        self._done = 0

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor | None]) -> None:
        """Take the next step.

        Args:
            gradients: of the loss, one for each parameter; one without (None) stays as it is.
        """
        recipe, places = self._recipe, [place for place, found in enumerate(gradients) if found is not None]
        moved = [self._parameters[place] for place in places]
        found = [gradient for gradient in gradients if gradient is not None]
        if recipe.proximal_mu:
            pull = torch._foreach_sub(moved, [self._start[place] for place in places])
            found = list(torch._foreach_add(found, torch._foreach_mul(pull, recipe.proximal_mu)))
        if recipe.weight_decay:
            found = list(torch._foreach_add(found, moved, alpha=recipe.weight_decay))
        if recipe.momentum:
            found = self._accelerated(places, found)
        rate = recipe.lr * share_of_rate(recipe, self._done, self._steps)
        torch._foreach_add_(moved, found, alpha=-rate)
        self._done += 1

    def _accelerated(self, places: Sequence[int], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Return the velocities, of which a parameter's first is its gradient."""
        before = [self._velocity[place] for place in places]
        later = [number for number, velocity in enumerate(before) if velocity is not None]
        velocities = [gradient.clone() if was is None else was for gradient, was in zip(gradients, before, strict=True)]
        if later:
            known = [velocities[number] for number in later]
            torch._foreach_mul_(known, self._recipe.momentum)
            torch._foreach_add_(known, [gradients[number] for number in later])
        for place, velocity in zip(places, velocities, strict=True):
            self._velocity[place] = velocity
        return velocities
