from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from torch import Tensor

from fedmerge import federation, models
from fedmerge.client import client_app, evaluate_client, train_client
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.flower import CLIENT_CRASHED, CLIENT_FAILED, identity, node_context
from fedmerge.machine import choose_device, num_threads
from fedmerge.nodes import partition_of
from fedmerge.problem import Update
from fedmerge.seeds import derive, generator
from fedmerge.settings import ConfigurationError
from fedmerge.statistics import collect
from fedmerge.together import answer_together
from fedmerge.wire import arrays_from_state, update_from_records

CONFIG = Config(device="cpu", clients=3, local_epochs="1", min_client_examples=40, lr=0.05)


def loaded() -> Federation:
    return federation.load(CONFIG)


def initial(seed: int = 0) -> dict[str, Tensor]:
    model = models.create("mlp", shape=(1, 8, 8), num_classes=10, seed=seed)
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def train(config: Config = CONFIG, partition_id: int = 0, server_round: int = 1) -> Update:
    return train_client(config, loaded(), partition_id, server_round, initial())


def test_a_client_trains_to_the_same_bits_from_the_same_seed() -> None:
    assert same(train().state, train().state)


def test_another_seed_client_or_round_gives_another_model() -> None:
    shared = CONFIG.replace(init="shared")
    first = train(shared).state
    assert not same(first, train(shared.replace(seed=1)).state)
    assert not same(first, train(shared, partition_id=1).state)
    assert not same(first, train(shared, server_round=2).state)


def test_a_client_does_not_depend_on_the_callers_threads_or_global_generator_and_leaves_both_as_they_were() -> None:
    expected = train().state
    with num_threads(2):
        torch.manual_seed(123)
        before = torch.get_rng_state()
        assert same(train().state, expected)
        assert torch.get_num_threads() == 2
        assert torch.equal(torch.get_rng_state(), before)


def test_an_update_tells_what_the_client_has_and_how_well_its_model_does_on_it() -> None:
    update = train(CONFIG.replace(local_epochs="20"), partition_id=1)
    own = loaded().client(1)
    assert update.num_examples == len(own)
    assert update.partition_id == 1
    assert update.label_counts == tuple(loaded().label_counts()[1])
    assert update.num_bytes == sum(tensor.numel() * 4 for tensor in update.state.values())
    assert 0.9 < update.metrics["accuracy"] <= 1
    assert update.metrics["loss"] < 0.5
    assert update.metrics["seconds"] > 0
    judged, num_examples = evaluate_client(CONFIG, loaded(), 1, update.state)
    assert (judged.accuracy, judged.loss) == (update.metrics["accuracy"], update.metrics["loss"])
    assert num_examples == len(own)


def test_label_counts_stay_at_a_client_that_keeps_them() -> None:
    assert train(CONFIG.replace(label_counts=False)).label_counts is None


def test_a_client_tells_the_statistics_that_are_asked_for_and_trains_to_the_same_bits() -> None:
    plain, told = train(), train(CONFIG.replace(client_statistics="gram", merge="fisher"))
    assert plain.statistics == {}
    assert same(plain.state, told.state)
    assert told.num_bytes == plain.num_bytes
    own = loaded().client(0)
    model = models.create("mlp", shape=(1, 8, 8), num_classes=10, seed=0)
    chance = generator(0, "client", 0, "statistics", 1)
    expected = collect(("fisher", "gram"), model, told.state, own.images, generator=chance)
    assert told.statistics.keys() == expected.keys()
    assert all(same(told.statistics[kind], expected[kind]) for kind in expected)


def test_flowers_fedprox_may_tell_its_term_with_the_message_and_it_goes_before_the_setting() -> None:
    shared = CONFIG.replace(init="shared")
    told = message()
    told.content.config_records["config"]["proximal-mu"] = 5.0
    reply = client_app()(told, node_context(shared, 0))
    update = update_from_records(reply.content, initial(), fallback_id=9)
    assert same(update.state, train(shared.replace(proximal_mu=5.0)).state)
    assert not same(update.state, train(shared).state)
    told.content.config_records["config"]["proximal-mu"] = -1.0
    reply = client_app()(told, node_context(shared, 0))
    assert "--proximal-mu must be at least 0 and finite, got -1.0" in (reply.error.reason or "")


def test_independent_clients_start_the_first_round_from_initialisations_of_their_own() -> None:
    still = CONFIG.replace(lr=1e-30)
    for partition_id in range(2):
        assert same(train(still, partition_id).state, initial(derive(0, "client", partition_id, "init")))


def test_a_training_that_diverges_starts_again_at_half_the_rate_and_tells_so() -> None:
    pulled = CONFIG.replace(proximal_mu=200.0, local_epochs="60")  # it diverges at rates of 0.05 and of 0.025
    told, slow = train(pulled), train(pulled.replace(lr=CONFIG.lr / 4))
    assert told.metrics["restarts"] == 2
    assert "restarts" not in slow.metrics
    assert same(told.state, slow.state)
    [reply] = answer_together(federation.load, [(message(), node_context(pulled, 0))])
    update = update_from_records(reply.content, initial(), fallback_id=9)
    assert update.metrics["restarts"] == 2
    assert same(update.state, slow.state)


@pytest.mark.parametrize(("init", "server_round"), [("shared", 1), ("shared", 2), ("independent", 2)])
def test_clients_start_from_what_the_server_sent_if_initialisations_are_shared_or_the_round_is_not_the_first(
    init: str, server_round: int
) -> None:
    still = CONFIG.replace(lr=1e-30, init=init)
    assert same(train(still, server_round=server_round).state, initial())
    with pytest.raises(ValueError, match=f"the server sent no weights to start round {server_round} from"):
        train_client(still, loaded(), 0, server_round, None)


