"""Training of many small models side by side: their weights stacked, one matrix product for all of them.

A step of a small model costs more in calls than in arithmetic. Here one call serves all clients of a group: each sees
its own batches in its own order, with its own learning rate, and gives what `fedmerge.train.fit` gives, to rounding.
Clients that have done their steps leave the stack; a short batch is filled up with examples that weigh nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge.problem import Examples
from fedmerge.seeds import fork
from fedmerge.sgd import Diverged, LocalTraining, batches, diverged, share_of_rate
from fedmerge.state import StateDict

Forward = Callable[[dict[str, Tensor], Tensor], Tensor]
"""Maps stacked weights and images (models, images, …) to logits (models, images, classes)."""

ELEMENTWISE = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Identity)
OTHERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.GroupNorm, nn.LayerNorm)
"""Layers without statistics and without chance, which `torch.vmap` can stack."""

STACK_BYTES = 1 << 22
"""Weights that are stacked on a CPU: with their gradients and velocities they stay in its caches."""


@dataclass(frozen=True)
class Training:
    """One client's part of a group.

    Attributes:
        start: the weights to start from.
        examples: at least one, on the model's device.
        recipe: all of a group have the same but for the epochs.
        generator: decides the order of the examples.
    """

    start: StateDict
    examples: Examples
    recipe: LocalTraining
    generator: torch.Generator


def stackable(model: nn.Module, *, convolutions: bool = False) -> bool:
    """Return whether a model can be trained by `fit_many`: a chain of layers without statistics and without chance.

    Args:
        model: the architecture.
        convolutions: also those that need `torch.vmap`, which is slower than one model after the other on CPUs.
    """
    modules = [module for _, module in model.named_modules(remove_duplicate=False)]
    if len(set(modules)) < len(modules) or len(list(model.parameters())) < len(model.state_dict()):
        return False  # weights that are used twice have one name here
    leaves = [module for module in modules if type(module) is not nn.Sequential]
    allowed = (nn.Linear, *ELEMENTWISE, *(OTHERS if convolutions else ()))
    return all(type(leaf) in allowed or _flattens(leaf) for leaf in leaves)


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
    if any(len(training.examples) == 0 for training in trainings):
        raise ValueError("there are no examples to train on")
    plans = [_plan(training) for training in trainings]
    order = sorted(range(len(trainings)), key=lambda place: -len(plans[place]))
    found: dict[int, dict[str, Tensor] | Diverged] = {}
    size = _stack_size(model, trainings[0].examples.images.device)
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
        self._forward = _forward(model)
        stored = model.state_dict()
        names = [name for name, _ in model.named_parameters()]
        to = {name: stored[name] for name in names}
        self._weights = {
            name: _laid_out(torch.stack([training.start[name].to(to[name]) for training in trainings]))
            for name in names
        }
        self._start = (
            {name: tensor.clone() for name, tensor in self._weights.items()} if self._recipe.proximal_mu else {}
        )
        self._velocity: dict[str, Tensor] = {}
        self._steps = [len(plan) for plan in plans]
        self._images = torch.cat([training.examples.images for training in trainings])
        self._labels = torch.cat([training.examples.labels for training in trainings])
        self._index, self._shares = _table(trainings, plans, self._images.device)
        self._totals = torch.zeros(len(trainings), device=self._images.device)

    def run(self) -> list[dict[str, Tensor] | Diverged]:
        """Take all steps, and return what each member has become."""
        active, moved = 0, dict[str, Tensor]()
        for step in range(self._steps[0]):
            if step == 0 or self._steps[active - 1] <= step:
                active = sum(steps > step for steps in self._steps)
                moved = {name: tensor[:active].detach().requires_grad_() for name, tensor in self._weights.items()}
            self._step(step, active, moved)
        finite = torch.isfinite(self._totals).tolist()
        return [
            {name: tensor[place].clone(memory_format=torch.contiguous_format) for name, tensor in self._weights.items()}
            if finite[place]
            else diverged(float(self._totals[place]), training.recipe)
            for place, training in enumerate(self._trainings)
        ]

    def _step(self, step: int, active: int, moved: dict[str, Tensor]) -> None:
        shares = self._shares[:active, step]
        width = int((shares > 0).sum(1).max())
        index, shares = self._index[:active, step, :width], shares[:, :width].to(self._images.dtype)
        logits = self._forward(moved, self._images[index])
        losses = functional.cross_entropy(logits.flatten(0, 1), self._labels[index].flatten(), reduction="none")
        each = (losses.view(active, width) * shares).sum(1)
        gradients = torch.autograd.grad(each.sum(), list(moved.values()))
        self._totals[:active] += each.detach()
        with torch.no_grad():
            members = zip(self._trainings[:active], self._steps, strict=False)
            each_rate = [member.recipe.lr * share_of_rate(member.recipe, step, steps) for member, steps in members]
            rates = torch.tensor(each_rate, dtype=torch.float64, device=shares.device)
            for (name, weights), gradient in zip(moved.items(), gradients, strict=True):
                drawn = self._accelerated(name, self._with_penalties(name, weights, gradient))
                rate = rates.to(weights.dtype).view(-1, *[1] * (weights.ndim - 1))
                weights.addcmul_(drawn, rate, value=-1)

    def _with_penalties(self, name: str, weights: Tensor, gradient: Tensor) -> Tensor:
        if self._recipe.proximal_mu:
            gradient = gradient.add(weights - self._start[name][: len(weights)], alpha=self._recipe.proximal_mu)
        return gradient.add(weights, alpha=self._recipe.weight_decay) if self._recipe.weight_decay else gradient

    def _accelerated(self, name: str, gradient: Tensor) -> Tensor:
        if not self._recipe.momentum:
            return gradient
        if name not in self._velocity:
            self._velocity[name] = gradient.clone()
            return self._velocity[name]
        velocity = self._velocity[name][: len(gradient)]
        return torch.add(gradient, velocity, alpha=self._recipe.momentum, out=velocity)


def _stack_size(model: nn.Module, device: torch.device) -> int:
    """Return how many copies of a model are stacked; on other devices than CPUs as many as there are."""
    if device.type != "cpu":
        return sys.maxsize
    return max(1, STACK_BYTES // sum(parameter.nbytes for parameter in model.parameters()))


def _plan(training: Training) -> list[Tensor]:
    """Return the batches of all epochs, as `fedmerge.train.fit` draws them."""
    fork(training.generator)  # dropout's seed, which such models have no use for
    size, recipe = len(training.examples), training.recipe
    return [batch for _ in range(recipe.epochs) for batch in batches(size, recipe.batch_size, training.generator)]


def _table(trainings: Sequence[Training], plans: Sequence[list[Tensor]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the examples of each member's steps (members, steps, batch), counted through all, and their shares."""
    widest = max(len(batch) for plan in plans for batch in plan)
    index = torch.zeros(len(plans), len(plans[0]), widest, dtype=torch.long)
    shares = torch.zeros(index.shape, dtype=torch.float64)
    first = 0
    for place, (training, plan) in enumerate(zip(trainings, plans, strict=True)):
        index[place] = first
        for step, batch in enumerate(plan):
            index[place, step, : len(batch)] += batch
            shares[place, step, : len(batch)] = 1 / len(batch)
        first += len(training.examples)
    return index.to(device), shares.to(device)


