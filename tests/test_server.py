from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Error, Message, RecordDict
from flwr.clientapp import ClientApp
from grids import InProcessGrid, in_process
from safetensors.torch import load_file
from torch import Tensor

from fedmerge import federation, models
from fedmerge.client import client_app, evaluate_client, train_client
from fedmerge.config import Config
from fedmerge.flower import CLIENT_FAILED, identity, node_context
from fedmerge.machine import num_threads
from fedmerge.problem import Problem
from fedmerge.recording import RecordingGrid
from fedmerge.results import bytes_up
from fedmerge.runs import Run, RunError
from fedmerge.server import collect, serve
from fedmerge.simulation import recall_from
from fedmerge.state import num_bytes
from fedmerge.strategy import OneShotMerge, RoundFailed
from fedmerge.wire import arrays_from_state, state_from_arrays

CONFIG = Config(clients=3, local_epochs="1", align="identity", merge="mean", server_examples=60, threads=1)
MODEL_BYTES = 104_488


def new_run(folder: Path, config: Config = CONFIG) -> Run:
    return Run.create(folder / "run", "simulate", config)


def failing(partition_id: int, reason: str = "no disk") -> ClientApp:
    """The clients, of which one fails."""
    app, broken = client_app(), ClientApp()

    @broken.train()
    def train(message: Message, context: Any) -> Message:
        if context.node_config["partition-id"] == partition_id:
            return Message(Error(CLIENT_FAILED, f"client {partition_id}: {reason}"), reply_to=message)
        return app(message, context)

    return broken


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_run_leaves_partition_updates_models_and_results(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    heard: list[tuple[str, int, int]] = []
    with in_process(CONFIG) as grid:
        result = serve(grid, CONFIG, run, progress=lambda *what: heard.append(what), pause=0)
    examples = federation.load(CONFIG)
    assert json.loads((run.path / "partitions" / "seed-0.json").read_text()) == examples.indices()
    for update in run.load_updates(0):
        expected = train_client(CONFIG, examples, update.partition_id, 1, None)
        assert same(update.state, expected.state)
        assert update.label_counts == expected.label_counts
    assert [update.partition_id for update in run.load_updates(0)] == [0, 1, 2]
    [line] = run.results()
    assert (line["method"], line["seed"], line["round"], line["status"]) == ("mean", 0, 1, "ok")
    assert (line["bytes_up"], line["bytes_down"]) == (3 * MODEL_BYTES, 0)
    assert dict(result.evaluate_metrics_serverapp[1]) == {"accuracy": line["accuracy"], "loss": line["loss"]}
    stored = load_file(run.path / "models" / "seed-0" / "round-1" / "mean.safetensors")
    assert num_bytes(stored) == MODEL_BYTES
    assert [what for what in heard if what[0] == "clients trained"] == [
        ("clients trained", done, 3) for done in (1, 2, 3)
    ]


def test_what_a_merger_needs_of_the_clients_is_sent_stored_counted_and_recalled(tmp_path: Path) -> None:
    config = CONFIG.replace(merge="fisher")
    run = new_run(tmp_path, config)
    with in_process(config) as grid:
        serve(grid, config, run, pause=0)
    [line] = run.results()
    assert line["bytes_up"] == 6 * MODEL_BYTES  # a Fisher is as large as a model
    updates = run.load_updates(0)
    assert [list(update.statistics) for update in updates] == [["fisher"]] * 3
    assert bytes_up(updates, "mean") == 3 * MODEL_BYTES
    again = Run.create(tmp_path / "again", "simulate", config)
    with in_process(config) as grid:
        serve(grid, config, again, recall=recall_from(run, config), pause=0)
    assert again.results()[0]["accuracy"] == line["accuracy"]


def test_a_rounds_start_is_what_the_server_sent(tmp_path: Path) -> None:
    config = CONFIG.replace(init="shared", merge="task-arithmetic:scales=1", rounds=2)
    run, plain = new_run(tmp_path, config), Run.create(tmp_path / "plain", "simulate", CONFIG)
    with in_process(config) as grid:
        serve(grid, config, run, pause=0)
    with in_process(config) as grid:
        serve(grid, config.replace(merge="mean"), plain, pause=0)
    for ours, theirs in zip(run.results(), plain.results(), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], abs=1e-4)  # at this scale it is the mean of the clients


