"""Whom a round asks: drawn by seed and round from the clients, whatever ids their nodes have, and again on resuming."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from grids import InProcessGrid, in_process

from fedmerge.client import client_app, train_client
from fedmerge.config import Config
from fedmerge.federation import load
from fedmerge.flower import identity, node_context
from fedmerge.rounds import RoundFailed
from fedmerge.runs import Run
from fedmerge.sampling import Sample, drawn
from fedmerge.server import serve
from fedmerge.settings import ConfigurationError
from fedmerge.simulation import nodes_of, recall_from

CONFIG = Config(
    clients=6,
    clients_per_round=2,
    rounds=3,
    local_epochs="1",
    min_client_examples=5,
    align="identity",
    merge="mean",
    init="shared",
)


def served(folder: Path, config: Config = CONFIG, nodes: Sequence[int] | None = None) -> tuple[Run, InProcessGrid]:
    run = Run.create(folder, "simulate", config)
    with in_process(config, nodes=nodes) as grid:
        serve(grid, config, run, pause=0)
    return run, grid


def asked(run: Run, server_round: int) -> list[int]:
    return [update.partition_id for update in run.load_updates(0, server_round)]


def test_a_draw_is_a_sorted_sample_without_replacement_of_the_size_that_there_is() -> None:
    for size, server_round in itertools.product((1, 3, 10, 12), (1, 2)):
        found = drawn(range(10), size, seed=0, server_round=server_round)
        assert found == sorted(set(found))
        assert len(found) == min(size, 10)
    assert drawn([4, 7, 9], 3, seed=1, server_round=1) == [4, 7, 9]


def test_draws_differ_by_seed_and_round_and_give_every_client_its_share() -> None:
    draws = [drawn(range(20), 5, seed=seed, server_round=each) for seed in range(10) for each in range(1, 41)]
    assert len({tuple(found) for found in draws}) > 390
    share = torch.bincount(torch.tensor(draws).flatten(), minlength=20) / len(draws)
    assert float((share - 0.25).abs().max()) < 0.08


def test_rounds_ask_the_clients_of_the_draw_whatever_ids_their_nodes_have(tmp_path: Path) -> None:
    run, _ = served(tmp_path / "in order")
    other, grid = served(tmp_path / "of random ids", nodes=[71, 5, 993, 20, 44, 6])
    for server_round in (1, 2, 3):
        expected = drawn(range(6), 2, seed=0, server_round=server_round)
        assert asked(run, server_round) == asked(other, server_round) == expected
    kinds = [message.metadata.message_type for message in grid.sent]
    assert kinds.count(MessageType.QUERY) == 6
    assert kinds.count(MessageType.TRAIN) == 6
    ours, theirs = ([line["accuracy"] for line in each.results()] for each in (run, other))
    assert ours == theirs
    assert len(ours) == 3


def test_nodes_that_do_not_tell_which_client_they_are_are_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = Run.create(tmp_path, "simulate", CONFIG)
    app = client_app()

    def answer(message: Message, partition_id: int) -> Message:
        context = node_context(CONFIG, partition_id)
        if partition_id in (1, 4):
            del context.node_config["partition-id"]
        return app(message, context)

    with identity():
        serve(InProcessGrid(answer, range(1, 7)), CONFIG, run, pause=0)
    assert "the nodes 2, 5 do not tell which clients they are: left out" in caplog.text
    for server_round in (1, 2, 3):
        assert asked(run, server_round) == drawn([0, 2, 3, 5], 2, seed=0, server_round=server_round)


def test_where_no_node_tells_the_round_fails() -> None:
    with identity(), pytest.raises(RoundFailed, match="none of 2 nodes tells which client it is"):
        Sample(1, 0).nodes(1, [3, 4], InProcessGrid(lambda message, _: message, [3, 4], mute=(0, 1)))


def test_a_resumed_run_asks_the_same_and_takes_what_is_there(tmp_path: Path) -> None:
    run, _ = served(tmp_path / "whole")
    again = Run.create(tmp_path / "again", "simulate", CONFIG)
    first = drawn(range(6), 2, seed=0, server_round=1)
    for client in first:
        again.save_update(0, 1, run.load_update(0, 1, client))
    with in_process(CONFIG) as grid:
        serve(grid, CONFIG, again, recall=recall_from(again, CONFIG), pause=0, clients_of=nodes_of)
    sent = [message.metadata.dst_node_id - 1 for message in grid.sent]
    assert sent == [client for each in (2, 3) for client in drawn(range(6), 2, seed=0, server_round=each)]
    last = [each.path / "models" / "seed-0" / "round-3" for each in (run, again)]
    ours, theirs = (next(folder.iterdir()).read_bytes() for folder in last)
    assert ours == theirs


def test_side_by_side_a_round_is_taken_whole_or_not_at_all(tmp_path: Path) -> None:
    config = CONFIG.replace(batched_clients=2, init="independent")
    run, both = Run.create(tmp_path, "simulate", config), drawn(range(6), 2, seed=0, server_round=1)
    with in_process(config) as grid:
        message = grid.create_message(
            RecordDict({"config": ConfigRecord({"server-round": 1})}), MessageType.TRAIN, 1 + both[0], ""
        )
        for client, known in zip(both, (False, True), strict=True):
            run.save_update(0, 1, train_client(config, load(config), client, 1, None))
            assert (recall_from(run, config)(message) is not None) == known
        assert recall_from(run, config.replace(batched_clients=1))(message) is not None


def test_more_than_there_are_cannot_be_asked_or_needed() -> None:
    with pytest.raises(ConfigurationError, match="--clients-per-round is 7, but there are only 6 clients"):
        CONFIG.replace(clients_per_round=7)
    with pytest.raises(ConfigurationError, match=r"--min-completed is 3, but there are only 2 of them in a round"):
        CONFIG.replace(min_completed=3)
