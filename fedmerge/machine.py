"""What a process computes with: device, CPU threads, versions, and algorithms that give the same bits again."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib import metadata
from typing import Any

import torch
import torch.utils.deterministic

from fedmerge.memory import hold_memory
from fedmerge.settings import ConfigurationError

WORKSPACE = ":4096:8"
"""cuBLAS's scratch memory, fixed in size, without which its products are not the same again."""
VERSIONED = ("fedmerge", "torch", "torchvision", "flwr", "ray", "numpy", "scipy")


def num_cores() -> int:
    """Return how many cores this process may use, which in a container or under `taskset` is not all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def versions() -> dict[str, str]:
    """Return the versions that a run's numbers depend on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in VERSIONED:
        loaded = getattr(sys.modules.get(name), "__version__", None)  # tells torch's builds apart
        try:
            found[name] = str(loaded or metadata.version(name))
        except metadata.PackageNotFoundError:  # the app's bundle runs without an installed fedmerge
            found[name] = "unknown"
    return found | {"threads": str(torch.get_num_threads())}


def choose_device(name: str) -> torch.device:
    """Return the device of the setting `device`; "auto" is CUDA where this process has one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigurationError: if it is none of these, or CUDA is asked for where there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"--device must be cpu, cuda, cuda:N or auto, got '{name}'") from error
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(f"--device {name}: this process sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` CPU threads inside the block (0: as many as there are cores), then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or num_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def reproducible(threads: int = 1) -> Iterator[None]:
    """Compute so that the same seed gives the same bits again, on CPUs and on CUDA, and `hold_memory`.

    On CUDA torch takes deterministic algorithms where it has them, and warns of an operation that has none. The
    precision of products (TF32) is torch's own setting, and stays as it is.

    Args:
        threads: CPU threads (0: as many as there are cores).
    """
    hold_memory()
    with num_threads(threads), _deterministic() if torch.cuda.is_available() else nullcontext():
        yield


@contextmanager
def _deterministic() -> Iterator[None]:
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", WORKSPACE)
    was, warned = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    setting: Any = torch.utils.deterministic
    filled = setting.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    setting.fill_uninitialized_memory = False  # it costs, and nothing here reads what it did not write
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was, warn_only=warned)
        setting.fill_uninitialized_memory = filled
