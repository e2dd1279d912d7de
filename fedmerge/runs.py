"""The run folder: everything that a run leaves behind, written so that a killed run can go on.

    RUN/config.json                                    command, configuration, versions
    RUN/partitions/seed-0.json                         indices of the clients', the server's and the evaluation images
    RUN/updates/seed-0/round-1/client-00003.safetensors    what a client sent, its metadata in the header
    RUN/updates/seed-0/round-1/fisher/client-00003.safetensors    a statistic that it was asked for (or gram/)
    RUN/models/seed-0/round-1/METHOD.safetensors       merged models (METHOD-00001-… for an ensemble's members)
    RUN/results.jsonl                                  a line for each method, seed and round; the last one counts
    RUN/log.txt, RUN/report.html, RUN/figures/

A file is there whole or not at all (it is written beside its place and moved), and one process at a time may write.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fedmerge.catalogue import STATISTICS
from fedmerge.config import Config
from fedmerge.errors import FedmergeError
from fedmerge.machine import versions
from fedmerge.outcomes import SEPARATOR
from fedmerge.problem import Update
from fedmerge.state import MalformedState, StateDict, read_checkpoint, serialize
from fedmerge.updatefiles import read_update, update_to_bytes
from fedmerge.wholefiles import TEMPORARY, append_line, write_whole

logger = logging.getLogger(__name__)

Result = dict[str, Any]

ARCHITECTURE = "architecture"
"""In the header of a merged model's file, the name of its architecture; absent: it is the server's."""
LOCK = ".lock"


class RunError(FedmergeError):
    """A run folder that cannot be used as asked, with what to do."""


@dataclass(frozen=True)
class Run:
    """A run folder. Use `Run.create` or `Run.open`."""

    path: Path

    @classmethod
    def create(cls, path: Path, command: str, config: Config, **settings: object) -> Run:
        """Make a new run folder.

        Args:
            path: the folder; it must not exist, or be empty.
            command: the subcommand that writes it.
            config: the federation.
            settings: what else is needed to repeat the command, in JSON's types.

        Raises:
            RunError: if the folder is in use, not empty or not writable.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
            _require_empty(path)
            run = cls(path.resolve())
            content = {"command": command, "config": config.to_mapping(), **settings, "versions": versions()}
            with run.locked():
                _require_empty(path)  # again: another process may have made its run here in the meantime
                run.write("config.json", (json.dumps(content, indent=2) + "\n").encode())
        except OSError as error:
            raise RunError(f"cannot write the run folder {path}: {error.strerror}; give another --out") from error
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run folder.

        Args:
            path: the folder.

        Raises:
            RunError: if it is not a run folder.
        """
        if not (path / "config.json").is_file():
            raise RunError(f"{path} is not a run folder: it has no config.json")
        return cls(path.resolve())

    @property
    def settings(self) -> dict[str, Any]:
        """The content of config.json."""
        content = self.read_json("config.json")
        if not (isinstance(content.get("command"), str) and isinstance(content.get("config"), dict)):
            raise RunError(f"{self.path / 'config.json'} is damaged: it lacks the command or its configuration")
        return content

    @property
    def config(self) -> Config:
        """The federation's configuration."""
        return Config.from_mapping(self.settings["config"])

    @property
    def has_last_round(self) -> bool:
        """Whether a method came to the end of the last round: there is nothing to go on with."""
        rounds = self.config.rounds
        return any(result["status"] == "ok" and result["round"] >= rounds for result in self.results())

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other processes from writing into the folder; the lock ends with the process, however it ends.

        Raises:
            RunError: if another process has it.
        """
        lock = FileLock(self.path / LOCK, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunError(f"another process is writing into {self.path}: wait for it, or give another --out") from None
        try:
            yield
        finally:
            lock.release()

    def save_partition(self, seed: int, indices: Mapping[str, object]) -> None:
        """Store a seed's indices, or check that they are those stored before.

        Args:
            seed: the seed.
            indices: what `Federation.indices` returns.

        Raises:
            RunError: if the folder holds others: the data or the libraries have changed since.
        """
        content = json.dumps(indices).encode()
        path = self.path / "partitions" / f"seed-{seed}.json"
        if not path.exists():
            self.write(path, content)
        elif path.read_bytes() != content:
            raise RunError(
                f"{path} holds another partition than these settings give now: the data or the libraries have changed "
                "since the run was started; start a new run"
            )

    def has_update(self, seed: int, server_round: int, partition_id: int) -> bool:
        """Return whether a client's update is stored."""
        return self._update_path(seed, server_round, partition_id).exists()

    def save_update(self, seed: int, server_round: int, update: Update) -> None:
        """Store a client's update, once.

        Args:
            seed: the run's seed.
            server_round: the round, from 1.
            update: what the client sent.
        """
        if self.has_update(seed, server_round, update.partition_id):
            return
        path = self._update_path(seed, server_round, update.partition_id)
        for kind, tensors in update.statistics.items():  # before the update, whose file says that all is there
            self.write(path.parent / kind / path.name, serialize(tensors))
        self.write(path, update_to_bytes(update))

    def load_update(self, seed: int, server_round: int, partition_id: int) -> Update:
        """Return one stored update.

        Raises:
            RunError: if the file is damaged, or another client's.
        """
        path = self._update_path(seed, server_round, partition_id)
        told = {kind: path.parent / kind / path.name for kind in STATISTICS}
        try:
            update = read_update(path)
            statistics = {kind: read_checkpoint(file)[0] for kind, file in told.items() if file.exists()}
        except MalformedState as error:
            raise RunError(f"{error}: delete the file, and --resume the run to train this client again") from error
        if update.partition_id != partition_id:
            raise RunError(f"{path} holds the update of client {update.partition_id}: move it to its place")
        return replace(update, statistics=statistics)

    def load_updates(self, seed: int, server_round: int = 1) -> list[Update]:
        """Return the stored updates of a seed and round, by partition id."""
        folder = self._update_path(seed, server_round, 0).parent
        names = [path.stem.removeprefix("client-") for path in folder.glob("client-*.safetensors")]
        ids = sorted(int(name) for name in names if re.fullmatch("[0-9]{5,20}", name))
        return [self.load_update(seed, server_round, partition_id) for partition_id in ids]

    def save_model(
        self, seed: int, server_round: int, method: str, states: Sequence[StateDict], models: Sequence[str] = ()
    ) -> None:
        """Store a merged model, or an ensemble's members, and the names of architectures that are not the server's."""
        folder = self.path / "models" / f"seed-{seed}" / f"round-{server_round}"
        for index, state in enumerate(states):
            part = f"-{index + 1:05}-of-{len(states):05}" if len(states) > 1 else ""
            about = {ARCHITECTURE: models[index]} if models and models[index] else {}
            self.write(folder / f"{file_name(method)}{part}.safetensors", serialize(state, about))

    def append(self, result: Mapping[str, object]) -> None:
        """Add a line to results.jsonl; it is on the disk when this returns."""
        append_line(self.path / "results.jsonl", json.dumps(result).encode())

    def results(self) -> list[Result]:
        """Return the results, the last line of each method, seed and round, in the order of the run's methods.

        A method's steps come before it.
        """
        path = self.path / "results.jsonl"
        latest: dict[tuple[object, ...], Result] = {}
        for line in path.read_bytes().splitlines() if path.exists() else ():
            try:
                result = json.loads(line)
                latest[str(result["method"]), int(result["seed"]), result.get("round")] = result
            except (ValueError, TypeError, KeyError, RecursionError):  # the line that a killed process was writing
                logger.warning("%s has an unfinished line, left out: %.60s", path, line.decode(errors="replace"))
        methods: list[str] = self.settings.get("methods", [])
        places = {method: place for place, method in enumerate(methods)}
        return sorted(
            latest.values(), key=lambda result: places.get(result["method"].partition(SEPARATOR)[0], len(places))
        )

    @contextmanager
    def logging(self) -> Iterator[None]:
        """Append what fedmerge and Flower log to log.txt inside the block."""
        handler = logging.FileHandler(self.path / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        levels = {logging.getLogger(name): logging.getLogger(name).level for name in ("fedmerge", "flwr")}
        for item in levels:
            item.addHandler(handler)
            item.setLevel(logging.INFO)
        try:
            yield
        finally:
            for item, level in levels.items():
                item.removeHandler(handler)
                item.setLevel(level)
            handler.close()

    def write(self, name: Path | str, content: bytes) -> Path:
        """Write a file of the run, whole or not at all, and return its path.

        Args:
            name: the file's, in the run folder.
            content: of the file.

        Raises:
            RunError: if it would not be in the run folder.
        """
        path = self.path / name
        if not path.resolve().is_relative_to(self.path.resolve()):
            raise RunError(f"{path} is not in the run folder {self.path}: nothing is written elsewhere")
        write_whole(path, content)
        return path

    def read_json(self, name: str) -> dict[str, Any]:
        """Return the object in a JSON file of the run.

        Args:
            name: the file's, below the folder.

        Raises:
            RunError: if it cannot be read, or is no JSON object.
        """
        try:
            content = json.loads((self.path / name).read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise RunError(f"{self.path / name} is damaged: {error}") from error
        if not isinstance(content, dict):
            raise RunError(f"{self.path / name} is damaged: expected an object")
        return content

    def _update_path(self, seed: int, server_round: int, partition_id: int) -> Path:
        folder = self.path / "updates" / f"seed-{seed}" / f"round-{server_round}"
        return folder / f"client-{partition_id:05}.safetensors"


def _require_empty(path: Path) -> None:
    # a lock and half a file are what a killed process leaves behind
    if any(item.suffix != TEMPORARY and item.name != LOCK for item in path.iterdir()):
        raise RunError(
            f"the run folder {path} is not empty: give another --out, or --resume to go on with the run in it"
        )


def file_name(method: str) -> str:
    """Return a method's name as a file name.

    Example:
        >>> file_name("activations+np:groups=channel")
        'activations+np_groups=channel'
    """
    return re.sub(r"[^A-Za-z0-9.+=_-]", "_", method)
