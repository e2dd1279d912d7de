"""Updates as Flower records, and back: the boundary at which nothing that arrives is trusted.

A reply holds one ArrayRecord (the state dict), one more for each statistic that was asked for, and one MetricRecord:
`num-examples`, and from our own clients also `partition-id`, `label-counts`, `loss`, `accuracy` and `seconds`. What
does not fit raises `MalformedUpdate` before memory is spent on it: the sizes that headers tell are compared with the
model's before an array is read.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping
from typing import Any, TypeGuard, TypeVar

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmerge.catalogue import STATISTICS
from fedmerge.problem import Update
from fedmerge.state import MalformedState, StateDict, check_state, conform, num_bytes
from fedmerge.statistics import expected_shape

T = TypeVar("T")

ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"
NUM_EXAMPLES = "num-examples"
PARTITION_ID = "partition-id"
NUM_PARTITIONS = "num-partitions"
LABEL_COUNTS = "label-counts"
SERVER_ROUND = "server-round"
PROXIMAL_MU = "proximal-mu"
"""Where Flower's FedProx tells clients its μ."""
MOST_CLIENTS = 2**64  # as there are node ids
MOST_EXAMPLES = 2**53  # beyond it a float64, by which updates are weighted, no longer holds every whole number
REPORTED = ("loss", "accuracy", "seconds")

NUMPY_FORMAT = "numpy.ndarray"
HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(..)"
    rb"\{'descr': '([^']{1,9})', 'fortran_order': (True|False), 'shape': \((|\d{1,18}(?:, \d{1,18}){0,63},?)\), \} *\n",
    re.DOTALL,
)
"""What `numpy.save` writes before the numbers of an array without fields: the header's length, and the array's type."""

DTYPES = frozenset(
    np.dtype(name).str
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
)


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
    return ArrayRecord({name: Array(_to_numpy(name, tensor, dtype)) for name, tensor in state.items()})


def state_from_arrays(arrays: ArrayRecord, expected: StateDict) -> dict[str, Tensor]:
    """Return Flower's arrays as a state dict that fits `expected`, in its dtypes, on the CPU; or `MalformedUpdate`.

    Args:
        arrays: what came.
        expected: the state dict of the architecture: keys, shapes and kinds of numbers must be its own.
    """
    return _state_and_size(arrays, expected)[0]


def num_array_bytes(content: RecordDict) -> int:
    """Return the size in bytes of the numbers in all arrays of a message."""
    return sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize
        for record in content.array_records.values()
        for array in record.values()
    )


def update_to_records(update: Update, *, upload_dtype: str) -> RecordDict:
    """Return an update as the content of a reply.

    Args:
        update: the client's update.
        upload_dtype: floating-point tensors are sent in it, "float32" or "float16"; integer buffers as they are.
    """
    metrics = MetricRecord({NUM_EXAMPLES: update.num_examples, PARTITION_ID: update.partition_id})
    for name in REPORTED:
        if name in update.metrics:
            metrics[name] = float(update.metrics[name])
    if update.label_counts is not None:
        metrics[LABEL_COUNTS] = list(update.label_counts)
    content = RecordDict({ARRAYS: arrays_from_state(update.state, getattr(torch, upload_dtype)), METRICS: metrics})
    for kind, tensors in update.statistics.items():
        content[kind] = arrays_from_state(tensors)
    return content


def update_from_records(
    content: RecordDict,
    expected: StateDict,
    *,
    fallback_id: int,
    num_classes: int | None = None,
    weighted_by_key: str = NUM_EXAMPLES,
) -> Update:
    """Check a reply's content and return it as an update.

    Args:
        content: of the reply.
        expected: the state dict of the architecture.
        fallback_id: the partition id of a client that does not tell it.
        num_classes: length that label counts must have; None: any.
        weighted_by_key: the metric that is the number of examples.

    Raises:
        MalformedUpdate: if anything in it cannot be used.
    """
    records = content.array_records
    arrays = _only("ArrayRecord", {name: record for name, record in records.items() if name not in STATISTICS})
    metrics = _only("MetricRecord", content.metric_records)
    state, size = _state_and_size(arrays, expected)
    partition_id = metrics.get(PARTITION_ID, fallback_id)
    if not isinstance(partition_id, int) or not 0 <= partition_id < MOST_CLIENTS:
        raise MalformedUpdate(f"{PARTITION_ID} is {partition_id!r}, expected a whole number from 0")
    num_examples = _num_examples(metrics, weighted_by_key)
    return Update(
        state=state,
        num_examples=num_examples,
        partition_id=partition_id,
        label_counts=_label_counts(metrics, num_classes, num_examples if weighted_by_key == NUM_EXAMPLES else None),
        metrics={name: _finite(name, metrics[name]) for name in REPORTED if name in metrics},
        num_bytes=size,
        statistics={kind: _statistic(kind, records[kind], expected) for kind in STATISTICS if kind in records},
    )


