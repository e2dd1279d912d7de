"""What a model consists of, found once: a small model's tensors are sooner trained than looked for.

A model walks through its modules for each state dict, each load and each change of mode. One whose modules and tensors
stay the same can be sealed: its parts are kept for as long as it lives. With every other one, torch does as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fedmerge.state import StateDict

T = TypeVar("T")


@dataclass(frozen=True)
class _Parts:
    modules: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]
    tensors: dict[str, Tensor]
    shapes: dict[str, torch.Size]
    found: dict[Callable[[nn.Module], Any], Any] = field(default_factory=dict)


_sealed: WeakKeyDictionary[nn.Module, _Parts] = WeakKeyDictionary()


def seal(model: nn.Module) -> None:
    """Keep a model's parts.

    Args:
        model: no module, parameter or buffer of it is replaced from now on, or moved to other memory; its modules
            change mode and load tensors as torch's own do.
    """
    tensors = dict(model.state_dict())
    _sealed[model] = _Parts(tuple(model.modules()), tuple(model.parameters()), tensors, _shapes(tensors))


def modules(model: nn.Module) -> Sequence[nn.Module]:
    """Return a model's modules, itself included."""
    parts = _sealed.get(model)
    return tuple(model.modules()) if parts is None else parts.modules


def parameters(model: nn.Module) -> Sequence[nn.Parameter]:
    """Return a model's parameters, each once."""
    parts = _sealed.get(model)
    return tuple(model.parameters()) if parts is None else parts.parameters


def once(find: Callable[[nn.Module], T], model: nn.Module) -> T:
    """Return what a function finds out about a model; a sealed one is looked at once."""
    parts = _sealed.get(model)
    if parts is None:
        return find(model)
    if find not in parts.found:
        parts.found[find] = find(model)
    return parts.found[find]  # type: ignore[no-any-return]


def train(model: nn.Module, mode: bool = True) -> None:
    """Put a model into training mode, or into evaluation mode.

    Args:
        model: with all its modules.
        mode: as torch's.
    """
    parts = _sealed.get(model)
    if parts is None:
        model.train(mode)
        return
    for module in parts.modules:
        vars(module)["training"] = mode  # what an assignment does, after a look at every kind of attribute


def load(model: nn.Module, state: StateDict) -> None:
    """Copy a state dict into a model; what does not fit is torch's RuntimeError.

    Args:
        model: of the state's architecture.
        state: left as it is.
    """
    parts = _sealed.get(model)
    if parts is None or _shapes(state) != parts.shapes:
        model.load_state_dict(dict(state))
        return
    with torch.no_grad():
        torch._foreach_copy_(list(parts.tensors.values()), [state[name] for name in parts.tensors])


def copied(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of a model's state dict."""
    parts = _sealed.get(model)
    tensors = model.state_dict() if parts is None else parts.tensors
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _shapes(state: StateDict) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in state.items()}
