"""Clients that answer late, twice, for another round or with another model, and servers that die between rounds."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pytest
from click.testing import CliRunner
from flwr.app import Error, Message
from grids import InProcessGrid, in_process

from fedmerge import models
from fedmerge.cli import main
from fedmerge.client import client_app
from fedmerge.config import Config
from fedmerge.flower import identity, node_context
from fedmerge.resuming import Answers, enter
from fedmerge.runs import Run, RunError
from fedmerge.server import collect, serve
from fedmerge.state import read_checkpoint
from fedmerge.strategy import RoundFailed
from fedmerge.wire import arrays_from_state

CONFIG = Config(clients=3, local_epochs="1", align="identity", merge="mean", server_examples=60, threads=1)
NODES = (11, 22, 33)


class Power(Exception):
    """The server's machine lost its power."""


class Unreliable(InProcessGrid):
    """A grid that hands on, after each pull, what `after` makes of the replies."""

    def __init__(self, config: Config, after: Callable[[list[Message]], list[Message]]) -> None:
        app = client_app()
        super().__init__(lambda message, client: app(message, node_context(config, client)), NODES)
        self._after = after

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        waited = [message_id for message_id in message_ids if message_id in self._waiting]
        return self._after(list(super().pull_messages(waited)))


def run_with(config: Config, folder: Path, after: Callable[[list[Message]], list[Message]]) -> Run:
    run = Run.create(folder, "flwr run", config)
    with identity():
        serve(Unreliable(config, after), config, run, pause=0.01)
    return run


def same_models(first: Run, second: Run, rounds: int = 1) -> bool:
    paths = [f"models/seed-0/round-{number}/mean.safetensors" for number in range(1, rounds + 1)]
    pairs = [(read_checkpoint(first.path / path)[0], read_checkpoint(second.path / path)[0]) for path in paths]
    return all(tensor.equal(theirs[name]) for ours, theirs in pairs for name, tensor in ours.items())


def test_a_client_that_answers_twice_counts_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedmerge"):
        twice = run_with(CONFIG, tmp_path / "twice", lambda replies: [*replies, *replies[:1]])
    once = run_with(CONFIG, tmp_path / "once", list)
    assert same_models(twice, once)
    assert "node 11 sent a reply that nothing waits for" in caplog.text


def test_an_answer_for_another_round_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIG.replace(rounds=2)
    earlier: list[Message] = []

    def again(replies: list[Message]) -> list[Message]:
        late = list(earlier)
        earlier.extend(replies)
        return [*late, *replies]

    with caplog.at_level(logging.WARNING, "fedmerge"):
        stale = run_with(config, tmp_path / "stale", again)
    assert same_models(stale, run_with(config, tmp_path / "fresh", list), rounds=2)
    assert caplog.text.count("that nothing waits for") == 3


