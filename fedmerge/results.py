"""Lines of results.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from fedmerge.catalogue import STATISTICS
from fedmerge.methods import needs
from fedmerge.outcomes import SEPARATOR, Outcome, Step
from fedmerge.privacy import guarantee
from fedmerge.problem import Examples, Merged, Problem, Update
from fedmerge.runs import Result
from fedmerge.state import num_bytes
from fedmerge.train import evaluate


def measured(
    *,
    method: str,
    seed: int,
    server_round: int,
    outcome: Outcome,
    problem: Problem,
    evaluation: Examples,
    bytes_up: int,
    bytes_down: int | None,
    refused: Sequence[str] = (),
    privacy: Mapping[str, Any] | None = None,
) -> Result:
    """Evaluate a merge and return its line.

    Args:
        method: ALIGNER+MERGER.
        seed: the run's seed.
        server_round: the round, from 1.
        outcome: the merge.
        problem: has the architectures.
        evaluation: the images to evaluate on, which nothing was chosen by.
        bytes_up: sent by all clients in this round.
        bytes_down: sent to all clients in this round; None: not known.
        refused: why replies of this round could not be used, or did not come.
        privacy: what the clients' training guarantees; a merge is post-processing, and changes nothing of it.
    """
    merged = outcome.merged
    models = [problem.architecture(name) for name in merged.models] or problem.model
    found = evaluate(models, merged.states, evaluation, merged.combine)
    return {
        **_what(method, seed, server_round),
        "status": "ok",
        "error": None,
        "accuracy": found.accuracy,
        "loss": found.loss,
        "per_class_accuracy": list(found.per_class_accuracy),
        "seconds": round(outcome.seconds, 3),
        "peak_bytes": outcome.peak_bytes,
        "bytes_up": bytes_up if merged.uses_clients else 0,
        "bytes_down": bytes_down if merged.uses_clients else 0,
        "server_examples": merged.server_examples,
        "server_labels": merged.server_labels,
        "models": len(merged.states),
        **({"architectures": list(merged.models)} if any(merged.models) else {}),
        **({"note": outcome.note} if outcome.note else {}),
        **({"privacy": dict(privacy)} if privacy and merged.uses_clients else {}),
        "diagnostics": {**({"refused": list(refused)} if refused else {}), **outcome.diagnostics},
    }


def measured_with_steps(
    *,
    method: str,
    seed: int,
    server_round: int,
    outcome: Outcome,
    problem: Problem,
    evaluation: Examples,
    updates: Sequence[Update],
    bytes_down: int,
    server_model: str,
    refused: Sequence[str] = (),
) -> list[tuple[Result, Merged]]:
    """Evaluate a merge and its steps; return their lines, the steps' first, with what was evaluated.

    Args:
        method: ALIGNER+MERGER.
        seed: the run's seed.
        server_round: the round, from 1.
        outcome: the merge.
        problem: has the architectures.
        evaluation: the images to evaluate on, which nothing was chosen by.
        updates: the clients'.
        bytes_down: sent to all clients in this round.
        server_model: the name of the server's architecture, for the names of steps.
        refused: why replies of this round could not be used, or did not come.
    """
    common: dict[str, Any] = {
        "seed": seed,
        "server_round": server_round,
        "problem": problem,
        "evaluation": evaluation,
        "privacy": guarantee(updates),
    }
    found = []
    for step in outcome.steps:
        of_step = [update for update in updates if update.partition_id in step.clients]
        noted = replace(step.outcome, note=f"{len(of_step)} client{'s' * (len(of_step) != 1)}")
        name = step_name(method, step, server_model)
        up = bytes_up(of_step, method)
        found.append((measured(method=name, outcome=noted, bytes_up=up, bytes_down=None, **common), noted.merged))
    up = bytes_up(updates, method)
    line = measured(method=method, outcome=outcome, bytes_up=up, bytes_down=bytes_down, refused=refused, **common)
    return [*found, (line, outcome.merged)]


def step_name(method: str, step: Step, server_model: str) -> str:
    """Return the name under which a step's result is kept.

    Args:
        method: ALIGNER+MERGER.
        step: of the merge.
        server_model: the name of the server's architecture.
    """
    return f"{method}{SEPARATOR}{step.kind}" + ("" if step.model is None else f":{step.model or server_model}")


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
