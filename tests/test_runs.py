"""The run folder: what a killed, a second or a resumed process finds in it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fedmerge.config import Config
from fedmerge.errors import FedmergeError
from fedmerge.machine import versions
from fedmerge.problem import Update
from fedmerge.runs import Result, Run, RunError, file_name
from fedmerge.state import read_checkpoint

HOLDER = """
import sys
from pathlib import Path
from fedmerge.runs import Run

with Run.open(Path(sys.argv[1])).locked():
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run.create(tmp_path / "run", "compare", Config(clients=3, lr=0.5), methods=["np", "fedavg"], seeds=[0, 1])


def update(partition_id: int, label_counts: tuple[int, ...] | None = (3, 0, 4), number: float = 0.5) -> Update:
    return Update(
        state={"w": torch.full((2, 3), number), "count": torch.tensor(7), "half": torch.tensor([0.1]).half()},
        num_examples=7,
        partition_id=partition_id,
        label_counts=label_counts,
        metrics={"loss": 0.1 + 0.2, "accuracy": 1.0, "seconds": 12.5},
        num_bytes=34,
    )


def line(method: str, seed: int = 0, server_round: int = 1, accuracy: float = 0.5) -> Result:
    return {"method": method, "seed": seed, "round": server_round, "accuracy": accuracy}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# creating and opening


def test_a_new_run_keeps_all_that_repeats_it(run: Run) -> None:
    assert run.config == Config(clients=3, lr=0.5)
    settings = Run.open(run.path).settings
    assert settings["command"] == "compare"
    assert settings["methods"] == ["np", "fedavg"]
    assert settings["seeds"] == [0, 1]
    assert settings["versions"] == versions()
    assert torch.__version__.startswith(settings["versions"]["torch"])
    assert settings["versions"]["threads"] == str(torch.get_num_threads())
    assert run.path.is_absolute()


