"""Ray actors that take turns at tasks: built once, replaced when they die, and never waited for without an end.

An actor imports what this process imports, in the same order of places, whatever
folders lie in the working directory; tensors that actors share lie once in the memory of a machine.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedmerge.cluster import Resources, room, running_ray, shorten
from fedmerge.settings import ConfigurationError

logger = logging.getLogger(__name__)

Handle = Any
"""Ray's handle of an actor."""

Reference = Any
"""Ray's reference to a value."""


@dataclass(frozen=True)
class Failure:
    """A task that has no result.

    Attributes:
        reason: what happened, in one line.
        crashed: whether the actor's process died of it; otherwise the task raised.
    """

    reason: str
    crashed: bool


class ActorPool:
    """Actors that each hold one object, and call its method `answer` with a task's arguments.

    Args:
        resources: what an actor takes, and where from.
        most: no more actors than this.

    Raises:
        ConfigurationError: if there is no such cluster, or it has no room for one actor.
    """

    def __init__(self, resources: Resources, most: int) -> None:
        self._target, self._resources = "", resources
        self._ray, self._started_ray = running_ray(resources)
        self._actors: list[Handle] = []
        self._arguments: tuple[object, ...] = ()
        self._starting: dict[Reference, Handle] = {}
        self._idle: deque[Handle] = deque()
        self._queue: deque[tuple[str, tuple[object, ...]]] = deque()
        self._running: dict[Reference, tuple[str, Handle]] = {}
        self._cause = ""
        try:
            self._size = min(most, room(resources, self._ray.nodes()))
        except ConfigurationError:
            self.close()
            raise
        logger.info("%d Ray actors, each with %g CPUs and %g GPUs", self._size, resources.cpus, resources.gpus)

    def share(self, value: object) -> Reference:
        """Put a value into Ray's object store and return its reference; tensors in it will be read without a copy."""
        from ray.util import deregister_serializer, register_serializer

        register_serializer(Tensor, serializer=_to_numpy, deserializer=tensor_from_shared_memory)
        try:
            return self._ray.put(value)
        finally:
            deregister_serializer(Tensor)

    def load(self, target: str, *arguments: object) -> None:
        """Let every actor build an object, which takes the place of the one that it has.

        Args:
            target: `module:class` of the object.
            arguments: of the object's class; references from `share` among them arrive as their values.
        """
        self._target, self._arguments = target, arguments
        self._idle.clear()
        self._starting.clear()
        for actor in self._actors:
            self._build(actor)
        while len(self._actors) < self._size:
            self._add()

    def submit(self, task_id: str, *arguments: object) -> None:
        """Queue a task; tasks start in the order of their submission.

        Args:
            task_id: under which `poll` gives its result.
            arguments: of the object's method `answer`.
        """
        self._queue.append((task_id, arguments))

    def poll(self, wait: float) -> list[tuple[str, object]]:
        """Return the tasks that have ended since, with their results or `Failure`s.

        Args:
            wait: seconds to wait for the first, at most.
        """
        self._dispatch()
        if self._queue and not self._actors:
            failure = Failure(f"no Ray actor could start: {self._cause}", crashed=True)
            ended: list[tuple[str, object]] = [(task_id, failure) for task_id, _ in self._queue]
            self._queue.clear()
            return ended
        pending = [*self._running, *self._starting]
        if not pending:
            return []
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=wait)
        if ready:
            ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        ended = [outcome for reference in ready if (outcome := self._take(reference)) is not None]
        self._dispatch()
        return ended

    def cancel(self, task_id: str) -> bool:
        """Forget a task, whose result is not wanted any more, and return whether it had been started."""
        for reference, (running, actor) in list(self._running.items()):
            if running == task_id:
                del self._running[reference]
                self._remove(actor)
                self._add()
                return True
        self._queue = deque(item for item in self._queue if item[0] != task_id)
        return False

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        if self._started_ray:
            self._ray.shutdown()
        else:
            for actor in self._actors:
                self._ray.kill(actor)
        self._actors, self._started_ray = [], False

    def _add(self) -> None:
        make = self._ray.remote(num_cpus=self._resources.cpus, num_gpus=self._resources.gpus, max_restarts=0)
        actor = make(_actor_class()).remote(_import_path())
        self._actors.append(actor)
        self._build(actor)

    def _build(self, actor: Handle) -> None:
        self._starting[actor.build.remote(self._target, *self._arguments)] = actor

    def _remove(self, actor: Handle) -> None:
        self._ray.kill(actor)
        self._actors.remove(actor)

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            actor = self._idle.popleft()
            task_id, arguments = self._queue.popleft()
            self._running[actor.answer.remote(*arguments)] = task_id, actor

    def _take(self, reference: Reference) -> tuple[str, object] | None:
        """Take what has become ready: an actor, or a task's outcome."""
        from ray.exceptions import RayError, RayTaskError

        if reference in self._starting:
            actor = self._starting.pop(reference)
            try:
                self._ray.get(reference)
                self._idle.append(actor)
            except RayError as error:  # one that cannot even start is not replaced: its successor could not either
                self._cause = _reason(error)
                logger.warning("a Ray actor could not start: %s", self._cause)
                self._remove(actor)
            return None
        task_id, actor = self._running.pop(reference)
        try:
            result = self._ray.get(reference)
        except RayTaskError as error:
            self._idle.append(actor)
            return task_id, Failure(_reason(error), crashed=False)
        except RayError as error:
            self._remove(actor)
            self._add()
            return task_id, Failure(_reason(error), crashed=True)
        self._idle.append(actor)
        return task_id, result


def tensor_from_shared_memory(array: np.ndarray[Any, Any]) -> Tensor:
    """Return a tensor that reads an array of Ray's object store in place; nobody may write to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(array)


def _to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    return tensor.detach().cpu().contiguous().numpy()


def _actor_class() -> type:
    """Return the actors' class, which travels as code: it sets where imports come from before anything is imported."""

    class Actor:
        def __init__(self, import_path: list[str]) -> None:
            import sys

            os.environ["OMP_NUM_THREADS"] = "1"
            sys.path[:] = import_path + [place for place in sys.path if place not in import_path]

        def build(self, target: str, *arguments: object) -> None:
            import importlib

            module, _, name = target.partition(":")
            self.held = getattr(importlib.import_module(module), name)(*arguments)

        def answer(self, *arguments: object) -> object:
            return self.held.answer(*arguments)

    return Actor


def _import_path() -> list[str]:
    """Return where this process imports from, in absolute paths."""
    return [str(Path(place).resolve()) for place in sys.path]


def _reason(error: Exception) -> str:
    """Return what a Ray error says, in one line."""
    cause = getattr(error, "cause", None)
    return shorten(str(error) if cause is None else f"{type(cause).__name__}: {cause}")
