"""A CUDA graph's like on the CPU: the operations that a function calls, done again on the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fedmerge import native, replay
from fedmerge.merge import descent, pair, streamed


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records operations with their tensors and numbers; what they have changed is put back after it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.found: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a result is waited for")
        for value in tree_leaves((args, kwargs or {})):
            if isinstance(value, Tensor) and id(value) not in self.found and 0 not in value.stride():
                self.found[id(value)] = value, value.clone()
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def put_back(self) -> None:
        for value, before in reversed(self.found.values()):
            value.copy_(before)

    @torch.no_grad()
    def play(self) -> None:
        for func, args, kwargs, result in self.calls:
            again = func(*args, **kwargs)
            for place, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(place, Tensor) and place.data_ptr() != new.data_ptr():
                    place.copy_(new)


@contextmanager
def recording(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tape]]:
    """Record steps on the CPU as on a GPU inside the block; yields the tapes."""
    tapes: list[Tape] = []

    def record(function: Callable[[], Sequence[Tensor | None]]) -> tuple[Callable[[], None], Sequence[Tensor | None]]:
        with Tape() as tape:
            results = function()
        with torch.no_grad():
            tape.put_back()
        tapes.append(tape)
        return tape.play, results

    with monkeypatch.context() as patch:
        patch.setattr(replay, "record", record)
        patch.setattr(replay, "aside", lambda function: function())
        for module in (replay, descent):
            patch.setattr(module, "records", lambda model, _: replay.has_no_dropout(model))
        on_device(patch)
        yield tapes


def on_device(patch: pytest.MonkeyPatch) -> None:
    """Let merges take their steps as on a GPU: by PyTorch's operations, and by counts that are tensors."""
    patch.setattr(native, "library", lambda _: None)
    for module in (streamed, pair):
        patch.setattr(module, "first_step", lambda _: torch.zeros((), dtype=torch.float64))
