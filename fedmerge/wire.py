"""Updates as Flower records, and back: the boundary at which nothing that arrives is trusted.

A reply holds one ArrayRecord (the state dict), one more for each statistic that was asked for, and one MetricRecord:
`num-examples`, and from our own clients also `partition-id`, `label-counts` and what is in `REPORTED`. A client
whose architecture is not the server's declares it by name in a ConfigRecord; the federation knows those names, and
nothing is built by what arrives. One that sends its last layers alone announces how many; the others are those that it
started from. What does not fit raises `MalformedUpdate` before memory is spent on it: the sizes
that headers tell are compared with the model's before an array is read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedmerge.arrays import MalformedUpdate as MalformedUpdate
from fedmerge.arrays import arrays_from_state as arrays_from_state
from fedmerge.arrays import read_arrays
from fedmerge.catalogue import STATISTICS
from fedmerge.flower import fill
from fedmerge.metrics import LABEL_COUNTS, PARTITION_ID, PRIVACY, is_finite, records
from fedmerge.partial import last_layers, num_layers
from fedmerge.problem import Update
from fedmerge.state import MalformedState, StateDict, conform, num_bytes
from fedmerge.statistics import expected_shape

T = TypeVar("T")

StartOf = Callable[[str, int], StateDict | None]
"""Gives the weights that a client started from, by the name of its architecture and its partition id, if known."""

ARRAYS = "arrays"
METRICS = "metrics"
CONFIG = "config"
NUM_EXAMPLES = "num-examples"
SERVER_ROUND = "server-round"
MODEL = "model"
"""In a reply, the name of the client's architecture; in a message, of the one that the weights are of."""
LAYERS = "layers"
"""In a reply, how many of the model's last layers it holds, if not all."""
PROXIMAL_MU = "proximal-mu"
"""Where Flower's FedProx tells clients its μ."""
MOST_CLIENTS = 2**64  # as there are node ids
MOST_EXAMPLES = 2**53  # beyond it a float64, by which updates are weighted, no longer holds every whole number
REPORTED = ("loss", "accuracy", "seconds", "restarts", *PRIVACY)


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
        for record in records(content, ArrayRecord).values()
        for array in record.values()
    )


def update_to_records(update: Update, *, upload_dtype: str) -> RecordDict:
    """Return an update as the content of a reply.

    Args:
        update: the client's update.
        upload_dtype: floating-point tensors are sent in it, "float32" or "float16"; integer buffers as they are.
    """
    metrics = MetricRecord()
    numbers: dict[str, int | float | list[int]] = {
        NUM_EXAMPLES: update.num_examples,
        PARTITION_ID: update.partition_id,
        **{name: float(update.metrics[name]) for name in REPORTED if name in update.metrics},
    }
    if update.label_counts is not None:
        numbers[LABEL_COUNTS] = list(update.label_counts)
    fill(metrics, numbers)
    sent = update.state
    if update.layers:
        sent = {name: update.state[name] for name in last_layers(update.state, update.layers)}
    content = RecordDict()
    fill(content, {ARRAYS: arrays_from_state(sent, getattr(torch, upload_dtype)), METRICS: metrics})
    told = ConfigRecord()
    if update.model:
        told[MODEL] = update.model
    if update.layers:
        told[LAYERS] = update.layers
    if told:
        content[CONFIG] = told
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
    others: Mapping[str, StateDict] | None = None,
    start_of: StartOf | None = None,
) -> Update:
    """Check a reply's content and return it as an update.

    Args:
        content: of the reply.
        expected: the state dict of the server's architecture.
        fallback_id: the partition id of a client that does not tell it.
        num_classes: length that label counts must have; None: any.
        weighted_by_key: the metric that is the number of examples.
        others: the state dicts of the architectures that clients may declare, by name.
        start_of: gives what a client started from that sends its last layers alone; None: no client may.

    Raises:
        MalformedUpdate: if anything in it cannot be used.
    """
    told = records(content, ConfigRecord).get(CONFIG, ConfigRecord())
    model = _declared(told, others or {})
    if model:
        expected = (others or {})[model]
    sent = records(content, ArrayRecord)
    arrays = _only("ArrayRecord", {name: record for name, record in sent.items() if name not in STATISTICS})
    metrics = _only("MetricRecord", records(content, MetricRecord))
    partition_id = metrics.get(PARTITION_ID, fallback_id)
    if not isinstance(partition_id, int) or not 0 <= partition_id < MOST_CLIENTS:
        raise MalformedUpdate(f"{PARTITION_ID} is {partition_id!r}, expected a whole number from 0")
    layers = _announced(told, expected)
    if layers:
        start = None if start_of is None else start_of(model, partition_id)
        if start is None:
            raise MalformedUpdate(
                f"it holds the last {layers} layers alone, and the server does not know what the others started from: "
                "use --init shared"
            )
        part = {name: expected[name] for name in last_layers(expected, layers)}
        state, size = _state_and_size(arrays, part)
        state = {name: state[name] if name in state else start[name].cpu().clone() for name in expected}
    else:
        state, size = _state_and_size(arrays, expected)
    num_examples = _num_examples(metrics, weighted_by_key)
    return Update(
        state=state,
        num_examples=num_examples,
        partition_id=partition_id,
        label_counts=_label_counts(metrics, num_classes, num_examples if weighted_by_key == NUM_EXAMPLES else None),
        metrics={name: _finite(name, metrics[name]) for name in REPORTED if name in metrics},
        num_bytes=size,
        statistics={kind: _statistic(kind, sent[kind], expected) for kind in STATISTICS if kind in sent},
        model=model,
        layers=layers,
    )


