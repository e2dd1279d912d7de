"""Tensors as Flower's arrays, and back: numbers in numpy's format, of which nothing is ever unpickled.

A small model's arrays cost more in looks at them than in bytes: here the header is written once for all arrays of a
type and shape, and what is read is compared with it. Other headers are taken apart, and what they tell is compared with
the model before a number is read.
"""

from __future__ import annotations

import functools
import io
import math
import re
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor

from fedmerge.flower import fill
from fedmerge.state import StateDict

NUMPY_FORMAT = "numpy.ndarray"
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)"
    rb"\{'descr': '([^']{1,9})', 'fortran_order': (True|False), 'shape': \((|\d{1,18}(?:, \d{1,18}){0,63},?)\), \} *\n",
    re.DOTALL,
)
"""What `numpy.save` writes before the numbers of an array without fields: the header's length, and the array's type."""

DTYPES = {
    getattr(torch, name): np.dtype(name)
    for name in [
        "bool",
        "uint8",
        "int8",
        "int16",
        "int32",
        "int64",
        "float16",
        "float32",
        "float64",
        "complex64",
        "complex128",
    ]
}
"""What may arrive, in torch's types and in numpy's."""

DESCRIPTIONS = frozenset(dtype.str for dtype in DTYPES.values())

Numbers = np.ndarray[Any, Any]


class MalformedUpdate(ValueError):
    """A client's reply that cannot be used, with the reason."""


def arrays_from_state(state: StateDict, dtype: torch.dtype | None = None) -> ArrayRecord:
    """Return a state dict as Flower's arrays; ValueError for bfloat16, which they cannot carry.

    Args:
        state: the tensors, on any device.
        dtype: floating-point tensors are cast to it, which must hold their numbers; None: all stay as they are.

    Example:
        >>> arrays_from_state({"w": torch.zeros(2, 3)}, torch.float16)["w"].dtype
        'float16'
    """
    record = ArrayRecord()  # one that is made of a dict would make each array a second time
    fill(record, {name: _array(_to_numpy(name, tensor, dtype)) for name, tensor in state.items()})
    return record


def read_arrays(arrays: Mapping[str, Array], expected: StateDict) -> tuple[dict[str, Tensor], bool]:
    """Read arrays whose shapes are known, those of one type into one piece of memory.

    Args:
        arrays: what came; for a name that is not expected there is an empty tensor.
        expected: tensors of the shapes that these must have, on any device.

    Returns:
        The tensors, and whether all numbers are known to be finite.

    Raises:
        MalformedUpdate: if an array's bytes are not what its header or its record tells, or not of the shape.
    """
    found, kinds = dict.fromkeys(arrays, torch.empty(0)), dict[np.dtype[Any], dict[str, Numbers]]()
    for name, array in arrays.items():
        if name in expected:
            numbers = _numbers(name, array, expected[name])
            kinds.setdefault(numbers.dtype, {})[name] = numbers
    finite = True
    for of_kind in kinds.values():
        flat, begin = np.concatenate([numbers.reshape(-1) for numbers in of_kind.values()]), 0
        if flat.dtype.kind in "fc":
            finite = finite and math.isfinite(abs(torch.from_numpy(flat).sum().item()))  # a sum of others never is
        for name, numbers in of_kind.items():  # NumPy's views cost less than torch's
            end = begin + numbers.size
            found[name] = torch.from_numpy(flat[begin:end].reshape(expected[name].shape))
            begin = end
    return found, finite


def _numbers(name: str, array: Array, expected: Tensor) -> Numbers:
    """Return an array's numbers as they lie in its bytes, once they are known to be of the expected shape."""
    shape = tuple(expected.shape)
    if array.stype != NUMPY_FORMAT:
        raise MalformedUpdate(f"array '{name}' is serialised as '{array.stype}', expected '{NUMPY_FORMAT}'")
    if expected.dtype in DTYPES and array.shape == shape:
        header, dtype, size = _format(DTYPES[expected.dtype], shape)
        if len(array.data) == size and array.data.startswith(header):
            return np.frombuffer(array.data, dtype, offset=len(header))
    told = HEADER.match(array.data)
    if told is None or told.end() != 10 + int.from_bytes(told[1], "little"):
        raise MalformedUpdate(f"array '{name}' is not in numpy's format")
    stored = tuple(int(size) for size in told[4].decode().split(",") if size.strip())
    for what, stated in (("its header", stored), ("its record", tuple(array.shape))):
        if stated != shape:
            raise MalformedUpdate(f"tensor '{name}' has shape {stated} in {what}, expected {shape}")
    description = told[2].decode("latin1")
    if description not in DESCRIPTIONS:
        raise MalformedUpdate(f"array '{name}' has dtype {description}, expected numbers in this machine's byte order")
    size, wanted = len(array.data) - told.end(), math.prod(shape) * np.dtype(description).itemsize
    if size != wanted:
        raise MalformedUpdate(f"array '{name}' holds {size} bytes, expected {wanted}")
    order: Literal["F", "C"] = "F" if told[3] == b"True" else "C"
    return np.frombuffer(array.data, description, offset=told.end()).reshape(shape, order=order)


def _array(values: Numbers) -> Array:
    """Return an array as Flower makes it."""
    values = values if values.flags.c_contiguous else values.copy()
    made = Array.__new__(Array)
    vars(made).update(vars(_blank(values.dtype, values.shape)))
    vars(made)["data"] = b"".join((_format(values.dtype, values.shape)[0], values.data))
    return made


@functools.lru_cache(maxsize=1024)
def _blank(dtype: np.dtype[Any], shape: tuple[int, ...]) -> Array:
    """Return an array without its bytes, which it is given as a copy."""
    return Array(dtype=dtype.name, shape=shape, stype=NUMPY_FORMAT, data=b"")


@functools.lru_cache(maxsize=1024)
def _format(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[bytes, np.dtype[Any], int]:
    """Return numpy's header of arrays of a type and shape, the type, and how many bytes they are with it."""
    buffer, told = io.BytesIO(), {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, told)
    header = buffer.getvalue()
    return header, dtype, len(header) + math.prod(shape) * dtype.itemsize


def _to_numpy(name: str, tensor: Tensor, dtype: torch.dtype | None) -> Numbers:
    values = tensor.detach().cpu()
    if dtype is not None and values.is_floating_point() and values.dtype != dtype:
        values = values.to(dtype)
        if bool((torch.isinf(values) & torch.isfinite(tensor.detach().cpu())).any()):
            raise ValueError(f"tensor '{name}' has numbers that {dtype} cannot hold; use --upload-dtype float32")
    if values.dtype == torch.bfloat16:
        raise ValueError(
            f"tensor '{name}' is bfloat16, which Flower's arrays cannot carry: use model.float() or model.half()"
        )
    return values.numpy()