def test_an_answer_after_the_deadline_is_not_waited_for_and_does_not_disturb_the_next_round(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = CONFIG.replace(rounds=2, timeout=1.5)
    held: list[Message] = []

    def late(replies: list[Message]) -> list[Message]:
        if not held:
            held.extend(replies[2:])
            return replies[:2]
        return [*held, *replies] if replies else []  # it comes with the next round's

    with caplog.at_level(logging.WARNING, "fedmerge"):
        run = run_with(config, tmp_path / "run", late)
    assert [len(run.load_updates(0, number)) for number in (1, 2)] == [2, 3]
    assert [result["status"] for result in run.results()] == ["ok", "ok"]
    assert run.results()[0]["diagnostics"]["refused"] == ["node 33 did not answer in time"]


def test_an_answer_with_another_model_is_refused_by_name(tmp_path: Path) -> None:
    def swapped(replies: list[Message]) -> list[Message]:
        other = models.create("mlp@0.5", shape=(1, 8, 8), num_classes=10, seed=0)
        replies[1].content["arrays"] = arrays_from_state(other.state_dict())
        return replies

    run = run_with(CONFIG, tmp_path / "run", swapped)
    assert [update.partition_id for update in run.load_updates(0)] == [0, 2]
    [reason] = run.results()[0]["diagnostics"]["refused"]
    assert reason.startswith("client 1 (node 22)")
    assert "shape" in reason


def test_a_node_that_the_superlink_finds_gone_is_named_once(tmp_path: Path) -> None:
    def gone(replies: list[Message]) -> list[Message]:
        error = Message(Error(3, "Node Unavailable"), reply_to=replies[1])
        error.metadata.__dict__["_reply_to_message_id"] = replies[1].metadata.reply_to_message_id
        error.metadata.__dict__["_src_node_id"] = 1  # the SuperLink's
        return [replies[0], error, *replies[2:]]

    run = run_with(CONFIG, tmp_path / "run", gone)
    assert run.results()[0]["diagnostics"]["refused"] == ["Node Unavailable (node 22)"]


def deployed(config: Config, folder: Path, nodes: Sequence[int] = NODES, mute: Sequence[int] = ()) -> list[int]:
    """Run as `server/app.py` does, and return the nodes that were asked."""
    run = enter(folder, config)
    with in_process(config, nodes=nodes, mute=mute) as grid, run.locked():
        serve(grid, config, run, answers=Answers(run, config), pause=0.01)
        return [message.metadata.dst_node_id for message in grid.sent]


def dies_in_round(
    number: int, config: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, mute: Sequence[int] = ()
) -> None:
    """Run until a round's updates are there, and lose the power before they are merged."""
    measure = Run.save_model

    def fail(run: Run, seed: int, server_round: int, *rest: object) -> None:
        if server_round == number:
            raise Power
        measure(run, seed, server_round, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Run, "save_model", fail)
        with pytest.raises(Power):
            deployed(config, folder, mute=mute)


@pytest.mark.parametrize("number", [1, 2])
def test_a_run_that_is_submitted_again_goes_on_where_its_server_died(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = CONFIG.replace(rounds=2, out=str(tmp_path / "run"))
    assert deployed(config.replace(out=str(tmp_path / "whole")), tmp_path / "whole") == [*NODES, *NODES]
    dies_in_round(number, config, tmp_path / "run", monkeypatch)
    asked = deployed(config, tmp_path / "run")
    assert asked == ([*NODES] if number == 1 else [])  # no client trains twice
    assert same_models(Run.open(tmp_path / "run"), Run.open(tmp_path / "whole"), rounds=2)


def test_what_sites_sent_before_they_went_away_is_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dies_in_round(1, CONFIG, tmp_path / "run", monkeypatch)
    assert deployed(CONFIG, tmp_path / "run", nodes=[11], mute=[0]) == []
    assert same_models(Run.open(tmp_path / "run"), run_with(CONFIG, tmp_path / "whole", list))


def test_a_site_that_has_not_answered_is_asked_when_the_run_goes_on(tmp_path: Path) -> None:
    config = CONFIG.replace(timeout=0.2, min_completed=3)
    with pytest.raises(RoundFailed, match="node 33 did not answer in time"):
        deployed(config, tmp_path / "run", mute=[2])
    assert deployed(config, tmp_path / "run") == [33]
    with (tmp_path / "run" / "nodes.jsonl").open("a") as file:
        file.write('{"node": 4')  # the line that a killed process was writing
    assert Answers(Run.open(tmp_path / "run"), config).nodes([]) == [11, 22, 33]


def test_what_arrived_before_the_server_died_is_merged_without_any_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies_in_round(1, CONFIG.replace(timeout=0.2), tmp_path / "run", monkeypatch, mute=[1])
    done = CliRunner().invoke(main, ["merge", str(tmp_path / "run"), "--methods", "mean"])
    assert done.exit_code == 0, done.output
    assert len(Run.open(tmp_path / "run").results()) == 1


def test_a_folder_is_entered_for_its_own_unfinished_run_alone(tmp_path: Path) -> None:
    deployed(CONFIG, tmp_path / "run")
    with pytest.raises(RunError, match="holds this run, completed: fetch it"):
        enter(tmp_path / "run", CONFIG)
    with pytest.raises(RunError, match="holds a run of other settings"):
        enter(tmp_path / "run", CONFIG.replace(seed=1))
    Run.create(tmp_path / "simulated", "simulate", CONFIG)
    with pytest.raises(RunError, match="holds a run of other settings"):
        enter(tmp_path / "simulated", CONFIG)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    with pytest.raises(RunError, match="is not empty"):
        enter(tmp_path / "other", CONFIG)


def test_of_two_runs_that_enter_one_folder_one_goes_on(tmp_path: Path) -> None:
    run = enter(tmp_path / "run", CONFIG)
    with in_process(CONFIG, nodes=NODES) as grid:
        collect(grid, CONFIG, run, pause=0)
    with run.locked(), pytest.raises(RunError, match="another process is writing into"):
        deployed(CONFIG, tmp_path / "run")
