"""The side of an actor's process: the object that it holds, and how tensors and failures come and go."""

from __future__ import annotations

import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.cluster import shorten


@dataclass(frozen=True)
class Failure:
    """A task that has no result.

    Attributes:
        reason: what happened, in one line.
        crashed: whether the actor's process died of it; otherwise the task raised.
    """

    reason: str
    crashed: bool


def tensor_from_shared_memory(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor that reads an array of Ray's object store in place; nobody may write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return a tensor as the array that the object store takes."""
    return tensor.detach().cpu().contiguous().numpy()


def actor_class() -> type:
    """Return the actors' class, which travels as code: it sets where imports come from before anything is imported."""

    class Actor:
        def __init__(self, import_path: list[str]) -> None:
            import sys

            os.environ["OMP_NUM_THREADS"] = "1"
            sys.path[:] = import_path + [place for place in sys.path if place not in import_path]
            self.held: Any = None

        def build(self, target: str, *arguments: object) -> None:
            import gc
            import importlib

            module, _, name = target.partition(":")
            made = getattr(importlib.import_module(module), name)
            if self.held is None:
                gc.freeze()  # the modules: each collection would look at all of their objects
            self.held = made(*arguments)

        def answer(self, tasks: list[tuple[object, ...]], *shared: object) -> tuple[float, list[object]]:
            from time import perf_counter

            from fedmerge.actorside import failed

            began, results = perf_counter(), []
            for arguments in tasks:
                try:
                    results.append(self.held.answer(*arguments, *shared))
                except Exception as error:
                    results.append(failed(error))
            return perf_counter() - began, results

    return Actor


def import_path() -> list[str]:
    """Return where this process imports from, in absolute paths."""
    return [str(Path(place).resolve()) for place in sys.path]


def failed(error: Exception) -> Failure:
    """Return the failure of a task that raised."""
    return Failure(shorten(f"{type(error).__name__}: {error}"), crashed=False)
