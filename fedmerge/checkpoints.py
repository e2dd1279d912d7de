"""Checkpoints that were trained elsewhere, as updates: safetensors files, and what is known of their data."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from fedmerge import federation, federation_models
from fedmerge.config import Config
from fedmerge.problem import Update
from fedmerge.settings import ConfigurationError
from fedmerge.state import MalformedState, StateDict, conform, num_bytes, read_checkpoint
from fedmerge.updatefiles import described


def checkpoint_config(config: Config, count: int) -> Config:
    """Return the configuration of merging checkpoints: only the server's images matter.

    Args:
        config: the architecture, and the data that the server's images are drawn from.
        count: number of checkpoints.
    """
    return config.replace(clients=count, partition="iid", client_examples=0, min_completed=count, init="independent")


def read_checkpoints(
    config: Config, paths: Sequence[Path], label_counts: Mapping[str, Sequence[int]] | None = None
) -> list[Update]:
    """Read safetensors files that were trained elsewhere.

    Args:
        config: from `checkpoint_config`.
        paths: the files, one a client, in the clients' order.
        label_counts: images of each class by file name, or None.

    Raises:
        MalformedState: if a file does not fit the model.
    """
    examples = federation.load(config)
    known = {
        config.model: federation_models.of_server(config, examples),
        **federation_models.of_others(config, examples),
    }
    return [
        _checkpoint(
            path,
            place,
            "" if name == config.model else name,
            known[name].state_dict(),
            label_counts,
            len(examples.classes),
        )
        for place, (path, name) in enumerate(zip(paths, config.client_models, strict=True))
    ]


def read_label_counts(path: Path) -> dict[str, list[int]]:
    """Read images of each class by checkpoint file name from a JSON file.

    Args:
        path: an object {"site-a.safetensors": [12, 0, …], …}.

    Raises:
        ConfigurationError: if it is anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--label-counts {path}: cannot be read as JSON: {error}") from error
    valid = isinstance(found, dict) and all(
        isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
        for counts in found.values()
    )
    if not valid:
        raise ConfigurationError(
            f'--label-counts {path}: expected an object {{"FILE NAME": [images of class 0, of class 1, …], …}}'
        )
    return dict(found)


def _checkpoint(
    path: Path,
    partition_id: int,
    model: str,
    expected: StateDict,
    label_counts: Mapping[str, Sequence[int]] | None,
    num_classes: int,
) -> Update:
    state, header = read_checkpoint(path)
    try:
        state = conform(state, expected)
    except MalformedState as error:
        raise MalformedState(
            f"{path}: {error}; is {_asked(model)} the architecture that it was trained with?"
        ) from error
    about = described(path, header)
    counts = about.get("label-counts") if label_counts is None else label_counts.get(path.name)
    if label_counts is not None and (counts is None or len(counts) != num_classes or not sum(counts)):
        raise ConfigurationError(
            f"--label-counts: expected {num_classes} counts for '{path.name}', not all 0, got {counts}"
        )
    return Update(
        state=state,
        num_examples=sum(counts) if counts else about.get("num-examples", 1),
        partition_id=partition_id,
        label_counts=tuple(counts) if counts else None,
        metrics=about.get("metrics", {}),
        num_bytes=num_bytes(state),
        model=model,
    )


def _asked(model: str) -> str:
    return f"'{model}' of --models" if model else "--model"
