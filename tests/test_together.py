"""Clients that answer side by side: what each would have answered alone, errors included."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from torch import Tensor

from fedmerge import federation, models
from fedmerge.client import client_app
from fedmerge.config import Config
from fedmerge.flower import CLIENT_FAILED, identity, node_context, set_message_id
from fedmerge.problem import Update
from fedmerge.together import GROUP_BYTES, LARGEST_GROUP, answer_together, group_size
from fedmerge.wire import arrays_from_state, update_from_records

CONFIG = Config(device="cpu", clients=5, local_epochs="1..2", min_client_examples=5, init="shared", lr=0.05)


def initial(name: str = "mlp") -> dict[str, Tensor]:
    return dict(models.create(name, shape=(1, 8, 8), num_classes=10, seed=0).state_dict())


def messages(config: Config, *, arrays: bool = True, name: str = "mlp") -> list[tuple[Message, Context]]:
    content = RecordDict({"config": ConfigRecord({"server-round": 1})})
    if arrays:
        content["arrays"] = arrays_from_state(initial(name))
    asked = []
    for client in range(config.clients):
        with identity():
            message = Message(content, client + 1, MessageType.TRAIN)
            set_message_id(message)
        asked.append((message, node_context(config, client)))
    return asked


def read(reply: Message, name: str = "mlp", others: Mapping[str, Mapping[str, Tensor]] | None = None) -> Update:
    return update_from_records(reply.content, initial(name), fallback_id=99, num_classes=10, others=others)


@pytest.mark.parametrize("init", ["shared", "independent"])
def test_updates_are_those_of_clients_that_train_alone_but_for_rounding(init: str) -> None:
    config = CONFIG.replace(init=init, client_statistics="gram")
    asked, app = messages(config), client_app()
    for (message, context), reply in zip(asked, answer_together(federation.load, asked), strict=True):
        assert reply.metadata.reply_to_message_id == message.metadata.message_id
        found, expected = read(reply), read(app(message, context))
        for name, tensor in expected.state.items():
            torch.testing.assert_close(found.state[name], tensor, rtol=1e-4, atol=1e-6)
        assert found.partition_id == expected.partition_id
        assert (found.num_examples, found.label_counts) == (expected.num_examples, expected.label_counts)
        assert found.metrics["loss"] == pytest.approx(expected.metrics["loss"], rel=1e-4)
        assert found.statistics.keys() == expected.statistics.keys() == {"gram"}


def test_the_same_clients_side_by_side_give_the_same_bits_again() -> None:
    first, again = ([read(reply) for reply in answer_together(federation.load, messages(CONFIG))] for _ in range(2))
    for one, other in zip(first, again, strict=True):
        assert all(torch.equal(tensor, other.state[name]) for name, tensor in one.state.items())


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"devices": "layers=1:5"}, "mlp"),
        ({"devices": "layers=1:2"}, "mlp"),
        ({"model": "lenet5"}, "lenet5"),
        ({"augment": "both"}, "mlp"),
    ],
)
def test_what_cannot_be_stacked_trains_alone_to_the_same_bits(changes: dict[str, str], name: str) -> None:
    config = CONFIG.replace(**changes)
    asked, app = messages(config, name=name), client_app()
    replies = answer_together(federation.load, asked)
    alone = 2 if changes.get("devices") == "layers=1:2" else config.clients
    for (message, context), reply in list(zip(asked, replies, strict=True))[:alone]:
        expected = app(message, context)
        ours, theirs = reply.content.array_records["arrays"], expected.content.array_records["arrays"]
        assert {key: array.data for key, array in ours.items()} == {key: array.data for key, array in theirs.items()}


def test_clients_of_several_architectures_are_stacked_by_architecture_and_declare_theirs() -> None:
    config = CONFIG.replace(models="mlp@0.5:2,mlp:3")
    replies = answer_together(federation.load, messages(config))
    updates = [read(reply, others={"mlp@0.5": initial("mlp@0.5")}) for reply in replies]
    assert [update.model for update in updates] == ["mlp@0.5"] * 2 + [""] * 3


def test_what_goes_wrong_at_one_is_its_own_answer_and_the_others_go_on() -> None:
    asked = messages(CONFIG)
    asked[1][1].node_config["partition-id"] = 77
    asked[3][1].node_config["device"] = "cuda:9"
    replies = answer_together(federation.load, asked)
    assert [reply.has_content() for reply in replies] == [True, False, True, False, True]
    assert replies[1].error.code == replies[3].error.code == CLIENT_FAILED
    assert "client 77: ConfigurationError: the node's configuration has partition-id=77" in (
        replies[1].error.reason or ""
    )
    assert "client 3: ConfigurationError: --device cuda:9" in (replies[3].error.reason or "")
    for reply in answer_together(federation.load, messages(CONFIG, arrays=False)):
        assert "ValueError: the server sent no weights to start round 1" in (reply.error.reason or "")
    for client, reply in enumerate(answer_together(federation.load, messages(CONFIG.replace(lr=1e30)))):
        assert f"client {client}: Diverged: the training loss became" in (reply.error.reason or "")


def test_a_group_is_as_asked_for_or_one_on_cpus_and_of_convolutions_and_by_the_models_size_on_gpus() -> None:
    assert group_size(CONFIG, 1) == group_size(CONFIG.replace(client_gpus=1.0, device="cpu"), 1) == 1
    assert group_size(CONFIG.replace(batched_clients=7, client_gpus=1.0), 1) == 7
    on_gpu = CONFIG.replace(device="auto", client_gpus=0.5)
    assert group_size(on_gpu, 0) == group_size(on_gpu, 1000) == LARGEST_GROUP
    assert group_size(on_gpu, GROUP_BYTES // 40) == 10
    assert group_size(on_gpu, GROUP_BYTES) == 1
    assert group_size(on_gpu.replace(model="lenet5"), 1000) == 1
    assert group_size(on_gpu.replace(model="lenet5", batched_clients=5), 1000) == 5
