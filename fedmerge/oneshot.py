"""One shot: the clients' updates go in, one model comes out."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedmerge.catalogue import ALIGNERS, MERGERS, SCREENS
from fedmerge.conforming import conformed
from fedmerge.memory import Peak, foreseen
from fedmerge.merge.best import best_client
from fedmerge.merge.finetune import FineTune
from fedmerge.merge.objective import Objective
from fedmerge.methods import parse_method, resolve
from fedmerge.outcomes import Outcome
from fedmerge.problem import LABEL_COUNTS, LABELS, Aligned, Merged, Problem, Update
from fedmerge.screening import Screening
from fedmerge.screening import screen as screen_clients
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError, known
from fedmerge.state import StateDict, num_bytes
from fedmerge.statistics import rebased

logger = logging.getLogger(__name__)

ALIGNED_AT_ONCE = 2
"""States that an alignment holds where memory is short: one as it comes, and as it goes to its file."""


@dataclass(frozen=True)
class Alignment:
    """Updates in one basis.

    Attributes:
        updates: sorted by partition id, their states in the reference's basis.
        server_examples: how many of the server's examples were used.
        server_labels: whether their labels were used.
        diagnostics: in JSON's types.
        seconds: wall time.
        screening: of the clients, in JSON's types; empty if there was none.
        peak_bytes: as in `Outcome`.
    """

    updates: tuple[Update, ...]
    server_examples: int
    server_labels: bool
    diagnostics: dict[str, Any]
    seconds: float
    screening: dict[str, Any] = field(default_factory=dict)
    peak_bytes: int | None = None


def merge_updates(
    problem: Problem, updates: Sequence[Update], *, align: str, merge: str, seed: int, screen: str = "auto"
) -> Outcome:
    """Leave out the clients that are of no use, align the others' models and merge them.

    Args:
        problem: the server's side.
        updates: at least one, in any order; nothing depends on it.
        align: an aligner's name, with options.
        merge: a merger's name, with options.
        seed: of everything random in the merge.
        screen: "auto", or "off" to merge every client.

    Raises:
        ConfigurationError: for an unknown name.
        MalformedState: if an update does not fit the model.
    """
    problem, alignment = prepare(problem, updates, align=align, merge=merge, seed=seed, screen=screen)
    return merge_aligned(problem, alignment, merge=merge, seed=seed)


def prepare(
    problem: Problem, updates: Sequence[Update], *, align: str, merge: str, seed: int, screen: str = "auto"
) -> tuple[Problem, Alignment]:
    """Do all that comes before the merge itself; mergers of one `lesson` may share it if `screens` is the same.

    Args:
        problem: the server's side.
        updates: at least one, in any order.
        align: an aligner's name, with options.
        merge: a merger's name, with options.
        seed: of everything random in it.
        screen: "auto", or "off" to merge every client.

    Returns:
        The problem as the merger learns from it (`teach`), and the updates in one basis.
    """
    started = time.perf_counter()
    parse_method(f"{align}+{merge}")
    found = screened(problem, updates, align=align, merge=merge, screen=screen)
    if found is not None:
        updates = found.updates
    problem = teach(problem, updates, merge=merge)
    alignment = align_updates(problem, updates, align=align, seed=seed)
    if found is not None:
        alignment = replace(
            alignment,
            server_examples=max(alignment.server_examples, found.server_examples),
            server_labels=alignment.server_labels or found.judge == "labels",
            screening=found.diagnostics,
        )
    return problem, replace(alignment, seconds=time.perf_counter() - started)


def screened(problem: Problem, updates: Sequence[Update], *, align: str, merge: str, screen: str) -> Screening | None:
    """Return what screening finds, or None where the method, or the setting, does without.

    Args:
        problem: the server's side.
        updates: at least one, in any order.
        align: an aligner's name, with options.
        merge: a merger's name, with options.
        screen: "auto", or "off".
    """
    known("way of screening", screen, SCREENS)
    if screen == "off" or len(updates) < 2 or not screens(align, merge):
        return None
    learned = objective(merge)
    use_labels = (learned is None or learned.uses_labels) and not problem.blind
    judges = problem if learned is None else learned.seen(problem)
    return screen_clients(judges, conformed(problem, updates), use_labels=use_labels)


def screens(align: str, merge: str) -> bool:
    """Return whether a method screens the clients: one that makes use of the server's images anyway, and of clients.

    The plain averages and ensembles of models as they came, and the server's own training, stay what they are known as.

    Args:
        align: an aligner's name, with options.
        merge: a merger's name, with options.
    """
    merger = resolve("merger", merge, MERGERS)
    own_training = isinstance(merger, FineTune) and merger.start == "fresh" and merger.targets == "labels"
    return not own_training and (align != "identity" or isinstance(merger, Objective))


def objective(merge: str) -> Objective | None:
    """Return what a merger learns from; None if it descends no loss.

    Args:
        merge: a merger's name, with options.
    """
    merger = resolve("merger", merge, MERGERS)
    return merger.objective if isinstance(merger, Objective) else None


def lesson(problem: Problem, merge: str) -> Objective | None:
    """Return what of a merger `teach` depends on: where it is equal, problem and alignment may be shared.

    Args:
        problem: the server's side.
        merge: a merger's name, with options.
    """
    learned = objective(merge)
    by_labels = learned is not None and learned.targets == "labels"
    return None if by_labels and problem.data.labelled else learned


def check_needs(merge: str, *, labels: bool = True, label_counts: bool = True) -> None:
    """Raise if a merger cannot work with what will be known; it can be called before clients train.

    Args:
        merge: a merger's name, with options.
        labels: whether classes of the server's images are known.
        label_counts: whether the clients tell theirs.

    Raises:
        ConfigurationError: says what is missing and what does without.
    """
    needs: frozenset[str] = getattr(resolve("merger", merge, MERGERS), "needs", frozenset())
    if LABELS in needs and not labels:
        raise ConfigurationError(
            f"--merge {merge} needs the classes of the server's images, and none is known (--server-labels): choose a "
            "method that needs none, as np-distill or finetune-distill"
        )
    if LABEL_COUNTS in needs and not label_counts:
        raise ConfigurationError(
            f"--merge {merge} needs every client's label counts, and they keep them to themselves "
            "(--no-label-counts): choose what needs none (teacher=mean, or the plain mean or ensemble)"
        )


def teach(problem: Problem, updates: Sequence[Update], *, merge: str) -> Problem:
    """Return the problem as the merger learns from it; others get it as it is.

    A merger that learns from labels gets the labelled images alone; one that learns a teacher's targets gets all
    images, with these in place of the labels. The teacher is made of the clients' models as they came. Aligners then
    choose on its targets too, so that a method without labels depends on none.

    Args:
        problem: the server's side.
        updates: at least one, in any order.
        merge: a merger's name, with options.
    """
    of_merger = objective(merge)
    if of_merger is None or len(updates) < 2:
        return problem
    return of_merger.teach(problem, conformed(problem, updates))


def align_updates(problem: Problem, updates: Sequence[Update], *, align: str, seed: int) -> Alignment:
    """Bring the clients' models into the basis of the best client (the largest, below 50 examples).

    Args:
        problem: the server's side.
        updates: at least one, with distinct partition ids.
        align: an aligner's name, with options.
        seed: of everything random in it.

    Raises:
        ValueError: if there is no update, or two have the same partition id.
    """
    started = time.perf_counter()
    ordered = conformed(problem, updates)
    states = [update.state for update in ordered]
    aligner = resolve("aligner", align, ALIGNERS)
    reference = 0
    losses: list[float] = []
    diagnostics: dict[str, Any] = {"aligner": align}
    if align != "identity" and len(ordered) > 1:
        reference, losses = best_client(problem, ordered)
        diagnostics["reference"] = ordered[reference].partition_id
    copies = 0 if align == "identity" else ALIGNED_AT_ONCE if problem.low_memory else len(states)
    with _foreseen(problem, copies, f"an alignment of {len(states)} models") as peak:
        found: Aligned = aligner(problem, states, reference, generator=generator(seed, "align"))
    aligned = [replace(update, state=state) for update, state in zip(ordered, found.states, strict=True)]
    if getattr(aligner, "parts", False):  # parts of a mean, which no label counts can weigh
        aligned = [replace(update, label_counts=None) for update in aligned]
    if any(update.statistics for update in ordered):
        aligned = [
            replace(update, statistics=_following(problem, update, found, place))
            for place, update in enumerate(aligned)
        ]
    seconds = time.perf_counter() - started
    logger.info("aligned %d models by '%s' in %.1f s", len(ordered), align, seconds)
    return Alignment(
        tuple(aligned),
        found.server_examples,
        (found.server_labels or bool(losses)) and not problem.blind,
        {**diagnostics, **found.diagnostics},
        seconds,
        peak_bytes=peak.bytes,
    )


def merge_aligned(problem: Problem, alignment: Alignment, *, merge: str, seed: int) -> Outcome:
    """Merge models that are in one basis.

    Args:
        problem: the server's side.
        alignment: from `align_updates`; several mergers may share it.
        merge: a merger's name, with options.
        seed: of everything random in it.
    """
    started = time.perf_counter()
    merger = resolve("merger", merge, MERGERS)
    count = len(alignment.updates)
    held = getattr(merger, "held", None)
    states = held(count) if held else 1
    if problem.low_memory:
        states = getattr(merger, "held_low", states)
    with _foreseen(problem, states, f"'{merge}' of {count} models") as peak:
        found: Merged = merger(problem, alignment.updates, generator=generator(seed, "merge"))
    seconds = alignment.seconds + time.perf_counter() - started
    logger.info("merged %d models by '%s' in %.1f s", len(alignment.updates), merge, seconds)
    return Outcome(
        replace(
            found,
            server_examples=max(found.server_examples, alignment.server_examples),
            server_labels=found.server_labels or alignment.server_labels,
        ),
        {
            **({"screen": alignment.screening} if alignment.screening else {}),
            "align": alignment.diagnostics,
            "merge": {"merger": merge, **found.diagnostics},
        },
        seconds,
        peak_bytes=None if peak.bytes is None else max(peak.bytes, alignment.peak_bytes or 0),
    )


def _foreseen(problem: Problem, states: int, purpose: str) -> Peak:
    return foreseen(num_bytes(problem.model.state_dict()), states, purpose, problem.data.images.device)


def _following(problem: Problem, update: Update, found: Aligned, place: int) -> Mapping[str, StateDict]:
    """Return the statistics of an update in its new basis; none where they cannot follow."""
    if found.changes is None:
        return {}
    changes = found.changes[place]
    return rebased(update.statistics, update.state, problem.spaces, changes) if changes else update.statistics
