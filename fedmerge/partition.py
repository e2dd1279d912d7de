"""Partitions: how images are divided among clients, as lists of indices, and stratified samples.

Flower's partitioners (flwr-datasets) divide by Dirichlet's distribution; importing them takes seconds, so the divisions
that are a cut of the list are here, and give what Flower's give.
All work on the labels alone, in an order that the seed has shuffled.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedmerge.names import PARTITIONS
from fedmerge.seeds import fork, generator
from fedmerge.settings import ConfigurationError, known

if TYPE_CHECKING:
    from flwr_datasets.partitioner import Partitioner

ATTEMPTS = 10
"""Draws with derived seeds before a partition is given up (Flower's Dirichlet draws 11 times in each)."""

SHARDS_PER_CLIENT = 2
MAJORITY_SHARE = 0.8


def divide(labels: Tensor, num_clients: int, *, name: str, alpha: float, minimum: int, seed: int) -> tuple[Tensor, ...]:
    """Divide examples among clients: each example belongs to exactly one client (to every client, if it is "same").

    Args:
        labels: (examples,) integer classes, of any values.
        num_clients: how many clients.
        name: one of `fedmerge.names.PARTITIONS`.
        alpha: concentration > 0 of the Dirichlet partitions: the smaller, the more the clients differ.
        minimum: examples that every client has at least; never fewer than one.
        seed: the run's seed.

    Returns:
        For each client its sorted int64 indices into `labels`.

    Raises:
        ConfigurationError: for an unknown name, an impossible division, or one that was not found in `ATTEMPTS` draws.

    Example:
        >>> divide(torch.tensor([0, 0, 5, 5]), 2, name="disjoint", alpha=1.0, minimum=2, seed=0)
        (tensor([0, 1]), tensor([2, 3]))
    """
    known("partition", name, PARTITIONS)
    least = max(1, minimum)
    if num_clients < 1:
        raise ConfigurationError(f"--clients must be at least 1, got {num_clients}")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ConfigurationError(f"--alpha must be greater than 0, got {alpha}")
    owners = 1 if name == "same" else num_clients
    if owners * least > len(labels):
        raise ConfigurationError(
            f"{owners} clients (--clients) with at least {least} images each (--min-client-examples) need "
            f"{owners * least} images, but there are {len(labels)} for the clients: lower one of them"
        )
    classes, compact = np.unique(labels.numpy(force=True), return_inverse=True)
    if name == "disjoint" and num_clients > len(classes):
        raise ConfigurationError(
            f"--partition disjoint gives each client classes of its own: {num_clients} clients (--clients) are more "
            f"than the {len(classes)} classes of the clients' images"
        )
    for attempt in range(ATTEMPTS):
        stream = generator(seed, "partition", attempt)
        order = torch.randperm(len(labels), generator=stream)
        shuffled = torch.from_numpy(compact)[order]
        parts = _DEALERS[name](_Division(shuffled, num_clients, alpha, least, stream))
        if parts and min(map(len, parts)) >= least:
            return tuple(order[part].sort().values for part in parts)
    skew, advice = (f" with --alpha {alpha:g}", "raise --alpha, or lower") if "dirichlet" in name else ("", "lower")
    raise ConfigurationError(
        f"--partition {name}{skew} did not give each of {num_clients} clients {least} images in {ATTEMPTS} attempts: "
        f"{advice} --clients or --min-client-examples"
    )


def stratified_sample(labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw examples without replacement so that each class has its share, rounded down or up.

    Every `len(labels) / size`-th example is taken of a list that is sorted by class and shuffled within the classes.

    Args:
        labels: (examples,) integer classes.
        size: how many to draw, from 0 to all.
        generator: source of randomness.

    Returns:
        (size,) sorted int64 indices into `labels`.

    Raises:
        ValueError: if there are not that many examples.
    """
    total = len(labels)
    if not 0 <= size <= total:
        raise ValueError(f"expected a size of at most {total} examples, got {size}")
    order = torch.randperm(total, generator=generator)
    by_class = order[torch.argsort(labels[order], stable=True)]
    start = torch.randint(max(1, total), (), generator=generator)
    return by_class[(torch.arange(size) * total + start) // max(1, size)].sort().values


def stratified_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Order examples so that each beginning of the order holds every class by its share, to about one example.

    Example i of the n_c of a class, in random order, comes at (i + u_c) / n_c, with u_c drawn from [0, 1).

    Args:
        labels: (examples,) integer classes.
        generator: source of randomness.

    Returns:
        (examples,) int64 indices into `labels`.

    Example:
        >>> labels = torch.tensor([0, 0, 0, 0, 1, 1])
        >>> labels[stratified_order(labels, torch.Generator().manual_seed(0))[:3]].sort().values
        tensor([0, 0, 1])
    """
    classes, inverse = torch.unique(labels, return_inverse=True)
    sizes = inverse.bincount(minlength=len(classes))
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[torch.argsort(inverse[shuffled], stable=True)]
    of_class = inverse[by_class]
    ranks = torch.arange(len(labels)) - (sizes.cumsum(0) - sizes)[of_class]
    offsets = torch.rand(len(classes), generator=generator, dtype=torch.float64)
    return by_class[torch.argsort((ranks + offsets[of_class]) / sizes[of_class], stable=True)]


@dataclass(frozen=True)
class _Division:
    """What is to be divided: the labels are 0..C-1 and in random order."""

    labels: Tensor
    num_clients: int
    alpha: float
    least: int
    generator: torch.Generator


def _iid(task: _Division) -> list[Tensor]:
    return list(torch.arange(len(task.labels)).tensor_split(task.num_clients))


def _dirichlet(task: _Division) -> list[Tensor]:
    from flwr_datasets.partitioner import DirichletPartitioner

    partitioner = DirichletPartitioner(
        task.num_clients,
        partition_by="label",
        alpha=float(task.alpha),
        min_partition_size=task.least,
        self_balancing=False,
        shuffle=False,
        seed=fork(task.generator),
    )
    return _by_flower(partitioner, task)


def _dirichlet_equal(task: _Division) -> list[Tensor]:
    from flwr_datasets.partitioner import InnerDirichletPartitioner

    sizes = [len(part) for part in torch.arange(len(task.labels)).tensor_split(task.num_clients)]
    partitioner = InnerDirichletPartitioner(
        sizes, partition_by="label", alpha=float(task.alpha), shuffle=False, seed=fork(task.generator)
    )
    return _by_flower(partitioner, task)


def _quantity(task: _Division) -> list[Tensor]:
    shares = np.random.default_rng(fork(task.generator)).dirichlet([task.alpha] * task.num_clients)
    spare = len(task.labels) - task.num_clients * task.least
    bounds = np.floor(np.cumsum(shares)[:-1] * spare).astype(int)
    sizes = task.least + np.diff(bounds, prepend=0, append=spare)
    return list(torch.split(torch.arange(len(task.labels)), sizes.tolist()))


def _disjoint(task: _Division) -> list[Tensor]:
    classes = torch.randperm(int(task.labels.max()) + 1, generator=task.generator)
    own = [classes[client :: task.num_clients] for client in range(task.num_clients)]
    return [torch.isin(task.labels, each).nonzero()[:, 0] for each in own]


def _eighty_twenty(task: _Division) -> list[Tensor]:
    if task.num_clients == 1:
        return [torch.arange(len(task.labels))]
    classes = torch.randperm(int(task.labels.max()) + 1, generator=task.generator)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    for rank, each in enumerate(classes):
        positions = (task.labels == each).nonzero()[:, 0]
        cut = round(MAJORITY_SHARE * len(positions))
        half = int(rank >= math.ceil(len(classes) / 2))
        sides[half].append(positions[:cut])
        sides[1 - half].append(positions[cut:])
    pools = [torch.cat(side) for side in sides]
    members = (math.ceil(task.num_clients / 2), task.num_clients // 2)
    return [pools[client % 2][client // 2 :: members[client % 2]] for client in range(task.num_clients)]


def _shards(task: _Division) -> list[Tensor]:
    # flwr-datasets' ShardPartitioner leaves out the examples that do not fill a shard.
    shards = torch.argsort(task.labels, stable=True).tensor_split(SHARDS_PER_CLIENT * task.num_clients)
    hands = torch.randperm(len(shards), generator=task.generator).view(task.num_clients, SHARDS_PER_CLIENT)
    return [torch.cat([shards[shard] for shard in hand]) for hand in hands.tolist()]


def _same(task: _Division) -> list[Tensor]:
    return [torch.arange(len(task.labels))] * task.num_clients


def _by_flower(partitioner: Partitioner, task: _Division) -> list[Tensor]:
    """Return what a partitioner of flwr-datasets makes of the labels: nothing if its draws failed."""
    from datasets import Dataset

    partitioner.dataset = Dataset.from_dict({"label": task.labels.numpy(), "position": np.arange(len(task.labels))})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # one for each redraw, with advice that the final error repeats
        try:
            parts = [partitioner.load_partition(client).with_format("numpy") for client in range(task.num_clients)]
        except ValueError:  # too few examples after its 11 draws, or priors that underflowed to 0 (a tiny alpha)
            return []
    return [torch.from_numpy(part["position"][:]) for part in parts]


_DEALERS: Mapping[str, Callable[[_Division], list[Tensor]]] = {
    "iid": _iid,
    "dirichlet": _dirichlet,
    "dirichlet-equal": _dirichlet_equal,
    "disjoint": _disjoint,
    "80-20": _eighty_twenty,
    "shards": _shards,
    "same": _same,
    "quantity": _quantity,
}
