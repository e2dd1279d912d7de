"""The recipe of deploy/README.md, followed to the letter on machines made of Linux namespaces.

    python deploy/rehearse.py [--folder NEW]

Six hosts: a server, a desk and four sites, with addresses, keys and data of their own; the last site's link is slow.
What is not real here: the environment is this one instead of a new installation, `systemctl` starts the command of a
unit file (as root), and `ssh` and `scp` reach the other host's files without the network.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from hosts import SERVER_NAME, Host, Network, Unsupported

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```sh\n# ((?:at|on) .*)\n((?:.*\n)*?)```$", re.MULTILINE)
SITES = [f"site-{number}" for number in range(1, 5)]
SLOW_SITE, SLOW_RATE = "site-4", "20mbit"
IMAGES_PER_SITE = 120

SSH = f"""#!/bin/sh
# ssh [USER@]{SERVER_NAME} COMMAND: as if at the server
exec unshare --mount sh -c 'mount --bind "$SERVER_FILES/var/lib" /var/lib && mount --bind "$SERVER_FILES/etc" /etc &&
  exec sh -c "$0"' "$2"
"""
SCP = f"""#!/bin/sh
# scp [USER@{SERVER_NAME}:]FILE … [USER@{SERVER_NAME}:]FOLDER
for word in "$@"; do
  case "$word" in root@{SERVER_NAME}:*) word="$SERVER_FILES${{word#*:}}" ;; esac
  words="$words $word"
done
exec cp $words
"""


@dataclass
class Service:
    """A unit file, started as systemd would start it, and started again when it ends."""

    host: Host
    name: str
    log: Path

    def start(self) -> None:
        """Start the unit's command."""
        settings = read_unit(self.host.path(f"/etc/systemd/system/{self.name}.service"))
        [command], [directory] = settings["ExecStart"], settings["WorkingDirectory"]
        environment = dict(item.split("=", 1) for line in settings["Environment"] for item in shlex.split(line))
        for file in settings.get("EnvironmentFile", []):
            lines = self.host.path(file).read_text(encoding="utf-8").splitlines()
            environment |= dict(shlex.split(line)[0].split("=", 1) for line in lines if line)
        words = [re.sub(r"\$\{(\w+)\}", lambda found: environment[found[1]], word) for word in shlex.split(command)]
        self.host.path(directory).mkdir(parents=True, exist_ok=True)
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        [pause] = settings["RestartSec"]
        kept = f"while :; do {shlex.join(words)} || true; sleep {pause}; done"  # the shell ends at what fails
        self.host.popen(kept, environment=environment, directory=directory, log=self.log)


class Federation:
    """The recipe's machines and services.

    Args:
        network: with the hosts "desk" and `SITES`.
        blocks: the recipe's blocks by their titles.
    """

    def __init__(self, network: Network, blocks: dict[str, str], tools: Path) -> None:
        self.network, self.blocks = network, blocks
        self.desk = network.hosts["desk"]
        self.services: list[Service] = []
        self._environment = {
            "PATH": f"{tools}:/opt/fedmerge/bin:{os.environ['PATH']}",
            "HOME": "/root",
            "PYTHONPATH": "/opt/fedmerge-source",
            "SERVER_FILES": str(network.server.path("/")),
            "OMP_NUM_THREADS": "1",
        }
        for host in (network.server, *network.hosts.values()):
            install(host)

    def follow(self, title: str, host: Host) -> str:
        """Run a block of the recipe at a host, and return its output."""
        text = self.blocks[title]
        if host.name in SITES:
            text = text.replace("site=1\n", f"site={SITES.index(host.name) + 1}\n")
        output = ""
        for part in re.split(r"^(systemctl enable --now \S+)\n", text, flags=re.MULTILINE):
            if part.startswith("systemctl"):
                self.start(host, part.split()[-1])
            elif part:
                output += self.run(host, part)
        return output

    def run(self, host: Host, command: str) -> str:
        """Run a shell command at a host, in the source's folder."""
        return host.run(command, environment=self._environment, directory="/opt/fedmerge-source")

    def start(self, host: Host, unit: str) -> None:
        """Start a unit at a host."""
        service = Service(host, unit, host.folder / f"{unit}.log")
        self.services.append(service)
        service.start()
        self._wait(host, unit)

    def kill(self, host: Host) -> None:
        """Kill all processes of a host at once (kill -9)."""
        host.run("kill -9 -1", allow_failure=True)
        host.run("while ss -ltn | grep -qE ':(8000|9094) '; do sleep 0.1; done")  # until they are gone

    def start_again(self, host: Host) -> None:
        """Start a host's units after it was killed, as at the start of its machine."""
        for service in self.services:
            if service.host is host:
                service.start()
                self._wait(host, service.name)

    def _wait(self, host: Host, unit: str) -> None:
        if unit == "fedmerge-superlink":
            self.run(host, "for i in $(seq 240); do ss -ltn | grep -q :8000 && exit 0; sleep 0.5; done; exit 1")

    def logs(self) -> str:
        """Return the ends of the services' logs."""
        logs = [(item.host.name, item.name, item.log.read_text(errors="replace")[-4000:]) for item in self.services]
        return "\n".join(f"--- {host}, {unit}\n{text}" for host, unit, text in logs)


