"""What a process computes with: its device, its CPU threads, and algorithms that give the same bits again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fedmerge.settings import ConfigurationError


def choose_device(name: str) -> torch.device:
    """Return the device of the setting `device`; "auto" is CUDA where this process has one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigurationError: if it is none of these, or CUDA is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"--device must be cpu, cuda, cuda:N or auto, got '{name}'") from error
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(f"--device {name}: this process sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` CPU threads inside the block (0: as many as there are cores), then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def reproducible() -> Iterator[None]:
    """Compute with one CPU thread and, on CUDA, with cuDNN's deterministic algorithms."""
    with num_threads(1), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield
