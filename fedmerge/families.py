"""Families: clients whose architectures differ, and can become one (`fedmerge.adapt`).

A family has one architecture into which all its members' models are brought before they are aligned and merged: the
server's where they can become that, or else that of the members into which most clients can go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fedmerge.adapt import Adaptation, adaptation
from fedmerge.calibrate import calibrate
from fedmerge.problem import Problem, Update
from fedmerge.state import StateDict

Ways = Mapping[str, Adaptation | None]
"""How models of some architectures, by name, become models of one; None for that one itself."""


@dataclass(frozen=True)
class Family:
    """Clients whose models can become models of one architecture.

    Attributes:
        target: the architecture's name, as in `Update.model`.
        updates: the clients' models as they came, by partition id.
        ways: how each member's architecture becomes the target.
    """

    target: str
    updates: tuple[Update, ...]
    ways: Ways

    @property
    def clients(self) -> tuple[int, ...]:
        """The members' partition ids."""
        return tuple(update.partition_id for update in self.updates)

    @property
    def relations(self) -> dict[str, str]:
        """What differs between each member's architecture and the target: "same", "width", "depth" or both."""
        return {name: "same" if way is None else way.kind for name, way in self.ways.items()}

    @property
    def label_counts(self) -> tuple[int, ...] | None:
        """The members' images of each class together; None where one keeps its own to itself."""
        counts = [update.label_counts for update in self.updates if update.label_counts]
        return tuple(map(sum, zip(*counts, strict=True))) if len(counts) == len(self.updates) else None

    def problem(self, problem: Problem) -> Problem:
        """Return the problem of a server that wants the family's architecture.

        Args:
            problem: the server's side.
        """
        if not self.target and not problem.others:
            return problem
        return problem.changed(model=problem.architecture(self.target), others={}, start=None)

    def adapted(self, problem: Problem) -> list[Update]:
        """Return the members' models as models of the target: updates of the family's own problem.

        Args:
            problem: the server's side; its images show which units are alike, and re-estimate BatchNorm statistics.
        """
        found = []
        for update in self.updates:
            state = _brought(problem, update.state, self.ways[update.model], self.target)
            found.append(replace(update, state=state, statistics={}, model=""))
        return found


def families_of(problem: Problem, updates: Sequence[Update]) -> tuple[Family, ...]:
    """Return the families, those of most clients first; of equals the server's, then that of the first client.

    Args:
        problem: the server's side, with all architectures.
        updates: at least one, by partition id.
    """
    left = list(dict.fromkeys(update.model for update in updates))
    clients = {name: sum(update.model == name for update in updates) for name in left}
    found: dict[str, Ways] = {}
    if ways := _ways(problem, left, ""):
        found[""] = ways
        left = [name for name in left if name not in ways]
    while left:
        reached = {target: _ways(problem, left, target) for target in left}
        target = max(left, key=lambda name: (sum(clients[one] for one in reached[name]), _size(problem, name)))
        found[target] = reached[target]
        left = [name for name in left if name not in found[target]]
    families = [
        Family(target, tuple(update for update in updates if update.model in ways), ways)
        for target, ways in found.items()
    ]
    return tuple(sorted(families, key=lambda family: (-len(family.updates), family.target != "", family.clients[0])))


def next_starts(
    problem: Problem, updates: Sequence[Update], merged: Sequence[tuple[Family, StateDict]]
) -> dict[int, StateDict]:
    """Return what clients of other architectures than the server's go on with in the next round, by partition id.

    That is their family's merged model, brought back into their own architecture; or their own last model, where that
    cannot be done or they are in no family.

    Args:
        problem: the server's side, with all architectures.
        updates: of the last round.
        merged: each family with its merged model.
    """
    found: dict[int, StateDict] = {update.partition_id: update.state for update in updates if update.model}
    for family, state in merged:
        for name in filter(None, family.ways):
            back = _ways(problem, [family.target], name)
            if back:
                brought = _brought(problem, state, back[family.target], name)
                found |= {update.partition_id: brought for update in family.updates if update.model == name}
    return found


def _ways(problem: Problem, names: Sequence[str], target: str) -> Ways:
    """Return how those of the architectures that can become the target do so."""
    goal, images = problem.architecture(target), problem.data.images
    others = {name: adaptation(problem.architecture(name), goal, images) for name in names if name != target}
    possible: dict[str, Adaptation | None] = {name: way for name, way in others.items() if way is not None}
    return {name: possible.get(name) for name in names if name == target or name in possible}


def _brought(problem: Problem, state: StateDict, way: Adaptation | None, target: str) -> StateDict:
    """Return a model as one of the target; BatchNorm statistics are re-estimated where units have become fewer."""
    if way is None:
        return state
    found, images = way(state, problem.data.images), problem.data.images
    narrowed = way.widths is not None and way.widths.narrowed
    return calibrate(problem.architecture(target), found, images) if narrowed else found


def _size(problem: Problem, name: str) -> int:
    return sum(parameter.numel() for parameter in problem.architecture(name).parameters())
