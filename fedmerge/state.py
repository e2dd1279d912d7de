"""State dicts: what they must have in common, and how they are stored.

A model is a mapping from names to tensors. Functions take a `StateDict` and return a fresh `dict`; nothing is changed
in place.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from fedmerge.errors import FedmergeError

StateDict = Mapping[str, Tensor]

SMALL = 1 << 16
"""Numbers of a model whose tensors cost more in calls than in arithmetic: they are put together."""


class MalformedState(FedmergeError, ValueError):
    """A state dict that does not fit the model that it claims to be of."""


def check_state(state: StateDict, expected: StateDict) -> None:
    """Raise unless `state` has the keys and shapes of `expected`, tensors of the same kind, and finite numbers.

    Kinds are floating point, complex, and integer or boolean: a float16 upload of a float32 model passes.

    Args:
        state: the state dict to check.
        expected: the state dict of the architecture, on any device (also "meta").

    Raises:
        MalformedState: names what was expected and what came.

    Example:
        >>> check_state({"w": torch.zeros(2)}, {"w": torch.zeros(3)})
        Traceback (most recent call last):
        fedmerge.state.MalformedState: tensor 'w' has shape (2,), expected (3,)
    """
    if state.keys() != expected.keys():
        missing = [name for name in expected if name not in state]
        unknown = [name for name in state if name not in expected]
        parts = [f"{what} {_some(names)}" for what, names in (("missing", missing), ("unknown", unknown)) if names]
        raise MalformedState(f"the keys differ from the model's {len(expected)}: {'; '.join(parts)}")
    for name, tensor in state.items():
        wanted = expected[name]
        if tensor.shape != wanted.shape:
            raise MalformedState(f"tensor '{name}' has shape {tuple(tensor.shape)}, expected {tuple(wanted.shape)}")
        if tensor.dtype != wanted.dtype and _kind(tensor) != _kind(wanted):
            raise MalformedState(f"tensor '{name}' has dtype {tensor.dtype}, expected {wanted.dtype}")
    numbers = {name: tensor for name, tensor in state.items() if _kind(tensor) != "integer"}
    if _are_finite(list(numbers.values())):
        return
    for name, tensor in numbers.items():
        if not _is_finite(tensor):
            count = int((~torch.isfinite(tensor)).sum())
            raise MalformedState(f"tensor '{name}' has {count} NaN or infinite numbers of {tensor.numel()}")


def conform(state: StateDict, expected: StateDict, device: torch.device | None = None) -> dict[str, Tensor]:
    """Return `state` checked against `expected`, in its key order and dtypes.

    Args:
        state: the state dict that came.
        expected: the state dict of the architecture.
        device: where the result lies; None: where `state` does.

    Raises:
        MalformedState: as `check_state`, also for numbers that the model's dtypes cannot hold.
    """
    check_state(state, expected)
    result = {name: state[name].to(device, wanted.dtype) for name, wanted in expected.items()}
    if any(result[name].dtype != tensor.dtype for name, tensor in state.items()):
        check_state(result, expected)
    return result


def num_bytes(state: StateDict) -> int:
    """Return the size of the tensors' contents in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def serialize(state: StateDict, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return `state` as a safetensors file's bytes, with string `metadata` in its header.

    Tied tensors are stored once for each of their names: the format knows no shared memory.
    """
    apart = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    return to_safetensors(apart, dict(metadata or {}))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file.

    Args:
        path: the file.

    Returns:
        The state dict on the CPU, and the header's metadata.

    Raises:
        MalformedState: if the file is not readable as safetensors.
    """
    try:
        with safe_open(path, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            return state, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise MalformedState(f"{path} is not a readable safetensors file: {error}") from error


def _are_finite(tensors: Sequence[Tensor]) -> bool:
    """Return whether all numbers are finite, as far as one look tells: small tensors are looked at together."""
    if len({(tensor.dtype, tensor.device) for tensor in tensors}) != 1:
        return not tensors
    if sum(tensor.numel() for tensor in tensors) > SMALL:
        return False
    return math.isfinite(abs(torch.cat([tensor.reshape(-1) for tensor in tensors]).sum().item()))


def _is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite: a sum of others never is, and it is the faster look."""
    return math.isfinite(abs(tensor.sum().item())) or bool(torch.isfinite(tensor).all())


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else "complex" if tensor.is_complex() else "integer"


def _some(names: Sequence[str], most: int = 3) -> str:
    shown = ", ".join(f"'{name}'" for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "")
