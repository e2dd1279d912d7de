"""Training a client's model, and evaluating any: plain PyTorch on examples in memory."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from fedmerge import parts
from fedmerge.augment import augmented
from fedmerge.chain import chain_for
from fedmerge.examples import taken
from fedmerge.problem import UNKNOWN, Combination, Examples, Problem, Update
from fedmerge.reordered import reordered
from fedmerge.replay import replay_of
from fedmerge.seeds import default_generator, fork
from fedmerge.sgd import Descent, diverged
from fedmerge.sgd import Diverged as Diverged
from fedmerge.sgd import LocalTraining as LocalTraining
from fedmerge.sgd import batches as batches
from fedmerge.sgd import num_batches as num_batches
from fedmerge.state import StateDict

EVALUATION_BATCH = 128
"""Images in a batch without gradients: larger ones leave a CPU's cache."""

LARGE_BATCH = 1 << 17
"""Pixels of a batch from which on a GPU is faster channels last: between 50 images of 28×28, no faster on an H100, and
500 of 32×32, twice as fast."""

LEAST_LOG_PROBABILITY = -700.0
"""Stands for the logarithm of 0, which an ensemble may give to a class that none of its members has seen."""


@dataclass(frozen=True)
class Evaluation:
    """How well a model does on examples.

    Attributes:
        accuracy: share of the examples of known classes that are classified correctly, in [0, 1]; NaN without any.
        loss: mean cross-entropy in nats, with the known labels or the examples' targets.
        per_class_accuracy: the accuracy within each class; None for a class without examples.
    """

    accuracy: float
    loss: float
    per_class_accuracy: tuple[float | None, ...]


def fit(
    model: nn.Module,
    state: StateDict,
    examples: Examples,
    recipe: LocalTraining,
    *,
    generator: torch.Generator,
    moving: Collection[str] | None = None,
) -> tuple[dict[str, Tensor], float]:
    """Train a copy of `model` from `state` by mini-batch SGD on the cross-entropy.

    Args:
        model: the architecture; it is used as a workspace, and its weights afterwards are those trained.
        state: the weights to start from.
        examples: at least one, on the model's device.
        recipe: the hyper-parameters.
        generator: decides the order of the examples, dropout and the augmentation.
        moving: names of the tensors that are trained; the others stay, BatchNorm statistics included. None: all.

    Returns:
        The trained state dict (copies, on the model's device) and the mean loss over the last epoch.

    Raises:
        ValueError: if there are no examples.
        Diverged: if the loss becomes NaN or infinite.
    """
    if len(examples) == 0:
        raise ValueError("there are no examples to train on")
    parts.load(model, state)
    parts.train(model)
    if moving is not None:
        freeze(model, moving)
    trained = [parameter for parameter in parts.parameters(model) if parameter.requires_grad]
    descent = Descent(trained, recipe, steps=recipe.epochs * num_batches(len(examples), recipe.batch_size))
    device = examples.images.device
    replay = replay_of(model, device)
    forward = parts.once(reordered, model)
    chain = chain_for(model, examples.images) if moving is None else None
    weights = {} if chain is None else parts.once(_named_parameters, model)

    def gradients(images: Tensor, labels: Tensor) -> Sequence[Tensor | None]:
        if chain is not None:
            loss, found = chain.gradients(weights, images, labels)
            return [loss, *found.values()]
        loss = functional.cross_entropy(forward(images), labels)
        return [loss.detach(), *torch.autograd.grad(loss, trained, allow_unused=True)]

    mean_loss = math.nan
    with default_generator(fork(generator), device):
        chance = generator if recipe.augment == "none" else torch.Generator().manual_seed(fork(generator))
        for _ in range(recipe.epochs):
            total = torch.zeros((), device=device)
            for index in batches(len(examples), recipe.batch_size, generator, device):
                images = augmented(taken(examples.images, index), recipe.augment, chance)
                loss, *found = replay(gradients, images, taken(examples.labels, index))
                descent.step(found)
                total += loss * len(index)  # type: ignore[operator]
            mean_loss = float(total) / len(examples)
            if not math.isfinite(mean_loss):
                raise diverged(mean_loss, recipe)
    return parts.copied(model), mean_loss


def _named_parameters(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters())


def freeze(model: nn.Module, moving: Collection[str]) -> None:
    """Let nothing but the tensors of these names change in training."""
    for name, module in model.named_modules():
        own = [*module.named_parameters(name, recurse=False), *module.named_buffers(name, recurse=False)]
        if own and not any(tensor_name in moving for tensor_name, _ in own):
            module.eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in moving)


