"""What a merged model took from each client: the coefficients that it amounts to, tensor by tensor and class by class.

A learned mixture of many models keeps no coefficients (`fedmerge.merge.streamed` moves in the models' span), and
pairs never had any. So they are recovered: for each tensor the least squares fit θ − θ̄ ≈ Σ_k β_k (θ_k − θ̄) of the
shortest β gives α_k = 1/K + β_k, which sum to 1. A mixture whose coefficients were one number for a client and tensor
is fitted exactly, as long as its models are in general position; of any other the fit tells which part of the way from
the mean it explains. The same is done for each row of the head, which is a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fedmerge.catalogue import MERGERS
from fedmerge.merge.heads import find_head
from fedmerge.problem import Update
from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict

BLOCK = 2**16
"""Entries of a row that are held in float64 at once, of each model."""
SINGULAR, ROUNDING = 1e-10, 1e-20
"""Squared lengths that count as 0: beside the greatest deviation's, and beside the mean's own."""
DIGITS = 4


def is_mixture(merge: str) -> bool:
    """Return whether a merger is a form of NP Merge, whose model is a learned mixture of the clients'.

    Args:
        merge: a merger's name, with options.

    Example:
        >>> is_mixture("np-distill"), is_mixture("finetune")
        (True, False)
    """
    name = merge.partition(":")[0]
    return name in MERGERS and MERGERS[name].target.startswith("fedmerge.merge.nonuniform:")


def recovered(
    merged: Float[Tensor, "rows entries"], models: Sequence[Float[Tensor, "rows entries"]]
) -> tuple[Float[Tensor, "rows models"], Float[Tensor, " rows"]]:
    """Return the coefficients of each row, Σ_k α_k = 1, and how much of its way from the mean they explain.

    Where models do not differ, a row's coefficients are the nearest to 1/K that fit as well.

    Args:
        merged: the merged model's numbers.
        models: those of the models, in the same places.

    Returns:
        α in float64, and 1 − ‖θ − Σ_k α_k θ_k‖² / ‖θ − θ̄‖² in [0, 1]; 1 for a row that is the mean.

    Example:
        >>> first, second = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]])
        >>> recovered(0.25 * first + 0.75 * second, [first, second])[0]
        tensor([[0.2500, 0.7500]], dtype=torch.float64)
    """
    count, rows = len(models), len(merged)
    gram = torch.zeros(rows, count, count, dtype=torch.float64)
    along = torch.zeros(rows, count, dtype=torch.float64)
    length, size = torch.zeros(2, rows, dtype=torch.float64)
    for start in range(0, merged.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        stack = torch.stack([model[:, part].detach().cpu().double() for model in models], 1)
        mean = stack.mean(1)
        stack -= mean[:, None]
        way = merged[:, part].detach().cpu().double() - mean
        gram += stack @ stack.mT
        along += (stack @ way[..., None])[..., 0]
        length += way.square().sum(1)
        size += mean.square().sum(1)
    least = {"atol": ROUNDING * size, "rtol": torch.full_like(size, SINGULAR)}
    beta = (torch.linalg.pinv(gram, **least, hermitian=True) @ along[..., None])[..., 0]
    explained = torch.where(length > ROUNDING * size, (beta * along).sum(1) / length, 1.0)
    return 1 / count + beta, explained.clamp(0, 1)


def describe_shares(
    model: nn.Module, merged: StateDict, updates: Sequence[Update], shape: Sequence[int]
) -> dict[str, Any]:
    """Return a merged model's coefficients in JSON's types.

    Args:
        model: the architecture.
        merged: the merged model.
        updates: at least two, in one basis.
        shape: of one image.

    Returns:
        "clients": partition ids; "tensors" and "explained": by parameter, α of each client and what it explains;
        "classes": for each class α of each client in the head's rows, absent where the model has no head.
    """
    states = [update.state for update in updates]
    names = [name for name, parameter in model.named_parameters() if parameter.is_floating_point()]
    found = {name: recovered(*_rows([merged, *states], [name], 1)) for name in names}
    told: dict[str, Any] = {
        "clients": [update.partition_id for update in updates],
        "tensors": {name: _rounded(alpha[0]) for name, (alpha, _) in found.items()},
        "explained": {name: round(float(explained), DIGITS) for name, (_, explained) in found.items()},
    }
    try:
        head = find_head(model, merged, shape)
    except ConfigurationError:  # the last layer's outputs are mixed: no row is a class
        return told
    alpha, _ = recovered(*_rows([merged, *states], head, len(merged[head[0]])))
    return {**told, "classes": [_rounded(row) for row in alpha]}


def _rows(states: Sequence[StateDict], names: Sequence[str], rows: int) -> tuple[Tensor, list[Tensor]]:
    """Return the first state's tensors as one matrix, and the others'."""
    first, *others = (torch.cat([state[name].reshape(rows, -1) for name in names], 1) for state in states)
    return first, others


def _rounded(values: Tensor) -> list[float]:
    return [round(value, DIGITS) + 0.0 for value in values.tolist()]  # + 0.0: no negative zero
