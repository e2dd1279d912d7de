"""Training of many small models side by side: their weights stacked, one matrix product for all of them.

A step of a small model costs more in calls than in arithmetic. Here one call serves all clients of a group: each sees
its own batches in its own order, with its own learning rate, and gives what `fedmerge.train.fit` gives, to rounding.
Clients that have done their steps leave the stack; a short batch is filled up with examples that weigh nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from fedmerge.chain import ELEMENTWISE, chain_for, chain_of, flattens
from fedmerge.examples import Examples, Part, taken
from fedmerge.seeds import fork
from fedmerge.sgd import Diverged, LocalTraining, batches, diverged, share_of_rate
from fedmerge.state import StateDict

OTHERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.GroupNorm, nn.LayerNorm)
"""More layers without statistics and without chance, which `torch.vmap` can stack."""

STACK_BYTES = 1 << 22
"""Weights that are stacked on a CPU: with their velocities they stay in its caches."""


@dataclass(frozen=True)
class Training:
    """One client's part of a group.

    Attributes:
        start: the weights to start from.
        part: of the examples on the model's device, at least one of them.
        recipe: all of a group have the same but for the epochs.
        generator: decides the order of the examples.
    """

    start: StateDict
    part: Part
    recipe: LocalTraining
    generator: torch.Generator


def stackable(model: nn.Module, *, convolutions: bool = False) -> bool:
    """Return whether a model can be trained by `fit_many`: a chain of layers without statistics and without chance.

    Args:
        model: the architecture.
        convolutions: also those that need `torch.vmap`, which is slower than one model after the other on CPUs.
    """
    if chain_of(model) is not None:
        return True
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    if not convolutions or len(set(modules)) < len(modules) or len(list(model.parameters())) < len(model.state_dict()):
        return False  # weights that are used twice have one name here
    leaves = [module for module in modules if type(module) is not nn.Sequential]
    return all(type(leaf) in (nn.Linear, *ELEMENTWISE, *OTHERS) or flattens(leaf) for leaf in leaves)


def fit_many(model: nn.Module, trainings: Sequence[Training]) -> list[dict[str, Tensor] | Diverged]:
    """Train copies of `model`, each on its own examples, by mini-batch SGD on the cross-entropy.

    Args:
        model: the architecture, `stackable`; its weights are not used.
        trainings: at least one, in any order.

    Returns:
        The trained state dicts, and the error of each client whose loss became NaN or infinite.

    Raises:
        ValueError: if a client has no examples.
    """
    if any(len(training.part) == 0 for training in trainings):
        raise ValueError("there are no examples to train on")
    plans = [_plan(training) for training in trainings]
    order = sorted(range(len(trainings)), key=lambda place: -len(plans[place]))
    found: dict[int, dict[str, Tensor] | Diverged] = {}
    size = _stack_size(model, trainings[0].part.whole.images.device)
    for first in range(0, len(order), size):
        places = order[first : first + size]
        group = _Group(model, [trainings[place] for place in places], [plans[place] for place in places])
        found |= zip(places, group.run(), strict=True)
    return [found[place] for place in range(len(trainings))]


class _Group:
    """Trainings in one stack, those with the most steps first.

    Args:
        model: the architecture.
        trainings: the members.
        plans: each member's batches.
    """

    def __init__(self, model: nn.Module, trainings: Sequence[Training], plans: Sequence[list[Tensor]]) -> None:
        self._trainings, self._recipe = trainings, trainings[0].recipe
        examples, origins = _shared([training.part for training in trainings])
        self._images, self._labels = examples.images, examples.labels
        self._model, self._chain = model, chain_for(model, self._images)
        stored = model.state_dict()
        names = [name for name, _ in model.named_parameters()]
        to = {name: stored[name] for name in names}
        self._weights = {
            name: torch.stack([training.start[name].to(to[name]) for training in trainings]) for name in names
        }
        self._start = (
            {name: tensor.clone() for name, tensor in self._weights.items()} if self._recipe.proximal_mu else {}
        )
        self._velocity = {name: torch.zeros_like(tensor) for name, tensor in self._weights.items()}
        self._steps = [len(plan) for plan in plans]
        self._index, self._shares = _table(origins, plans, self._images.device)
        self._totals = torch.zeros(len(trainings), device=self._images.device)

    def run(self) -> list[dict[str, Tensor] | Diverged]:
        """Take all steps, and return what each member has become."""
        active = 0
        for step in range(self._steps[0]):
            if step == 0 or self._steps[active - 1] <= step:
                active = sum(steps > step for steps in self._steps)
                weights, velocity, start = [
                    {name: tensor[:active] for name, tensor in tensors.items()}
                    for tensors in (self._weights, self._velocity, self._start)
                ]
            self._accelerate(step, weights, velocity)
            self._move(step, weights, velocity, start)
        finite = torch.isfinite(self._totals).tolist()
        return [
            {name: tensor[place].clone() for name, tensor in self._weights.items()}
            if finite[place]
            else diverged(float(self._totals[place]), training.recipe)
            for place, training in enumerate(self._trainings)
        ]

    def _accelerate(self, step: int, weights: dict[str, Tensor], velocity: dict[str, Tensor]) -> None:
        """Add a step's gradients to the velocities of the members that take it."""
        active = len(next(iter(weights.values())))
        shares = self._shares[:active, step]
        width = int((shares > 0).sum(1).max())
        index, shares = self._index[:active, step, :width], shares[:, :width].to(self._images.dtype)
        images = taken(self._images, index.flatten()).reshape(*index.shape, *self._images.shape[1:])
        labels, momentum = self._labels[index], self._recipe.momentum
        if self._chain is not None:
            losses = self._chain.accelerate(velocity, momentum, weights, images, labels, shares)
        else:
            losses, gradients = self._differentiated(weights, images, labels, shares)
            for moving, gradient in zip(velocity.values(), gradients, strict=True):
                moving.mul_(momentum).add_(gradient)
        self._totals[:active] += losses

    def _differentiated(
        self, weights: dict[str, Tensor], images: Tensor, labels: Tensor, shares: Tensor
    ) -> tuple[Tensor, Sequence[Tensor]]:
        moved = {name: tensor.detach().requires_grad_() for name, tensor in weights.items()}
        logits = torch.vmap(lambda state, own: functional_call(self._model, state, (own,)))(moved, images)
        each = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = (each.view_as(shares) * shares).sum(1)
        return losses.detach(), torch.autograd.grad(losses.sum(), list(moved.values()))

    def _move(
        self, step: int, weights: dict[str, Tensor], velocity: dict[str, Tensor], start: dict[str, Tensor]
    ) -> None:
        recipe = self._recipe
        members = zip(self._trainings, self._steps, strict=True)
        each_rate = [own.recipe.lr * share_of_rate(own.recipe, step, steps) for own, steps in members if steps > step]
        rates = torch.tensor(each_rate, dtype=torch.float64, device=self._images.device)
        for name, tensor in weights.items():
            moving = velocity[name]
            if recipe.proximal_mu:
                moving.add_(tensor - start[name], alpha=recipe.proximal_mu)
            if recipe.weight_decay:
                moving.add_(tensor, alpha=recipe.weight_decay)
            tensor.addcmul_(moving, rates.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1)), value=-1)