def _forward(model: nn.Module) -> Forward:
    """Return how stacked models compute."""
    layers = {name: module for name, module in model.named_modules() if type(module) is not nn.Sequential}
    if not stackable(model):
        return torch.vmap(lambda weights, images: functional_call(model, weights, (images,)))

    def forward(weights: dict[str, Tensor], images: Tensor) -> Tensor:
        for name, layer in layers.items():
            if isinstance(layer, nn.Linear):
                images = _linear(weights, name, images)
            else:
                images = images.flatten(2) if isinstance(layer, nn.Flatten) else layer(images)
        return images

    return forward


def _laid_out(weights: Tensor) -> Tensor:
    """Return stacked weights in the memory layout that the gradients of matrices have: transposed."""
    return weights.mT.contiguous().mT if weights.ndim == 3 else weights


def _linear(weights: dict[str, Tensor], name: str, inputs: Tensor) -> Tensor:
    prefix = f"{name}." if name else ""
    transposed = weights[f"{prefix}weight"].transpose(1, 2)
    if f"{prefix}bias" not in weights:
        return torch.bmm(inputs, transposed)
    return torch.baddbmm(weights[f"{prefix}bias"].unsqueeze(1), inputs, transposed)


def _flattens(module: nn.Module) -> bool:
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)