def read_unit(path: Path) -> dict[str, list[str]]:
    """Return the settings of a unit file's service, each with its values in order."""
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    _, _, service = text.partition("[Service]\n")
    found: dict[str, list[str]] = {}
    for line in service.partition("\n[")[0].splitlines():
        name, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(name, []).append(value)
    return found


def read_recipe(path: Path = ROOT / "deploy" / "README.md") -> dict[str, str]:
    """Return the recipe's blocks by their titles."""
    return {found[1]: found[2] for found in BLOCK.finditer(path.read_text(encoding="utf-8"))}


@contextmanager
def rehearsal(folder: Path) -> Iterator[Federation]:
    """Give the recipe's federation, all its sites joined; at the end nothing of it runs.

    Args:
        folder: a new one for the hosts' files.
    """
    blocks = read_recipe()
    tools = folder / "tools"
    tools.mkdir(parents=True)
    for name, text in (("ssh", SSH), ("scp", SCP)):
        (tools / name).write_text(text, encoding="utf-8")
        (tools / name).chmod(0o755)
    with Network(folder, ["desk", *SITES]) as network:
        network.slow(SLOW_SITE, SLOW_RATE)
        federation = Federation(network, blocks, tools)
        federation.follow("at the server: keys and service", network.server)
        for number, name in enumerate(SITES):
            write_images(network.hosts[name].path("/srv/data"), number)
            federation.follow("at each site: key", network.hosts[name])
        federation.follow("at the desk: register", federation.desk)
        for name in SITES:
            federation.follow("at each site: join", network.hosts[name])
        yield federation


def write_images(folder: Path, number: int) -> None:
    """Write a site's own images, the handwritten digits that are in no data set here, as FOLDER/CLASS/IMAGE."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    generator = np.random.default_rng(number)
    favoured = (digits.target % len(SITES) == number) * 4 + 1  # sites differ: each has more of some classes
    chosen = generator.choice(len(digits.target), IMAGES_PER_SITE, replace=False, p=favoured / favoured.sum())
    for index in chosen:
        path = folder / str(digits.target[index]) / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(digits.images[index].astype(np.uint8)).save(path)


def install(host: Host) -> None:
    """Let a host see this environment where the recipe installs one, and this checkout where it clones it."""
    for source, place in ((Path(sys.prefix), "/opt/fedmerge"), (ROOT, "/opt/fedmerge-source")):
        at = shlex.quote(str(source))
        host.run(f"mkdir -p {place} && mount --bind {at} {place} && mount -o remount,ro,bind {place}")
    host.run("useradd --system fedmerge")


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), help="New folder for the hosts' files, kept.")
def main(folder: Path | None) -> None:
    """Follow the recipe, and show what its last block prints."""
    with tempfile.TemporaryDirectory(prefix="fedmerge-rehearsal-") as temporary:
        try:
            with rehearsal(folder or Path(temporary) / "hosts") as federation:
                click.echo(federation.follow("at the desk: run", federation.desk))
        except Unsupported as error:
            raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
