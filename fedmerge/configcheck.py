"""What settings of a federation cannot be, alone or together: each is refused by its flag, with what was expected."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fedmerge.catalogue import AUGMENTATIONS, SCREENS, STATISTICS
from fedmerge.devices import parse_devices
from fedmerge.settings import ConfigurationError, flag, known

if TYPE_CHECKING:
    from fedmerge.config import Config

INITIALISATIONS = ("independent", "shared")
SPLITS = ("test", "development")
UPLOAD_DTYPES = ("float32", "float16")
SCHEDULES = ("cosine", "linear")
CHOICES = {
    "init": INITIALISATIONS,
    "split": SPLITS,
    "upload_dtype": UPLOAD_DTYPES,
    "lr_schedule": SCHEDULES,
    "augment": AUGMENTATIONS,
    "screen": SCREENS,
}
"""What a setting may be, where it is one of a few words."""


def check(config: Config) -> None:
    """Refuse a configuration that cannot be, by a ConfigurationError."""
    for name, allowed in CHOICES.items():
        known(flag(name), getattr(config, name), allowed)
    for kind in config.client_statistics.split("/") if config.client_statistics else ():
        known(flag("client_statistics"), kind, STATISTICS)
    for name in ("clients", "batch_size", "rounds", "min_completed"):
        _require(config, name, getattr(config, name) >= 1, "at least 1")
    for name in (
        "client_examples",
        "server_examples",
        "threads",
        "min_client_examples",
        "batched_clients",
        "clients_per_round",
    ):
        _require(config, name, getattr(config, name) >= 0, "at least 0")
    for name in ("client_gpus", "weight_decay", "proximal_mu", "dp_clip", "dp_noise", "label_count_noise"):
        _require(config, name, 0 <= getattr(config, name) < math.inf, "at least 0 and finite")
    for name in ("alpha", "lr", "client_cpus", "timeout"):
        _require(config, name, 0 < getattr(config, name) < math.inf, "greater than 0 and finite")
    _require(config, "momentum", 0 <= config.momentum < 1, "in [0, 1)")
    _require(config, "dp_delta", 0 <= config.dp_delta < 1, "in [0, 1)")
    _check_privacy(config)
    _require(config, "server_labels", config.server_labels >= -1, "at least 0, or -1 for all")
    _require(config, "server_limit", config.server_limit == -1 or config.server_limit >= 1, "at least 1, or -1 for all")
    budgets = ("server_labels", "owns", "server_examples"), ("server_limit", "owns", "server_examples")
    limits = (("server_labels", "uses", "server_limit"),) if config.server_limit > 0 else ()
    for name, verb, of in (*budgets, *limits):
        if getattr(config, name) > getattr(config, of):
            raise ConfigurationError(
                f"{flag(name)} is {getattr(config, name)}, but the server {verb} only {getattr(config, of)} images "
                f"({flag(of)})"
            )
    for name, most in (("clients_per_round", "clients"), ("min_completed", "clients"), ("min_completed", "asked")):
        value, limit = getattr(config, name), getattr(config, most)
        if value > limit:
            what = "clients (--clients)" if most == "clients" else "of them in a round (--clients-per-round)"
            raise ConfigurationError(f"{flag(name)} is {value}, but there are only {limit} {what}")
    parse_devices(config.devices, config.clients if config.devices else 0)
    if config.models and len(config.client_models) != config.clients:
        raise ConfigurationError(
            f"--models {config.models} has {len(config.client_models)} clients, and --clients is {config.clients}: "
            "make them equal"
        )
    if config.devices and config.init != "shared" and any(device.layers for device in config.client_devices):
        raise ConfigurationError(
            f"--devices {config.devices}: layers=N leaves a client's other layers at the start that all share: give "
            "--init shared"
        )
    if config.anchor and (config.models or "layers" in config.devices):
        raise ConfigurationError(
            "--anchor renames the units of whole models of one architecture: leave out --models, and layers=N of "
            "--devices"
        )
    low, high = config.epochs_range
    _require(config, "local_epochs", 1 <= low <= high, "N or LOW..HIGH with 1 ≤ LOW ≤ HIGH")
    _require(config, "warmup", 0 <= config.warmup < 1, "in [0, 1)")


def _check_privacy(config: Config) -> None:
    """Refuse what would leave the clients without the privacy that they are to have."""
    if config.dp_noise and not config.dp_clip:
        raise ConfigurationError(f"--dp-noise {config.dp_noise} is in units of --dp-clip: give that too, as 1")
    if config.dp_noise and config.statistics:
        raise ConfigurationError(
            f"{' and '.join(config.statistics)}: statistics of the clients' images have no noise, and would undo "
            "--dp-noise: use a method that needs none"
        )


def _require(config: Config, name: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ConfigurationError(f"{flag(name)} must be {expected}, got {getattr(config, name)!r}")
