"""Lines of results.jsonl."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from fedmerge.catalogue import STATISTICS, needs
from fedmerge.oneshot import Outcome
from fedmerge.problem import Examples, Update
from fedmerge.runs import Result
from fedmerge.state import num_bytes
from fedmerge.train import evaluate


def measured(
    *,
    method: str,
    seed: int,
    server_round: int,
    outcome: Outcome,
    model: nn.Module,
    evaluation: Examples,
    bytes_up: int,
    bytes_down: int,
    refused: Sequence[str] = (),
) -> Result:
    """Evaluate a merge and return its line.

    Args:
        method: ALIGNER+MERGER.
        seed: the run's seed.
        server_round: the round, from 1.
        outcome: the merge.
        model: the architecture.
        evaluation: the images to evaluate on, which nothing was chosen by.
        bytes_up: sent by all clients in this round.
        bytes_down: sent to all clients in this round.
        refused: why replies of this round could not be used, or did not come.
    """
    found = evaluate(model, outcome.merged.states, evaluation, outcome.merged.combine)
    return {
        **_what(method, seed, server_round),
        "status": "ok",
        "error": None,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "per_class_accuracy": list(found.per_class_accuracy),
        "seconds": round(outcome.seconds, 3),
        "bytes_up": bytes_up if outcome.merged.uses_clients else 0,
        "bytes_down": bytes_down if outcome.merged.uses_clients else 0,
        "server_examples": outcome.merged.server_examples,
        "server_labels": outcome.merged.server_labels,
        "models": len(outcome.merged.states),
        "diagnostics": {**({"refused": list(refused)} if refused else {}), **outcome.diagnostics},
    }


def bytes_up(updates: Sequence[Update], method: str) -> int:
    """Return the bytes that clients send for a method: their models, and the statistics that it needs.

    Args:
        updates: the clients'.
        method: ALIGNER+MERGER.
    """
    kinds = [kind for kind in STATISTICS if kind in needs([method])]
    told = sum(num_bytes(update.statistics.get(kind, {})) for update in updates for kind in kinds)
    return told + sum(update.num_bytes for update in updates)


def failed(*, method: str, seed: int, server_round: int, reason: str) -> Result:
    """Return the line of a merge that failed.

    Args:
        method: ALIGNER+MERGER.
        seed: the run's seed.
        server_round: the round, from 1.
        reason: what stopped it.
    """
    return {**_what(method, seed, server_round), "status": "failed", "error": reason}


def _what(method: str, seed: int, server_round: int) -> Result:
    return {"method": method, "seed": seed, "round": server_round}
