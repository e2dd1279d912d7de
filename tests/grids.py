"""A Flower grid that calls the clients in this process, one after the other, when their replies are pulled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid

from fedmerge.client import client_app
from fedmerge.config import Config
from fedmerge.flower import identity, node_context, set_message_id

if TYPE_CHECKING:
    from flwr.supercore.run import Run

Answer = Callable[[Message, int], Message]


class InProcessGrid(Grid):
    """Nodes answer in the order of `nodes`, which are the clients' node ids by partition id; `mute` ones never do."""

    def __init__(
        self, answer: Answer, nodes: Sequence[int], *, reverse: bool = False, mute: Sequence[int] = ()
    ) -> None:
        self._answer = answer
        self._nodes = list(nodes)
        self._reverse = reverse
        self._mute = mute
        self._waiting: dict[str, Message] = {}
        self.sent: list[Message] = []

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    @property
    def run(self) -> Run:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        self.sent += messages
        ids = [set_message_id(message) for message in messages]
        self._waiting |= dict(zip(ids, messages, strict=True))
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        replies = []
        for message_id in sorted(message_ids, key=lambda item: self._waiting[item].metadata.dst_node_id):
            message = self._waiting[message_id]
            partition_id = self._nodes.index(message.metadata.dst_node_id)
            if partition_id not in self._mute:
                replies.append(self._answer(self._waiting.pop(message_id), partition_id))
        return replies[::-1] if self._reverse else replies

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))


@contextmanager
def in_process(
    config: Config,
    *,
    app: ClientApp | None = None,
    nodes: Sequence[int] | None = None,
    reverse: bool = False,
    mute: Sequence[int] = (),
) -> Iterator[InProcessGrid]:
    """Give a grid of a federation's clients in this process."""
    chosen = app or client_app()

    def answer(message: Message, partition_id: int) -> Message:
        return chosen(message, node_context(config, partition_id))

    with identity():
        yield InProcessGrid(answer, nodes or range(1, config.clients + 1), reverse=reverse, mute=mute)
