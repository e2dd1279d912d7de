"""A Flower grid that records: replies are handed on as they arrive, and known answers are not asked for again."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from fedmerge.problem import Progress, silent
from fedmerge.wire import CONFIG, SERVER_ROUND, num_array_bytes

if TYPE_CHECKING:
    from flwr.proto.node_pb2 import NodeInfo
    from flwr.supercore.run import Run

logger = logging.getLogger(__name__)

Recall = Callable[[Message], RecordDict | None]
"""Gives the content of the reply to a message that was answered before, or None."""


class RecordingGrid(Grid):
    """A grid that tells of each reply as it arrives, and answers from memory what was answered before.

    Args:
        grid: the grid that reaches the clients.
        arrived: called with a training message and its reply, once for each.
        recall: asked first; what it knows is not sent.
        nodes: given the connected nodes, returns those that a round may ask; None: the connected.
        progress: told how many clients have answered.
        pause: seconds between looks for new replies.
    """

    def __init__(
        self,
        grid: Grid,
        *,
        arrived: Callable[[Message, Message], None],
        recall: Recall | None = None,
        nodes: Callable[[Iterable[int]], Iterable[int]] | None = None,
        progress: Progress = silent,
        pause: float = 0.1,
    ) -> None:
        self._grid = grid
        self._nodes = nodes
        self._arrived = arrived
        self._recall = recall
        self._progress = progress
        self._pause = pause
        self.bytes_sent = 0

    def set_run(self, run: Run) -> None:
        """Set the wrapped grid's run."""
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        """The wrapped grid's run."""
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Create a message by the wrapped grid."""
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        """Return the nodes that a round may ask."""
        connected = self._grid.get_node_ids()
        return connected if self._nodes is None else self._nodes(connected)

    def get_nodes(self) -> Iterable[NodeInfo]:
        """Return what the wrapped grid knows of its nodes."""
        return self._grid.get_nodes()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages by the wrapped grid."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Pull replies by the wrapped grid."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        """Send messages and wait for their replies.

        Args:
            messages: to send.
            timeout: seconds to wait; who has not answered then is logged and left out.

        Returns:
            The replies that came.
        """
        messages = list(messages)
        self._count_bytes(messages)
        recalled = [(message, self._recall(message) if self._recall else None) for message in messages]
        replies = [Message(content, reply_to=message) for message, content in recalled if content is not None]
        task = "clients trained" if all(map(_is_training, messages)) else "clients answered"
        if replies:
            self._progress(task, len(replies), len(messages))
        for message, reply in self._receive([message for message, content in recalled if content is None], timeout):
            if _is_training(message):
                self._arrived(message, reply)
            replies.append(reply)
            self._progress(task, len(replies), len(messages))
        return replies

    def _receive(self, messages: list[Message], timeout: float | None) -> Iterator[tuple[Message, Message]]:
        """Yield each message with its reply, as they arrive."""
        if not messages:
            return
        message_ids = list(self._grid.push_messages(messages))
        end = math.inf if timeout is None else time.monotonic() + timeout
        waiting = {
            message_id: message for message_id, message in zip(message_ids, messages, strict=False) if message_id
        }
        if len(waiting) < len(messages):
            logger.warning("Flower could not send %d of %d messages", len(messages) - len(waiting), len(messages))
        while waiting:
            for reply in self._grid.pull_messages(list(waiting)):
                message = waiting.pop(reply.metadata.reply_to_message_id, None)
                if message is None:  # a second reply, or one to a message of another round
                    logger.warning("node %d sent a reply that nothing waits for: left out", reply.metadata.src_node_id)
                    continue
                if reply.has_error() and reply.metadata.src_node_id != message.metadata.dst_node_id:
                    reply = Message(reply.error, reply_to=message)  # the SuperLink answers for a node that is gone
                yield message, reply
            if waiting and time.monotonic() >= end:
                nodes = ", ".join(str(message.metadata.dst_node_id) for message in waiting.values())
                logger.warning("no answer within %.0f s from the nodes %s", timeout, nodes)
                return
            if waiting:
                time.sleep(self._pause)

    def _count_bytes(self, messages: Sequence[Message]) -> None:
        for message in filter(_is_training, messages):
            self.bytes_sent += num_array_bytes(message.content)


def _is_training(message: Message) -> bool:
    return message.metadata.message_type == MessageType.TRAIN


def round_of(message: Message) -> int:
    """Return the round, from 1, of a message that asks for training."""
    server_round = message.content.config_records[CONFIG][SERVER_ROUND]
    if not isinstance(server_round, int):
        raise ValueError(f"expected a whole number as {SERVER_ROUND}, got {server_round!r}")
    return server_round
