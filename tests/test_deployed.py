"""The recipe of deploy/README.md on machines made of namespaces, and what happens when they break."""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from certificates import main as certificates
from click.testing import CliRunner
from hosts import Host, Unsupported
from rehearse import IMAGES_PER_SITE, ROOT, SITES, SLOW_SITE, Federation, install, rehearsal

from fedmerge.models import create
from fedmerge.runs import Run
from fedmerge.state import read_checkpoint

LINK = "--superlink fl.example.org:8000 --root-certificates /etc/fedmerge/ca.crt"
RUNS = "/var/lib/fedmerge/runs"
PLAIN = "--align identity --merge mean --min-completed 2"
SECONDS_TO_IMPORT = 6.0
"""What `slowness` takes on a quiet machine."""


@functools.cache
def slowness() -> float:
    """How many times as long as on a quiet machine a start takes here: deadlines are multiplied by it."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch, torchvision, flwr.serverapp"], check=True)
    return max(1.0, (time.monotonic() - began) / SECONDS_TO_IMPORT)


def patient(seconds: float) -> int:
    """Return as many seconds for a machine as slow as this one."""
    return math.ceil(seconds * slowness())


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """The recipe's machines, all sites joined."""
    try:
        with rehearsal(tmp_path_factory.mktemp("rehearsal") / "hosts") as made:
            yield made
    except Unsupported as reason:
        pytest.skip(str(reason))


@pytest.fixture(autouse=True)
def mended(request: pytest.FixtureRequest) -> Iterator[None]:
    """Join all links again, however a test has ended."""
    yield
    if "federation" in request.fixturenames:
        network = request.getfixturevalue("federation").network
        for site in SITES:
            network.mend(site)


class Submitted:
    """`fedmerge deploy run` at the desk, under way."""

    def __init__(self, federation: Federation, name: str, options: str) -> None:
        self.folder = federation.network.server.path(f"{RUNS}/{name}")
        self._federation = federation
        self._error: Exception | None = None
        self.output = ""
        command = f"fedmerge deploy run {LINK} --clients {len(SITES)} {options} --out {RUNS}/{name}"
        command = re.sub(r"(?<=--timeout )\d+", lambda found: str(patient(int(found[0]))), command)
        self._thread = threading.Thread(target=self._run, args=(command,))
        self._thread.start()

    def _run(self, command: str) -> None:
        try:
            self.output = self._federation.run(self._federation.desk, command)
        except RuntimeError as error:
            self._error = error

    def wait_until(self, what: Callable[[], bool], seconds: float = 240) -> None:
        """Wait while the run goes on."""
        end = time.monotonic() + patient(seconds)
        while not what():
            assert self._thread.is_alive(), f"the run has ended: {self.output or self._error}"
            assert time.monotonic() < end, self._federation.logs()
            time.sleep(0.05)

    def done(self, seconds: float = 400) -> Run:
        """Wait for the end of a run that is to complete."""
        self._thread.join(patient(seconds))
        assert not self._thread.is_alive(), self._federation.logs()
        assert self._error is None, f"{self._error}\n{self._federation.logs()}"
        return Run.open(self.folder)

    def failed(self, seconds: float = 400) -> str:
        """Wait for the end of a run that is to fail, and return what is told."""
        self._thread.join(patient(seconds))
        assert not self._thread.is_alive(), self._federation.logs()
        assert self._error is not None, self.output
        return str(self._error)

    def arrived(self, *clients: int) -> bool:
        """Return whether the updates of these clients are on the server's disk."""
        folder = self.folder / "updates/seed-0/round-1"
        return all((folder / f"client-{client:05}.safetensors").exists() for client in clients)


def refused(run: Run) -> list[str]:
    found: list[str] = run.results()[0]["diagnostics"].get("refused", [])
    return found


def clients(run: Run) -> list[int]:
    return [update.partition_id for update in run.load_updates(0)]


def in_training(federation: Federation, site: str) -> bool:
    """Whether a site's ClientApp is at work: a process of its own, started by the SuperExec."""
    return "flwr-clientapp" in federation.network.hosts[site].run("cat /proc/[0-9]*/cmdline | tr '\\0' ' '")


