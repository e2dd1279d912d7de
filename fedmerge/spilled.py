"""State dicts that lie in files instead of memory: what is only read again need not be held (`--low-memory`).

The files are temporary, in the folder that TMPDIR names, which should be on a disk: the system reads their pages when
they are needed, and may drop them. They have no name any more once they are mapped, and go with the last tensor.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from fedmerge.state import StateDict

LEAST_BYTES = 1 << 16
"""Smaller tensors are copied: a mapped file takes whole pages."""


def spilled(state: StateDict) -> dict[str, Tensor]:
    """Return a state dict whose large tensors are read from files; on a GPU, which files cannot be, it is a copy.

    Args:
        state: the tensors, which are written one after the other.

    Example:
        >>> torch.equal(spilled({"w": torch.arange(1e5)})["w"], torch.arange(1e5))
        True
    """
    with tempfile.TemporaryDirectory(prefix="fedmerge-") as folder:
        return {
            name: _mapped(tensor.detach(), Path(folder, str(place)))
            for place, (name, tensor) in enumerate(state.items())
        }


def _mapped(tensor: Tensor, path: Path) -> Tensor:
    if tensor.device.type != "cpu" or tensor.numel() * tensor.element_size() < LEAST_BYTES:
        return tensor.clone()
    tensor.contiguous().view(-1).view(torch.uint8).numpy().tofile(path)
    found = torch.from_file(str(path), shared=False, size=tensor.numel(), dtype=tensor.dtype)
    return found.view(tensor.shape)
