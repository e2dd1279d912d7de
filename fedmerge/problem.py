"""What an aligner and a merger may see, and what they give back: the types that join the mathematics.

`Problem` holds the server's side: the architecture, its feature spaces and the data that the server owns, with the
protocol by which every choice is made on them. `Update` is what a client sent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fedmerge.basis import BasisChange
from fedmerge.examples import UNKNOWN as UNKNOWN
from fedmerge.examples import Examples as Examples
from fedmerge.examples import stratified_parts
from fedmerge.seeds import generator
from fedmerge.spaces import Space
from fedmerge.spilled import spilled
from fedmerge.state import StateDict
from fedmerge.symmetry import symmetry

Progress = Callable[[str, int, int], None]
"""Called with what is being done, steps done and steps in all."""

LABELS, LABEL_COUNTS = "labels", "label counts"
"""What a merger may need: a class of a server's image at least; every client's number of images of each class."""

FEWEST_TO_CHOOSE = 50
FEWEST_TO_SPLIT = 500
NUM_PARTS = 5
"""Of which one validates, where one is enough."""
NUM_FOLDS = 3
"""Of a cross-validation. Five took half as long again and chose no better (one seed of development images)."""

Combination = Callable[[Tensor], Tensor]
"""Maps log-probabilities (members, examples, classes) to an ensemble's (examples, classes), in float64."""


def silent(task: str, done: int, total: int) -> None:
    """Report no progress."""


@dataclass(frozen=True)
class Update:
    """What a client sent: its trained model and what it tells of its data.

    Attributes:
        state: the state dict, in the model's dtypes.
        num_examples: training images of the client, more than 0.
        partition_id: the client's number; updates are always sorted by it.
        label_counts: images of each class, or None where the client keeps them to itself.
        metrics: loss, accuracy and seconds of the local training, as reported.
        num_bytes: size of the state as it was sent.
        statistics: of its data under its model, by kind (`fedmerge.statistics`); those that were asked for.
        model: the name of its architecture among the problem's others; empty: it is the server's.
        layers: how many of its last layers it trained and sent, the others being those of its start; 0: all.
    """

    state: StateDict
    num_examples: int
    partition_id: int
    label_counts: tuple[int, ...] | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    num_bytes: int = 0
    statistics: Mapping[str, StateDict] = field(default_factory=dict)
    model: str = ""
    layers: int = 0


@dataclass(frozen=True)
class Merged:
    """What a merger gives back.

    Attributes:
        states: one state dict, or the members of an ensemble.
        server_examples: how many of the server's examples were used.
        server_labels: whether their labels were used.
        uses_clients: False for a control that needs no client.
        diagnostics: what was chosen and why, in JSON's types.
        combine: how an ensemble's log-probabilities become one prediction; None: the mean of the probabilities.
        models: the name of each state's architecture, as in `Update.model`; empty: all are of the server's.
    """

    states: tuple[dict[str, Tensor], ...]
    server_examples: int = 0
    server_labels: bool = False
    uses_clients: bool = True
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    combine: Combination | None = None
    models: tuple[str, ...] = ()

    @property
    def state(self) -> dict[str, Tensor]:
        """The merged model.

        Raises:
            ValueError: for an ensemble, which is no single model.
        """
        if len(self.states) != 1:
            raise ValueError(f"an ensemble of {len(self.states)} models is not one model")
        return self.states[0]


