"""Models that are built once for a process and lent again and again: a client's work must not begin with building one.

A lent model has the weights of whoever had it before; all that a state dict does not hold is as in a new one. A user's
own model (`package.module:function`) may keep what cannot be put back, and is built anew each time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fedmerge import models, parts
from fedmerge.architectures import Shape

MOST = 4
"""Models that are kept."""

Kept = tuple[nn.Module, dict[str, Tensor]]

_kept: dict[tuple[object, ...], Kept | tuple[()]] = {}


@contextmanager
def lent(name: str, *, shape: Shape, num_classes: int, device: torch.device | str = "cpu") -> Iterator[nn.Module]:
    """Lend a model of an architecture, in evaluation mode; what it computes is up to the weights that it is given.

    Args:
        name: as in `fedmerge.models.create`.
        shape: (channels, height, width) of an image.
        num_classes: outputs of the model.
        device: where it is.
    """
    place = name, tuple(shape), num_classes, str(device)
    model, buffers = _kept.pop(place, ()) or _built(name, shape, num_classes, device)  # no one else has it now
    yield model  # after an exception it is not taken back
    if ":" not in name:
        _restore(model, buffers)
        while len(_kept) >= MOST:
            _kept.pop(next(iter(_kept)))
        _kept[place] = model, buffers


def _built(name: str, shape: Shape, num_classes: int, device: torch.device | str) -> Kept:
    model = models.create(name, shape=shape, num_classes=num_classes, seed=0).to(device)
    if ":" not in name:
        parts.seal(model)
    stored = model.state_dict()
    return model, {key: buffer.clone() for key, buffer in model.named_buffers() if key not in stored}


def _restore(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Undo what training and freezing leave behind beside the weights."""
    parts.train(model, False)
    for parameter in parts.parameters(model):
        if not parameter.requires_grad:
            parameter.requires_grad_(True)
        parameter.grad = None
    for name, buffer in model.named_buffers() if buffers else ():
        if name in buffers:
            buffer.copy_(buffers[name])
