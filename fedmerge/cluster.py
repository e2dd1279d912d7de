"""Ray: started on this machine or joined where it runs, and how many actors it has room for."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fedmerge.machine import num_cores
from fedmerge.settings import ConfigurationError

LONGEST_REASON = 600

RAY_SETTINGS = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_enable_metrics_collection": "0",
}
"""No reports over the network, no metrics, no environment made by uv; the user's own settings go before these."""


@dataclass(frozen=True)
class Resources:
    """What an actor takes, and the cluster that has it.

    Attributes:
        cpus: of an actor, more than 0.
        gpus: of an actor; a fraction shares one.
        address: of a running Ray cluster; empty: start Ray on this machine, if this process has not.
        num_cpus: of a Ray that is started here; None: the cores that this process may use.
        num_gpus: of a Ray that is started here, logical ones; None: the machine's.
    """

    cpus: float = 1.0
    gpus: float = 0.0
    address: str = ""
    num_cpus: int | None = None
    num_gpus: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("--client-cpus", self.cpus), ("--client-gpus", self.gpus)):
            if value > 1 and value != int(value):
                raise ConfigurationError(f"{name} must be a whole number where it is more than 1, got {value:g}")


def running_ray(resources: Resources) -> tuple[Any, bool]:
    """Return Ray, running, and whether it was started, or connected to, here.

    Args:
        resources: where from.

    Raises:
        ConfigurationError: if there is no cluster at the address.
    """
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        return ray, False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if not resources.address:
        num_cpus = resources.num_cpus or num_cores()
        ray.init(num_cpus=num_cpus, num_gpus=resources.num_gpus, include_dashboard=False, **options)
        return ray, True
    try:
        ray.init(address=resources.address, **options)
    except (ConnectionError, ValueError) as error:
        reason = shorten(str(error))
        raise ConfigurationError(f"--ray-address {resources.address}: no Ray cluster is there: {reason}") from error
    return ray, True


def room(resources: Resources, nodes: Sequence[dict[str, Any]]) -> int:
    """Return how many actors fit on the cluster's machines.

    Args:
        resources: of an actor.
        nodes: what Ray tells of its machines.

    Raises:
        ConfigurationError: if there is room for none.
    """
    tolerance = 1e-9
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    total = 0
    for machine in alive:
        fits = [machine.get("CPU", 0) / resources.cpus]
        if resources.gpus:
            fits.append(machine.get("GPU", 0) / resources.gpus)
        total += int(min(fits) + tolerance)
    if total == 0:
        have = " and ".join(f"{sum(machine.get(kind, 0) for machine in alive):g} {kind}s" for kind in ("CPU", "GPU"))
        raise ConfigurationError(
            f"no client can run: --client-cpus {resources.cpus:g} and --client-gpus {resources.gpus:g} fit on none of "
            f"the Ray cluster's {len(alive)} machines, which have {have}; ask for less"
        )
    return total


def shorten(text: str) -> str:
    """Return a text of many lines, as Ray's errors are, as one line of bearable length."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else line[: LONGEST_REASON - 1] + "…"