def _declared(told: ConfigRecord, others: Mapping[str, StateDict]) -> str:
    """Return the name of the client's architecture; empty for the server's, which is not declared."""
    model = told.get(MODEL, "")
    if isinstance(model, str) and (not model or model in others):
        return model
    names = ", ".join(map(repr, others)) or "no other than the server's"
    raise MalformedUpdate(f"{MODEL} is {model!r:.60}, expected one that the federation has (--models): {names}")


def _announced(told: ConfigRecord, expected: StateDict) -> int:
    """Return how many of its last layers a reply holds; 0 for all, which is not announced."""
    layers = told.get(LAYERS, 0)
    if type(layers) is int and layers == 0:
        return 0
    most = num_layers(expected)
    if type(layers) is int and 0 < layers <= most:
        return layers
    raise MalformedUpdate(f"{LAYERS} is {layers!r:.60}, expected a whole number up to {most}, as many as the model has")


def _state_and_size(arrays: ArrayRecord, expected: StateDict) -> tuple[dict[str, Tensor], int]:
    """Return the state dict, and its size in bytes in the dtypes that were sent."""
    sent, finite = read_arrays(arrays, expected)
    if finite and {name: t.dtype for name, t in sent.items()} == {name: t.dtype for name, t in expected.items()}:
        return {name: sent[name] for name in expected}, num_bytes(sent)  # nothing is left to look at
    try:
        state = conform(sent, expected)
    except MalformedState as error:
        raise MalformedUpdate(str(error)) from error
    return state, num_bytes(sent)


def _statistic(kind: str, arrays: ArrayRecord, expected: StateDict) -> dict[str, Tensor]:
    wanted = dict[str, Tensor]()
    for name in arrays:
        shape = expected_shape(kind, name, expected)
        if shape is None:
            raise MalformedUpdate(f"the statistic '{kind}' tells of '{name}', which the model has no weights of")
        wanted[name] = torch.empty(shape, device="meta")
    found, _ = read_arrays(arrays, wanted)
    for name, tensor in found.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise MalformedUpdate(f"the statistic '{kind}' of '{name}' is not of finite floating-point numbers")
    return found


def _only(kind: str, found: Mapping[str, T]) -> T:
    if len(found) != 1:
        raise MalformedUpdate(f"expected exactly one {kind} in the reply, got {len(found)}")
    return next(iter(found.values()))


def _num_examples(metrics: MetricRecord, key: str) -> int:
    value = metrics.get(key)
    if is_finite(value) and 1 <= value <= MOST_EXAMPLES and value == int(value):
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
    if is_finite(value):
        return float(value)
    raise MalformedUpdate(f"metric '{name}' is {value!r}, expected a finite number")
