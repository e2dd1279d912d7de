"""What messages tell: their records, means of their numbers over clients, and what of a merge's they can hold."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TypeGuard, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Record = TypeVar("Record", ArrayRecord, ConfigRecord, MetricRecord)

PARTITION_ID, NUM_PARTITIONS = "partition-id", "num-partitions"
LABEL_COUNTS = "label-counts"
EPSILON, DELTA, COUNT_EPSILON = PRIVACY = "epsilon", "delta", "label-count-epsilon"
"""What clients tell of their privacy: ε and δ of their models of all rounds so far, and ε of their label counts."""


def records(content: RecordDict, kind: type[Record]) -> dict[str, Record]:
    """Return a message's records of a kind by name, without the checks of each that Flower's own views make.

    Args:
        content: of the message.
        kind: ArrayRecord, ConfigRecord or MetricRecord.
    """
    return {name: record for name, record in content.items() if isinstance(record, kind)}


def sender(content: RecordDict, node_id: int) -> str:
    """Return how to name the sender of a reply that may hold anything.

    Args:
        content: of the reply.
        node_id: Flower's.
    """
    told = [record[PARTITION_ID] for record in records(content, MetricRecord).values() if PARTITION_ID in record]
    return f"client {told[0]} (node {node_id})" if told else f"node {node_id}"


def average_metrics(contents: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """Return the weighted means of the clients' scalar metrics, each over the clients that report a finite number.

    A mean of ε would be nobody's: these are left out.

    Args:
        contents: of the replies.
        weighted_by_key: the metric that is the weight.
    """
    told = [record for content in contents for record in records(content, MetricRecord).values()]
    means = MetricRecord()
    others = {weighted_by_key, PARTITION_ID, LABEL_COUNTS, *PRIVACY}
    for name in sorted({name for record in told for name in record} - others):
        pairs = [
            (float(value), float(weight))
            for record in told
            if is_finite(value := record.get(name))
            if is_finite(weight := record.get(weighted_by_key)) and weight > 0
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
        elif is_finite(value) and not isinstance(value, bool):
            found[prefix + name] = value
    return found


def is_finite(value: object) -> TypeGuard[int | float]:
    """Return whether a value is a number that a float can hold, whole numbers of any size included."""
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max
