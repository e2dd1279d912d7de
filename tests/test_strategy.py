from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.exception import AggregationError
from grids import InProcessGrid
from torch import Tensor, nn

from fedmerge.flower import CLIENT_FAILED, identity
from fedmerge.problem import Update
from fedmerge.settings import ConfigurationError
from fedmerge.strategy import OneShotMerge, RoundFailed
from fedmerge.wire import arrays_from_state, state_from_arrays, update_to_records

Answer = Callable[[Message, int], Message]


def network() -> nn.Module:
    """A small network with an integer buffer (BatchNorm's)."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))


IMAGES = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(60) % 3


def trained(partition_id: int, start: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A state that differs from client to client, and depends on where it starts."""
    generator = torch.Generator().manual_seed(partition_id)
    state = network().state_dict() if start is None else start
    return {
        name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator)
        if tensor.is_floating_point() and "running" not in name
        else tensor + (partition_id + 1 if not tensor.is_floating_point() else 0)
        for name, tensor in state.items()
    }


def content_of(partition_id: int, start: Mapping[str, Tensor] | None = None) -> RecordDict:
    update = Update(
        trained(partition_id, start),
        num_examples=10 * (partition_id + 1),
        partition_id=partition_id,
        label_counts=(1, 2, 3),
        metrics={"loss": float(partition_id), "accuracy": 0.5, "seconds": 1.0},
    )
    return update_to_records(update, upload_dtype="float32")


def good(message: Message, partition_id: int) -> Message:
    arrays = message.content.array_records.get("arrays")
    start = None if arrays is None else state_from_arrays(arrays, network().state_dict())
    return Message(content_of(partition_id, start), reply_to=message)


def but(partition_id: int, answer: Answer) -> Answer:
    """Answer well, all but one client."""

    def choose(message: Message, node: int) -> Message:
        return (answer if node == partition_id else good)(message, node)

    return choose


def raising(message: Message, partition_id: int) -> Message:
    return Message(Error(CLIENT_FAILED, f"client {partition_id}: ValueError: no disk"), reply_to=message)


def with_nan(message: Message, partition_id: int) -> Message:
    content = content_of(partition_id)
    state = trained(partition_id)
    state["0.weight"][0, 0] = torch.nan
    content["arrays"] = arrays_from_state(state)
    return Message(content, reply_to=message)


def foreign(message: Message, partition_id: int) -> Message:
    """A client of an app that knows nothing of ours."""
    content = RecordDict(
        {"arrays": ArrayRecord(trained(partition_id)), "metrics": MetricRecord({"num-examples": 8, "train_loss": 1.5})}
    )
    return Message(content, reply_to=message)


def strategy(**settings: Any) -> OneShotMerge:
    defaults: dict[str, Any] = {"align": "identity", "merge": "mean", "min_train_nodes": 3}
    return OneShotMerge(network(), IMAGES, LABELS, **(defaults | settings))


def grid(answer: Answer = good, nodes: Sequence[int] = (5, 3, 9), **settings: Any) -> InProcessGrid:
    return InProcessGrid(answer, nodes, **settings)


def run(chosen: OneShotMerge, on: InProcessGrid, rounds: int = 1) -> dict[str, Tensor]:
    with identity():
        result = chosen.start(on, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=rounds)
    return state_from_arrays(result.arrays, network().state_dict())


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("merge", ["mean", "np:steps=20"])
def test_neither_the_order_of_replies_nor_the_nodes_ids_matter(merge: str) -> None:
    expected = run(strategy(merge=merge), grid())
    assert same(run(strategy(merge=merge), grid(reverse=True)), expected)
    assert same(run(strategy(merge=merge), grid(nodes=(2, 77, 13))), expected)


def test_the_mean_of_the_updates_is_what_comes_out() -> None:
    state = run(strategy(align="identity", merge="mean"), grid())
    expected = torch.stack([trained(index)["3.weight"] for index in range(3)]).mean(0)
    assert torch.allclose(state["3.weight"], expected, atol=1e-6)


