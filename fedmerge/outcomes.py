"""What a merge ends in: the model, its steps if it has several, and what is to be known of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmerge.families import Family
from fedmerge.problem import Merged
from fedmerge.state import StateDict

SEPARATOR = " > "
"""Between a method's name and a step's."""


@dataclass(frozen=True)
class Outcome:
    """A merge that is done.

    Attributes:
        merged: the model, or the ensemble.
        diagnostics: of the screening, the alignment and the merge, in JSON's types.
        seconds: wall time of all.
        steps: of a merge that has several, in their order (`fedmerge.mixed`).
        families: of clients whose architectures differ, with their merged models.
        note: what a reader must know of it, in a few words.
        peak_bytes: growth of memory in alignment and merge, at its highest, above what there was when each began, of
            the greatest of several steps: of a GPU's where they ran on one, else of this process's anonymous memory;
            None where the system does not tell.
    """

    merged: Merged
    diagnostics: dict[str, Any]
    seconds: float
    steps: tuple[Step, ...] = ()
    families: tuple[tuple[Family, StateDict], ...] = ()
    note: str = ""
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Step:
    """A part of a merge that is a result of its own: what a family of clients gives, or all families together.

    Attributes:
        kind: what it is.
        outcome: its model, or ensemble.
        clients: partition ids of those that are in it.
        model: the name of its architecture, as in `Update.model`; None: of several.
    """

    kind: str
    outcome: Outcome
    clients: tuple[int, ...]
    model: str | None = None
