"""What clients of other architectures than the server's go on with in the next round.

The server's model fits the clients of its own architecture alone. The others get their family's merged model, brought
back into their architecture, or, where that cannot be done, the model that they sent last: what the families teach the
server does not go back to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, RecordDict

from fedmerge.mixed import starts_after
from fedmerge.outcomes import Outcome
from fedmerge.problem import Problem, Update
from fedmerge.state import StateDict
from fedmerge.wire import MODEL, arrays_from_state


@dataclass(frozen=True)
class GoingOn:
    """Models to go on with.

    Attributes:
        starts: by partition id, the name of the client's architecture and its weights.
    """

    starts: Mapping[int, tuple[str, StateDict]] = field(default_factory=dict)

    def after(self, problem: Problem, updates: Sequence[Update], outcome: Outcome) -> GoingOn:
        """Return what a round leaves to go on with; clients that had no part in it keep what they had.

        Args:
            problem: the server's side, with all architectures.
            updates: of the round.
            outcome: of its merge.
        """
        models = {update.partition_id: update.model for update in updates}
        starts = starts_after(problem, updates, outcome)
        return GoingOn({**self.starts, **{client: (models[client], state) for client, state in starts.items()}})

    def contents(self, told: Mapping[str, Any], config_key: str, arrays_key: str) -> dict[int, RecordDict]:
        """Return the content of each client's message, by partition id; clients of one start share it.

        Args:
            told: what all clients are told.
            config_key: name of the message's record of that.
            arrays_key: name of the record of the weights.
        """
        contents: dict[int, RecordDict] = {}
        for model, state in self.starts.values():
            if id(state) not in contents:
                told_too = ConfigRecord({**told, MODEL: model})
                contents[id(state)] = RecordDict({config_key: told_too, arrays_key: arrays_from_state(state)})
        return {client: contents[id(state)] for client, (_, state) in self.starts.items()}
