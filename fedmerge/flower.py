"""The private parts of Flower that are needed, here and nowhere else.

Flower's Message can be made only in a process that Flower has given an identity, and only Flower's own grids give a
message its id and a node its context. Its records check each item, for several times the price of a small one. A
test fails when Flower changes any of it.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from typing import Any

from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from fedmerge.config import Config
from fedmerge.metrics import NUM_PARTITIONS, PARTITION_ID
from fedmerge.settings import Value

RUN_ID = 1
SERVER_NODE_ID = 0
FIRST_NODE_ID = 1
"""The node of client 0 in a simulation; the others follow."""

CLIENT_FAILED = 2
CLIENT_CRASHED = 8
"""Flower's error codes of a ClientApp that raised an exception, and of one whose process died."""


def fill(record: MutableMapping[str, Any], items: Mapping[str, object]) -> None:
    """Set items of one of Flower's records, which checks each in vain: they are known to be of its types.

    Args:
        record: changed in place.
        items: what to set.
    """
    unchecked = vars(record).get("_data")
    (unchecked if isinstance(unchecked, dict) else record).update(items)


@contextmanager
def identity() -> Iterator[None]:
    """Give this process the identity under which Flower lets it make messages, and take it away again."""
    before = {name: vars(TaskIdentity)[name] for name in ("_task_id", "_run_id", "_node_id")}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 0, RUN_ID, SERVER_NODE_ID
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)


def set_message_id(message: Message) -> str:
    """Give a message an id, as Flower's grids do when they send it, and return it."""
    message_id = str(uuid.uuid4())
    message.metadata.__dict__["_message_id"] = message_id
    return message_id


def node_context(config: Config, partition_id: int, *, settings: dict[str, Value] | None = None) -> Context:
    """Return the context in which a client's node runs the app.

    Args:
        config: the federation's configuration.
        partition_id: the client's number, from 0.
        settings: the configuration's mapping, where it is made once for many; nobody changes it.
    """
    return Context(
        run_id=RUN_ID,
        node_id=FIRST_NODE_ID + partition_id,
        node_config={PARTITION_ID: partition_id, NUM_PARTITIONS: config.clients},
        state=RecordDict(),
        run_config=config.to_mapping() if settings is None else settings,
    )
