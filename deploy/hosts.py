"""Machines of a rehearsal, on this one: Linux namespaces with addresses, processes and files of their own.

A `Network` has a server and hosts that reach the server alone, each by a link of its own, which can be slowed down and
cut. Every host has its own processes, which end with it, as it ends with this process, however that ends; and its own
/etc, /opt, /srv and /var/lib, overlays of this machine's: a recipe can be followed to the letter, and leaves nothing
behind. Root is needed, and Linux.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

SERVER_ADDRESS = "10.77.0.1"
SERVER_NAME = "fl.example.org"
OWN_FOLDERS = ("/etc", "/opt", "/srv", "/var/lib")
SECONDS_TO_START = 20.0


class Unsupported(Exception):
    """What this machine lacks for a rehearsal."""


class Host:
    """A machine.

    Args:
        name: of the host, for messages and files.
        folder: where its files are kept; a new folder.
    """

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self._started: list[subprocess.Popen[bytes]] = []
        mounts = []
        for path in OWN_FOLDERS:
            upper, work = self.path(path), folder / f"work{path.replace('/', '-')}"
            for made in (upper, work):
                made.mkdir(parents=True)
            options = f"lowerdir={path},upperdir={upper},workdir={work}"
            mounts.append(f"mount -t overlay overlay -o {shlex.quote(options)} {path}")
        ready = folder / "ready"
        script = " && ".join([*mounts, "ip link set lo up", f"touch {shlex.quote(str(ready))}", "exec sleep infinity"])
        options_own = ["--mount", "--net", "--pid", "--uts", "--fork", "--kill-child", "--mount-proc"]
        self._holder = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "unshare", *options_own, "sh", "-c", script],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        end = time.monotonic() + SECONDS_TO_START
        while not ready.exists():
            if self._holder.poll() is not None or time.monotonic() > end:
                self._holder.kill()
                said = self._holder.communicate()[1].strip()
                raise Unsupported(f"this machine cannot make a host with files and processes of its own: {said}")
            time.sleep(0.02)
        children = Path(f"/proc/{self._holder.pid}/task/{self._holder.pid}/children").read_text(encoding="ascii")
        self.process_id = int(children.split()[0])

    def path(self, inside: str) -> Path:
        """Return where this machine has what lies at `inside` (below one of `OWN_FOLDERS`) of the host."""
        return self.folder / "files" / inside.lstrip("/")

    def popen(
        self, command: str, *, environment: Mapping[str, str], directory: str | Path, log: Path
    ) -> subprocess.Popen[bytes]:
        """Start a shell command in the host, its output appended to `log`."""
        with log.open("ab") as output:
            started = subprocess.Popen(
                self._enter(command, directory),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self._started.append(started)
        return started

    def run(
        self,
        command: str,
        *,
        environment: Mapping[str, str] | None = None,
        directory: str | Path = "/",
        allow_failure: bool = False,
    ) -> str:
        """Run a shell command in the host, and return its output; RuntimeError if it fails, unless that is allowed."""
        done = subprocess.run(
            self._enter(command, directory),
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
        )
        if done.returncode != 0 and not allow_failure:
            raise RuntimeError(f"at {self.name}: exit code {done.returncode} of\n{command}\n{done.stdout}")
        return done.stdout

    def close(self) -> None:
        """End the host with all its processes, as by a loss of power."""
        self._holder.kill()  # --kill-child: the first process of the host ends with it, and all others with that one
        self._holder.communicate()
        for process in self._started:
            process.wait()

    def _enter(self, command: str, directory: str | Path) -> list[str]:
        namespaces = ["--target", str(self.process_id), "--mount", "--net", "--pid", "--uts"]
        return ["nsenter", *namespaces, "sh", "-ec", f"cd {shlex.quote(str(directory))}\n{command}"]


class Network:
    """A server and hosts around it.

    Args:
        folder: where their files are kept; a new folder.
        names: of the hosts.

    Attributes:
        server: the host at `SERVER_ADDRESS`, which all hosts know as `SERVER_NAME`.
        hosts: the others, by name.
    """

    def __init__(self, folder: Path, names: list[str]) -> None:
        if missing := [tool for tool in ("ip", "unshare", "nsenter", "setpriv", "mount") if shutil.which(tool) is None]:
            raise Unsupported(f"a rehearsal needs the command {missing[0]}")
        if os.geteuid() != 0:
            raise Unsupported("a rehearsal makes network namespaces, which needs root")
        self._made: list[Host] = []
        try:
            self.server = self._make("server", folder)
            self.server.run(f"ip address add {SERVER_ADDRESS}/32 dev lo")
            self.hosts = {name: self._make(name, folder) for name in names}
            for number, host in enumerate(self.hosts.values(), start=1):
                self._link(host, number)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Network:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def slow(self, name: str, rate: str) -> None:
        """Let no more than `rate` ("20mbit") pass a host's link in each direction; `Unsupported` without tc's tbf."""
        try:
            for host, device in self._ends(name):
                host.run(f"tc qdisc replace dev {device} root tbf rate {rate} burst 64kb latency 400ms")
        except RuntimeError as error:
            raise Unsupported(f"this kernel cannot slow a link down (tc tbf): {error}") from error

    def cut(self, name: str) -> None:
        """Cut the link of a host."""
        self.hosts[name].run("ip link set up0 down")

    def mend(self, name: str) -> None:
        """Join the link of a host again."""
        self.hosts[name].run(f"ip link set up0 up && ip route replace {SERVER_ADDRESS} via {self._address(name, 1)}")

    def bytes_sent(self, name: str) -> int:
        """Return how many bytes a host has sent to the server."""
        [link] = json.loads(self.hosts[name].run("ip -json -statistics link show up0"))
        return int(link["stats64"]["tx"]["bytes"])

    def close(self) -> None:
        """End all hosts; nothing of them is left but their folders."""
        while self._made:
            self._made.pop().close()

    def _make(self, name: str, folder: Path) -> Host:
        host = Host(name, folder / name)
        self._made.append(host)
        known = f"{SERVER_ADDRESS} {SERVER_NAME}\n127.0.0.1 localhost {name}\n"
        host.run(f"hostname {name} && printf %s {shlex.quote(known)} > /etc/hosts")
        return host

    def _link(self, host: Host, number: int) -> None:
        ends = f"up0 netns {host.process_id} type veth peer name to{number} netns {self.server.process_id}"
        done = subprocess.run(["ip", "link", "add", *ends.split()], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise Unsupported(f"this kernel cannot link hosts (veth): {done.stderr.strip()}")
        host.run(f"ip address add {self._address(host.name, 2)}/30 dev up0")
        self.server.run(f"ip address add {self._address(host.name, 1)}/30 dev to{number}")
        self.server.run(f"ip link set to{number} up")
        self.mend(host.name)

    def _address(self, name: str, end: int) -> str:
        return f"10.77.{list(self.hosts).index(name) + 1}.{end}"

    def _ends(self, name: str) -> list[tuple[Host, str]]:
        return [(self.hosts[name], "up0"), (self.server, f"to{list(self.hosts).index(name) + 1}")]
