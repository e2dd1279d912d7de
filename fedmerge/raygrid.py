"""A Flower grid over Ray actors: its nodes are clients that take turns on them."""

from __future__ import annotations

import copy
import gc
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from flwr.app import Error, Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmerge import flower
from fedmerge.actors import ActorPool
from fedmerge.actorside import Failure
from fedmerge.client import client_app
from fedmerge.cluster import Resources
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.settings import Value
from fedmerge.together import answer_together, group_size
from fedmerge.wire import num_array_bytes

if TYPE_CHECKING:
    from flwr.supercore.run import Run as FlowerRun

LONGEST_WAIT = 1.0


class Clients:
    """What an actor does: it is any client whose message it gets.

    Args:
        settings: the configuration.
        examples: the federation.
    """

    def __init__(self, settings: dict[str, Value], examples: Federation) -> None:
        torch.set_num_threads(1)
        self._config = Config.from_mapping(settings)
        self._load = lambda _: examples
        self._app = client_app(self._load)
        self._settings = self._config.to_mapping()

    def answer(self, messages: Sequence[Message], content: RecordDict) -> list[Message]:
        """Return the clients' replies to messages that travelled without their content.

        Args:
            messages: one, or those of clients that train side by side.
            content: of each.
        """
        contexts = [
            flower.node_context(self._config, partition_of(message), settings=self._settings) for message in messages
        ]
        for message in messages:
            message.content = content
        if len(messages) == 1:
            return [self._app(messages[0], contexts[0])]
        return answer_together(self._load, list(zip(messages, contexts, strict=True)))


