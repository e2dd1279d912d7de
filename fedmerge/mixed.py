"""The merge of a mixed federation, whose clients run different architectures; the server's is what comes out.

1. Clients whose models are of no use are left out (`fedmerge.screening`), whatever their architectures.
2. Those whose architectures can become one are a family (`fedmerge.families`): they are brought into one, and aligned
   and merged as a federation of one architecture is. A family of one client has that client's model.
3. If there are several families, or the only one is not the server's, they teach the server's architecture
   (`fedmerge.distillation`).

Methods that take clients' models as they are (ensembles, the best client, server-only training, distillation into a
fresh network) are what they are elsewhere. A plain average, which has no aligner and learns nothing, averages the
largest group of clients of exactly one architecture. Methods without labels depend on none here either.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from fedmerge import oneshot
from fedmerge.catalogue import MERGERS
from fedmerge.conforming import conformed
from fedmerge.distillation import choose_teacher, distil
from fedmerge.families import Family, families_of, next_starts
from fedmerge.merge.best import BestClient
from fedmerge.merge.descent import Schedule
from fedmerge.merge.teacher import PROPAGATED, SMOOTHING
from fedmerge.methods import method_name, needs, parse_method, resolve
from fedmerge.outcomes import Outcome, Step
from fedmerge.problem import Examples, Merged, Problem, Update
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict

logger = logging.getLogger(__name__)

LARGEST, FAMILY, ENSEMBLE = "largest-family", "family", "families-ensemble"
"""The names of steps."""


def is_mixed(updates: Sequence[Update]) -> bool:
    """Return whether any client has another architecture than the server."""
    return any(update.model for update in updates)


def check_mixed(align: str, merge: str) -> None:
    """Raise if a method cannot be used where architectures differ; it can be called before clients train.

    Args:
        align: an aligner's name, with options.
        merge: a merger's name, with options.

    Raises:
        ConfigurationError: says why, and what to use.
    """
    method = method_name(align, merge)
    if wanted := needs([method]):
        what = {"start": "one start of all clients"}.get(min(wanted), f"the statistic '{min(wanted)}' of all clients")
        raise ConfigurationError(
            f"'{method}' needs {what}, and clients of different architectures (--models) have none: use a method that "
            "needs the models alone, as np, finetune, mean, ensemble or fresh-distill"
        )
    if align != "identity" and _takes_all(merge):
        raise ConfigurationError(
            f"'{method}': {merge} takes clients' models of any architectures as they are (--models), and nothing is "
            f"aligned: use {merge} alone"
        )


def may_end_elsewhere(align: str, merge: str) -> bool:
    """Return whether a method may end in a single model of another architecture than the server's.

    Args:
        align: an aligner's name, with options.
        merge: a merger's name, with options.
    """
    merger = resolve("merger", merge, MERGERS)
    return isinstance(merger, BestClient) or not (_takes_all(merge) or oneshot.screens(align, merge))


def merge_federation(
    problem: Problem, updates: Sequence[Update], *, align: str, merge: str, seed: int, screen: str = "auto"
) -> Outcome:
    """Merge clients' models of any architectures; those of one are merged by `fedmerge.oneshot.merge_updates`.

    Args:
        problem: the server's side, with all architectures.
        updates: at least one, in any order; nothing depends on it.
        align: an aligner's name, with options.
        merge: a merger's name, with options.
        seed: of everything random in the merge.
        screen: "auto", or "off" to merge every client.
    """
    parse_method(f"{align}+{merge}")
    if not is_mixed(updates):
        return oneshot.merge_updates(problem, updates, align=align, merge=merge, seed=seed, screen=screen)
    check_mixed(align, merge)
    if _takes_all(merge):
        return oneshot.merge_updates(problem, updates, align=align, merge=merge, seed=seed, screen=screen)
    if may_end_elsewhere(align, merge):
        return _largest_group(problem, updates, merge=merge, seed=seed)
    return merge_by_families(problem, updates, align=align, merge=merge, seed=seed, screen=screen)


def merge_by_families(
    problem: Problem, updates: Sequence[Update], *, align: str, merge: str, seed: int, screen: str = "auto"
) -> Outcome:
    """Merge inside the families, and let them teach the server's architecture: steps 1 to 3 of this module.

    Args:
        problem: the server's side, with all architectures.
        updates: at least one, in any order.
        align: an aligner's name, with options.
        merge: a merger's name, with options.
        seed: of everything random in the merge.
        screen: "auto", or "off" to merge every client.
    """
    started = time.perf_counter()
    screening = oneshot.screened(problem, updates, align=align, merge=merge, screen=screen)
    kept = conformed(problem, updates if screening is None else screening.updates)
    learned = oneshot.objective(merge)
    if learned is not None and not learned.uses_labels:
        problem = problem.restricted(Examples.unlabelled(problem.data.images))
    families = families_of(problem, kept)
    outcomes = [_merge_family(problem, family, align=align, merge=merge, seed=seed) for family in families]
    diagnostics: dict[str, Any] = {
        **({} if screening is None else {"screen": screening.diagnostics}),
        "families": [_described(family) for family in families],
        "findings": _findings(families),
    }
    if len(families) == 1 and not families[0].target:
        merged = outcomes[0].merged
        steps: tuple[Step, ...] = ()
        diagnostics |= outcomes[0].diagnostics
    else:
        merged, steps = _distilled(problem, kept, families, outcomes, merge=merge, seed=seed)
        diagnostics["distillation"] = dict(merged.diagnostics)
    if screening is not None:
        merged = replace(
            merged,
            server_examples=max(merged.server_examples, screening.server_examples),
            server_labels=merged.server_labels or screening.judge == "labels",
        )
    models = list(zip(families, (outcome.merged.state for outcome in outcomes), strict=True))
    logger.info("merged %d families of %d clients by '%s'", len(families), len(kept), method_name(align, merge))
    seconds = time.perf_counter() - started
    peak = max((outcome.peak_bytes for outcome in outcomes if outcome.peak_bytes is not None), default=None)
    return Outcome(merged, diagnostics, seconds, steps, families=tuple(models), peak_bytes=peak)


def starts_after(problem: Problem, updates: Sequence[Update], outcome: Outcome) -> dict[int, StateDict]:
    """Return what clients of other architectures than the server's go on with in the next round, by partition id.

    Args:
        problem: the server's side, with all architectures.
        updates: of the round that has ended.
        outcome: of its merge.
    """
    return next_starts(problem, updates, outcome.families) if is_mixed(updates) else {}


def _takes_all(merge: str) -> bool:
    return bool(getattr(resolve("merger", merge, MERGERS), "takes_architectures", False))


def _largest_group(problem: Problem, updates: Sequence[Update], *, merge: str, seed: int) -> Outcome:
    """Average the largest group of clients of one architecture; of equals the server's, then the first client's."""
    ordered = sorted(updates, key=lambda update: update.partition_id)
    groups: dict[str, list[Update]] = {}
    for update in ordered:
        groups.setdefault(update.model, []).append(update)
    name, group = max(groups.items(), key=lambda item: (len(item[1]), item[0] == ""))
    if len(group) < 2:
        raise ConfigurationError(
            f"'{merge}' averages models of one architecture, and no two clients have the same (--models): use a method "
            "that takes any, as best-client or ensemble, or one that learns, as activations+np"
        )
    family = Family(name, tuple(group), {})
    alone = [replace(update, model="") for update in group]
    found = oneshot.merge_updates(family.problem(problem), alone, align="identity", merge=merge, seed=seed)
    clients = ", ".join(map(str, family.clients))
    return replace(
        found,
        merged=replace(found.merged, models=(name,) if name else ()),
        diagnostics={"largest-group": {"model": name, "clients": list(family.clients)}, **found.diagnostics},
        note=f"of clients {clients} alone",
    )


def _merge_family(problem: Problem, family: Family, *, align: str, merge: str, seed: int) -> Outcome:
    """Align and merge a family's models, brought into its target; a family of one has that client's."""
    started = time.perf_counter()
    of_family, updates = family.problem(problem), family.adapted(problem)
    if len(updates) == 1:
        state = {name: tensor.clone() for name, tensor in updates[0].state.items()}
        found = Outcome(Merged((state,)), {}, 0.0)
    else:
        found = oneshot.merge_updates(of_family, updates, align=align, merge=merge, seed=seed, screen="off")
    merged = replace(found.merged, models=(family.target,) if family.target else ())
    return replace(found, merged=merged, seconds=time.perf_counter() - started)


def _distilled(
    problem: Problem,
    updates: Sequence[Update],
    families: Sequence[Family],
    outcomes: Sequence[Outcome],
    *,
    merge: str,
    seed: int,
) -> tuple[Merged, tuple[Step, ...]]:
    """Let the families' merged models, or the clients' own, teach the server's architecture; return the steps too."""
    learned = oneshot.objective(merge)
    rule, smoothing = (PROPAGATED, SMOOTHING) if learned is None else (learned.teacher, learned.smoothing)
    if not all(update.label_counts for update in updates):
        rule = "mean"
    members = [_as_client(family, outcome) for family, outcome in zip(families, outcomes, strict=True)]
    teachers: dict[str, tuple[Sequence[Update], str]] = {
        "families": (members, rule),
        "families, alike": (members, "mean"),
        "clients": (updates, rule),
        "families and clients": ([*members, *updates], rule),
    }
    default = "families" if problem.data.known.any() else "clients"
    lesson = choose_teacher(problem, teachers, default, smoothing)
    begun = next((member.state for member in members if not member.model), None)
    steps = getattr(resolve("merger", merge, MERGERS), "steps", Schedule.steps)
    student = distil(problem, lesson, begun, steps=steps, generator=generator(seed, "distil"))
    alone = [
        Step(FAMILY if place or len(families) == 1 else LARGEST, outcome, family.clients, family.target)
        for place, (family, outcome) in enumerate(zip(families, outcomes, strict=True))
    ]
    if len(families) == 1:
        return student, tuple(alone)
    together = oneshot.merge_updates(
        problem, members, align="identity", merge=f"ensemble:rule={rule}:smoothing={smoothing}", seed=seed
    )
    ensemble = replace(
        together.merged,
        server_examples=max(found.merged.server_examples for found in (together, *outcomes)),
        server_labels=any(found.merged.server_labels for found in (together, *outcomes)),
    )
    seconds = sum(found.seconds for found in (together, *outcomes))
    clients = tuple(sorted(client for family in families for client in family.clients))
    return student, (*alone, Step(ENSEMBLE, replace(together, merged=ensemble, seconds=seconds), clients))


def _as_client(family: Family, outcome: Outcome) -> Update:
    """Return a family's merged model as one client that has all its members' images."""
    return Update(
        outcome.merged.state,
        sum(update.num_examples for update in family.updates),
        family.clients[0],
        family.label_counts,
        model=family.target,
    )


def _described(family: Family) -> dict[str, Any]:
    return {"model": family.target, "clients": list(family.clients), "relations": family.relations}


def _findings(families: Sequence[Family]) -> list[str]:
    """Return what speaks against a mix of families, which is logged too."""
    found = []
    for place, one in enumerate(families):
        for other in families[place + 1 :]:
            if one.label_counts and other.label_counts and not _share_a_class(one.label_counts, other.label_counts):
                found.append(
                    f"the clients {_listed(one)} and the clients {_listed(other)}, of other architectures, have no "
                    "class in common: each alone teaches its classes"
                )
    for finding in found:
        logger.warning("%s", finding)
    return found


def _share_a_class(first: Sequence[int], second: Sequence[int]) -> bool:
    return any(one and other for one, other in zip(first, second, strict=True))


def _listed(family: Family) -> str:
    return ", ".join(map(str, family.clients))