def test_shared_initialisations_and_later_rounds_are_sent_to_the_clients_and_counted(tmp_path: Path) -> None:
    config = CONFIG.replace(init="shared", rounds=2)
    run = new_run(tmp_path, config)
    with in_process(config) as grid:
        serve(grid, config, run, pause=0)
    first, second = run.results()
    assert (first["bytes_up"], first["bytes_down"]) == (3 * MODEL_BYTES, 3 * MODEL_BYTES)
    assert (second["bytes_up"], second["bytes_down"]) == (3 * MODEL_BYTES, 3 * MODEL_BYTES)  # in its round
    assert second["accuracy"] > first["accuracy"]
    merged = load_file(run.path / "models" / "seed-0" / "round-1" / "mean.safetensors")
    expected = train_client(config, federation.load(config), 1, 2, merged)
    assert same(run.load_update(0, 2, 1).state, expected.state)


def test_a_resumed_run_trains_only_what_is_missing_and_ends_in_the_same_bits(tmp_path: Path) -> None:
    config = CONFIG.replace(rounds=2, upload_dtype="float16", merge="np:steps=20")
    run = new_run(tmp_path, config)
    with in_process(config) as grid:
        expected = serve(grid, config, run, pause=0)
    lost = run.path / "updates" / "seed-0" / "round-2" / "client-00001.safetensors"
    lost.unlink()
    heard = []
    with in_process(config) as grid:
        got = serve(
            grid, config, run, recall=recall_from(run, config), progress=lambda *what: heard.append(what), pause=0
        )
        assert [message.metadata.dst_node_id for message in grid.sent] == [2]
    assert [array.data for array in got.arrays.values()] == [array.data for array in expected.arrays.values()]
    assert lost.exists()
    assert [what for what in heard if what[0] == "clients trained"] == [
        ("clients trained", 3, 3),
        ("clients trained", 2, 3),
        ("clients trained", 3, 3),
    ]
    first, second = run.results()
    assert (first["bytes_up"], second["bytes_down"]) == (3 * MODEL_BYTES / 2, 3 * MODEL_BYTES)


