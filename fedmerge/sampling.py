"""Whom a round asks, where it does not ask all: clients drawn by the seed, whatever ids their nodes have."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from flwr.app import Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid

from fedmerge.metrics import PARTITION_ID, records
from fedmerge.rounds import RoundFailed
from fedmerge.seeds import generator

logger = logging.getLogger(__name__)

ClientsOf = Callable[[Sequence[int]], Mapping[int, int]]
"""Maps connected nodes' ids to the node of each partition id."""


@dataclass
class Sample:
    """Draws the clients of a round from those whose nodes are connected.

    Attributes:
        size: how many; all, if there are not so many.
        seed: of the run.
        clients_of: gives the node of each client; None: every node is asked once which client it is.
        timeout: seconds to wait for the nodes' answers.
        known: the nodes that have answered.
    """

    size: int
    seed: int
    clients_of: ClientsOf | None = None
    timeout: float = 3600.0
    known: dict[int, int] = field(default_factory=dict)

    def nodes(self, server_round: int, node_ids: Sequence[int], grid: Grid) -> list[int]:
        """Return the nodes of the clients that a round asks.

        Args:
            server_round: the round, from 1.
            node_ids: of the connected nodes.
            grid: reaches them.

        Raises:
            RoundFailed: if no node tells which client it is.
        """
        if self.clients_of is not None:
            found = self.clients_of(node_ids)
        else:
            strangers = sorted(set(node_ids) - set(self.known.values()))
            self.known |= ask(grid, strangers, timeout=self.timeout) if strangers else {}
            connected = set(node_ids)
            found = {client: node_id for client, node_id in self.known.items() if node_id in connected}
        if not found:
            raise RoundFailed(f"none of {len(node_ids)} nodes tells which client it is")
        return [found[client] for client in drawn(sorted(found), self.size, seed=self.seed, server_round=server_round)]


def drawn(clients: Sequence[int], size: int, *, seed: int, server_round: int) -> list[int]:
    """Return the clients that a round asks, sorted; they depend on the seed, the round and who there is.

    Args:
        clients: sorted, and at least one.
        size: how many to draw without replacement; all if there are not so many.
        seed: of the run.
        server_round: the round, from 1.

    Example:
        >>> drawn(range(100), 3, seed=0, server_round=1) == drawn(range(100), 3, seed=0, server_round=1)
        True
    """
    order = torch.randperm(len(clients), generator=generator(seed, "sample", server_round))
    return [clients[place] for place in order[:size].sort().values.tolist()]


def ask(grid: Grid, node_ids: Sequence[int], *, timeout: float) -> dict[int, int]:
    """Ask nodes which clients they are, and return the node of each; who does not tell is left out, with a warning.

    Args:
        grid: reaches the nodes.
        node_ids: to ask.
        timeout: seconds to wait for the answers.
    """
    messages = [Message(RecordDict(), node_id, MessageType.QUERY, ttl=timeout) for node_id in node_ids]
    found: dict[int, int] = {}
    replies = grid.send_and_receive(messages, timeout=timeout)
    for reply in sorted(replies, key=lambda reply: reply.metadata.src_node_id):
        answers = records(reply.content, MetricRecord).values() if reply.has_content() else ()
        told = [record[PARTITION_ID] for record in answers if PARTITION_ID in record]
        if len(told) == 1 and isinstance(told[0], int):
            found.setdefault(told[0], reply.metadata.src_node_id)
    if missing := set(node_ids) - set(found.values()):
        logger.warning(
            "the nodes %s do not tell which clients they are: left out", ", ".join(map(str, sorted(missing)))
        )
    return found