def _stack_size(model: nn.Module, device: torch.device) -> int:
    """Return how many copies of a model are stacked; on other devices than CPUs as many as there are."""
    if device.type != "cpu":
        return sys.maxsize
    return max(1, STACK_BYTES // sum(parameter.nbytes for parameter in model.parameters()))


def _plan(training: Training) -> list[Tensor]:
    """Return the batches of all epochs, as `fedmerge.train.fit` draws them."""
    fork(training.generator)  # dropout's seed, which such models have no use for
    size, recipe = len(training.part), training.recipe
    return [batch for _ in range(recipe.epochs) for batch in batches(size, recipe.batch_size, training.generator)]


def _shared(parts: Sequence[Part]) -> tuple[Examples, Sequence[Tensor]]:
    """Return examples that all parts are of, and where in them each part's are."""
    if all(part.whole is parts[0].whole for part in parts):
        return parts[0].whole, [part.index for part in parts]
    copies = [part.copied() for part in parts]
    together = Examples(torch.cat([own.images for own in copies]), torch.cat([own.labels for own in copies]))
    return together, torch.split(torch.arange(len(together)), [len(own) for own in copies])


def _table(origins: Sequence[Tensor], plans: Sequence[list[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the examples of each member's steps (members, steps, batch), and their shares.

    Args:
        origins: where each member's examples are.
        plans: each member's batches.
        device: of the examples.
    """
    widest = max(len(batch) for plan in plans for batch in plan)
    index = torch.zeros(len(plans), len(plans[0]), widest, dtype=torch.long)
    shares = torch.zeros(index.shape, dtype=torch.float64)
    for place, (origin, plan) in enumerate(zip(origins, plans, strict=True)):
        batches = pad_sequence(plan, batch_first=True)
        sizes = torch.tensor([[len(batch)] for batch in plan])
        index[place, : len(plan), : batches.shape[1]] = origin[batches]
        shares[place, : len(plan)] = (torch.arange(widest) < sizes).double() / sizes
    return index.to(device), shares.to(device)