def test_a_client_trains_by_the_schedule_of_the_run() -> None:
    plain = CONFIG.replace(local_epochs="2")
    linear = plain.replace(lr_schedule="linear")
    states = [train(config).state for config in (plain, linear, linear.replace(warmup=0.5))]
    assert not any(same(first, second) for first, second in itertools.combinations(states, 2))


def test_epochs_are_drawn_for_each_client_and_round_within_the_range(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def fit(*arguments: Any, **_: Any) -> tuple[dict[str, Tensor], float]:
        _, state, _, recipe = arguments
        drawn.append(recipe.epochs)
        return dict(state), 0.0

    monkeypatch.setattr("fedmerge.client.fit", fit)
    config = CONFIG.replace(local_epochs="2..4")
    for server_round in range(1, 8):
        for partition_id in range(3):
            train(config, partition_id, server_round)
    assert set(drawn) == {2, 3, 4}
    assert len({tuple(drawn[index : index + 3]) for index in range(0, len(drawn), 3)}) > 1


def message(kind: str = MessageType.TRAIN, server_round: object = 1, arrays: bool = True) -> Message:
    told = ConfigRecord() if server_round is None else ConfigRecord({"server-round": server_round})  # type: ignore[dict-item]
    content = RecordDict({"config": told})
    if arrays:
        content["arrays"] = arrays_from_state(initial())
    with identity():
        return Message(content=content, message_type=kind, dst_node_id=1)


def test_the_app_answers_a_training_message_with_the_update() -> None:
    config = CONFIG.replace(init="shared", upload_dtype="float16")
    reply = client_app()(message(), node_context(config, 2))
    got = update_from_records(reply.content, initial(), fallback_id=99, num_classes=10)
    expected = train(config, partition_id=2)
    assert got.partition_id == 2
    assert got.num_bytes == expected.num_bytes / 2
    assert same(got.state, {name: tensor.half().float() for name, tensor in expected.state.items()})


def test_the_app_answers_an_evaluation_message_with_metrics() -> None:
    reply = client_app()(message(MessageType.EVALUATE), node_context(CONFIG, 2))
    judged, num_examples = evaluate_client(CONFIG, loaded(), 2, initial())
    assert dict(reply.content["metrics"]) == {
        "num-examples": num_examples,
        "partition-id": 2,
        "loss": judged.loss,
        "accuracy": judged.accuracy,
    }


def wrong_arrays() -> ArrayRecord:
    return arrays_from_state({"w": torch.zeros(2)})


def test_whatever_goes_wrong_at_a_client_is_answered_with_its_number_and_the_reason() -> None:
    shared = CONFIG.replace(init="shared")
    unfit = message()
    unfit.content["arrays"] = wrong_arrays()
    cases = [
        (shared, unfit, "client 1: MalformedUpdate: the keys differ from the model's 6: missing"),
        (
            shared,
            message(server_round=None),
            "client 1: ValueError: the message's record 'config' has server-round=None",
        ),
        (
            shared,
            message(server_round=0),
            "client 1: ValueError: the message's record 'config' has server-round=0",
        ),
        (
            shared,
            message(arrays=False),
            "client 1: ValueError: the server sent no weights to start round 1 from",
        ),
        (CONFIG.replace(lr=1e9, local_epochs="5"), message(), "client 1: Diverged: the training loss became"),
        (
            CONFIG,
            message(MessageType.EVALUATE, arrays=False),
            "client 1: ValueError: an evaluation needs the model",
        ),
        (CONFIG.replace(device="cuda:7"), message(), "client 1: ConfigurationError: --device cuda:7"),
        (CONFIG.replace(data="nothing"), message(), "client 1: ConfigurationError: unknown data set 'nothing'"),
    ]
    for config, sent, reason in cases:
        reply = client_app()(sent, node_context(config, 1))
        assert reply.error.code == CLIENT_FAILED
        assert (reply.error.reason or "").startswith(reason)


def test_the_error_codes_are_flowers() -> None:
    assert CLIENT_FAILED == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert CLIENT_CRASHED == ErrorCode.CLIENT_APP_CRASHED


def test_a_node_must_tell_which_client_it_is() -> None:
    assert partition_of({"partition-id": 2}, CONFIG) == 2
    assert partition_of({"partition-id": 2, "num-partitions": 3}, CONFIG) == 2
    for wrong in ({}, {"partition-id": 3}, {"partition-id": -1}, {"partition-id": "1"}):
        with pytest.raises(ConfigurationError, match="expected a whole number from 0 to 2"):
            partition_of(wrong, CONFIG)
    with pytest.raises(
        ConfigurationError, match=r"the node has num-partitions=2, but the run has clients=3.*num-supernodes=3"
    ):
        partition_of({"partition-id": 0, "num-partitions": 2}, CONFIG)


def test_a_sites_own_settings_go_before_the_runs() -> None:
    seen = []

    def load(config: Config) -> Federation:
        seen.append((config.data_dir, config.device, config.lr))
        return loaded()

    context = node_context(CONFIG, 0)
    context.node_config |= {"data-dir": "/site/images", "device": "cpu", "lr": 7.0, "site-name": "north"}
    assert client_app(load)(message(), context).has_content()
    assert seen == [("/site/images", "cpu", CONFIG.lr)]


def test_a_node_of_another_run_is_told_which_setting_is_unknown() -> None:
    context = Context(1, 1, {"partition-id": 0}, RecordDict(), {"num-server-rounds": 3})
    reply = client_app()(message(), context)
    assert "unknown setting 'num-server-rounds'" in (reply.error.reason or "")


def test_a_device_that_is_none_is_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ConfigurationError, match="--device must be cpu, cuda, cuda:N or auto, got 'gpu'"):
        choose_device("gpu")
