"""Small merging problems that tests share."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedmerge.basis import Permutation, rebase
from fedmerge.catalogue import STATISTICS
from fedmerge.models import create
from fedmerge.problem import UNKNOWN, Examples, Problem, Update
from fedmerge.seeds import generator
from fedmerge.statistics import collect
from fedmerge.train import LocalTraining, fit

SHAPE = (1, 6, 6)


def blobs(count: int, seed: int, classes: tuple[int, ...] = (0, 1, 2)) -> Examples:
    """Images of classes that are easy, but not trivial, to tell apart."""
    centres = torch.randn(3, *SHAPE, generator=generator(0, "centres"))
    stream = generator(seed, "blobs")
    labels = torch.tensor(classes)[torch.randint(len(classes), (count,), generator=stream)]
    return Examples(centres[labels] + 1.5 * torch.randn(count, *SHAPE, generator=stream), labels)


def problem_of(name: str, server_examples: int = 60) -> Problem:
    model = create(name, shape=SHAPE, num_classes=3, seed=99)
    start = create(name, shape=SHAPE, num_classes=3, seed=0).state_dict()  # that of `trained(…, shared=True)`
    return Problem(model, blobs(server_examples, seed=7), batch_size=16, start=start)


def trained(name: str, count: int = 3, *, shared: bool = False) -> list[Update]:
    """Updates of clients that see two of three classes each, fresh copies each time."""
    updates = [_trained(name, client, shared) for client in range(count)]
    return [replace(update, state={key: tensor.clone() for key, tensor in update.state.items()}) for update in updates]


@functools.cache
def _trained(name: str, client: int, shared: bool) -> Update:
    model = create(name, shape=SHAPE, num_classes=3, seed=0 if shared else client)
    examples = blobs(60 + client, seed=client, classes=(client % 3, (client + 1) % 3))
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state, _ = fit(model, start, examples, LocalTraining(epochs=4, lr=0.02), generator=generator(client, "fit"))
    return Update(state, len(examples), client, tuple(examples.labels.bincount(minlength=3).tolist()))


def with_statistics(problem: Problem, updates: list[Update], kinds: Sequence[str] = STATISTICS) -> list[Update]:
    """Return the updates with statistics of their models, each on other images."""
    found = []
    for update in updates:
        images, stream = blobs(20, seed=update.partition_id).images, generator(update.partition_id, "statistics")
        told = collect(kinds, problem.model, update.state, images.to(problem.data.images), generator=stream)
        found.append(replace(update, statistics=told))
    return found


def shuffled(problem: Problem, update: Update, seed: int) -> Update:
    """Return the same function, its units renamed."""
    stream = generator(seed, "shuffle")
    changes = [Permutation(torch.randperm(space.size, generator=stream)) for space in problem.spaces]
    return replace(update, state=rebase(update.state, problem.spaces, changes), partition_id=update.partition_id + 100)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


class TwoLayers(nn.Sequential):
    """A net without ReLU's symmetry of scale, small enough for oracles in float64."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 5), nn.Tanh(), nn.Linear(5, 3))


def doubles(count: int) -> tuple[Problem, list[dict[str, Tensor]]]:
    """A problem and models of it in float64, small enough for oracles."""
    generator = torch.Generator().manual_seed(11)
    model = TwoLayers().double().eval()
    states = [
        {
            key: torch.randn(tensor.shape, generator=generator, dtype=torch.float64) * 0.3
            for key, tensor in model.state_dict().items()
        }
        for _ in range(count)
    ]
    examples = blobs(30, seed=9)
    return Problem(model, Examples(examples.images.double(), examples.labels), batch_size=8), states


def hiding(problem: Problem, hidden: Tensor) -> Problem:
    """Return the problem with some classes unknown."""
    return replace(problem, data=Examples(problem.data.images, problem.data.labels.where(~hidden, UNKNOWN)))
