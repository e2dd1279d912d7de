"""Flower's own processes for tests: a SuperLink and SuperNodes on loopback, all ended at the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedmerge.settings import Value

BIN = Path(sys.executable).parent
SECONDS_TO_START = 120
SECONDS_TO_RUN = 400
LOG_TAIL = 6000


class Flower:
    """A SuperLink of its own: own home, own port, started in an empty directory."""

    def __init__(self, folder: Path, *, simulation: bool) -> None:
        self._folder = folder
        self._home = folder / "flower-home"
        self._home.mkdir(parents=True)
        self._port = free_port()
        self._address = f"127.0.0.1:{self._port}"
        connection = (
            f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self._address}"\ninsecure = true\n'
        )
        (self._home / "config.toml").write_text(connection)
        self._processes: list[subprocess.Popen[bytes]] = []
        options = ["--simulation"] if simulation else []
        self._start("flower-superlink", "--insecure", "--port", str(self._port), *options)
        end = time.monotonic() + SECONDS_TO_START
        while not listens(self._port):
            if time.monotonic() > end or self._processes[0].poll() is not None:
                self.stop()
                raise TimeoutError(f"the SuperLink does not listen on port {self._port}\n{self.logs()}")
            time.sleep(0.5)

    def add_node(self, **config: Value) -> None:
        """Start a SuperNode."""
        told = " ".join(f"{name.replace('_', '-')}={json.dumps(value)}" for name, value in config.items())
        options = ["--superlink", self._address, "--port", str(free_port()), "--node-config", told]
        self._start("flower-supernode", "--insecure", *options)

    def run(self, app: Path, config: Mapping[str, Value], federation: str = "") -> None:
        """Run the app in a folder as `flwr run .` does, and wait until it has completed."""
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in config.items())
        options = ["--run-config", told, *(["--federation-config", federation] if federation else [])]
        submitted = json.loads(self._flwr("run", ".", "here", "--format", "json", *options, cwd=app))
        run_id = str(submitted["run-id"])
        end = time.monotonic() + SECONDS_TO_RUN
        status = ""
        while not status.startswith("finished"):
            if time.monotonic() > end:
                raise TimeoutError(f"the run is still '{status}' after {SECONDS_TO_RUN} s\n{self.logs()}")
            time.sleep(1)
            [run] = json.loads(self._flwr("ls", "here", "--run-id", run_id, "--format", "json"))["runs"]
            status = run["status"]
        if status != "finished:completed":
            raise RuntimeError(f"the run ended as '{status}'\n{self.logs()}")

    def logs(self) -> str:
        """Return the ends of all logs."""
        files = sorted(self._folder.glob("*.log"))
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-LOG_TAIL:]}" for file in files)

    def stop(self) -> None:
        """End all processes, and those that they have started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in self._processes:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, number)
            for process in self._processes:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
        for process_id in self._leftover():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process_id, signal.SIGKILL)

    def _leftover(self) -> list[int]:
        """Return processes that run in our home, such as Ray's, which leave the process group."""
        mark = f"FLWR_HOME={self._home}".encode()
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in file.read_bytes().split(b"\0"):
                    found.append(int(file.parent.name))
        return found

    def _start(self, command: str, *arguments: str) -> None:
        directory = self._folder / f"{command}-{len(self._processes)}"
        directory.mkdir()
        with (self._folder / f"{directory.name}.log").open("wb") as log:
            process = subprocess.Popen(
                [BIN / command, *arguments],
                cwd=directory,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes.append(process)

    def _flwr(self, *arguments: str, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [BIN / "flwr", *arguments],
            cwd=cwd or self._folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=SECONDS_TO_START,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"flwr {' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}\n{self.logs()}")
        return done.stdout

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return kept | {
            "FLWR_HOME": str(self._home),
            "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1",
            "FLWR_TELEMETRY_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }


@contextmanager
def flower(folder: Path, *, simulation: bool) -> Iterator[Flower]:
    """Give a SuperLink, and end it and its SuperNodes."""
    started = Flower(folder, simulation=simulation)
    try:
        yield started
    finally:
        started.stop()


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def listens(port: int) -> bool:
    """Return whether somebody listens on a port."""
    with socket.socket() as client:
        return client.connect_ex(("127.0.0.1", port)) == 0