def test_integer_buffers_stay_integers() -> None:
    merged = run(strategy(), grid())
    assert merged["1.num_batches_tracked"].dtype == torch.int64


def test_a_model_given_to_the_strategy_is_left_as_it_was() -> None:
    model = network().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    run(OneShotMerge(model, IMAGES, LABELS, merge="np:steps=20", min_train_nodes=3), grid())
    assert same(before, model.state_dict())
    assert model.training


def test_each_round_starts_from_the_last_merged_model() -> None:
    on = grid()
    final = run(strategy(), on, rounds=2)
    expected = network().state_dict()
    for server_round in range(2):
        arrays = on.sent[3 * server_round].content.array_records["arrays"]
        assert same(state_from_arrays(arrays, network().state_dict()), expected)
        expected = run(strategy(), grid(but(-1, good)), rounds=server_round + 1)
    assert same(final, expected)


def test_independent_clients_are_sent_no_arrays_in_the_first_round() -> None:
    on = grid()
    run(strategy(send_arrays_first_round=False), on, rounds=2)
    assert ["arrays" in message.content for message in on.sent] == [False] * 3 + [True] * 3
    assert [message.content["config"]["server-round"] for message in on.sent] == [1] * 3 + [2] * 3


def test_the_callers_configuration_is_left_as_it_was() -> None:
    told = ConfigRecord({"lr": 0.5})
    with identity():
        strategy().start(grid(), ArrayRecord(network().state_dict()), num_rounds=1, train_config=told)
    assert dict(told) == {"lr": 0.5}


def test_a_malformed_update_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[tuple[list[int], Sequence[str]]] = []
    chosen = strategy(
        on_round=lambda _, updates, rejected, __: seen.append(([item.partition_id for item in updates], rejected))
    )
    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        state = run(chosen, grid(but(1, with_nan)))
    reason = "client 1 (node 3): tensor '0.weight' has 1 NaN or infinite numbers of 24"
    assert seen == [([0, 2], [reason])]
    assert f"round 1 goes on without an update: {reason}" in caplog.text
    without = torch.stack([trained(index)["3.weight"] for index in (0, 2)]).mean(0)
    assert torch.allclose(state["3.weight"], without, atol=1e-6)