class RayGrid(Grid):
    """A Flower grid over Ray actors. Use `simulation`.

    The nodes are the clients, in order. Messages wait for a free actor, those of the largest clients first. A client
    that fails, an actor that dies and a message that outlives its time to live give an error reply with the reason.

    Args:
        config: the federation's configuration.
        num_cpus: CPUs of a Ray that is started here; None: this machine's.
        num_gpus: GPUs of a Ray that is started here; None: this machine's.
    """

    def __init__(self, config: Config, *, num_cpus: int | None = None, num_gpus: int | None = None) -> None:
        self._config = config
        self._resources = Resources(
            config.client_cpus, config.client_gpus, config.ray_address, num_cpus=num_cpus, num_gpus=num_gpus
        )
        self._examples: Federation | None = None
        self._flower_run: FlowerRun | None = None
        self._pool: ActorPool | None = None
        self._loaded = False
        self._messages: dict[str, tuple[Message, float]] = {}
        self._members: dict[str, list[str]] = {}
        self._replies: dict[str, Message] = {}

    def load(self, config: Config, examples: Federation) -> None:
        """Take another federation; the actors that there are go on with it.

        Args:
            config: its configuration; the resources and the cluster stay those of the start.
            examples: the federation.
        """
        self._config, self._examples, self._loaded = config, examples, False

    def map(self, kind: type, arguments: Sequence[object], tasks: Sequence[str]) -> Iterator[tuple[str, object]]:
        """Let the actors do other work between rounds, side by side.

        Args:
            kind: an importable class; each actor builds one, and its method `answer` is called with a task.
            arguments: of the class after the actors' configuration; large ones are shared.
            tasks: different from each other.

        Yields:
            Each task as it ends, with its result or its `Failure`.
        """
        pool, _ = self._ready_pool()
        self._loaded = False
        pool.load(_target(kind), _actor_settings(self._config), *map(pool.share, arguments))
        for task in tasks:
            pool.submit(task, task)
        left = set(tasks)
        while left:
            for task, result in pool.poll(LONGEST_WAIT):
                left.discard(task)
                yield task, result

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None
            gc.unfreeze()

    def set_run(self, run: FlowerRun) -> None:
        """Set Flower's run."""
        self._flower_run = run

    @property
    def run(self) -> FlowerRun:
        """Flower's run.

        Raises:
            RuntimeError: if it was not set.
        """
        if self._flower_run is None:
            raise RuntimeError("the simulation is no run of Flower's; set_run gives it one")
        return self._flower_run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Return the clients' nodes, in order."""
        return range(flower.FIRST_NODE_ID, flower.FIRST_NODE_ID + self._config.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages.

        Args:
            messages: those that share a content send it once.

        Returns:
            Their ids, in order.
        """
        messages = list(messages)
        if not messages:
            return []
        pool, examples = self._ready_pool()
        contents = {id(message.content): message.content for message in messages}
        shared = {which: pool.share(content) for which, content in contents.items()}
        now = time.monotonic()  # Ray's start does not count
        for message in messages:
            self._messages[flower.set_message_id(message)] = message, now + message.metadata.ttl
        for group in self._groups(
            sorted(messages, key=lambda message: -len(examples.partition[partition_of(message)]))
        ):
            task_id = group[0].metadata.message_id
            self._members[task_id] = [message.metadata.message_id for message in group]
            pool.submit(task_id, list(map(_envelope, group)), shared=(shared[id(group[0].content)],))
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Return the replies that have come; if there is none, wait a second for one.

        Args:
            message_ids: of the messages whose replies are wanted.
        """
        wanted = list(message_ids)
        self._collect(0 if any(message_id in self._replies for message_id in wanted) else LONGEST_WAIT)
        return [self._replies.pop(message_id) for message_id in wanted if message_id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies.

        Args:
            messages: to send.
            timeout: seconds to wait.

        Returns:
            The replies that came in time.
        """
        waiting = set(self.push_messages(messages))
        end = math.inf if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and time.monotonic() < end:
            come = list(self.pull_messages(waiting))
            waiting -= {reply.metadata.reply_to_message_id for reply in come}
            replies += come
        return replies

    def _ready_pool(self) -> tuple[ActorPool, Federation]:
        if self._examples is None:
            raise RuntimeError("the simulation has no federation yet: call load first")
        if self._pool is None:
            self._pool = ActorPool(self._resources, self._config.clients)
            gc.collect()  # what Ray's start left over would be frozen too
            gc.freeze()  # what is there, mostly modules: collections in the rounds would look at all of their objects
        if not self._loaded:
            self._pool.load(_target(Clients), _actor_settings(self._config), self._pool.share(self._examples))
            self._loaded = True
        return self._pool, self._examples

    def _groups(self, messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
        """Yield the messages whose clients train side by side: of neighbours, by their own order and nothing else."""
        for _, run in itertools.groupby(messages, lambda message: (message.metadata.message_type, id(message.content))):
            same = list(run)
            size = 1
            if same[0].metadata.message_type == MessageType.TRAIN:
                size = group_size(self._config, num_array_bytes(same[0].content))
            yield from (same[first : first + size] for first in range(0, len(same), size))

    def _collect(self, wait: float) -> None:
        if self._pool is None or not self._messages:
            return
        soonest = min(deadline for _, deadline in self._messages.values()) - time.monotonic()
        for task_id, result in self._pool.poll(max(0.0, min(wait, soonest))):
            members = self._members.pop(task_id)
            results = result if isinstance(result, list) else [result] * len(members)
            for message_id, one in zip(members, results, strict=True):
                self._replies[message_id] = _reply(self._messages.pop(message_id)[0], one)
        now = time.monotonic()
        for task_id, members in list(self._members.items()):
            if all(now >= self._messages[message_id][1] for message_id in members):
                del self._members[task_id]
                started = self._pool.cancel(task_id)
                reason = "it has not finished" if started else "its turn has not come"
                for message, _ in map(self._messages.pop, members):
                    told = f"{reason} within {message.metadata.ttl:.0f} s; raise --timeout, or let it have less to do"
                    self._replies[message.metadata.message_id] = _error(message, flower.CLIENT_FAILED, told)


def _target(kind: type) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _actor_settings(config: Config) -> dict[str, Value]:
    """Return the configuration for the actors: clients without a GPU of their own do not look for one."""
    if config.device == "auto" and not config.client_gpus:
        config = config.replace(device="cpu")
    return config.to_mapping()


def partition_of(message: Message) -> int:
    """Return the client that a message of the simulation goes to."""
    return message.metadata.dst_node_id - flower.FIRST_NODE_ID


def _envelope(message: Message) -> Message:
    """Return a message without its content, which travels once for all."""
    envelope = copy.copy(message)
    envelope.content = RecordDict()
    return envelope


def _reply(message: Message, result: object) -> Message:
    if isinstance(result, Message):
        flower.set_message_id(result)
        return result
    if isinstance(result, Failure) and not result.crashed:
        return _error(message, flower.CLIENT_FAILED, result.reason)
    return _error(message, flower.CLIENT_CRASHED, f"its process died: {getattr(result, 'reason', result)}")


def _error(message: Message, code: int, reason: str) -> Message:
    return Message(Error(code, f"client {partition_of(message)}: {reason}"), reply_to=message)
