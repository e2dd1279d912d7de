"""Randomness from one seed and a path.

Every random number of a run comes from `generator(seed, "client", 3, "shuffle")`: a stream that depends on the run's
seed and on what it is for, and on nothing else: not on the process, the order of calls or the number of actors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derive(seed: int, *path: str | int) -> int:
    """Return the 63-bit seed of the stream named by `path` under `seed`.

    Args:
        seed: the run's seed, any integer.
        path: what the stream is for, from the general to the particular.

    Example:
        >>> derive(0, "client", 3) == derive(0, "client", 3)
        True
        >>> derive(0, "client", 3) == derive(0, "client", 4)
        False
    """
    digest = hashlib.sha256(repr((int(seed), *path)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(seed: int, *path: str | int) -> torch.Generator:
    """Return a CPU generator for the stream named by `path` under `seed` (see `derive`)."""
    return torch.Generator().manual_seed(derive(seed, *path))


def fork(generator: torch.Generator) -> int:
    """Draw from `generator` the seed of a stream of its own."""
    return int(torch.randint(2**62, (), generator=generator))


@contextmanager
def default_generator(seed: int, device: torch.device | str = "cpu") -> Iterator[None]:
    """Seed torch's default generators inside the block, and put them back as they were.

    Dropout and the layers' own initialisation know no other source of randomness.

    Args:
        seed: of the block.
        device: where the block draws, beside the CPU; other devices' generators are left alone.
    """
    device = torch.device(device)
    if device.type == "cuda":
        with torch.random.fork_rng([device]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would also seed GPUs that are not put back
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
            yield
        return
    before = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(before)
