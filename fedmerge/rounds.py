"""What a round needs before it starts, what it can send on, and what it fails with."""

from __future__ import annotations

import logging
import math
import time

from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError

from fedmerge.errors import FedmergeError
from fedmerge.outcomes import Outcome
from fedmerge.state import StateDict

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_WARNINGS = 30.0


class RoundFailed(FedmergeError, AggregationError):
    """A round that has too few good updates, or whose result cannot be used; the text tells every reason."""


def model_to_send(outcome: Outcome, merge: str) -> StateDict:
    """Return the merged model, if it can be sent to the clients.

    Args:
        outcome: of the round's merge.
        merge: the merger's name, for the errors.

    Raises:
        RoundFailed: if it is an ensemble, or of an architecture that is not the server's.
    """
    merged = outcome.merged
    if len(merged.states) != 1:
        raise RoundFailed(
            f"--merge {merge} gives an ensemble of {len(merged.states)} models, which cannot be sent to the clients as "
            "one; choose another --merge, or evaluate ensembles with 'fedmerge compare'"
        )
    if any(merged.models):
        raise RoundFailed(
            f"--merge {merge} gives a model of '{merged.models[0]}', which is not the server's (--model) and cannot be "
            "sent to all clients; choose another --merge, or look at it with 'fedmerge compare'"
        )
    return merged.state


def wait_for_nodes(grid: Grid, wanted: int, *, least: int, timeout: float) -> list[int]:
    """Return the ids of the nodes, once there are as many as wanted, or `timeout` has passed.

    Args:
        grid: gives the nodes.
        wanted: how many to wait for.
        least: how many will do after the timeout.
        timeout: seconds.

    Raises:
        RoundFailed: if there are fewer.
    """
    began, warned = time.monotonic(), -math.inf
    while len(node_ids := sorted(grid.get_node_ids())) < wanted:
        waited = time.monotonic() - began
        state = f"{len(node_ids)} of {wanted} nodes are connected"
        if waited >= timeout:
            if len(node_ids) < max(least, 1):
                raise RoundFailed(f"{state} after {waited:.0f} s, and {least} are needed (min_completed)")
            logger.warning("%s after %.0f s: the round starts without the others", state, waited)
            break
        if waited - warned >= SECONDS_BETWEEN_WARNINGS:
            warned = waited
            logger.warning(
                "%s, waiting for the others for up to %.0f s; in a simulation, give Flower as many: "
                '--federation-config "num-supernodes=%d"',
                state,
                timeout,
                wanted,
            )
        time.sleep(min(SECONDS_BETWEEN_LOOKS, timeout - waited))
    return node_ids
