"""What a round needs before it starts, and what it fails with."""

from __future__ import annotations

import logging
import math
import time

from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError

from fedmerge.errors import FedmergeError

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_WARNINGS = 30.0


class RoundFailed(FedmergeError, AggregationError):
    """A round that has too few good updates, or whose result cannot be used; the text tells every reason."""


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
