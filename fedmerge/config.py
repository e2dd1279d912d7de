"""The configuration of a federation: one frozen dataclass.

The command's flags, the TOML keys, Flower's run configuration and `config.json` are all made from it.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from fedmerge.catalogue import STATISTICS
from fedmerge.configcheck import check
from fedmerge.devices import Device, parse_devices
from fedmerge.methods import needs
from fedmerge.settings import ConfigurationError, Value, convert, counted, flag, key, known

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def _option(default: Value, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Config:
    """What a federation is: data, clients, training, server and machine. Each field is a flag of the command."""

    data: str = _option("digits", "data set: a name from `fedmerge list`, or folder:PATH (ImageFolder layout)")
    data_dir: str = _option("", "folder that is searched first for the data set's files")
    split: str = _option(
        "test", "what to evaluate on: 'test' files, or 'development' images cut from the training files"
    )
    model: str = _option(
        "mlp",
        "model: a name from `fedmerge list` (NAME@WIDTH scales its width), torchvision's, or package.module:function",
    )
    models: str = _option(
        "", "the clients' models in their order, NAME:COUNT,NAME:COUNT,…; empty: all have the server's, --model"
    )
    clients: int = _option(5, "number of clients")
    client_examples: int = _option(0, "training images of all clients together; 0: all that the server leaves")
    partition: str = _option("dirichlet", "how the clients' images are divided: a name from `fedmerge list`")
    alpha: float = _option(0.3, "Dirichlet concentration > 0: the smaller, the more the clients differ")
    min_client_examples: int = _option(10, "images that every client has at least")
    init: str = _option("independent", "clients start from 'independent' initialisations or from one 'shared' one")
    local_epochs: str = _option(
        "10", "passes over its data that a client trains: N, or LOW..HIGH drawn for each client"
    )
    batch_size: int = _option(32, "images in a batch, at the clients and at the server")
    lr: float = _option(0.05, "the clients' highest learning rate (SGD, decay to 0)")
    lr_schedule: str = _option("cosine", "how the clients' learning rate decays to 0 in a round: cosine or linear")
    warmup: float = _option(0.1, "share of the clients' steps in which the learning rate first rises, in [0, 1)")
    momentum: float = _option(0.9, "the clients' momentum, in [0, 1)")
    weight_decay: float = _option(0.0, "the clients' weight decay")
    augment: str = _option(
        "none",
        "the clients' images are in each step moved by pixels ('shifts'), mirrored left to right ('flips'), or 'both'",
    )
    proximal_mu: float = _option(0.0, "FedProx: pull of the clients' weights toward the round's start, at least 0")
    dp_clip: float = _option(0.0, "differential privacy (DP-SGD): most norm of an image's gradient; 0: no privacy")
    dp_noise: float = _option(0.0, "differential privacy: the noise's standard deviation, in units of --dp-clip")
    dp_delta: float = _option(0.0, "δ at which clients tell their ε, below 1; 0: 1 / a client's number of images")
    anchor: bool = _option(
        False, "clients rename their units to fit the public model by weights before they send theirs"
    )
    rounds: int = _option(1, "federated rounds; each starts from the last merged model")
    clients_per_round: int = _option(0, "clients that a round asks, drawn anew by the seed in each; 0: all")
    server_examples: int = _option(100, "images that the server owns, in no client and in no evaluation")
    server_labels: int = _option(-1, "how many of the server's images it knows the classes of; -1: of all, 0: of none")
    server_limit: int = _option(
        -1, "how many of the server's images are used, those whose classes it knows among them; -1: all"
    )
    screen: str = _option(
        "auto", "'auto' leaves out clients whose models the server's images show to be useless; or 'off'"
    )
    align: str = _option("auto", "how the clients' models are aligned: a name from `fedmerge list`")
    merge: str = _option(
        "np", "how the aligned models are merged: a name from `fedmerge list`, NAME:KEY=VALUE sets options"
    )
    seed: int = _option(0, "seed of everything that is random")
    devices: str = _option(
        "",
        "weak clients, the first ones, DEVICE:COUNT,…: epochs=N, float16, layers=N (trains and sends its last N layers "
        "alone; needs --init shared), or several joined by +",
    )
    upload_dtype: str = _option("float32", "numbers in a client's reply: float32, or float16 for half the bytes")
    label_counts: bool = _option(True, "clients tell the server how many images of each class they have")
    label_count_noise: float = _option(
        0.0, "scale of the noise that clients add to their label counts, whose ε is 1 / scale; 0: none"
    )
    client_metrics: bool = _option(True, "clients tell how well their trained models do on their own images")
    client_statistics: str = _option(
        "", "what clients send beside their model: fisher, gram or fisher/gram; what methods need is always asked for"
    )
    min_completed: int = _option(2, "fewer good updates than this fail the round")
    timeout: float = _option(3600.0, "seconds to wait for the clients in a round")
    client_cpus: float = _option(1.0, "CPUs of a client in the simulation")
    client_gpus: float = _option(0.0, "GPUs of a client in the simulation; fractions share one")
    batched_clients: int = _option(
        0,
        "clients whose small models a simulation trains side by side, to the same numbers but for rounding; 1: one by "
        "one; 0: up to 64 of the mlp where clients have a GPU, all others one by one",
    )
    ray_address: str = _option("", "address of a running Ray cluster; empty: start Ray on this machine")
    device: str = _option("auto", "where models run: cpu, cuda, cuda:N, or auto (cuda where the process has one)")
    low_memory: bool = _option(
        False, "merges hold few models: what is only read lies in files, coefficients are tied by channel"
    )
    threads: int = _option(1, "CPU threads of a merge; 0: all cores (results depend on it in the last bits)")
    out: str = _option("", "run folder to write; empty: a new one under runs/")

    def __post_init__(self) -> None:
        check(self)

    @property
    def epochs_range(self) -> tuple[int, int]:
        """The least and the most local epochs of a client.

        Example:
            >>> Config(local_epochs="1..5").epochs_range
            (1, 5)
        """
        match = re.fullmatch(r"\s*(\d+)\s*(?:\.\.\s*(\d+)\s*)?", self.local_epochs)
        if match is None:
            raise ConfigurationError(f"--local-epochs must be N or LOW..HIGH, got {self.local_epochs!r}")
        low = int(match[1])
        return low, int(match[2]) if match[2] else low

    @property
    def asked(self) -> int:
        """How many clients a round asks.

        Example:
            >>> Config(clients=9).asked, Config(clients=9, clients_per_round=3).asked
            (9, 3)
        """
        return self.clients_per_round or self.clients

    @functools.cached_property
    def client_models(self) -> tuple[str, ...]:
        """The name of each client's model, in their order.

        Example:
            >>> Config(clients=3, models="cnn:2,mlp:1").client_models, Config(clients=2, min_completed=1).client_models
            (('cnn', 'cnn', 'mlp'), ('mlp', 'mlp'))
        """
        if not self.models:
            return (self.model,) * self.clients
        return tuple(name for name, count in counted(flag("models"), self.models) for _ in range(count))

    @property
    def other_models(self) -> tuple[str, ...]:
        """The names of the models that clients have and the server has not.

        Example:
            >>> Config(clients=3, model="mlp", models="cnn:2,mlp:1").other_models
            ('cnn',)
        """
        return tuple(name for name in dict.fromkeys(self.client_models) if name != self.model)

    @functools.cached_property
    def client_devices(self) -> tuple[Device, ...]:
        """Each client's device, in their order.

        Example:
            >>> Config(clients=2, devices="epochs=3:1").client_devices[0].epochs
            3
        """
        return parse_devices(self.devices, self.clients)

    @property
    def num_server_images(self) -> int:
        """How many of the server's images are used.

        Example:
            >>> Config(server_examples=300).num_server_images, Config(server_limit=20).num_server_images
            (300, 20)
        """
        return self.server_examples if self.server_limit < 0 else self.server_limit

    @property
    def num_server_labels(self) -> int:
        """How many of the server's images that are used it knows the classes of.

        Example:
            >>> Config(server_examples=300).num_server_labels, Config(server_labels=0).num_server_labels
            (300, 0)
        """
        return self.num_server_images if self.server_labels < 0 else self.server_labels

    @property
    def statistics(self) -> tuple[str, ...]:
        """What clients tell of their data under their model: what is asked for, and what `merge` needs.

        Example:
            >>> Config(client_statistics="gram", merge="fisher").statistics
            ('fisher', 'gram')
        """
        wanted = {*self.client_statistics.split("/"), *needs([f"identity+{self.merge}"])}
        return tuple(kind for kind in STATISTICS if kind in wanted)

    def replace(self, **changes: Value) -> Config:
        """Return the configuration with some fields changed."""
        return dataclasses.replace(self, **changes)  # type: ignore[arg-type]

    def to_mapping(self, *, changed_only: bool = False) -> dict[str, Value]:
        """Return the fields by their kebab-case keys, those of TOML files and of Flower's run configuration.

        Args:
            changed_only: leave out the fields that have their default.
        """
        return {
            key(item.name): getattr(self, item.name)
            for item in dataclasses.fields(self)
            if not (changed_only and getattr(self, item.name) == item.default)
        }

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> Config:
        """Make a configuration from kebab-case (or snake_case) keys; keys left out have their default.

        Args:
            mapping: numbers may come as strings, as Flower's command line has them.

        Raises:
            ConfigurationError: for an unknown key or a value of the wrong type.
        """
        types = _types()
        values: dict[str, Any] = {}
        for name, value in mapping.items():
            attribute = name.replace("-", "_")
            if attribute not in types:
                known("setting", key(attribute), map(key, types))
            values[attribute] = convert(flag(attribute), value, types[attribute])
        return cls(**values)


@functools.cache
def _types() -> dict[str, type]:
    return get_type_hints(Config)


def read_toml(path: Path) -> dict[str, object]:
    """Read the settings of a TOML file, without checking them.

    Args:
        path: a flat table of the command's flags, without dashes in front.

    Raises:
        ConfigurationError: if the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(f"cannot read the configuration {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from error
