"""Full disks, second processes and killed ones: what was there is whole, and a run goes on to the same bits."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.errors import FedmergeError
from fedmerge.models import create
from fedmerge.problem import Update
from fedmerge.runs import Run, RunError
from fedmerge.wholefiles import NotWritten, append_line, write_whole


def stored_run(path: Path, command: str = "compare", merge: str = "np", name: str = "mlp@0.2") -> Run:
    """A run whose clients were made, not trained."""
    config = Config(clients=3, client_examples=150, model=name, align="activations", merge=merge)
    settings = {"methods": ["mean"], "seeds": [0]} if command == "compare" else {}
    run = Run.create(path, command, config, **settings)
    for client in range(3):
        model = create(config.model, shape=(1, 8, 8), num_classes=10, seed=client)
        run.save_update(0, 1, Update(model.state_dict(), 50, client, (5,) * 10, num_bytes=10))
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let the system refuse what goes beyond `size`, after it has written what goes before: as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_told_and_leaves_every_file_whole(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    run.append({"method": "mean", "seed": 0, "round": 1})
    before = files(run.path)
    large = {"method": "np", "seed": 0, "round": 1, "diagnostics": "x" * 9000}
    update = run.load_update(0, 1, 0)
    with largest_file(4096):
        with pytest.raises(NotWritten, match=r"cannot write .*report\.html: .*; what was there before is whole"):
            run.write("report.html", b"x" * 9000)
        with pytest.raises(NotWritten, match=r"results\.jsonl"):
            run.append(large)
        with pytest.raises(NotWritten, match=r"client-00000\.safetensors"):
            run.save_update(1, 1, update)
        with pytest.raises(NotWritten, match=r"np\.safetensors"):
            run.save_model(0, 1, "np", (update.state,))
    assert files(run.path) == before
    run.append(large)
    assert len(run.results()) == 2


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_when_the_disk_is_flushed_is_one_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    path, lines = tmp_path / "file", tmp_path / "lines"
    write_whole(path, b"old")
    append_line(lines, b"old")

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(NotWritten, match=os.strerror(number)):
        write_whole(path, b"new")
    with pytest.raises(NotWritten, match=os.strerror(number)):
        append_line(lines, b"new")
    assert files(tmp_path) == {"file": b"old", "lines": b"old\n"}
    assert issubclass(NotWritten, FedmergeError)


def test_the_command_tells_of_a_full_disk_in_one_line(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    before = files(run.path)
    with largest_file(4096):
        result = CliRunner().invoke(main, ["merge", str(run.path), "--methods", "mean"])
    assert result.exit_code == 1
    assert "Error: cannot write " in result.output
    assert "Traceback" not in result.output
    found = files(run.path)
    assert {name: found[name] for name in before} == before
    assert not [name for name in found if name.endswith((".part", "mean.safetensors"))]
    done = CliRunner().invoke(main, ["merge", str(run.path), "--methods", "mean"])
    assert done.exit_code == 0, done.output


def test_a_second_command_in_a_folder_is_refused_while_the_first_one_runs(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    before = files(run.path)
    with run.locked():
        for words in (["merge", str(run.path), "--methods", "mean"], ["compare", "--resume", "--out", str(run.path)]):
            result = CliRunner().invoke(main, words)
            assert result.exit_code == 1
            assert "another process is writing into" in result.output
    assert {name: content for name, content in files(run.path).items() if name in before} == before


def test_of_two_processes_that_make_a_run_in_one_folder_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, locked = tmp_path / "run", Run.locked

    @contextmanager
    def late(run: Run) -> Iterator[None]:
        monkeypatch.setattr(Run, "locked", locked)
        Run.create(path, "simulate", Config(seed=1))  # the other process, between the look and the lock
        with run.locked():
            yield

    monkeypatch.setattr(Run, "locked", late)
    with pytest.raises(RunError, match="is not empty"):
        Run.create(path, "simulate", Config(seed=2))
    assert Run.open(path).config.seed == 1


def spawn(*words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedmerge", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_np_merge_resumes_to_the_same_bits(tmp_path: Path) -> None:
    stored_run(tmp_path / "whole", "simulate", "np", "mlp")
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    whole = spawn("simulate", "--resume", "--out", tmp_path / "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    killed = spawn("simulate", "--resume", "--out", tmp_path / "killed")
    log, give_up = tmp_path / "killed" / "log.txt", time.monotonic() + 200
    while (
        killed.poll() is None and time.monotonic() < give_up and not (log.exists() and "aligned 3" in log.read_text())
    ):
        time.sleep(0.01)
    assert killed.poll() is None, killed.communicate()[0]
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    assert "merged 3" not in log.read_text(), "it was to be killed in the middle"
    assert Run.open(tmp_path / "killed").results() == []
    resumed = spawn("simulate", "--resume", "--out", tmp_path / "killed")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    models = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole" / "models").rglob("*.safetensors")]
    assert len(models) == 1
    first, second = (load_file(tmp_path / which / models[0]) for which in ("whole", "killed"))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    accuracies = [Run.open(tmp_path / which).results()[0]["accuracy"] for which in ("whole", "killed")]
    assert accuracies[0] == accuracies[1]