@dataclass(frozen=True)
class Problem:
    """A merge to be done: the architecture and all the data that the server owns.

    The protocol of every choice: from 500 examples of known classes on, a fixed part to learn on and a fixed validation
    part; from 50, cross-validation over three folds and then a refit on all; below, defaults and no choice. An example
    of a class that neither is known nor a teacher tells is in all parts to learn on, and in no validation part.

    Attributes:
        model: the architecture; its own weights are never used.
        data: the server's examples, on the device where the merge runs.
        seed: of the split; mergers and aligners get their own generators.
        batch_size: examples in a step of a learned merge.
        progress: called on long work.
        blind: the data's labels and targets are a teacher's, and the server's own labels have no part in them.
        taught: a teacher has a part in the data's labels or targets.
        start: the weights that every client's training started from; None where they are not one, or not known.
        others: the architectures that clients may have and the server has not, by name.
        truth_judges: what is learned is judged by the known classes, whatever the targets that it learns from.
        mixtures: images made of the server's, with targets: they are learned from, and nothing else.
        apart: it for each split, taught without the labels of the validation part; (): those taught nothing anyway.
        lesson: what was chosen of the teacher, for the diagnostics.
        low_memory: states that are only read lie in files (`fedmerge.spilled`), and a learned mixture has a coefficient
            for each output channel, which takes no moments of the parameters.
    """

    model: nn.Module
    data: Examples
    seed: int = 0
    batch_size: int = 32
    progress: Progress = silent
    blind: bool = False
    taught: bool = False
    start: StateDict | None = None
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    truth_judges: bool = False
    mixtures: Examples | None = None
    apart: tuple[Problem, ...] = ()
    lesson: Mapping[str, Any] = field(default_factory=dict)
    low_memory: bool = False

    def __post_init__(self) -> None:
        if len(self.data) == 0:
            raise ValueError("the server owns no examples: merging needs at least one (--server-examples)")

    def architecture(self, name: str) -> nn.Module:
        """Return an architecture by its name in `others`; the server's for the empty name.

        Args:
            name: as in `Update.model`.

        Raises:
            ValueError: names those that there are.
        """
        if name and name not in self.others:
            known = ", ".join(map(repr, self.others)) or "no other"
            raise ValueError(f"unknown model {name!r:.60}: beside the server's, clients may have {known}")
        return self.others[name] if name else self.model

    @cached_property
    def spaces(self) -> tuple[Space, ...]:
        """The architecture's feature spaces.

        Raises:
            UnsupportedOperation: if they cannot be derived.
        """
        return symmetry(self.model, self.data.images[:2])

    @cached_property
    def labelled(self) -> Examples:
        """The examples whose classes are known."""
        return self.data if self.data.labelled else self.data[self.data.known]

    @cached_property
    def may_choose(self) -> bool:
        """Whether there are enough examples of known classes to choose anything by validation."""
        return len(self.labelled) >= FEWEST_TO_CHOOSE

    @cached_property
    def splits(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """Pairs of indices (part to learn on, validation part): one, three, or none (see the class)."""
        if not self.may_choose:
            return ()
        judges = self.data.known.cpu().nonzero()[:, 0]
        one_is_enough = len(judges) >= FEWEST_TO_SPLIT
        number = NUM_PARTS if one_is_enough else NUM_FOLDS
        parts = stratified_parts(self.data.labels.cpu()[judges], number, generator(self.seed, "server", "folds"))
        if one_is_enough:
            parts = parts[:1]
        everything = torch.arange(len(self.data))
        return tuple((everything[~torch.isin(everything, judges[part])], judges[part]) for part in parts)

    @cached_property
    def folds(self) -> tuple[tuple[Examples, Examples], ...]:
        """Pairs of (part to learn on, validation part), by `splits`."""
        judges = [replace(side.data, targets=None) if self.truth_judges else side.data for side in self.sides]
        parts = zip(self.sides, judges, self.splits, strict=True)
        return tuple((side.data[learn], judge[validation]) for side, judge, (learn, validation) in parts)

    @property
    def sides(self) -> tuple[Problem, ...]:
        """The problem as it is taught for each split."""
        return self.apart or (self,) * len(self.splits)

    @property
    def refits(self) -> bool:
        """Whether, after the choice, a model is fitted again on all examples."""
        return len(self.splits) != 1

    @cached_property
    def learn(self) -> Examples:
        """The examples that statistics of a finished model are estimated on."""
        return self.data if self.refits else self.folds[0][0]

    @cached_property
    def validation(self) -> Examples:
        """The examples that judge models to which nothing was fitted: the validation part, or all of known classes."""
        return self.labelled if self.refits else self.folds[0][1]

    def kept(self, state: StateDict) -> StateDict:
        """Return a state that is held for later, to be read alone: in a file, where memory is short."""
        return spilled(state) if self.low_memory else state

    def restricted(self, data: Examples) -> Problem:
        """Return the problem of a server that owns `data` alone."""
        return self.changed(data=data)

    def changed(self, **changes: Any) -> Problem:
        """Return the problem with other attributes; spaces of the model that are derived already are kept."""
        part = replace(self, **({"apart": ()} | changes if "data" in changes else changes))
        if "spaces" in vars(self) and part.model is self.model:
            vars(part)["spaces"] = self.spaces
        return part


class Aligner(Protocol):
    """Finds for each model the basis changes that bring it into the reference's basis.

    A frozen dataclass; its fields are its hyper-parameters.
    """

    def __call__(
        self, problem: Problem, states: Sequence[StateDict], reference: int, *, generator: torch.Generator
    ) -> Aligned:
        """Align all models to `states[reference]`.

        Args:
            problem: the server's side.
            states: the models, at least one.
            reference: index of the model whose basis is kept.
            generator: the only source of randomness.
        """


@dataclass(frozen=True)
class Aligned:
    """What an aligner gives back.

    Attributes:
        states: the models in the reference's basis, in the order in which they came; fresh, or unchanged by `identity`.
        server_examples: how many of the server's examples were used.
        server_labels: whether their labels were used.
        diagnostics: in JSON's types.
        changes: of each model, one for each space, or () where nothing has changed; None: more than these.
    """

    states: tuple[dict[str, Tensor], ...]
    server_examples: int = 0
    server_labels: bool = False
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    changes: tuple[Sequence[BasisChange], ...] | None = None


class Merger(Protocol):
    """Makes one model (or an ensemble) of the clients' aligned models.

    A frozen dataclass; its fields are its hyper-parameters. One that cannot work without some knowledge tells so by an
    attribute `needs`, a set of `LABELS` and `LABEL_COUNTS`. One that works also where the uniform mean of the states is
    all that they mean (aligners whose attribute `parts` is true) tells so by an attribute `takes_parts`. One that takes
    updates of several architectures (`Update.model`) tells so by an attribute `takes_architectures`. One that holds
    more than one state beside K models tells how many, at least, by a method `held(K)`; if they are fewer with
    `Problem.low_memory`, by an attribute `held_low`.
    """

    def __call__(self, problem: Problem, updates: Sequence[Update], *, generator: torch.Generator) -> Merged:
        """Merge the updates, at least one, sorted by partition id; nothing that is given is changed.

        Args:
            problem: the server's side.
            updates: the clients' models, in one basis.
            generator: the only source of randomness.
        """
