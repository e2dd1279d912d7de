"""Averages of the clients' weights.

FedAvg: McMahan, Moore, Ramage, Hampson, Agüera y Arcas: Communication-Efficient Learning of Deep Networks from
Decentralized Data, AISTATS 2017, arXiv 1602.05629. Unlike it, and unlike Flower's, integer buffers are not averaged
(they are the first client's), and BatchNorm statistics are re-estimated on the server's images, if it has any.

The last layer may be averaged differently: its row of class c knows that class from one client's data, so it is
weighted by how many examples of the class a client has.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.calibrate import calibrate, has_statistics
from fedmerge.merge.heads import best_scale, find_head, head_rows, scaled_logits
from fedmerge.merge.teacher import SMOOTHING, check_smoothing, class_weights, known_counts
from fedmerge.problem import LABEL_COUNTS, Merged, Problem, Update
from fedmerge.state import SMALL, StateDict
from fedmerge.train import predict


@dataclass(frozen=True)
class Average:
    """A weighted mean of the clients' models.

    Attributes:
        weights: "examples" (FedAvg: by the clients' numbers of examples) or "uniform".
        calibrate: re-estimate BatchNorm statistics on the server's images; otherwise they are averaged too.
        head: how the last layer's rows are weighted: "body" (as all the rest) or "counts" (by the clients' label
            counts).
        smoothing: examples added to each label count, at least 0.
        temperature: divide the logits by the temperature that has the least loss on validation data.
    """

    weights: str = "uniform"
    calibrate: bool = True
    head: str = "body"
    smoothing: float = SMOOTHING
    temperature: bool = False

    def __post_init__(self) -> None:
        if self.head not in ("body", "counts"):
            raise ValueError(f"head must be 'body' or 'counts', got {self.head!r}")
        check_smoothing(self.smoothing)
        if self.weights not in ("examples", "uniform"):
            raise ValueError(f"weights must be 'examples' or 'uniform', got {self.weights!r}")

    @property
    def takes_parts(self) -> bool:
        """Whether it is the uniform mean."""
        return self.weights == "uniform" and self.head == "body"

    @property
    def needs(self) -> frozenset[str]:
        """What it cannot do without."""
        return frozenset([LABEL_COUNTS] if self.head == "counts" else [])

    def __call__(
        self,
        problem: Problem,
        updates: Sequence[Update],
        *,
        generator: torch.Generator,
    ) -> Merged:
        """Average the updates."""
        states = [update.state for update in updates]
        shares = [float(update.num_examples) if self.weights == "examples" else 1.0 for update in updates]
        merged = mean_state(states, shares)
        if self.head == "counts" and len(updates) > 1:
            merged |= mean_head(problem, updates, self.smoothing)
        used = Merged((merged,))
        if self.calibrate and has_statistics(problem.model):
            images = problem.data.images  # all of them: which part is for learning depends on the labels
            used = Merged((calibrate(problem.model, merged, images),), server_examples=len(images))
        if self.temperature and problem.may_choose and len(updates) > 1:
            return _with_temperature(problem, used.state)
        return used


def mean_head(problem: Problem, updates: Sequence[Update], smoothing: float) -> dict[str, Tensor]:
    """Return the mean of the clients' heads, each row weighted by the clients' counts of its class.

    Args:
        problem: the architecture.
        updates: the clients', with label counts.
        smoothing: examples added to each count.

    Raises:
        ConfigurationError: if a client keeps its counts to itself, or the architecture has no head.
    """
    counts = torch.tensor(known_counts(updates, "a head weighted by counts"), dtype=torch.float64)
    states = [update.state for update in updates]
    head = find_head(problem.model, states[0], problem.data.images.shape[1:])
    return head_rows(states, head, class_weights(counts, smoothing))


def _with_temperature(problem: Problem, state: StateDict) -> Merged:
    images, labels = problem.validation.images, problem.validation.labels
    scale = best_scale(predict(problem.model, state, images), labels)
    head = find_head(problem.model, state, images.shape[1:])
    return Merged(
        (scaled_logits(problem.model, state, head, scale, images),),
        server_examples=len(problem.data),
        server_labels=not problem.blind,
        diagnostics={"temperature": 1 / scale},
    )


def mean_state(states: Sequence[StateDict], weights: Sequence[float] | None = None) -> dict[str, Tensor]:
    """Return the weighted mean of state dicts: θ₀ + Σ_k w_k (θ_k − θ₀), exact where all are equal.

    Args:
        states: at least one, of one architecture.
        weights: non-negative, not all 0; they are normalised. Default: equal.

    Returns:
        A fresh state dict; integer tensors are the first state's.

    Raises:
        ValueError: if the weights are unusable.

    Example:
        >>> mean_state([{"w": torch.tensor([1.0])}, {"w": torch.tensor([4.0])}], [2, 1])
        {'w': tensor([2.])}
    """
    weights = [1.0] * len(states) if weights is None else list(weights)
    total = sum(weights)
    if len(weights) != len(states) or min(weights) < 0 or not 0 < total < float("inf"):
        raise ValueError(f"expected {len(states)} weights, none negative and not all 0, got {weights}")
    first, *others = states
    result = {name: tensor if tensor.is_floating_point() else tensor.clone() for name, tensor in first.items()}
    for names in _groups(first):
        start = _joined(first, names)
        mean = start.clone()
        for state, weight in zip(others, weights[1:], strict=True):
            mean += (_joined(state, names) - start).mul_(weight / total)
        parts = torch.split(mean, [first[name].numel() for name in names])
        result |= {name: part.view(first[name].shape).clone() for name, part in zip(names, parts, strict=True)}
    return result


def _groups(state: StateDict) -> Iterator[list[str]]:
    """Yield the names of the floating-point tensors, small ones of a type together: of these, calls cost the most."""
    for _, alike in itertools.groupby(state, lambda name: state[name].dtype):
        group, size = list[str](), 0
        for name in alike:
            if state[name].is_floating_point():
                if group and size + state[name].numel() > SMALL:
                    yield group
                    group, size = [], 0
                group.append(name)
                size += state[name].numel()
        if group:
            yield group


def _joined(state: StateDict, names: Sequence[str]) -> Tensor:
    """Return all numbers of some tensors, those of one where they lie."""
    flat = [state[name].detach().reshape(-1) for name in names]
    return flat[0] if len(flat) == 1 else torch.cat(flat)
