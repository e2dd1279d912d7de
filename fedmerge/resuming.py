"""A deployed run that goes on in its folder after its server has died: who has answered is not asked again.

The SuperLink does not resume a run, and nodes are known by ids. So the run folder keeps which node answered as which
client (nodes.jsonl), a node that keeps its key keeps its id, and a run that is submitted again with the same settings
and folder takes the updates that are there, also those of sites that are gone, and computes its merges again, to the
same bits.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from pathlib import Path

from flwr.app import Message, MessageType, RecordDict

from fedmerge.config import Config
from fedmerge.recording import round_of
from fedmerge.runs import Run, RunError
from fedmerge.wholefiles import append_line
from fedmerge.wire import update_to_records

logger = logging.getLogger(__name__)

COMMAND = "flwr run"
NODES = "nodes.jsonl"


def enter(path: Path, config: Config) -> Run:
    """Make the folder of a run under Flower, or return the one in which it was interrupted.

    Args:
        path: the folder.
        config: of the federation.

    Raises:
        RunError: if the folder holds anything else than this run, unfinished.
    """
    if not (path / "config.json").is_file():
        return Run.create(path, COMMAND, config)
    run = Run.open(path)
    if run.settings["command"] != COMMAND or run.config != config:
        raise RunError(f"{path} holds a run of other settings: give another out, or the settings in its config.json")
    if run.has_last_round:
        raise RunError(f"{path} holds this run, completed: fetch it, or give another out to run it again")
    logger.warning("%s holds this run, interrupted: it goes on", path)
    return run


class Answers:
    """Who has answered in a run, in this process or in one before it.

    Args:
        run: the run folder.
        config: of the federation.
    """

    def __init__(self, run: Run, config: Config) -> None:
        self._run, self._config = run, config
        self._clients: dict[int, int] = {}
        self._next_round = 1
        path = run.path / NODES
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                told = json.loads(line)
                self._clients[int(told["node"])] = int(told["client"])
            except (ValueError, TypeError, KeyError):  # the line that a killed process was writing
                logger.warning("%s has an unfinished line, left out: %.60s", path, line.decode(errors="replace"))

    def note(self, node_id: int, partition_id: int) -> None:
        """Keep that a node has answered as a client; call it before the update is stored."""
        if self._clients.get(node_id) != partition_id:
            append_line(self._run.path / NODES, json.dumps({"node": node_id, "client": partition_id}).encode())
            self._clients[node_id] = partition_id

    def recall(self, message: Message) -> RecordDict | None:
        """Return the content of the reply to a training message that was answered before, or None."""
        if message.metadata.message_type != MessageType.TRAIN:
            return None
        server_round = round_of(message)
        self._next_round = server_round + 1
        client = self._clients.get(message.metadata.dst_node_id)
        if client is None or not self._run.has_update(self._config.seed, server_round, client):
            return None
        update = self._run.load_update(self._config.seed, server_round, client)
        return update_to_records(update, upload_dtype=self._config.upload_dtype)

    def nodes(self, connected: Iterable[int]) -> list[int]:
        """Return the nodes that can take part in the coming round: the connected, and those that have answered."""
        seed, server_round = self._config.seed, self._next_round
        answered = (node for node, client in self._clients.items() if self._run.has_update(seed, server_round, client))
        return sorted({*connected, *answered})