def test_a_run_goes_on_only_with_the_same_partition(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with in_process(CONFIG) as grid:
        collect(grid, CONFIG, run, pause=0)
        with pytest.raises(RunError, match="holds another partition"):
            collect(grid, CONFIG.replace(alpha=7.0), run, pause=0)


def test_collecting_gives_the_updates_without_a_merge(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    with in_process(CONFIG, reverse=True) as grid:
        updates = collect(grid, CONFIG, run, pause=0)
    assert [update.partition_id for update in updates] == [0, 1, 2]
    assert all(same(update.state, run.load_update(0, 1, update.partition_id).state) for update in updates)
    assert run.results() == []


def test_updates_are_stored_although_the_round_fails(tmp_path: Path) -> None:
    config = CONFIG.replace(min_completed=3)
    run = new_run(tmp_path, config)
    with in_process(config, app=failing(1)) as grid, pytest.raises(RoundFailed, match="client 1: no disk"):
        serve(grid, config, run, pause=0)
    assert [update.partition_id for update in run.load_updates(0)] == [0, 2]
    with in_process(config, app=failing(1)) as grid, pytest.raises(RoundFailed, match="needs 3"):
        collect(grid, config, run, pause=0)


def test_a_malformed_update_is_not_stored(tmp_path: Path) -> None:
    app, broken = client_app(), ClientApp()

    @broken.train()
    def train(message: Message, context: Any) -> Message:
        reply = app(message, context)
        if context.node_config["partition-id"] == 2:
            reply.content.metric_records["metrics"]["label-counts"] = [1, 2, 3]
        return reply

    run = new_run(tmp_path)
    with in_process(CONFIG, app=broken) as grid:
        serve(grid, CONFIG, run, pause=0)
    assert [update.partition_id for update in run.load_updates(0)] == [0, 1]
    [line] = run.results()
    [reason] = line["diagnostics"]["refused"]
    assert reason.startswith("client 2 (node ")
    assert reason.endswith("label-counts has 3 classes, expected 10")


def test_who_does_not_answer_in_time_is_told_and_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = CONFIG.replace(timeout=0.2)
    with in_process(config, mute=[1], nodes=[11, 22, 33]) as grid, caplog.at_level(logging.WARNING, "fedmerge"):
        updates = collect(grid, config, new_run(tmp_path, config), pause=0.01)
    assert [update.partition_id for update in updates] == [0, 2]
    assert "no answer within 0 s from the nodes 22" in caplog.text
    assert "node 22 did not answer in time" in caplog.text


def test_the_merge_runs_with_the_threads_asked_for_and_clients_do_not_depend_on_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    folds = Problem.__post_init__

    def noted(problem: Problem) -> None:
        seen.append(torch.get_num_threads())
        folds(problem)

    monkeypatch.setattr(Problem, "__post_init__", noted)
    config = CONFIG.replace(threads=3)
    with num_threads(1), in_process(config) as grid:
        serve(grid, config, new_run(tmp_path, config), pause=0)
        assert torch.get_num_threads() == 1
    assert seen == [3]


def test_a_recording_grid_is_otherwise_the_grid_that_it_wraps() -> None:
    with in_process(CONFIG) as grid:
        recording = RecordingGrid(grid, arrived=lambda _, __: None)
        assert list(recording.get_node_ids()) == [1, 2, 3]
        assert [node.node_id for node in recording.get_nodes()] == [1, 2, 3]
        message = recording.create_message(RecordDict(), "evaluate", 2, "group")
        [message_id] = recording.push_messages([message])
        [reply] = recording.pull_messages([message_id])
        assert (reply.error.reason or "").startswith("client 1: ValueError: an evaluation needs the model")
        with pytest.raises(NotImplementedError):
            _ = recording.run


def test_messages_that_flower_cannot_send_are_told(caplog: pytest.LogCaptureFixture) -> None:
    class Full(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> list[str]:
            return []

    full = Full(lambda message, _: message, [1])
    with identity(), caplog.at_level(logging.WARNING, "fedmerge"):
        grid = RecordingGrid(full, arrived=lambda _, __: None)
        message = grid.create_message(RecordDict(), "evaluate", 1, "")
        assert list(grid.send_and_receive([message], timeout=1)) == []
    assert "Flower could not send 1 of 1 messages" in caplog.text


def test_clients_evaluate_the_merged_model_on_their_images_if_asked() -> None:
    examples = federation.load(CONFIG)
    model = models.create("mlp", shape=(1, 8, 8), num_classes=10, seed=0)
    strategy = OneShotMerge(
        model,
        examples.server.images,
        examples.server.labels,
        align="identity",
        merge="mean",
        min_train_nodes=3,
        fraction_evaluate=1.0,
        min_evaluate_nodes=3,
    )
    with in_process(CONFIG) as grid:
        result = strategy.start(grid, arrays_from_state(model.state_dict()), num_rounds=1)
    merged = state_from_arrays(result.arrays, model.state_dict())
    judged = [evaluate_client(CONFIG, examples, client, merged) for client in range(3)]
    total = sum(count for _, count in judged)
    expected = {
        "accuracy": sum(found.accuracy * count for found, count in judged) / total,
        "loss": sum(found.loss * count for found, count in judged) / total,
    }
    assert dict(result.evaluate_metrics_clientapp[1]) == pytest.approx(expected)


def test_a_context_is_that_of_the_client() -> None:
    assert node_context(CONFIG, 2).node_config == {"partition-id": 2, "num-partitions": 3}
