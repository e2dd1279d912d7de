"""Ray actors that take turns at tasks: built once, replaced when they die, and never waited for without an end.

An actor imports what this process imports, in the same order of places, whatever
folders lie in the working directory; tensors that actors share lie once in the memory of a machine. A call of Ray costs
milliseconds: short tasks go to an actor many at a time, and what they answer comes back as one object.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from fedmerge.actorside import Failure, actor_class, import_path, tensor_from_shared_memory, to_numpy
from fedmerge.cluster import Resources, room, running_ray, shorten
from fedmerge.settings import ConfigurationError

logger = logging.getLogger(__name__)

LEAST_SECONDS, MOST_SECONDS = 0.05, 0.25
"""Tasks that are sent together take so long, as far as is known and there are enough of them."""

Handle = Any
"""Ray's handle of an actor."""

Reference = Any
"""Ray's reference to a value."""


@dataclass
class _Task:
    """A task that waits or runs.

    Attributes:
        task_id: under which its result is given.
        arguments: of the object's method.
        shared: references whose values come after these.
        alone: it was sent before, and its actor ended; it is sent once more, by itself.
    """

    task_id: str
    arguments: tuple[object, ...]
    shared: tuple[Reference, ...]
    alone: bool = False


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
        self._starts_left = 0
        self._idle: deque[Handle] = deque()
        self._queue: deque[_Task] = deque()
        self._running: dict[Reference, tuple[list[_Task], Handle]] = {}
        self._seconds: float | None = None
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

        register_serializer(Tensor, serializer=to_numpy, deserializer=tensor_from_shared_memory)
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
        self._target, self._arguments, self._seconds = target, arguments, None
        self._idle.clear()
        self._starting.clear()
        for actor in self._actors:
            self._build(actor)
        while len(self._actors) < self._size:
            self._add()
        self._starts_left = self._size

    def submit(self, task_id: str, *arguments: object, shared: tuple[Reference, ...] = ()) -> None:
        """Queue a task; tasks start in the order of their submission.

        Args:
            task_id: under which `poll` gives its result.
            arguments: of the object's method `answer`.
            shared: from `share`; their values are the method's last arguments.
        """
        self._queue.append(_Task(task_id, arguments, shared))

    def poll(self, wait: float) -> list[tuple[str, object]]:
        """Return the tasks that have ended since, with their results or `Failure`s.

        Args:
            wait: seconds to wait for the first, at most.
        """
        self._dispatch()
        if self._queue and not self._actors:
            failure = Failure(f"no Ray actor could start: {self._cause}", crashed=True)
            ended: list[tuple[str, object]] = [(task.task_id, failure) for task in self._queue]
            self._queue.clear()
            return ended
        pending = [*self._running, *self._starting]
        if not pending:
            return []
        ready, _ = self._ray.wait(pending, num_returns=1, timeout=wait)
        if ready:
            ready, _ = self._ray.wait(pending, num_returns=len(pending), timeout=0)
        ended = [outcome for reference in ready for outcome in self._take(reference)]
        self._dispatch()
        return ended

    def cancel(self, task_id: str) -> bool:
        """Forget a task, whose result is not wanted any more, and return whether it had been started.

        Others that were sent with it are sent again.
        """
        for reference, (tasks, actor) in list(self._running.items()):
            if any(task.task_id == task_id for task in tasks):
                del self._running[reference]
                self._replace(actor)
                self._again([task for task in tasks if task.task_id != task_id])
                return True
        cancelled = [task for task in self._queue if task.task_id == task_id]
        self._queue = deque(task for task in self._queue if task.task_id != task_id)
        return any(task.alone for task in cancelled)

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
        actor = make(actor_class()).remote(import_path())
        self._actors.append(actor)
        self._build(actor)

    def _build(self, actor: Handle) -> None:
        self._starting[actor.build.remote(self._target, *self._arguments)] = actor

    def _remove(self, actor: Handle) -> None:
        self._ray.kill(actor)
        self._actors.remove(actor)

    def _replace(self, actor: Handle) -> None:
        self._remove(actor)
        self._add()

    def _again(self, tasks: list[_Task]) -> None:
        """Send tasks again that were sent with one that has failed, each by itself."""
        self._queue.extendleft(replace(task, alone=True) for task in reversed(tasks))

    def _dispatch(self) -> None:
        while self._queue and self._idle:
            actor, tasks = self._idle.popleft(), self._next()
            reference = actor.answer.remote([task.arguments for task in tasks], *tasks[0].shared)
            self._running[reference] = tasks, actor

    def _next(self) -> list[_Task]:
        """Take the tasks to be sent together: as many as last long enough, and leave the others something to do."""
        count = 1
        if self._seconds is not None:
            share = len(self._queue) // (2 * self._size)
            least, most = (seconds / max(self._seconds, 1e-6) for seconds in (LEAST_SECONDS, MOST_SECONDS))
            count = math.ceil(max(least, min(most, share)))
        tasks = [self._queue.popleft()]
        while len(tasks) < count and self._queue and not tasks[0].alone:
            if self._queue[0].alone or self._queue[0].shared != tasks[0].shared:
                break
            tasks.append(self._queue.popleft())
        return tasks

    def _take(self, reference: Reference) -> list[tuple[str, object]]:
        """Take what has become ready: an actor, or tasks' outcomes."""
        from ray.exceptions import RayError, RayTaskError

        if reference in self._starting:
            actor = self._starting.pop(reference)
            try:
                self._ray.get(reference)
                self._idle.append(actor)
            except RayError as error:
                self._cause = _reason(error)
                logger.warning("a Ray actor could not start: %s", self._cause)
                self._remove(actor)
                if not isinstance(error, RayTaskError) and self._starts_left:  # of what raises, a successor would too
                    self._starts_left -= 1
                    self._add()
            return []
        tasks, actor = self._running.pop(reference)
        try:
            seconds, results = self._ray.get(reference)
        except RayError as error:
            crashed = not isinstance(error, RayTaskError)
            if crashed:
                self._replace(actor)
            else:
                self._idle.append(actor)
            if len(tasks) > 1 or (crashed and not tasks[0].alone):  # another may have ended it, or the machine
                logger.warning("what an actor had to do is sent again, each task by itself: %s", _reason(error))
                self._again(tasks)
                return []
            return [(tasks[0].task_id, Failure(_reason(error), crashed))]
        self._idle.append(actor)
        self._seconds = seconds / len(tasks)
        return [(task.task_id, result) for task, result in zip(tasks, results, strict=True)]


def _reason(error: Exception) -> str:
    """Return what a Ray error says, in one line."""
    cause = getattr(error, "cause", None)
    text = str(error) if cause is None else f"{type(cause).__name__}: {cause}"
    return shorten("\n".join(line for line in text.splitlines() if not line.startswith("\t")))  # those are Ray's ids