def average_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the weighted means of the clients' scalar metrics, each over the clients that report a finite number.

    Args:
        contents: of the replies.
        weighted_by_key: the metric that is the weight.
    """
    records = [record for content in contents for record in content.metric_records.values()]
    means = MetricRecord()
    for name in sorted({name for record in records for name in record} - {weighted_by_key, PARTITION_ID, LABEL_COUNTS}):
        pairs = [
            (float(value), float(weight))
            for record in records
            if _is_finite(value := record.get(name))
            if _is_finite(weight := record.get(weighted_by_key)) and weight > 0
        ]
        if pairs:
            means[name] = sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)
    return means


def finite_scalars(diagnostics: Mapping[str, object], prefix: str = "") -> dict[str, int | float]:
    """Return what a MetricRecord can hold of diagnostics: finite numbers, nested names joined by dashes.

    Args:
        diagnostics: in JSON's types.
        prefix: before each name.

    Example:
        >>> finite_scalars({"merge": {"steps": 3, "name": "np"}, "seconds": 0.5})
        {'merge-steps': 3, 'seconds': 0.5}
    """
    found: dict[str, int | float] = {}
    for name, value in diagnostics.items():
        if isinstance(value, Mapping):
            found |= finite_scalars(value, f"{prefix}{name}-")
        elif _is_finite(value) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def _state_and_size(arrays: ArrayRecord, expected: StateDict) -> tuple[dict[str, Tensor], int]:
    """Return the state dict, and its size in bytes in the dtypes that were sent."""
    try:
        sent = {
            name: _read(name, array, tuple(expected[name].shape)) if name in expected else torch.empty(0)
            for name, array in arrays.items()
        }
        state = conform(sent, expected)
        check_state(state, expected)  # again, for a float64 that is infinite in float32
    except MalformedState as error:
        raise MalformedUpdate(str(error)) from error
    return state, num_bytes(sent)


def _statistic(kind: str, arrays: ArrayRecord, expected: StateDict) -> dict[str, Tensor]:
    found = {}
    for name, array in arrays.items():
        shape = expected_shape(kind, name, expected)
        if shape is None:
            raise MalformedUpdate(f"the statistic '{kind}' tells of '{name}', which the model has no weights of")
        found[name] = _read(name, array, shape)
        if not found[name].is_floating_point() or not bool(torch.isfinite(found[name]).all()):
            raise MalformedUpdate(f"the statistic '{kind}' of '{name}' is not of finite floating-point numbers")
    return found


def _read(name: str, array: Array, shape: tuple[int, ...]) -> Tensor:
    """Read one array, after its header has told that it is what the model expects.

    Nothing is unpickled: the bytes are numbers, or the array is refused.
    """
    if array.stype != NUMPY_FORMAT:
        raise MalformedUpdate(f"array '{name}' is serialised as '{array.stype}', expected '{NUMPY_FORMAT}'")
    header = HEADER.match(array.data)
    if header is None or header.end() != 10 + int.from_bytes(header[1], "little"):
        raise MalformedUpdate(f"array '{name}' is not in numpy's format")
    stored = tuple(int(size) for size in header[4].decode().split(",") if size.strip())
    for what, stated in (("its header", stored), ("its record", tuple(array.shape))):
        if stated != shape:
            raise MalformedUpdate(f"tensor '{name}' has shape {stated} in {what}, expected {shape}")
    dtype = header[2].decode("latin1")
    if dtype not in DTYPES:
        raise MalformedUpdate(f"array '{name}' has dtype {dtype}, expected numbers in this machine's byte order")
    size, wanted = len(array.data) - header.end(), math.prod(shape) * np.dtype(dtype).itemsize
    if size != wanted:
        raise MalformedUpdate(f"array '{name}' holds {size} bytes, expected {wanted}")
    numbers = np.frombuffer(array.data[header.end() :], dtype).reshape(
        shape, order="F" if header[3] == b"True" else "C"
    )
    return torch.from_numpy(numbers.copy())


def _to_numpy(name: str, tensor: Tensor, dtype: torch.dtype | None) -> np.ndarray[Any, Any]:
    values = tensor.detach().cpu()
    if dtype is not None and values.is_floating_point() and values.dtype != dtype:
        values = values.to(dtype)
        if bool((torch.isinf(values) & torch.isfinite(tensor.detach().cpu())).any()):
            raise ValueError(f"tensor '{name}' has numbers that {dtype} cannot hold; use --upload-dtype float32")
    if values.dtype == torch.bfloat16:
        raise ValueError(
            f"tensor '{name}' is bfloat16, which Flower's arrays cannot carry: use model.float() or model.half()"
        )
    return np.asarray(values.numpy())


def _only(kind: str, records: Mapping[str, T]) -> T:
    if len(records) != 1:
        raise MalformedUpdate(f"expected exactly one {kind} in the reply, got {len(records)}")
    return next(iter(records.values()))


def _num_examples(metrics: MetricRecord, key: str) -> int:
    value = metrics.get(key)
    if _is_finite(value) and 1 <= value <= MOST_EXAMPLES and value == int(value):
        return int(value)
    raise MalformedUpdate(f"{key} is {value!r}, expected a whole number from 1 to {MOST_EXAMPLES}")


def _label_counts(metrics: MetricRecord, num_classes: int | None, num_examples: int | None) -> tuple[int, ...] | None:
    counts = metrics.get(LABEL_COUNTS)
    if counts is None:
        return None
    if not isinstance(counts, list) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise MalformedUpdate(f"{LABEL_COUNTS} is {counts!r}, expected a list of whole numbers from 0")
    if num_classes is not None and len(counts) != num_classes:
        raise MalformedUpdate(f"{LABEL_COUNTS} has {len(counts)} classes, expected {num_classes}")
    if sum(counts) == 0:
        raise MalformedUpdate(f"{LABEL_COUNTS} is 0 for every class")
    if num_examples is not None and sum(counts) > num_examples:  # fewer: not all of its examples have labels
        raise MalformedUpdate(f"{LABEL_COUNTS} add up to {sum(counts)}, but the client has {num_examples} examples")
    return tuple(int(count) for count in counts)


def _finite(name: str, value: object) -> float:
    if _is_finite(value):
        return float(value)
    raise MalformedUpdate(f"metric '{name}' is {value!r}, expected a finite number")


def _is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number that a float can hold, whole numbers of any size included."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
