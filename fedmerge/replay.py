"""Steps that a GPU is told once, and then repeats: CUDA graphs.

A training step of a small model is dozens of kernels of a few microseconds, which a GPU does sooner than they can be
launched. Recorded as one graph, a step is one launch; its kernels are the same, and so are its numbers.

Only what the kernels read from memory may differ between steps: the inputs, which are copied to where the recorded ones
lie, and tensors that stay where they are (weights, statistics, moments, a count of steps). A model that drops out draws
other numbers in each step, and is never recorded. What cannot be recorded, since it waits for a result or is decided by
one, is launched step by step as ever.

It is off but where the environment says FEDMERGE_GRAPHS=1. A module of the user's whose `forward` takes its branches
by numbers of Python's own, other ones in each step, must not be recorded: nothing would notice.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

logger = logging.getLogger(__name__)

SWITCH = "FEDMERGE_GRAPHS"
WARM_UP = 3
"""Steps before one is recorded: libraries choose their algorithms and take their memory in the first."""

MOST = 2
"""Kinds of steps, by the shapes of their inputs, that are recorded: each holds its own activations."""

Step = Callable[..., Sequence[Tensor | None]]
"""A function of tensors."""

Launch = Callable[[], None]
"""Does again what was recorded."""


def record(function: Callable[[], Sequence[Tensor | None]]) -> tuple[Launch, Sequence[Tensor | None]]:
    """Return what does a function's work on the GPU, which is not done now, and where its results will lie.

    Args:
        function: works on tensors of a GPU, and waits for none of its results.
    """
    graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = function()
    finally:
        torch.cuda.set_stream(here)  # torch leaves another one behind, where it could not record
    return graph.replay, results


def aside(function: Callable[[], Sequence[Tensor | None]]) -> Sequence[Tensor | None]:
    """Do a function's work on a stream of its own, as CUDA asks for before it is recorded, and return its results."""
    here, side = torch.cuda.current_stream(), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        results = function()
    here.wait_stream(side)
    return results


@dataclass
class _Kind:
    """Steps whose inputs have the same shapes: how many were done, and the recorded one."""

    done: int = 0
    inputs: list[Tensor] = field(default_factory=list)
    results: Sequence[Tensor | None] = ()
    launch: Launch | None = None


class Replay:
    """Calls a function of tensors, or launches what it did when it was recorded.

    Args:
        able: whether steps are to be recorded; otherwise every one is called.
    """

    def __init__(self, able: bool) -> None:
        self.able = able
        self._kinds: dict[object, _Kind] = {}

    def __call__(self, step: Step, *inputs: Tensor) -> Sequence[Tensor | None]:
        """Return what a step returns; the next call may overwrite it.

        Args:
            step: the same in every call, as far as its work is concerned.
            inputs: of the step, left as they are.
        """
        if not self.able:
            return step(*inputs)
        shapes = tuple((given.shape, given.dtype, given.stride()) for given in inputs)
        if shapes not in self._kinds and len(self._kinds) == MOST:
            return step(*inputs)
        kind = self._kinds.setdefault(shapes, _Kind())
        if kind.done < WARM_UP:
            kind.done += 1
            return aside(lambda: step(*inputs))
        if kind.launch is None and not self._recorded(kind, step, inputs):
            return step(*inputs)
        for place, given in zip(kind.inputs, inputs, strict=True):
            place.copy_(given)
        kind.launch()  # type: ignore[misc]
        return kind.results

    def _recorded(self, kind: _Kind, step: Step, inputs: Sequence[Tensor]) -> bool:
        """Record a step of a kind, and say whether it could be done; if not, none ever is."""
        kind.inputs = [given.clone() for given in inputs]
        try:
            kind.launch, kind.results = record(lambda: step(*kind.inputs))
        except RuntimeError as error:
            logger.info("steps are launched kernel by kernel, since they cannot be recorded: %s", error)
            self.able = False
            self._kinds.clear()
        return self.able


def records(model: nn.Module, device: torch.device) -> bool:
    """Return whether steps of a model's training are to be recorded.

    Args:
        model: in training mode.
        device: where it is trained.
    """
    return device.type == "cuda" and os.environ.get(SWITCH) == "1" and has_no_dropout(model)


def has_no_dropout(model: nn.Module) -> bool:
    """Return whether no module of a model drops out now."""
    return not any(isinstance(module, _DropoutNd) and module.training and module.p > 0 for module in model.modules())


_of_model: WeakKeyDictionary[nn.Module, tuple[object, Replay]] = WeakKeyDictionary()


def replay_of(model: nn.Module, device: torch.device) -> Replay:
    """Return what replays the steps of a model's own training, that of the trainings before where nothing has changed.

    So the clients that train one after the other in the same workspace share the recorded steps.

    Args:
        model: in training mode; its tensors stay where they are until the training ends.
        device: where it is trained.
    """
    if not records(model, device):
        return Replay(able=False)
    tensors = [*model.parameters(), *model.buffers()]
    now = (
        tuple((tensor.data_ptr(), tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors),
        tuple(module.training for module in model.modules()),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
    )
    found = _of_model.get(model)
    if found is None or found[0] != now:
        found = _of_model[model] = now, Replay(able=True)
    return found[1]