def test_a_client_that_raises_does_not_stop_the_round(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        run(strategy(), grid(but(0, raising)))
    assert "round 1 goes on without an update: client 0: ValueError: no disk (node 5)" in caplog.text


def test_a_client_that_trained_at_a_lower_rate_is_named(caplog: pytest.LogCaptureFixture) -> None:
    def slower(message: Message, partition_id: int) -> Message:
        reply = good(message, partition_id)
        reply.content.metric_records["metrics"]["restarts"] = 2
        return reply

    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        run(strategy(), grid(but(1, slower)))
    assert [record.message for record in caplog.records] == [
        "round 1: client 1's training diverged 2 times, and each time started again at half the rate"
    ]


def test_a_client_that_does_not_answer_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        run(strategy(), grid(mute=[2]))
    assert "node 9 did not answer in time" in caplog.text


def test_of_two_answers_for_one_client_the_one_of_the_lowest_node_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    def twice(message: Message, _: int) -> Message:
        return good(message, 0)

    seen = []
    chosen = strategy(on_round=lambda _, updates, rejected, __: seen.append((len(updates), rejected)))
    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        run(chosen, grid(but(2, twice)))
    assert seen == [(2, ["client 0 (node 9): another node has answered for the same partition-id"])]
    assert "another node has answered" in caplog.text


def test_too_few_good_updates_fail_the_round_with_every_reason() -> None:
    def answer(message: Message, partition_id: int) -> Message:
        return {0: raising, 1: with_nan, 2: good}[partition_id](message, partition_id)

    with pytest.raises(RoundFailed) as caught:
        run(strategy(), grid(answer, nodes=(5, 3, 9, 11), mute=[3]))
    text = str(caught.value)
    assert text.startswith("round 1 has 1 good updates, and needs 2 (min_completed):")
    for reason in (
        "client 0: ValueError: no disk (node 5)",
        "client 1 (node 3): tensor '0.weight' has 1 NaN",
        "node 11 did not answer in time",
    ):
        assert f"\n  {reason}" in text
    assert isinstance(caught.value, AggregationError)


def test_a_round_without_any_good_update_fails() -> None:
    with pytest.raises(RoundFailed, match="round 1 has 0 good updates, and needs 1"):
        run(strategy(min_completed=1), grid(raising))


def test_another_apps_clients_take_part_by_their_node_ids(caplog: pytest.LogCaptureFixture) -> None:
    seen = []
    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        run(strategy(on_round=lambda _, updates, __, ___: seen.extend(updates)), grid(foreign))
    assert [update.partition_id for update in seen] == [3, 5, 9]
    assert "node 3 tells no 'partition-id': its place in the order of clients is random" in caplog.text


def test_an_ensemble_cannot_be_sent_to_clients() -> None:
    with pytest.raises(RoundFailed, match=r"--merge ensemble gives an ensemble of 3 models.*choose another --merge"):
        run(strategy(merge="ensemble"), grid())


def test_unknown_names_are_refused_before_clients_train() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'np'"):
        strategy(merge="npp")
    with pytest.raises(ConfigurationError, match="unknown aligner 'x'"):
        strategy(align="x")


def test_metrics_are_the_clients_means_and_the_merges_numbers() -> None:
    chosen = strategy()
    with identity():
        result = chosen.start(grid(), ArrayRecord(network().state_dict()), num_rounds=1)
    metrics = result.train_metrics_clientapp[1]
    assert metrics["loss"] == pytest.approx((0 * 10 + 1 * 20 + 2 * 30) / 60)
    assert "merge-seconds" in metrics
    assert not {"partition-id", "label-counts"} & set(metrics)


def test_fedavgs_arguments_pass_through_and_its_warning_is_not_heard(caplog: pytest.LogCaptureFixture) -> None:
    flower = logging.getLogger("flwr")
    flower.addHandler(caplog.handler)
    try:
        assert strategy().fraction_evaluate == 0
        assert strategy(min_train_nodes=4).min_available_nodes == 4
        assert strategy(fraction_evaluate=0.5, arrayrecord_key="model").arrayrecord_key == "model"
    finally:
        flower.removeHandler(caplog.handler)
    assert not caplog.records


def test_a_share_of_the_nodes_is_chosen_by_the_seed() -> None:
    def chosen(seed: int) -> list[int]:
        on = grid(nodes=range(1, 11))
        run(strategy(fraction_train=0.3, seed=seed), on)
        return [message.metadata.dst_node_id for message in on.sent]

    assert chosen(0) == chosen(0)
    assert len(chosen(0)) == 3
    assert any(chosen(seed) != chosen(0) for seed in range(1, 4))


def test_clients_are_not_waited_for_without_an_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("fedmerge.rounds.SECONDS_BETWEEN_LOOKS", 0.01)
    with caplog.at_level(logging.WARNING, "fedmerge.strategy"):
        run(strategy(min_train_nodes=5, connect_timeout=0.05), grid())
    assert "3 of 5 nodes are connected, waiting for the others" in caplog.text
    assert 'num-supernodes=5"' in caplog.text
    assert "the round starts without the others" in caplog.text
    with pytest.raises(RoundFailed, match="1 of 5 nodes are connected after 0 s, and 2 are needed"):
        run(strategy(min_train_nodes=5, connect_timeout=0.05), grid(nodes=[4]))


def test_the_servers_examples_must_be_there_and_fit() -> None:
    with pytest.raises(ValueError, match="the server owns no examples"):
        OneShotMerge(network(), IMAGES[:0], LABELS[:0])
    with pytest.raises(ValueError, match="expected one label for each image"):
        OneShotMerge(network(), IMAGES, LABELS[:-1])