@pytest.mark.slow
def test_the_recipe_gives_a_merged_model_at_the_desk_of_the_sites_own_data(federation: Federation) -> None:
    federation.follow("at the desk: run", federation.desk)
    home = Run.open(federation.desk.path("/srv/first"))
    [result] = home.results()
    assert result["status"] == "ok"
    assert result["accuracy"] > 0.8
    assert (home.path / "report.html").stat().st_size > 10_000
    updates = home.load_updates(0)
    assert [update.num_examples for update in updates] == [IMAGES_PER_SITE] * len(SITES)
    for site, update in zip(SITES, updates, strict=True):
        folder = federation.network.hosts[site].path("/srv/data")
        counts = [len(list((folder / str(digit)).glob("*.png"))) for digit in range(10)]
        assert list(update.label_counts or ()) == counts
    keys = federation.network.server.path("/etc/fedmerge")
    assert not (keys / "nodes").exists(), "a site's private key has never left it"


def restart(federation: Federation) -> None:
    """Let the server lose its power, and come back; wait until its sites are back too."""
    server = federation.network.server
    federation.kill(server)
    federation.start_again(server)
    status = f"fedmerge deploy status {LINK} --json"
    end = time.monotonic() + patient(240)
    while time.monotonic() < end:
        time.sleep(3)
        with contextlib.suppress(RuntimeError):  # while the SuperLink comes up
            nodes = json.loads(federation.run(federation.desk, status).splitlines()[-1])["nodes"]
            if [node["status"] for node in nodes].count("online") == len(SITES):
                return
    raise TimeoutError(federation.logs())


def times(run: Submitted) -> dict[str, int]:
    folder = run.folder / "updates/seed-0/round-1"
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}


@pytest.mark.long
def test_a_superexec_that_died_is_started_again_and_runs_do_not_wait_for_ever(federation: Federation) -> None:
    processes = "$(grep -lx flower-superexe /proc/[0-9]*/comm | cut -d/ -f3)"  # a name's first 15 letters; not the loop
    federation.network.server.run(f"kill -9 {processes}")
    run = Submitted(federation, "superexec", f"{PLAIN} --local-epochs 1 --timeout 240")
    assert len(clients(run.done())) >= 3


@pytest.mark.long
def test_a_superlink_killed_during_and_after_the_merge_ends_in_the_same_bits(federation: Federation) -> None:
    options = "--align identity --merge np:steps=3000 --local-epochs 1 --timeout 400"
    whole = Submitted(federation, "whole", options).done()
    run = Submitted(federation, "during", options)
    run.wait_until(lambda: run.arrived(0, 1, 2, 3))
    there = times(run)
    restart(federation)
    assert run.failed()
    assert Run.open(run.folder).results() == []
    again = Submitted(federation, "during", options)
    found = again.done()
    assert times(run) == there
    first, second = (read_checkpoint(next((item.path / "models").rglob("*.safetensors")))[0] for item in (whole, found))
    assert all(tensor.equal(second[key]) for key, tensor in first.items())
    restart(federation)
    after = Submitted(federation, "during", options)
    assert "holds this run, completed: fetch it" in after.failed()
    federation.run(federation.desk, f"fedmerge deploy fetch root@fl.example.org:{RUNS}/during --out /srv/during")
    assert Run.open(federation.desk.path("/srv/during")).results()[0]["status"] == "ok"


@pytest.mark.long
def test_a_superlink_killed_before_the_merge_goes_on_with_what_has_arrived(federation: Federation) -> None:
    options = f"{PLAIN} --local-epochs 20 --timeout 400"
    first = Submitted(federation, "before", options)
    first.wait_until(lambda: in_training(federation, "site-3"))
    federation.network.cut("site-3")  # so that the round is not over
    first.wait_until(lambda: bool(times(first)))
    federation.kill(federation.network.server)
    there = times(first)
    federation.network.mend("site-3")
    assert first.failed()
    assert not first.arrived(*range(len(SITES)))
    restart(federation)
    found = Submitted(federation, "before", options).done()
    assert clients(found) == [0, 1, 2, 3]
    assert there.items() <= times(first).items()  # who had answered was not asked again


