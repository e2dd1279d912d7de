"""A federation's data: who owns which images, by the protocol that keeps results true.

The server's images, the clients' and those of the evaluation are three disjoint sets. Final runs evaluate on the test
files; development evaluates on a cut of the training files that is the same for every seed, and never reads the test
files' images. The server may use some of its images alone, and know the classes of some of these; who owns what does
not depend on it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fedmerge import data
from fedmerge.config import Config
from fedmerge.data import Dataset
from fedmerge.examples import Part
from fedmerge.memory import available
from fedmerge.partition import divide, stratified_order, stratified_sample
from fedmerge.problem import UNKNOWN, Examples
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError

DEVELOPMENT_SHARE = 1 / 6
DEVELOPMENT_MOST = 10_000

RESIDENT_SHARE = 1 / 8
"""Of a device's free memory: what all training files may take there, beside those of other actors and the training."""

RELEVANT = (
    "data",
    "data_dir",
    "split",
    "clients",
    "client_examples",
    "partition",
    "alpha",
    "min_client_examples",
    "server_examples",
    "server_labels",
    "server_limit",
    "seed",
)
"""The settings that a federation's data depend on."""


@dataclass(frozen=True)
class Federation:
    """The images of the clients, of the server and of the evaluation.

    Attributes:
        dataset: where they come from; all its training and test files, whoever owns them.
        split: "test", or "development".
        pool_indices: the training files that belong to clients, sorted.
        server_indices: the training files that the server owns, sorted.
        evaluation_indices: test files if the split is "test", training files if it is "development", sorted.
        partition: for each client its sorted indices into `pool_indices`, and so into `pool`.
        labelled_indices: the training files of the server whose classes it knows, sorted; None: all of its files.
        used_indices: the training files of the server that are used, sorted; None: all of its files.
    """

    dataset: Dataset
    split: str
    pool_indices: Tensor
    server_indices: Tensor
    evaluation_indices: Tensor
    partition: tuple[Tensor, ...]
    labelled_indices: Tensor | None = None
    used_indices: Tensor | None = None

    @property
    def classes(self) -> tuple[str, ...]:
        """The names of the classes."""
        return self.dataset.classes

    @cached_property
    def pool(self) -> Examples:
        """All clients' images together, a copy."""
        return self.dataset.train[self.pool_indices]

    @cached_property
    def server(self) -> Examples:
        """All that the server uses of what it owns, and the classes that it knows."""
        used = self.server_indices if self.used_indices is None else self.used_indices
        examples = self.dataset.train[used]
        if self.labelled_indices is None:
            return examples
        known = torch.isin(used, self.labelled_indices)
        return Examples(examples.images, examples.labels.where(known, UNKNOWN))

    @cached_property
    def evaluation(self) -> Examples:
        """What models are evaluated on."""
        return self.dataset.test if self.split == "test" else self.dataset.train[self.evaluation_indices]

    def client(self, partition_id: int) -> Examples:
        """Return a client's images.

        Args:
            partition_id: the client's number, from 0.

        Raises:
            ValueError: if there is no such client.
        """
        return self.dataset.train[self._indices_of(partition_id)]

    def client_labels(self, partition_id: int) -> Tensor:
        """Return the classes of a client's images, (images,)."""
        return self.dataset.train.labels[self._indices_of(partition_id)]

    def part(self, partition_id: int, device: torch.device) -> Part:
        """Return a client's images on a device.

        A device other than the CPU is sent all training files once, if they leave room there for others that do so,
        and the client's alone otherwise.

        Args:
            partition_id: the client's number, from 0.
            device: where they are wanted.
        """
        train, index = self.dataset.train, self._indices_of(partition_id)
        if device.type == "cpu":
            return Part(train, index)
        if device not in self._resident:
            room = available(device)
            fits = room is None or train.images.nbytes <= RESIDENT_SHARE * room
            self._resident[device] = train.to(device) if fits else None
        resident = self._resident[device]
        return Part.of_all(train[index].to(device)) if resident is None else Part(resident, index)

    @cached_property
    def _resident(self) -> dict[torch.device, Examples | None]:
        """All training files, by the device; None where there is no room for them."""
        return {}

    def _indices_of(self, partition_id: int) -> Tensor:
        if not 0 <= partition_id < len(self.partition):
            raise ValueError(f"expected a partition id from 0 to {len(self.partition) - 1}, got {partition_id}")
        return self.pool_indices[self.partition[partition_id]]

    def label_counts(self) -> list[list[int]]:
        """Return for each client its number of images of each class."""
        labels = self.dataset.train.labels[self.pool_indices]
        return [labels[part].bincount(minlength=len(self.classes)).tolist() for part in self.partition]

    def indices(self) -> dict[str, object]:
        """Return who owns what, in JSON's types.

        Indices count the training files, and those of the evaluation the test files if the split is "test".
        """
        return {
            "data": self.dataset.name,
            "split": self.split,
            "classes": list(self.classes),
            "clients": [self.pool_indices[part].tolist() for part in self.partition],
            "server": self.server_indices.tolist(),
            **({} if self.labelled_indices is None else {"server_labelled": self.labelled_indices.tolist()}),
            **({} if self.used_indices is None else {"server_used": self.used_indices.tolist()}),
            "evaluation": self.evaluation_indices.tolist(),
            "label_counts": self.label_counts(),
        }


def load(config: Config) -> Federation:
    """Return the federation of a configuration; the last ones stay in memory, their images shared.

    Args:
        config: its fields in `RELEVANT` matter, the others do not. What cannot be had is a ConfigurationError.
    """
    return _load(Config(min_completed=1, **{name: getattr(config, name) for name in RELEVANT}))


@functools.lru_cache(maxsize=4)
def _load(config: Config) -> Federation:
    dataset = data.load(config.data, config.data_dir)
    labels = dataset.train.labels
    free = torch.ones(len(labels), dtype=torch.bool)
    if config.split == "development":
        size = min(DEVELOPMENT_MOST, round(DEVELOPMENT_SHARE * len(labels)))
        evaluation = _take(free, labels, size, generator(0, "development"))
    else:
        evaluation = torch.arange(len(dataset.test))
    wanted = config.server_examples + config.client_examples
    if wanted > int(free.sum()):
        raise ConfigurationError(
            f"--server-examples {config.server_examples} and --client-examples {config.client_examples} need {wanted} "
            f"training images, but '{config.data}' has {int(free.sum())} for them (--split {config.split})"
        )
    server = _take(free, labels, config.server_examples, generator(config.seed, "server"))
    pool = free.nonzero()[:, 0]
    if config.client_examples:
        chosen = torch.randperm(len(pool), generator=generator(config.seed, "clients"))[: config.client_examples]
        pool = pool[chosen.sort().values]
    partition = divide(
        labels[pool],
        config.clients,
        name=config.partition,
        alpha=config.alpha,
        minimum=config.min_client_examples,
        seed=config.seed,
    )
    order = stratified_order(labels[server], generator(config.seed, "server", "labels"))
    labelled, used = (
        None if size < 0 else server[order[:size].sort().values] for size in (config.server_labels, config.server_limit)
    )
    return Federation(dataset, config.split, pool, server, evaluation, partition, labelled, used)


def _take(free: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Draw a stratified sample of the examples marked in `free`, unmark them there, and return their indices."""
    candidates = free.nonzero()[:, 0]
    taken = candidates[stratified_sample(labels[candidates], size, generator)]
    free[taken] = False
    return taken
