"""Runs on a SuperLink across the network: submitted, and followed to their end.

Flower's own command does the talking, in a home folder made for the moment, so that no other project's connections,
environment or working directory matter. What it hides is told: a run that has failed is an error here, and a run that
does not start is said to wait.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from fedmerge.config import Config
from fedmerge.errors import FedmergeError
from fedmerge.settings import ConfigurationError, Value

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Heard = Callable[[str], None]
"""Called with each line of a run's log, and of what there is to say of the run."""

CONNECTION = "fedmerge"
COMPLETED, FINISHED = "finished:completed", "finished"
WAITING = ("pending", "starting")
SECONDS_TO_ANSWER = 120.0
SECONDS_BETWEEN_LOOKS, MOST_SECONDS_BETWEEN_LOOKS = 3.0, 30.0
SECONDS_TO_START = 60.0
RUN_FOLDER = re.compile(r"run folder: (/.*\S)")
"""How the ServerApp (server/app.py) tells where its results lie."""


class DeployError(FedmergeError):
    """A SuperLink, a run or a copy that does not do what was asked, with what it said."""


@dataclass(frozen=True)
class SuperLink:
    """How to reach a SuperLink.

    Attributes:
        address: HOST:PORT.
        root_certificates: PEM file of the authority that signed the server's certificate; None: no TLS.
    """

    address: str
    root_certificates: Path | None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9.\-\[\]:]+:[0-9]{1,5}", self.address):
            raise ConfigurationError(f"--superlink must be HOST:PORT, got '{self.address}'")
        if self.root_certificates is not None and not self.root_certificates.is_file():
            raise ConfigurationError(f"--root-certificates: there is no file {self.root_certificates}")

    def submit(self, app: Path, config: Config) -> int:
        """Submit a run, and return its number.

        Args:
            app: folder of the Flower app, with its pyproject.toml.
            config: of the federation; `out` must be empty or absolute, for it is a folder of the server.
        """
        settings = _app_settings(app)
        told = config.to_mapping(changed_only=True)
        if unknown := sorted(set(told) - set(settings)):
            raise ConfigurationError(f"the app in {app} has no setting {', '.join(unknown)}: is it of this version?")
        if config.out and not PurePosixPath(config.out).is_absolute():
            raise ConfigurationError(f"--out {config.out} must be absolute: it is a folder of the server's machine")
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "run.toml"
            path.write_text(_toml(told), encoding="utf-8")
            options = ("--run-config", str(path)) if told else ()
            answer = self._flwr_json("run", str(app.resolve()), CONNECTION, *options)
        return int(answer["run-id"])

    def runs(self, run_id: int | None = None) -> list[dict[str, Any]]:
        """Return what the SuperLink tells of all runs, or of one."""
        options = () if run_id is None else ("--run-id", str(run_id))
        found: list[dict[str, Any]] = self._flwr_json("ls", CONNECTION, *options)["runs"]
        return found

    def nodes(self) -> list[dict[str, Any]]:
        """Return what the SuperLink tells of its SuperNodes."""
        found: list[dict[str, Any]] = self._flwr_json("supernode", "list", CONNECTION)["nodes"]
        return found

    def register(self, public_key: Path) -> str:
        """Let the SuperNode that has the private key of `public_key` join, and return its node id."""
        return str(self._flwr_json("supernode", "register", str(public_key.resolve()), CONNECTION)["node-id"])

    def follow(self, run_id: int, *, heard: Heard) -> str | None:
        """Wait for a run's end, and return the server's run folder, if its log has told it.

        Args:
            run_id: the run.
            heard: told each line of the run's log.

        Raises:
            DeployError: if the run has failed or was stopped.
        """
        folder: str | None = None

        def line(text: str) -> None:
            nonlocal folder
            if found := RUN_FOLDER.search(text):
                folder = found[1]
            heard(text)

        began, told = time.monotonic(), False
        pause = SECONDS_BETWEEN_LOOKS
        with self._log(run_id, line) as reader:
            while True:
                [run] = self.runs(run_id)
                if run["status"].startswith(FINISHED):
                    break
                if run["status"] in WAITING and not told and time.monotonic() - began > SECONDS_TO_START:
                    told = True
                    heard(f"run {run_id} is still {run['status']}: is a SuperExec running beside the SuperLink?")
                if reader.is_alive():  # it ends with the run: looks are expensive, and can be rare
                    reader.join(pause)
                    pause = min(2 * pause, MOST_SECONDS_BETWEEN_LOOKS)
                else:
                    time.sleep(SECONDS_BETWEEN_LOOKS)
        if run["status"] != COMPLETED:
            where = f"; what arrived is in {folder} at the server" if folder else ""
            raise DeployError(
                f"run {run_id} ended as {run['status']}: {run.get('status-details') or 'no reason'}{where}"
            )
        return folder

    @contextmanager
    def _log(self, run_id: int, heard: Heard) -> Iterator[threading.Thread]:
        """Hand on the lines of a run's log inside the block, and those left at its end; gives who reads them."""
        with self._home() as environment:
            process = subprocess.Popen(
                _command("log", str(run_id), CONNECTION, "--stream"),
                env=environment,
                cwd=environment["FLWR_HOME"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            reader = threading.Thread(target=_read_lines, args=(process.stdout, heard), daemon=True)
            reader.start()
            try:
                yield reader
                reader.join(SECONDS_TO_START)  # Flower ends the log soon after the run
            finally:
                process.kill()
                process.wait()
                reader.join()
                assert process.stdout is not None
                process.stdout.close()

    def _flwr_json(self, *words: str) -> dict[str, Any]:
        """Return what a subcommand of `flwr` prints as JSON."""
        with self._home() as environment:
            try:
                done = subprocess.run(
                    _command(*words, "--format", "json"),
                    env=environment,
                    cwd=environment["FLWR_HOME"],
                    stdin=subprocess.DEVNULL,
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=SECONDS_TO_ANSWER,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise DeployError(f"no answer from {self.address} within {SECONDS_TO_ANSWER:.0f} s") from None
        try:
            answer = json.loads(done.stdout)
        except ValueError:
            answer = {}
        if done.returncode != 0 or not isinstance(answer, dict) or not answer.get("success"):
            reason = answer.get("error-message") or (done.stdout + done.stderr).strip()[-1500:] or "no reason"
            raise DeployError(f"flwr {words[0]} at {self.address}: {reason}")
        return answer

    @contextmanager
    def _home(self) -> Iterator[dict[str, str]]:
        """Give the environment of a Flower command: a home of its own that knows this SuperLink alone."""
        connection: dict[str, Value] = {"address": self.address}
        if self.root_certificates is None:
            connection["insecure"] = True
        else:
            connection["root-certificates"] = str(self.root_certificates.resolve())
        with tempfile.TemporaryDirectory(prefix="fedmerge-flower-") as home:
            text = f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n{_toml(connection)}'
            (Path(home) / "config.toml").write_text(text, encoding="utf-8")
            yield {
                **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
                "FLWR_HOME": home,
                "FLWR_DISABLE_UPDATE_CHECK": "1",
                "FLWR_TELEMETRY_ENABLED": "0",
                "PATH": f"{_binaries()}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            }


def _app_settings(app: Path) -> Mapping[str, Any]:
    """Return the settings that an app folder's pyproject.toml lists."""
    path = app / "pyproject.toml"
    try:
        settings: Mapping[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))["tool"]["flwr"]["app"]["config"]
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}; give the folder of the Flower app") from error
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigurationError(f"{path} has no table [tool.flwr.app.config]: it is no Flower app of ours") from error
    return settings


def _toml(settings: Mapping[str, Value]) -> str:
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items())


def _binaries() -> Path:
    return Path(sys.executable).parent


def _command(*words: str) -> list[str]:
    return [str(_binaries() / "flwr"), *words]


def _read_lines(stream: IO[str], heard: Heard) -> None:
    for line in stream:
        heard(line.rstrip())
