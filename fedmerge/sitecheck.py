"""A site's dry run before it joins: do its data, classes, images, model and versions fit? Nothing is sent."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedmerge import data
from fedmerge.client import train_client
from fedmerge.config import Config
from fedmerge.errors import FedmergeError
from fedmerge.federation import Federation
from fedmerge.machine import versions
from fedmerge.settings import ConfigurationError
from fedmerge.sitedata import ImageFormat, federation_of, read
from fedmerge.tables import clean, size
from fedmerge.wire import num_array_bytes, update_to_records

VERSIONS = ("flwr", "fedmerge", "torch")


def describe(config: Config) -> dict[str, Any]:
    """Return what sites need to know of a federation, in JSON's types: its images' format, and the server's versions.

    Args:
        config: its data set's files must be here.
    """
    found = versions()
    told = ImageFormat.of(data.load(config.data, config.data_dir)).to_mapping()
    return told | {"versions": {name: found[name] for name in VERSIONS}}


def check(config: Config, place: str, described: Path | None = None) -> dict[str, Any]:
    """Check that a site can take part: read all of its data, and train one batch as a client does.

    Args:
        config: the federation's configuration.
        place: the site's data, as `fedmerge.sitedata.read` takes it.
        described: JSON file of what `describe` gave at the server; None: the federation's data set is on this machine.

    Returns:
        What was found, in JSON's types. Losses in nats, sizes in bytes.

    Raises:
        ConfigurationError: at the first thing that does not fit.
    """
    told = describe(config) if described is None else _read(described)
    wanted = ImageFormat.from_mapping(told)
    if wanted is None:
        raise ConfigurationError(f"{described} tells no format of images: make it with check-client --describe")
    found, server = versions(), told.get("versions", {})
    if not isinstance(server, dict):
        raise ConfigurationError(f"{described}: expected versions by the names of packages, got {server!r}")
    theirs = server.get("flwr", found["flwr"])
    if theirs != found["flwr"]:
        raise ConfigurationError(
            f"expected the server's version of flwr, {theirs}, got {found['flwr']}: pip install 'flwr=={theirs}'"
        )
    own = read(place, wanted)
    loss, bytes_up = _train_one_batch(config, federation_of(own[: config.batch_size], wanted, 0, config.clients))
    counts = own.labels.bincount(minlength=len(wanted.classes)).tolist()
    return {
        "data": place,
        "images": len(own),
        "shape": list(wanted.shape),
        "label_counts": dict(zip(wanted.classes, counts, strict=True)),
        "model": config.model,
        "batch": min(config.batch_size, len(own)),
        "loss": loss,
        "bytes_up": bytes_up,
        "versions": {name: found[name] for name in VERSIONS},
        "versions_compared": "flwr" in server and described is not None,
    }


def report(found: Mapping[str, Any]) -> str:
    """Return what `check` found, in a few lines for people."""
    counts = found["label_counts"]
    there = ", ".join(f"{name} {count}" for name, count in counts.items() if count)
    absent = ", ".join(name for name, count in counts.items() if not count)
    versions_text = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    compared = "flwr is the server's" if found["versions_compared"] else "compare flwr with the server's"
    lines = (
        f"data      {found['data']}: {found['images']} images of {'x'.join(map(str, found['shape']))}",
        f"classes   {there}{f'; none of {absent}' if absent else ''}",
        f"model     {found['model']}: loss {found['loss']:.3f} nats after a step on {found['batch']} images",
        f"upload    {size(found['bytes_up'])} a round",
        f"versions  {versions_text}; {compared}",
        "This site fits the federation. Nothing was sent.",
    )
    return "\n".join(map(clean, lines))


def _train_one_batch(config: Config, batch: Federation) -> tuple[float, int]:
    """Return the loss after a step on one batch, and the bytes that a client would send."""
    try:
        trained = config.replace(local_epochs="1", init="independent", dp_noise=0.0)  # a loss without noise, for here
        update = train_client(trained, batch, 0, 1, None)
    except FedmergeError:
        raise
    except (RuntimeError, ValueError) as error:
        raise ConfigurationError(
            f"--model {config.model} cannot be trained on a batch of {len(batch.pool)} of these images: {error}"
        ) from error
    loss = update.metrics["loss"]
    if not math.isfinite(loss):
        raise ConfigurationError(f"after a step the loss is {loss}: lower --lr (it is {config.lr})")
    return loss, num_array_bytes(update_to_records(update, upload_dtype=config.upload_dtype))


def _read(path: Path) -> dict[str, Any]:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise ConfigurationError(f"{path} is not JSON: {error}") from error
    if not isinstance(told, dict):
        raise ConfigurationError(f"{path}: expected what check-client --describe printed, got {type(told).__name__}")
    return told
