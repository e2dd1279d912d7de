"""Memory of a merge: what it takes is measured, and what it cannot have is refused before it is begun.

Only anonymous memory counts (RssAnon): models that are mapped from files are not in it, since the system can let go of
their pages. Where the system does not tell (it does on Linux), nothing is measured or refused.
"""

from __future__ import annotations

import threading
from pathlib import Path

from fedmerge.errors import FedmergeError
from fedmerge.state import StateDict, num_bytes

STATUS = Path("/proc/self/status")
SYSTEM = Path("/proc/meminfo")
GROUP = Path("/sys/fs/cgroup")
INTERVAL = 0.02
"""Seconds between two measurements."""


class TooLarge(FedmergeError, RuntimeError):
    """A merge that needs more memory than there is."""


def anonymous() -> int | None:
    """Return this process's anonymous memory in bytes; None where it is not told."""
    return _entry(STATUS, "RssAnon")


def available() -> int | None:
    """Return how many bytes this process can still have; None where it is not told."""
    free = _entry(SYSTEM, "MemAvailable")
    try:
        limit, used = (int((GROUP / name).read_text()) for name in ("memory.max", "memory.current"))
    except (OSError, ValueError):  # no group, or no limit
        return free
    return limit - used if free is None else min(free, limit - used)


def require(needed: int, purpose: str, advice: str) -> None:
    """Raise unless as much memory is available.

    Args:
        needed: bytes.
        purpose: what for, with the numbers that make it up.
        advice: what to do if there is not as much.

    Raises:
        TooLarge: says what is needed, and what there is.
    """
    free = available()
    if free is not None and needed > free:
        raise TooLarge(
            f"{purpose} needs at least {_gigabytes(needed)} of memory, and {_gigabytes(free)} are available: {advice}"
        )


class Peak:
    """The growth of this process's anonymous memory inside a block, at its highest.

    Attributes:
        bytes: the growth; None where it is not told.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Peak:
        self._before = anonymous()
        if self._before is not None:
            self.bytes = 0
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
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


def foreseen(model: StateDict, states: int, purpose: str) -> Peak:
    """Return what measures a piece of work, or refuse it.

    Args:
        model: what it works on; only on CPUs is anything refused.
        states: how many states of the model's size it holds, at least.
        purpose: what it is.

    Raises:
        TooLarge: if there is not as much memory.
    """
    size = num_bytes(model)
    if all(tensor.device.type == "cpu" for tensor in model.values()):
        advice = "give --low-memory, which keeps in files what is only read, or merge on a larger machine"
        require(states * size, f"{purpose} of {size / 1e6:.0f} MB, which holds {states} such states,", advice)
    return Peak()


def _entry(path: Path, name: str) -> int | None:
    """Return an entry of a file of the system, in bytes; it tells them in kB."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB"
