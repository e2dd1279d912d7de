"""A part of a model: its last layers, which a weak client trains and sends alone."""

from __future__ import annotations

from fedmerge.state import StateDict


def num_layers(state: StateDict) -> int:
    """Return how many layers a model has: modules that have a weight of two dimensions or more."""
    return len(_layers(state))


def last_layers(state: StateDict, count: int) -> tuple[str, ...]:
    """Return the names of all tensors from the `count`-th last layer on, norms between them and after them included.

    Args:
        state: the model's.
        count: at least 1.

    Raises:
        ValueError: if the model has not so many layers.

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.LayerNorm(2), torch.nn.Linear(2, 2))
        >>> last_layers(net.state_dict(), 1)
        ('2.weight', '2.bias')
    """
    layers = _layers(state)
    if not 1 <= count <= len(layers):
        raise ValueError(f"expected from 1 to {len(layers)} layers, as many as the model has, got {count}")
    modules = list(dict.fromkeys(map(_module, state)))
    chosen = set(modules[modules.index(layers[-count]) :])
    return tuple(name for name in state if _module(name) in chosen)


def _layers(state: StateDict) -> list[str]:
    found = (_module(name) for name, tensor in state.items() if tensor.is_floating_point() and tensor.ndim > 1)
    return list(dict.fromkeys(found))


def _module(name: str) -> str:
    return name.rpartition(".")[0]