def test_a_new_run_may_take_an_empty_folder_and_makes_those_above(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert Run.create(path, "simulate", Config()).config == Config()


def test_a_relative_folder_stays_the_same_when_the_process_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run = Run.create(Path("run"), "simulate", Config())
    monkeypatch.chdir("/")
    run.append(line("np"))
    assert (tmp_path / "run" / "results.jsonl").is_file()


@pytest.mark.parametrize("name", ["a file", ".hidden", "config.json"])
def test_a_folder_that_is_not_empty_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(RunError, match=r"is not empty: give another --out, or --resume to go on"):
        Run.create(tmp_path, "simulate", Config())
    assert files(tmp_path) == {name: b"mine"}


@pytest.mark.parametrize("below", ["", "run", "deep/run"])
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match=r"cannot write the run folder .*file.*: .+; give another --out"):
        Run.create(tmp_path / "file" / below, "simulate", Config())
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_without_a_configuration_is_no_run(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(RunError, match=r"is not a run folder: it has no config\.json"):
            Run.open(path)
    assert issubclass(RunError, FedmergeError)


# whole files or none


@pytest.mark.parametrize(("where", "name"), [(os, "fsync"), (Path, "replace")])
def test_a_writer_that_dies_half_way_leaves_the_old_file_whole(
    run: Run, monkeypatch: pytest.MonkeyPatch, where: object, name: str
) -> None:
    run.write("report.html", b"old")
    before = files(run.path)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(where, name, die)
    for target in ("report.html", "figures/new.png"):
        with pytest.raises(KeyboardInterrupt):
            run.write(target, b"new")
    assert files(run.path) == before


def test_a_file_is_replaced_whole_and_its_folders_are_made(run: Run) -> None:
    for content in (b"a long first version", b"short"):
        path = run.write("figures/a.svg", content)
        assert path == run.path / "figures" / "a.svg"
        assert path.read_bytes() == content
    assert [item.name for item in path.parent.iterdir()] == ["a.svg"]


def test_what_a_killed_writer_leaves_beside_an_update_is_not_an_update(run: Run) -> None:
    run.save_update(0, 1, update(1))
    (run.path / "updates" / "seed-0" / "round-1" / ".abc.part").write_bytes(b"half")
    assert [item.partition_id for item in run.load_updates(0)] == [1]


# one writer at a time


def test_a_second_process_is_refused_until_the_first_one_ends_however_it_ends(run: Run) -> None:
    command = [sys.executable, "-c", HOLDER, str(run.path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(RunError, match=r"another process is writing into .*: wait for it, or give"), run.locked():
            pytest.fail("two processes had the lock")
        holder.kill()
        holder.wait()
        with run.locked():
            pass


def test_a_run_may_be_locked_again_after_its_block_and_after_an_error(run: Run) -> None:
    with pytest.raises(KeyError), run.locked():
        raise KeyError
    for _ in range(2):
        with run.locked():
            pass


# partitions


def test_a_partition_is_stored_once_and_another_one_is_refused(run: Run) -> None:
    indices: dict[str, object] = {"clients": [[0, 1], [2]], "server": [3]}
    for _ in range(2):
        run.save_partition(0, indices)
    run.save_partition(1, {"clients": [[2], [0, 1]], "server": [3]})
    before = files(run.path)
    assert json.loads(before["partitions/seed-0.json"]) == indices
    with pytest.raises(RunError, match=r"seed-0\.json holds another partition .* start a new run"):
        run.save_partition(0, {**indices, "server": [4]})
    assert files(run.path) == before


# updates


@pytest.mark.parametrize("label_counts", [(3, 0, 4), (), None])
def test_an_update_comes_back_as_it_was(run: Run, label_counts: tuple[int, ...] | None) -> None:
    sent = update(2, label_counts)
    run.save_update(1, 3, sent)
    found = run.load_update(1, 3, 2)
    for name in ("num_examples", "partition_id", "label_counts", "metrics", "num_bytes"):
        assert getattr(found, name) == getattr(sent, name), name
    assert found.state.keys() == sent.state.keys()
    for name, tensor in found.state.items():
        assert tensor.dtype == sent.state[name].dtype
        assert torch.equal(tensor, sent.state[name])


def test_statistics_are_stored_beside_the_update_and_before_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    statistics = {"fisher": {"w": torch.rand(2, 3)}, "gram": {"w": torch.eye(3)}}
    sent = replace(update(2), statistics=statistics)
    written: list[str] = []
    write = Run.write

    def noted(self: Run, name: Path | str, content: bytes) -> Path:
        written.append(Path(name).parent.name)
        return write(self, name, content)

    monkeypatch.setattr(Run, "write", noted)
    run.save_update(0, 1, sent)
    assert written == ["fisher", "gram", "round-1"]
    run.save_update(0, 1, update(1))
    plain, found = run.load_updates(0)
    assert plain.statistics == {}
    assert found.statistics.keys() == statistics.keys()
    for kind, tensors in statistics.items():
        assert torch.equal(found.statistics[kind]["w"], tensors["w"])


def test_an_update_is_stored_once_by_seed_round_and_client(run: Run) -> None:
    assert not run.has_update(0, 1, 2)
    run.save_update(0, 1, update(2))
    before = files(run.path)
    run.save_update(0, 1, update(2, number=9.0))
    assert files(run.path) == before
    assert run.has_update(0, 1, 2)
    for other in ((1, 1, 2), (0, 2, 2), (0, 1, 1)):
        assert not run.has_update(*other)


def test_updates_are_loaded_by_partition_id(run: Run) -> None:
    assert run.load_updates(0) == []
    for partition_id in (123456, 10, 2, 99999, 0):
        run.save_update(0, 2, update(partition_id, number=float(partition_id)))
    found = run.load_updates(0, 2)
    assert [item.partition_id for item in found] == [0, 2, 10, 99999, 123456]
    assert [float(item.state["w"][0, 0]) for item in found] == [0, 2, 10, 99999, 123456]
    assert run.load_updates(0) == run.load_updates(1, 2) == []


# models


def test_a_model_is_stored_by_its_method_and_an_ensemble_member_by_member(run: Run) -> None:
    states = tuple({"w": torch.full((2,), float(index))} for index in range(3))
    run.save_model(0, 1, "activations+np:groups=channel", states[:1])
    run.save_model(0, 1, "ensemble", states)
    folder = run.path / "models" / "seed-0" / "round-1"
    names = [
        "activations+np_groups=channel.safetensors",
        *(f"ensemble-0000{index}-of-00003.safetensors" for index in (1, 2, 3)),
    ]
    assert sorted(path.name for path in folder.iterdir()) == names
    for name, state in zip(names, (states[0], *states), strict=True):
        assert torch.equal(read_checkpoint(folder / name)[0]["w"], state["w"])


@pytest.mark.parametrize("method", ["../../etc/x", "a/b", "a\\b", "np:lrs=0.1/0.2", "a b\n", "é<>|*?"])
def test_a_methods_file_name_stays_in_its_folder(run: Run, method: str) -> None:
    run.save_model(0, 1, method, ({"w": torch.zeros(1)},))
    assert len(list((run.path / "models" / "seed-0" / "round-1").glob("*.safetensors"))) == 1
    assert not set(file_name(method)) & set("/\\:\n <>|*?")


# results


def test_the_last_line_of_a_method_seed_and_round_counts(run: Run) -> None:
    for accuracy in (0.1, 0.2, 0.3):
        run.append(line("np", accuracy=accuracy))
        run.append(line("np", seed=1, accuracy=accuracy + 0.5))
        run.append(line("np", server_round=2, accuracy=accuracy + 0.6))
    assert [item["accuracy"] for item in run.results()] == [0.3, 0.8, pytest.approx(0.9)]


def test_results_have_the_order_of_the_runs_methods_and_others_come_last(run: Run) -> None:
    for method in ("unknown", "fedavg", "mean", "np"):
        run.append(line(method))
    assert [item["method"] for item in run.results()] == ["np", "fedavg", "unknown", "mean"]


def test_results_of_a_run_without_methods_have_the_order_in_which_they_came(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "simulate", Config())
    assert run.results() == []
    for server_round in (1, 2, 3):
        run.append(line("np", server_round=server_round))
    assert [item["round"] for item in run.results()] == [1, 2, 3]


def test_a_line_that_a_killed_process_was_writing_is_left_out_with_a_warning(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    path = run.path / "results.jsonl"
    run.append(line("np"))
    whole = path.read_bytes()
    last = json.dumps(line("fedavg")).encode()
    logger = logging.getLogger("fedmerge.runs")
    logger.addHandler(caplog.handler)  # whatever another test did to fedmerge's logger
    try:
        for size in range(1, len(last)):
            caplog.clear()
            path.write_bytes(whole + last[:size])
            assert [item["method"] for item in run.results()] == ["np"]
            assert "results.jsonl has an unfinished line, left out: {" in caplog.text
            run.append(line("mean"))
            assert [item["method"] for item in run.results()] == ["np", "mean"]
    finally:
        logger.removeHandler(caplog.handler)
    assert path.read_bytes().count(b"\n") == 3


def test_a_result_keeps_its_numbers_and_text(run: Run) -> None:
    result = line("np", accuracy=0.1 + 0.2) | {"error": "line\none \u2028 é \x1b[31m", "loss": float("inf")}
    run.append(result)
    assert run.results() == [result]
    assert (run.path / "results.jsonl").read_bytes().count(b"\n") == 1


# the log


def test_the_log_gets_what_fedmerge_and_flower_say_inside_the_block_alone(run: Run) -> None:
    loggers = [logging.getLogger(name) for name in ("fedmerge.server", "flwr", "elsewhere")]
    before = {name: list(logging.getLogger(name).handlers) for name in ("fedmerge", "flwr")}
    for text in ("first", "second"):
        loggers[0].warning("outside %s", text)
        with run.logging():
            for logger in loggers:
                logger.warning("%s block, é", text)
    lines = (run.path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [item.split(" ", 2)[2] for item in lines] == [
        f"WARNING {name}: {text} block, é" for text in ("first", "second") for name in ("fedmerge.server", "flwr")
    ]
    assert before == {name: logging.getLogger(name).handlers for name in ("fedmerge", "flwr")}


def test_the_log_is_closed_after_an_error_too(run: Run) -> None:
    with pytest.raises(KeyError), run.logging():
        raise KeyError
    logging.getLogger("fedmerge").warning("too late")
    assert (run.path / "log.txt").read_bytes() == b""
