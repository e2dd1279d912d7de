"""Task vectors: what each client has learned, as the difference of its weights from those that all started from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from fedmerge.merge.average import mean_state
from fedmerge.merge.descent import split_state
from fedmerge.problem import Problem, Update
from fedmerge.settings import ConfigurationError

SCALES = (1.0, 0.5, 0.75, 1.5, 2.0, 3.0)
"""Factors of the mean task vector to choose from; the first is the default."""


def check_scales(scales: Sequence[float]) -> None:
    """Raise unless there is a scale and all are finite.

    Raises:
        ValueError: says what was expected.
    """
    if not scales or not all(math.isfinite(scale) for scale in scales):
        raise ValueError(f"scales must be finite numbers, at least one, got {scales}")


def start_of(problem: Problem, what: str) -> dict[str, Tensor]:
    """Return the parameters that all clients started from.

    Args:
        problem: the server's side.
        what: what needs them, for the error.

    Raises:
        ConfigurationError: if there are none, or they are not known.
    """
    if problem.start is None:
        raise ConfigurationError(
            f"{what} needs the weights that all clients started from, and these did not start from one model, or it is "
            "not known: let the clients share it (--init shared), or use what needs none (mean, np)"
        )
    return split_state(problem, problem.start)[0]


def task_vectors(start: Mapping[str, Tensor], updates: Sequence[Update]) -> Float[Tensor, "clients parameters"]:
    """Return θ_k − θ₀ of each client, flat.

    Args:
        start: θ₀, parameters by name.
        updates: at least one.
    """
    return torch.stack(
        [torch.cat([(update.state[name] - tensor).flatten() for name, tensor in start.items()]) for update in updates]
    )


def departed(
    problem: Problem, start: Mapping[str, Tensor], updates: Sequence[Update], vector: Float[Tensor, " parameters"]
) -> dict[str, Tensor]:
    """Return the state dict of θ₀ plus a task vector; buffers are the clients' mean.

    Args:
        problem: the architecture.
        start: θ₀, parameters by name.
        updates: at least one.
        vector: flat, in the order of `start`.
    """
    _, buffers = split_state(problem, mean_state([update.state for update in updates]))
    parts = torch.split(vector, [tensor.numel() for tensor in start.values()])
    moved = {
        name: tensor + part.reshape(tensor.shape) for (name, tensor), part in zip(start.items(), parts, strict=True)
    }
    return {name: moved[name] if name in moved else buffers[name] for name in problem.model.state_dict()}
