"""A Ray cluster of two nodes, as of two machines, runs the same simulation to the same bits."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from flower_processes import BIN, free_port

from fedmerge import federation
from fedmerge.client import train_client
from fedmerge.cluster import RAY_SETTINGS
from fedmerge.config import Config
from fedmerge.runs import Run

CONFIG = Config(
    clients=4, local_epochs="1", align="identity", merge="mean", client_cpus=1.0, client_gpus=0.5, device="cpu"
)
SECONDS_TO_START = 300.0
STARTED = b"Ray runtime started."
ENVIRONMENT = os.environ | RAY_SETTINGS | {"PYTHONPATH": str(Path(federation.__file__).parents[1])}

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def node(log: Path, *options: str) -> Iterator[None]:
    """Run a node of a cluster, with one CPU and one GPU that need not exist; its processes end with it."""
    command = [str(BIN / "ray"), "start", "--block", "--num-cpus=1", "--num-gpus=1", "--object-store-memory=100000000"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--disable-usage-stats", *options],
            stdout=output,
            stderr=output,
            env=ENVIRONMENT,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + SECONDS_TO_START
        while STARTED not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.5)
        yield
    finally:
        for stop in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, stop)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a cluster of two nodes."""
    short = Path(tempfile.mkdtemp(prefix="ray"))  # the names of sockets may have 107 characters
    address = f"127.0.0.1:{free_port()}"
    here = "--node-ip-address=127.0.0.1"
    try:
        with (
            node(
                tmp_path / "head.log",
                "--head",
                here,
                f"--port={address.partition(':')[2]}",
                f"--temp-dir={short}",
                "--include-dashboard=false",
            ),
            node(tmp_path / "second.log", f"--address={address}", here),
        ):
            yield address
    finally:
        shutil.rmtree(short, ignore_errors=True)


def test_two_nodes_with_half_a_gpu_for_a_client_give_the_bits_of_this_process(cluster: str, tmp_path: Path) -> None:
    told = CONFIG.replace(ray_address=cluster, out=str(tmp_path / "run")).to_mapping(changed_only=True)
    done = subprocess.run(
        [sys.executable, "-m", "fedmerge", "simulate", *(f"--{name}={value}" for name, value in told.items())],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    run = Run.open(tmp_path / "run")
    assert "2 Ray actors, each with 1 CPUs and 0.5 GPUs" in (run.path / "log.txt").read_text()
    updates = run.load_updates(0)
    assert [update.partition_id for update in updates] == [0, 1, 2, 3]
    for update in updates:
        expected = train_client(CONFIG, federation.load(CONFIG), update.partition_id, 1, None)
        assert all(torch.equal(tensor, expected.state[name]) for name, tensor in update.state.items())
