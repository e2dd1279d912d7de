"""Clients whose devices are weak: less work, shorter numbers, the last layers alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from grids import in_process
from torch import Tensor, nn

from fedmerge import federation, models
from fedmerge.client import client_app, train_client
from fedmerge.config import Config
from fedmerge.devices import Device, parse_device, parse_devices
from fedmerge.flower import identity, node_context
from fedmerge.partial import last_layers, num_layers
from fedmerge.problem import Examples, Update
from fedmerge.runs import Run
from fedmerge.seeds import derive
from fedmerge.server import collect, serve
from fedmerge.settings import ConfigurationError
from fedmerge.simulation import recall_from
from fedmerge.state import StateDict, num_bytes
from fedmerge.train import LocalTraining, fit
from fedmerge.wire import (
    CONFIG,
    LAYERS,
    MalformedUpdate,
    arrays_from_state,
    update_from_records,
    update_to_records,
)

SETTINGS = Config(
    model="mlp@0.1",
    models="mlp@0.1:4,lenet5@0.5:1",
    devices="epochs=2:1,float16:1,layers=1+float16:1",
    clients=5,
    client_examples=300,
    init="shared",
    local_epochs="1",
    server_examples=40,
    align="identity",
    merge="finetune:steps=20:lrs=0.001",
)


def initial(name: str = "mlp@0.1") -> dict[str, Tensor]:
    return dict(models.create(name, shape=(1, 8, 8), num_classes=10, seed=derive(0, "init")).state_dict())


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def collected(config: Config, path: Path) -> list[Update]:
    with in_process(config) as grid:
        return collect(grid, config, Run.create(path, "compare", config), pause=0)


def test_clients_that_are_not_told_of_have_full_devices() -> None:
    weak, partial = Device(epochs=1, float16=True), Device(layers=2)
    assert parse_devices("epochs=1+float16:1,layers=2:2", 4) == (weak, partial, partial, Device())
    assert parse_devices("", 2) == (Device(), Device())
    assert parse_device("full") == Device()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast:1", "unknown kind of device in --devices 'fast'"),
        ("epochs:1", "--devices: expected epochs=N with a whole number from 1, got 'epochs'"),
        ("layers=0:1", "expected layers=N with a whole number from 1, got 'layers=0'"),
        ("float16=1:1", "float16 takes no value"),
        ("float16", "--devices must be NAME:COUNT"),
        ("float16:6", "--devices float16:6 has 6 clients, but there are 5"),
    ],
)
def test_a_device_that_cannot_be_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Config(devices=text)


def test_a_part_of_a_model_needs_a_start_that_all_share() -> None:
    with pytest.raises(ConfigurationError, match=r"layers=N leaves a client's other layers .* give --init shared"):
        Config(devices="layers=1:1")


def test_the_last_layers_have_their_norms_and_statistics_with_them() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 3)
    )
    state = model.state_dict()
    assert num_layers(state) == 3
    assert last_layers(state, 1) == ("5.weight", "5.bias")
    assert [name for name in state if name not in last_layers(state, 2)] == [name for name in state if name[0] in "01"]
    assert last_layers(state, 3) == tuple(name for name in state if name[0] != "") == tuple(state)
    for count in (0, 4):
        with pytest.raises(ValueError, match=f"expected from 1 to 3 layers, as many as the model has, got {count}"):
            last_layers(state, count)


@pytest.mark.parametrize("mu", [0.0, 0.1])
def test_training_the_last_layers_leaves_all_others_at_the_start_statistics_included(mu: float) -> None:
    torch.manual_seed(0)
    body = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten()
    model = nn.Sequential(*body, nn.Linear(32, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    data = Examples(torch.randn(20, 1, 6, 6), torch.arange(20) % 3)
    moving = last_layers(start, 2)
    recipe = LocalTraining(epochs=2, weight_decay=0.1, proximal_mu=mu)
    state, _ = fit(model, start, data, recipe, generator=torch.Generator().manual_seed(1), moving=moving)
    assert [name for name in state if not torch.equal(state[name], start[name])] == list(moving)
    everything, _ = fit(_again(model), start, data, recipe, generator=torch.Generator().manual_seed(1))
    of_all, _ = fit(_again(model), start, data, recipe, generator=torch.Generator().manual_seed(1), moving=tuple(start))
    assert same(everything, of_all)


def _again(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_()


def test_each_client_works_as_its_device_can_and_its_bytes_are_those_it_sent(tmp_path: Path) -> None:
    updates = collected(SETTINGS, tmp_path / "run")
    examples = federation.load(SETTINGS)
    plain = SETTINGS.replace(devices="", models="")
    expected = [
        train_client(plain.replace(local_epochs="2"), examples, 0, 1, initial()),
        train_client(plain, examples, 1, 1, initial()),
        train_client(plain, examples, 2, 1, initial(), layers=1),
        train_client(plain, examples, 3, 1, initial()),
        train_client(plain.replace(model="lenet5@0.5"), examples, 4, 1, initial("lenet5@0.5")),
    ]
    assert same(updates[0].state, expected[0].state)
    assert all(torch.equal(tensor, expected[1].state[name].half().float()) for name, tensor in updates[1].state.items())
    assert same(updates[3].state, expected[3].state)
    assert same(updates[4].state, expected[4].state)
    full, head = num_bytes(initial()), 4 * (10 * 13 + 10)
    assert [update.num_bytes for update in updates[:4]] == [full, full // 2, head // 2, full]
    assert [update.layers for update in updates] == [0, 0, 1, 0, 0]
    part = updates[2].state
    assert [name for name in part if not torch.equal(part[name], initial()[name])] == list(last_layers(part, 1))


def test_a_run_with_weak_devices_goes_on_from_its_folder_with_the_same_bytes_and_bits(tmp_path: Path) -> None:
    config = SETTINGS.replace(rounds=2)
    first, second = (Run.create(tmp_path / name, "simulate", config) for name in ("first", "second"))
    with in_process(config) as grid:
        serve(grid, config, first, pause=0)
    with in_process(config) as grid:
        serve(grid, config, second, recall=recall_from(first, config), pause=0)
        assert not grid.sent
    for ours, theirs in zip(first.results(), second.results(), strict=True):
        for name in ("accuracy", "loss", "bytes_up", "bytes_down"):
            assert ours[name] == theirs[name], (name, ours["method"], ours["round"])
    assert first.load_updates(0, 2)[2].layers == 1


def update(layers: int) -> Update:
    return Update({name: tensor + 1 for name, tensor in initial().items()}, 10, 2, layers=layers)


def start_of(model: str, partition_id: int) -> StateDict | None:
    return initial() if (model, partition_id) == ("", 2) else None


def test_an_announced_part_is_filled_in_with_what_the_client_started_from() -> None:
    content = update_to_records(update(2), upload_dtype="float32")
    assert list(content.array_records["arrays"]) == list(last_layers(initial(), 2))
    got = update_from_records(content, initial(), fallback_id=0, start_of=start_of)
    sent = last_layers(initial(), 2)
    assert all(torch.equal(got.state[name], tensor + (name in sent)) for name, tensor in initial().items())
    assert (got.layers, got.num_bytes) == (2, sum(4 * initial()[name].numel() for name in sent))


def test_a_part_is_refused_where_it_is_not_announced_or_the_start_is_not_known() -> None:
    content = update_to_records(update(1), upload_dtype="float32")
    with pytest.raises(MalformedUpdate, match=r"holds the last 1 layers alone, and the server does not know .* shared"):
        update_from_records(content, initial(), fallback_id=0)
    with pytest.raises(MalformedUpdate, match="the server does not know"):
        update_from_records(content, initial(), fallback_id=0, start_of=lambda *_: None)
    del content[CONFIG]
    with pytest.raises(MalformedUpdate, match="the keys differ from the model's"):
        update_from_records(content, initial(), fallback_id=0, start_of=start_of)


@pytest.mark.parametrize("told", [-1, 4, 10**9, 1.0, "1", True, [1]])
def test_a_hostile_number_of_layers_is_refused(told: Any) -> None:
    content = update_to_records(update(1), upload_dtype="float32")
    content[CONFIG] = ConfigRecord({LAYERS: told})
    with pytest.raises(MalformedUpdate, match=r"layers is .*, expected a whole number up to 3"):
        update_from_records(content, initial(), fallback_id=0, start_of=start_of)


def test_other_layers_than_announced_are_refused() -> None:
    content = update_to_records(update(1), upload_dtype="float32")
    content["arrays"] = arrays_from_state({"1.weight": initial()["1.weight"]})
    with pytest.raises(MalformedUpdate, match=r"missing '5.weight', '5.bias'; unknown '1.weight'"):
        update_from_records(content, initial(), fallback_id=0, start_of=start_of)


def reply(config: Config, node: Mapping[str, Any], client: int = 0) -> Message:
    with identity():
        content = RecordDict({CONFIG: ConfigRecord({"server-round": 1})})
        content["arrays"] = arrays_from_state(initial())
        context = node_context(config, client)
        context.node_config.update(node)
        return client_app()(Message(content, 1, MessageType.TRAIN), context)


def test_a_node_tells_what_its_device_can_and_goes_before_the_runs() -> None:
    plain = SETTINGS.replace(models="", devices="epochs=2+float16:5")
    told = {"local-epochs": "1", "upload-dtype": "float32", "layers": 1}
    got = update_from_records(reply(plain, told, 2).content, initial(), fallback_id=0, start_of=start_of)
    expected = train_client(plain.replace(devices=""), federation.load(plain), 2, 1, initial(), layers=1)
    assert same(got.state, expected.state)


@pytest.mark.parametrize(
    ("config", "node", "message"),
    [
        (SETTINGS, {"layers": "two"}, "layers in the node's configuration must be a whole number, got 'two'"),
        (SETTINGS, {"layers": 9}, "expected from 1 to 3 layers, as many as the model has, got 9"),
        (Config(model="mlp@0.1"), {"layers": 1}, "the run has init=independent: it needs init=shared"),
    ],
)
def test_a_node_that_tells_what_cannot_be_answers_why(config: Config, node: Mapping[str, Any], message: str) -> None:
    answer = reply(config, node)
    assert answer.has_error()
    assert message in str(answer.error.reason)