@pytest.mark.parametrize("model", [pytest.param("mlp@16", id="17 MB"), pytest.param("mlp@48", id="153 MB")])
@pytest.mark.long
def test_an_upload_whose_link_is_cut_in_the_middle_arrives_whole_or_not_at_all(
    federation: Federation, model: str
) -> None:
    size = sum(
        parameter.numel() * 4 for parameter in create(model, shape=(1, 8, 8), num_classes=10, seed=0).parameters()
    )
    name = f"cut-{size}"
    run = Submitted(federation, name, f"{PLAIN} --model {model} --local-epochs 1 --timeout 600")
    run.wait_until(lambda: in_training(federation, SLOW_SITE))
    before = federation.network.bytes_sent(SLOW_SITE)
    run.wait_until(lambda: federation.network.bytes_sent(SLOW_SITE) - before > size / 3)
    federation.network.cut(SLOW_SITE)
    sent = federation.network.bytes_sent(SLOW_SITE) - before
    assert sent < size, "it was to be cut in the middle"
    time.sleep(20)
    federation.network.mend(SLOW_SITE)
    found = run.done(900)
    assert set(clients(found)) >= {0, 1, 2}
    assert all(path.stat().st_size > size for path in (found.path / "updates/seed-0/round-1").glob("*.safetensors"))
    if SITES.index(SLOW_SITE) in clients(found):
        assert federation.network.bytes_sent(SLOW_SITE) - before > size
    else:
        assert len(refused(found)) == 1


@pytest.mark.long
def test_a_client_killed_while_it_trains_and_one_that_never_answers_are_left_out(federation: Federation) -> None:
    run = Submitted(federation, "killed", f"{PLAIN} --local-epochs 500 --timeout 240")
    run.wait_until(lambda: in_training(federation, "site-2"))
    federation.network.cut("site-2")
    run.wait_until(lambda: in_training(federation, "site-1"))
    federation.kill(federation.network.hosts["site-1"])
    federation.start_again(federation.network.hosts["site-1"])  # at once, under its id; its work is lost
    found = run.done()
    federation.network.mend("site-2")
    assert clients(found) == [2, 3]
    assert len(refused(found)) == 2
    assert all("Node Unavailable" in reason or "did not answer in time" in reason for reason in refused(found))
    again = Submitted(federation, "again", f"{PLAIN} --local-epochs 1 --timeout 150")
    assert {0, 2, 3} <= set(clients(again.done()))  # with a broken connection, site-2 may need minutes to be back


@pytest.mark.long
def test_the_containers_commands_run_the_app_natively(tmp_path: Path) -> None:
    """Process isolation: SuperLink and SuperNode hold messages alone, and a SuperExec beside each runs the app."""
    services = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text())["services"]
    given = {"SUPERLINK": "localhost:8000", "NODE_CONFIG": "partition-id=0 num-partitions=1"}
    environment = {
        "PATH": f"/opt/fedmerge/bin:{os.environ['PATH']}",
        "FLWR_HOME": "/var/lib/fedmerge/flower",
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "OMP_NUM_THREADS": "1",
    }
    try:
        host = Host("compose", tmp_path / "compose")
    except (Unsupported, FileNotFoundError) as reason:
        pytest.skip(str(reason))
    try:
        install(host)
        keys = host.path("/etc/fedmerge")
        for words in (["authority"], ["server", "--name", "superlink"], ["secret"], ["node", "site"]):
            done = CliRunner().invoke(certificates, [words[0], str(keys), *words[1:]])
            assert done.exit_code == 0, done.output
        (keys / "nodes" / "site").rename(keys / "node.key")
        host.path("/var/lib/fedmerge").mkdir(parents=True)

        def start(name: str) -> None:
            words = [
                re.sub(r"\$\{(\w+):-[^}]*\}", lambda found: given[found[1]], word) for word in services[name]["command"]
            ]
            command = shlex.join([f"flower-{services[name]['build']['target']}", *words])
            log = tmp_path / f"{name}.log"
            host.popen(f"exec {command}", environment=environment, directory="/var/lib/fedmerge", log=log)

        def run(words: str) -> str:
            source = {"PYTHONPATH": "/opt/fedmerge-source"}
            return host.run(words, environment=environment | source, directory="/opt/fedmerge-source")

        link = "--superlink localhost:8000 --root-certificates /etc/fedmerge/ca.crt"
        start("superlink")
        run("for i in $(seq 240); do ss -ltn | grep -q :8000 && exit 0; sleep 0.5; done; exit 1")
        start("server-superexec")
        run(f"fedmerge deploy register {link} /etc/fedmerge/nodes/site.pub")
        start("supernode")
        run("for i in $(seq 240); do ss -ltn | grep -q :9094 && exit 0; sleep 0.5; done; exit 1")
        start("site-superexec")
        run(
            f"fedmerge deploy run {link} --clients 1 --min-completed 1 --align identity --merge mean --local-epochs 1 "
            f"--timeout {patient(300)} --out {RUNS}/first"
        )
        [result] = Run.open(host.path(f"{RUNS}/first")).results()
        assert result["status"] == "ok"
    finally:
        host.close()
