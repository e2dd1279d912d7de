"""Updates as safetensors files, and back: what is read may have been damaged, or written by anybody.

A file holds the state dict; its header's entry `fedmerge` holds the rest of an `Update` as JSON. Nothing is unpickled,
and sizes that a header tells are compared with the file's before memory is spent on them (safetensors does).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fedmerge.problem import Update
from fedmerge.state import MalformedState, read_checkpoint, serialize

ENTRY = "fedmerge"


def update_to_bytes(update: Update) -> bytes:
    """Return an update as a safetensors file's bytes.

    Args:
        update: the update, on any device.
    """
    about = {
        "partition-id": update.partition_id,
        "num-examples": update.num_examples,
        "label-counts": update.label_counts,
        "metrics": dict(update.metrics),
        "num-bytes": update.num_bytes,
        **({"model": update.model} if update.model else {}),
        **({"layers": update.layers} if update.layers else {}),
    }
    return serialize(update.state, {ENTRY: json.dumps(about)})


def read_update(path: Path) -> Update:
    """Read an update from its file.

    Args:
        path: the file.

    Raises:
        MalformedState: if it is not readable, or lacks what is known of the client's data.
    """
    state, header = read_checkpoint(path)
    about = described(path, header)
    missing = [name for name in ("partition-id", "num-examples") if name not in about]
    if missing:
        raise MalformedState(f"{path} is no client's update: its header's '{ENTRY}' lacks {' and '.join(missing)}")
    counts = about.get("label-counts")
    return Update(
        state=state,
        num_examples=about["num-examples"],
        partition_id=about["partition-id"],
        label_counts=None if counts is None else tuple(counts),
        metrics=about.get("metrics", {}),
        num_bytes=about.get("num-bytes", 0),
        model=about.get("model", ""),
        layers=about.get("layers", 0),
    )


def described(path: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Return what a checkpoint's header tells of the client and its data, by the names of `update_to_bytes`.

    Args:
        path: the file, for the error.
        header: the file's metadata; one without our entry, as other tools write it, tells nothing.

    Raises:
        MalformedState: if the entry is not what `update_to_bytes` writes.
    """
    try:
        about = json.loads(header.get(ENTRY, "{}"))
    except (ValueError, RecursionError) as error:
        raise MalformedState(f"{path}: its header's '{ENTRY}' is not JSON: {error}") from error
    if not isinstance(about, dict):
        raise MalformedState(f"{path}: its header's '{ENTRY}' is not an object")
    expected: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "partition-id": ("a whole number from 0", _is_count),
        "num-examples": ("a whole number from 1", lambda value: _is_count(value) and value > 0),
        "num-bytes": ("a whole number from 0", _is_count),
        "model": ("a name", lambda value: isinstance(value, str)),
        "layers": ("a whole number from 0", _is_count),
        "label-counts": (
            "whole numbers from 0, or null",
            lambda value: value is None or (isinstance(value, list) and all(map(_is_count, value))),
        ),
        "metrics": (
            "finite numbers by name",
            lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
        ),
    }
    for name, (text, holds) in expected.items():
        if name in about and not holds(about[name]):
            raise MalformedState(f"{path}: its header has {name} {about[name]!r:.60}, expected {text}")
    return about


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**64


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(float(str(value)))