@torch.no_grad()
def predict(model: nn.Module, state: StateDict, images: Tensor) -> Tensor:
    """Return the logits (images, classes) of `state` in evaluation mode, computed in batches.

    The model's own weights and its modules' modes stay as they are.

    Args:
        model: the architecture.
        state: its weights.
        images: on the state's device.
    """
    forward = reordered(model)
    with evaluating(model):
        return torch.cat(
            [functional_call(forward, dict(state), (part,)) for part in torch.split(images, EVALUATION_BATCH)]
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode inside the block, and each of its modules back into its own after it."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:  # a layer may have been frozen in a model that trains
            module.training = was_training


@torch.no_grad()
def laid_out(model: nn.Module, examples: Examples, batch_size: int = 32) -> Examples:
    """Return the examples, their images in the memory layout that is fastest: channels last, for convolutions.

    On GPUs so for large batches alone: in small ones it is the launches that count, and the layout adds some. What is
    taken from such images by index, slice or chunk keeps the layout, and layers hand it on. A model that cannot take it
    (one that views its activations as they lie in memory) gets the images as they are.

    Args:
        model: the architecture, on the examples' device.
        examples: of any layout.
        batch_size: images that are computed with at a time.
    """
    images = examples.images
    if not parts.once(_convolves, model) or images.ndim != 4 or len(images) == 0:
        return examples
    if images.device.type != "cpu" and images[:batch_size, 0].numel() < LARGE_BATCH:
        return examples
    moved = torch.empty_like(images, memory_format=torch.channels_last).copy_(images)  # strides that tell it, always
    try:
        with evaluating(model):
            model(moved[:1])
    except RuntimeError:
        return examples
    return replace(examples, images=moved)


def _convolves(model: nn.Module) -> bool:
    return any(isinstance(module, nn.Conv2d) for module in model.modules())


def log_probabilities(model: nn.Module | Sequence[nn.Module], states: Sequence[StateDict], images: Tensor) -> Tensor:
    """Return each model's log-probabilities of the classes, (models, images, classes) in float64.

    Args:
        model: the architecture, or that of each model.
        states: the weights of each model, at least one.
        images: on the states' device.
    """
    models = [model] * len(states) if isinstance(model, nn.Module) else model
    found = [predict(model, state, images).double().log_softmax(1) for model, state in zip(models, states, strict=True)]
    return torch.stack(found)


def opinions(problem: Problem, updates: Sequence[Update], images: Tensor) -> Tensor:
    """Return the log-probabilities (clients, images, classes) of the clients' models, whatever their architectures.

    Args:
        problem: has the architectures.
        updates: at least one, on the images' device.
        images: (images, …).
    """
    models = [problem.architecture(update.model) for update in updates]
    return log_probabilities(models, [update.state for update in updates], images)


def evaluate(
    model: nn.Module | Sequence[nn.Module],
    states: Sequence[StateDict],
    examples: Examples,
    combine: Combination | None = None,
) -> Evaluation:
    """Evaluate a model, or an ensemble.

    Args:
        model: the architecture, or that of each member.
        states: one state dict, or the members'.
        examples: at least one, on the states' device; where they have targets, the loss is measured against these.
        combine: how the members' log-probabilities become one prediction; None: the mean of the probabilities.
    """
    found = log_probabilities(model, states, examples.images)
    if combine is None:
        found = found.logsumexp(0) - math.log(len(states))
    else:
        found = combine(found).clamp(min=LEAST_LOG_PROBABILITY)
    if examples.targets is None:
        loss = functional.nll_loss(found, examples.labels, ignore_index=UNKNOWN)
    else:
        loss = -(examples.targets.double() * found).sum(1).mean()
    known = examples.known
    correct = found.argmax(1) == examples.labels  # never where the class is not known
    num_classes = found.shape[1]
    counts = torch.bincount(examples.labels[known], minlength=num_classes)
    hits = torch.bincount(examples.labels[correct], minlength=num_classes)
    return Evaluation(
        accuracy=int(correct.sum()) / int(known.sum()) if known.any() else math.nan,
        loss=float(loss),
        per_class_accuracy=tuple(
            hit / count if count else None for hit, count in zip(hits.tolist(), counts.tolist(), strict=True)
        ),
    )
