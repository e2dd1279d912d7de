"""Memory of a merge: what it takes is measured, and what it cannot have is refused before it is begun.

On a GPU it is the device's memory, as torch holds it. On CPUs only anonymous memory counts (RssAnon): models that are
mapped from files are not in it, since the system can let go of their pages. Where the system does not tell (it does on
Linux), nothing is measured or refused.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from pathlib import Path

import torch

from fedmerge.errors import FedmergeError

STATUS = Path("/proc/self/status")
SYSTEM = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
INTERVAL = 0.02
"""Seconds between two measurements."""

MAPPED, HELD = 1 << 25, 1 << 27
"""Bytes from which a block is mapped alone (the most that glibc comes to by itself), and of freed memory to hold."""
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3

CPU = torch.device("cpu")
ADVICE = (
    "give --low-memory, which keeps in files what is only read, or merge on a larger machine; where a GPU is too "
    "small, on the CPU (--device cpu)"
)


class TooLarge(FedmergeError, RuntimeError):
    """A merge that needs more memory than there is."""


@functools.cache
def hold_memory() -> None:
    """Let this process keep freed memory, `HELD` at most, for what it allocates next.

    glibc gives it back where more than a batch's activations become free, and gets it again, page by page, for the next
    batch. Of other C libraries nothing is asked. It stays so until the process ends.
    """
    if library := _glibc():
        library.mallopt(M_MMAP_THRESHOLD, MAPPED)
        library.mallopt(M_TRIM_THRESHOLD, HELD)


def _glibc() -> ctypes.CDLL | None:
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def anonymous() -> int | None:
    """Return this process's anonymous memory in bytes; None where it is not told."""
    return _entry(STATUS, "RssAnon")


def available(device: torch.device = CPU) -> int | None:
    """Return how many bytes this process can still have; None where it is not told.

    Args:
        device: whose memory: a GPU's, or that of the system for any other.
    """
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    free = _entry(SYSTEM, "MemAvailable")
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or no limit
        return free
    return limit - used if free is None else min(free, limit - used)


def require(needed: int, purpose: str, advice: str, device: torch.device = CPU) -> None:
    """Raise unless as much memory is available.

    Args:
        needed: bytes.
        purpose: what for, with the numbers that make it up.
        advice: what to do if there is not as much.
        device: where.

    Raises:
        TooLarge: says what is needed, and what there is.
    """
    free = available(device)
    if free is not None and needed > free:
        where = f" on {device}" if device.type == "cuda" else ""
        raise TooLarge(
            f"{purpose} needs at least {_gigabytes(needed)} of memory{where}, and {_gigabytes(free)} are available: "
            f"{advice}"
        )


class Peak:
    """The growth of memory inside a block, at its highest: a GPU's tensors, or this process's anonymous memory.

    What was freed before the block, and is still held, is given back first: what is in use counts.

    Args:
        device: whose memory.

    Attributes:
        bytes: the growth; None where it is not told.
    """

    def __init__(self, device: torch.device = CPU) -> None:
        self.bytes: int | None = None
        self._device = device
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        elif library := _glibc():
            library.malloc_trim(0)
        self._before = torch.cuda.memory_allocated(self._device) if self._device.type == "cuda" else anonymous()
        if self._before is not None and self._device.type != "cuda":
            self.bytes = 0
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self.bytes = torch.cuda.max_memory_allocated(self._device) - (self._before or 0)
            return
        self._done.set()
        if self._before is not None:
            self._thread.join()
            self._look()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        now = anonymous()
        if now is not None and self._before is not None:
            self.bytes = max(self.bytes or 0, now - self._before)


def foreseen(size: int, states: int, purpose: str, device: torch.device = CPU) -> Peak:
    """Return what measures a piece of work, or refuse it.

    Args:
        size: bytes of the model that it works on.
        states: how many states of the model's size it holds, at least.
        purpose: what it is.
        device: where the states are held.

    Raises:
        TooLarge: if there is not as much memory.
    """
    require(states * size, f"{purpose} of {size / 1e6:.0f} MB, which holds {states} such states,", ADVICE, device)
    return Peak(device)


def _entry(path: Path, name: str) -> int | None:
    """Return an entry of a file of the system, in bytes; it tells them in kB."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
