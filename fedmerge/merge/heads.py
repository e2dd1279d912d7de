"""The head: the parameters whose rows are the classes, found by what they do, and what can be done to it alone.

A row of the head writes one output and no other. That is a law of derivatives, and no name of a layer is needed: with
random weights v, the gradient of Σ_c v_c y_c with respect to a row of the head is v_c times something that does not
depend on v.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict

PROBES = 4
TOLERANCE = 1e-6
LEAST_SCALE, MOST_SCALE = 1e-3, 1e3
BISECTIONS = 60


def find_head(model: nn.Module, state: StateDict, shape: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the parameters whose rows each write one output of the model and no other.

    Args:
        model: the architecture; it is not changed.
        state: weights that let something reach the outputs, as a trained model's.
        shape: of one image.

    Raises:
        ConfigurationError: if there are none, as in a network that mixes its outputs after the last layer.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
        >>> find_head(model, model.state_dict(), (4,))
        ('2.weight', '2.bias')
    """
    proof = copy.deepcopy(model).cpu().double().eval()
    proof.load_state_dict({name: tensor.cpu() for name, tensor in state.items()})
    chance = torch.Generator().manual_seed(0)
    outputs = proof(torch.randn(PROBES, *shape, generator=chance, dtype=torch.float64))
    num_classes = outputs.shape[1]
    rows = {name: parameter for name, parameter in proof.named_parameters() if parameter.shape[:1] == (num_classes,)}
    found: list[list[Tensor]] = []
    for _ in range(2):
        weights = 0.5 + torch.rand(num_classes, generator=chance, dtype=torch.float64)
        gradients = torch.autograd.grad(
            (outputs @ weights).sum(),
            list(rows.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found.append([gradient.reshape(num_classes, -1) / weights[:, None] for gradient in gradients])
    head = tuple(
        name
        for name, first, second in zip(rows, *found, strict=True)
        if first.any() and (first - second).abs().max() <= TOLERANCE * first.abs().max()
    )
    if not any(rows[name].ndim > 1 for name in head):
        raise ConfigurationError(
            f"{type(model).__name__} has no head: no weight's rows each write one of its {num_classes} outputs and no "
            "other; use what treats all layers alike (mean, fedavg)"
        )
    return head


def head_rows(
    states: Sequence[StateDict], head: Sequence[str], weights: Float[Tensor, "clients classes"]
) -> dict[str, Tensor]:
    """Return the head whose row of class c is Σ_k w_k(c) times client k's, exact where all are equal.

    Args:
        states: the clients' models.
        head: from `find_head`.
        weights: w_k(c), which sum to 1 over the clients.
    """
    found = {}
    for name in head:
        first = states[0][name]
        of_rows = weights.to(first).reshape(*weights.shape, *[1] * (first.ndim - 1))
        found[name] = first + sum(
            (of_row * (state[name] - first) for of_row, state in zip(of_rows[1:], states[1:], strict=True)),
            torch.zeros_like(first),
        )
    return found


@torch.no_grad()
def scaled_logits(
    model: nn.Module, state: StateDict, head: Sequence[str], scale: float, images: Tensor
) -> dict[str, Tensor]:
    """Return the model with its logits multiplied by a factor, by its head alone.

    Args:
        model: the architecture, in evaluation mode.
        state: its weights, left as they are.
        head: from `find_head`.
        scale: the factor.
        images: on which it is proven that the logits are scaled; at least one.

    Raises:
        ConfigurationError: if the outputs do not scale with the head.
    """
    result = {name: tensor.clone() for name, tensor in state.items()}
    for name in head:
        result[name] *= scale
    before, after = (functional_call(model, dict(weights), (images[:PROBES],)) for weights in (state, result))
    error = float((after - scale * before).abs().max())
    if not error <= 1e-3 * float((scale * before).abs().max()):
        raise ConfigurationError(
            f"the logits of {type(model).__name__} do not scale with its head ({', '.join(head)}): "
            "its temperature cannot be set in its weights"
        )
    return result


def best_scale(logits: Float[Tensor, "examples classes"], labels: Int[Tensor, " examples"]) -> float:
    """Return the factor of the logits with the least cross-entropy, which is convex in it: temperature scaling.

    Guo, Pleiss, Sun, Weinberger: On Calibration of Modern Neural Networks, ICML 2017, arXiv 1706.04599.

    Args:
        logits: of a model.
        labels: the true classes.

    Returns:
        1/T, within 1e-3 and 1e3.
    """
    logits = logits.double()
    truth = logits.gather(1, labels[:, None])[:, 0]
    low, high = LEAST_SCALE, MOST_SCALE
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        expected = ((middle * logits).softmax(1) * logits).sum(1)
        if float((expected - truth).mean()) > 0:  # the loss rises with the factor
            high = middle
        else:
            low = middle
    return math.sqrt(low * high)
