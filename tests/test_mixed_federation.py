"""A federation whose clients run different models, from the command's setting to the run folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp import ClientApp
from grids import in_process
from torch import Tensor

from fedmerge import federation, models
from fedmerge.cli import main
from fedmerge.client import client_app, train_client
from fedmerge.compare import Bench
from fedmerge.config import Config
from fedmerge.export import export_stored
from fedmerge.flower import CLIENT_FAILED, identity, node_context
from fedmerge.orders import own_start
from fedmerge.problem import Update
from fedmerge.runs import Run
from fedmerge.seeds import derive
from fedmerge.server import collect, serve
from fedmerge.settings import ConfigurationError, counted
from fedmerge.simulation import recall_from
from fedmerge.state import num_bytes, read_checkpoint
from fedmerge.strategy import RoundFailed
from fedmerge.summary import best_single_model, summarize
from fedmerge.tables import remarks
from fedmerge.wire import (
    CONFIG,
    MODEL,
    MalformedUpdate,
    arrays_from_state,
    num_array_bytes,
    update_from_records,
    update_to_records,
)
from fedmerge.words import repeat_command, scenario

MODELS = "mlp@0.1:2,mlp@0.2:1,lenet5:1"
SETTINGS = Config(
    model="mlp@0.1",
    models=MODELS,
    clients=4,
    client_examples=400,
    local_epochs="1",
    server_examples=40,
    align="activations",
    merge="np:steps=20:lrs=0.01",
)
METHOD = "activations+np:steps=20:lrs=0.01"


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def new_run(path: Path, config: Config = SETTINGS) -> Run:
    return Run.create(path, "simulate", config)


def expected_of(name: str) -> dict[str, Tensor]:
    return dict(models.create(name, shape=(1, 8, 8), num_classes=10, seed=0).state_dict())


def answered(config: Config = SETTINGS, client: int = 0, node: Mapping[str, Any] | None = None) -> Message:
    """A client's reply to a first round's message without weights."""
    with identity():
        content = RecordDict({CONFIG: ConfigRecord({"server-round": 1})})
        message = Message(content, 1, MessageType.TRAIN)
        context = node_context(config, client)
        context.node_config.update(node or {})
        return client_app()(message, context)


def test_clients_have_the_models_of_their_places() -> None:
    assert SETTINGS.client_models == ("mlp@0.1", "mlp@0.1", "mlp@0.2", "lenet5")
    assert SETTINGS.other_models == ("mlp@0.2", "lenet5")
    assert Config(model="cnn").client_models == ("cnn",) * 5
    assert Config(model="cnn").other_models == ()


@pytest.mark.parametrize(
    ("text", "got"),
    [("cnn", "cnn"), ("cnn:2,", ""), ("cnn:0", "cnn:0"), (":2", ":2"), ("a.b:f", "a.b:f"), ("cnn:-1", "cnn:-1")],
)
def test_a_model_without_a_count_is_refused(text: str, got: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"--models must be NAME:COUNT,NAME:COUNT,… .*, got '{got}'$"):
        counted("--models", text)


def test_counts_that_are_not_the_number_of_clients_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="--models cnn:2,mlp:1 has 3 clients, and --clients is 5: make them"):
        Config(models="cnn:2,mlp:1")


def test_a_run_of_three_architectures_leaves_each_steps_model_and_result(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with in_process(SETTINGS) as grid:
        serve(grid, SETTINGS, run, pause=0)
    assert [update.model for update in run.load_updates(0)] == ["", "", "mlp@0.2", "lenet5"]
    lines = {line["method"]: line for line in run.results()}
    steps = ["largest-family:mlp@0.1", "family:lenet5", "families-ensemble"]
    assert list(lines) == [*(f"{METHOD} > {step}" for step in steps), METHOD]
    largest, lenet, ensemble, final = lines.values()
    sizes = [update.num_bytes for update in run.load_updates(0)]
    assert [line["bytes_up"] for line in lines.values()] == [sum(sizes[:3]), sizes[3], sum(sizes), sum(sizes)]
    assert (final["models"], ensemble["models"]) == (1, 2)
    assert "architectures" not in final
    assert "architectures" not in largest
    assert lenet["architectures"] == ["lenet5"]
    assert (largest["note"], lenet["note"]) == ("3 clients", "1 client")
    folder = run.path / "models" / "seed-0" / "round-1"
    stored = {path.name: read_checkpoint(path) for path in folder.iterdir()}
    assert len(stored) == 5
    name = METHOD.replace(":", "_").replace("=", "=")
    state, header = stored[f"{name}___family_lenet5.safetensors"]
    assert (header, state.keys()) == ({"architecture": "lenet5"}, expected_of("lenet5").keys())
    assert same(state, run.load_updates(0)[3].state)


def test_the_same_run_again_and_from_its_updates_gives_the_same_bits_without_training(tmp_path: Path) -> None:
    config = SETTINGS.replace(rounds=2, init="shared")
    run, again, recalled = (new_run(tmp_path / name, config) for name in ("run", "again", "recalled"))
    for to, reverse in ((run, False), (again, True)):
        with in_process(config, reverse=reverse, nodes=(9, 5, 7, 3)) as grid:
            serve(grid, config, to, pause=0)
    with in_process(config) as grid:
        serve(grid, config, recalled, recall=recall_from(run, config), pause=0)
        assert not grid.sent
    for other in (again, recalled):
        for ours, theirs in zip(run.results(), other.results(), strict=True):
            assert (ours["method"], ours["accuracy"], ours["loss"]) == (
                theirs["method"],
                theirs["accuracy"],
                theirs["loss"],
            )


def test_in_a_second_round_each_client_goes_on_with_a_model_of_its_own_architecture(tmp_path: Path) -> None:
    config = SETTINGS.replace(rounds=2)
    run = new_run(tmp_path / "run", config)
    with in_process(config) as grid:
        serve(grid, config, run, pause=0)
    first, second = grid.sent[:4], grid.sent[4:]
    assert not any(message.content.array_records for message in first)
    told = [message.content.config_records[CONFIG].get(MODEL) for message in second]
    assert told == [None, None, "mlp@0.2", "lenet5"]
    for message, name in zip(second, SETTINGS.client_models, strict=True):
        sent = {key: array.shape for key, array in message.content.array_records["arrays"].items()}
        assert sent == {key: tuple(tensor.shape) for key, tensor in expected_of(name).items()}
    lines = [line for line in run.results() if line["method"] == METHOD]
    assert lines[1]["bytes_down"] == sum(num_array_bytes(message.content) for message in second)
    assert [update.model for update in run.load_updates(0, 2)] == ["", "", "mlp@0.2", "lenet5"]


def test_with_a_shared_initialisation_clients_of_one_architecture_start_alike() -> None:
    config = SETTINGS.replace(init="shared", models="mlp@0.1:1,lenet5:3")
    examples = federation.load(config)
    own = config.replace(model="lenet5", models="")
    starts = [own_start(own, examples, client) for client in (1, 2)]
    fresh = models.create("lenet5", shape=(1, 8, 8), num_classes=10, seed=derive(0, "init")).state_dict()
    assert same(starts[0], fresh)
    assert same(starts[1], fresh)
    independent = [own_start(own.replace(init="independent"), examples, client) for client in (1, 2)]
    assert not same(*independent)


def test_a_client_whose_architecture_the_weights_are_not_of_starts_from_its_own() -> None:
    config = SETTINGS.replace(init="shared")
    examples = federation.load(config)
    own = config.replace(model="lenet5", models="")
    with identity():
        content = RecordDict(
            {"arrays": arrays_from_state(expected_of("mlp@0.1")), CONFIG: ConfigRecord({"server-round": 1})}
        )
        reply = client_app()(Message(content, 1, MessageType.TRAIN), node_context(config, 3))
    got = update_from_records(
        reply.content, expected_of("mlp@0.1"), fallback_id=0, others={"lenet5": expected_of("lenet5")}
    )
    expected = train_client(own, examples, 3, 1, own_start(own, examples, 3))
    assert got.model == "lenet5"
    assert same(got.state, expected.state)


def test_a_client_of_the_servers_architecture_declares_nothing_and_trains_the_same_bits_as_without_models() -> None:
    mixed, plain = answered(), answered(SETTINGS.replace(models=""))
    assert CONFIG not in mixed.content.config_records
    contents = mixed.content, plain.content
    ours, theirs = (update_from_records(content, expected_of("mlp@0.1"), fallback_id=0) for content in contents)
    assert same(ours.state, theirs.state)


def test_a_node_may_tell_which_of_the_federations_models_it_trains() -> None:
    reply = answered(client=0, node={"model": "lenet5"})
    assert reply.content.config_records[CONFIG][MODEL] == "lenet5"
    back = answered(client=3, node={"model": "mlp@0.1"})
    assert CONFIG not in back.content.config_records
    refused = answered(client=0, node={"model": "os:system"})
    assert refused.has_error()
    assert "unknown model in the node's configuration 'os:system'" in str(refused.error.reason)


def update_of(name: str, model: str = "") -> Update:
    return Update(expected_of(name), 10, 0, (1,) * 10, {"loss": 1.0}, model=model)


@pytest.mark.parametrize("told", ["os:system", "vgg11", "../x", 3, 1.5, b"lenet5", [1, 2]])
def test_a_declared_model_that_the_federation_has_not_is_refused_before_anything_is_read_or_built(told: Any) -> None:
    content = update_to_records(update_of("lenet5"), upload_dtype="float32")
    content[CONFIG] = ConfigRecord({MODEL: told})
    content["arrays"] = arrays_from_state({"huge": torch.zeros(1)})
    with pytest.raises(MalformedUpdate, match=r"model is .*, expected one that the federation has .*: 'lenet5'"):
        update_from_records(content, expected_of("mlp"), fallback_id=0, others={"lenet5": expected_of("lenet5")})
    with pytest.raises(MalformedUpdate, match="no other than the server's"):
        update_from_records(content, expected_of("mlp"), fallback_id=0)


def test_weights_must_fit_the_declared_model() -> None:
    content = update_to_records(update_of("mlp", "lenet5"), upload_dtype="float32")
    with pytest.raises(MalformedUpdate, match=r"tensor .3.weight. has shape|keys differ"):
        update_from_records(content, expected_of("mlp"), fallback_id=0, others={"lenet5": expected_of("lenet5")})


def test_an_update_survives_records_and_file_with_its_model(tmp_path: Path) -> None:
    sent = update_of("lenet5", "lenet5")
    got = update_from_records(
        update_to_records(sent, upload_dtype="float32"),
        expected_of("mlp"),
        fallback_id=0,
        others={"lenet5": expected_of("lenet5")},
    )
    run = new_run(tmp_path / "run")
    run.save_update(0, 1, got)
    (stored,) = run.load_updates(0)
    assert got.model == stored.model == "lenet5"
    assert same(got.state, sent.state)
    assert same(stored.state, sent.state)


def test_a_client_with_an_unknown_model_is_left_out_by_name(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    elsewhere = SETTINGS.replace(models="mlp@0.1:2,mlp@0.2:1,cnn@0.1:1")
    with in_process(elsewhere) as grid:
        serve(grid, SETTINGS, run, pause=0)
    line = run.results()[-1]
    (reason,) = line["diagnostics"]["refused"]
    assert reason.startswith("client 3 (node 4): model is 'cnn@0.1', expected one that the federation has")


def test_a_round_that_ends_in_another_architecture_fails_with_what_to_do(tmp_path: Path) -> None:
    config = SETTINGS.replace(align="identity", merge="fedavg", models="mlp@0.1:1,lenet5:3")
    with (
        in_process(config) as grid,
        pytest.raises(RoundFailed, match="gives a model of 'lenet5', which is not the server's"),
    ):
        serve(grid, config, new_run(tmp_path / "run", config), pause=0)


def compared(tmp_path: Path) -> Run:
    """A comparison of two methods, by a bench in this process."""
    run = Run.create(tmp_path / "run", "compare", SETTINGS, methods=["fedavg", "ensemble", METHOD], seeds=[0])
    with in_process(SETTINGS) as grid:
        updates = collect(grid, SETTINGS, run, pause=0)
    bench = Bench(SETTINGS.to_mapping(), federation.load(SETTINGS), updates)
    for method in run.settings["methods"]:
        for line, states, names in bench.answer(method):
            run.save_model(0, 1, line["method"], states, names)
            run.append(line)
    return run


def test_a_comparison_has_a_row_for_every_step_and_tells_what_it_is(tmp_path: Path) -> None:
    run = compared(tmp_path)
    rows = {row.method: row for row in summarize(run.results(), [0])}
    assert list(rows) == [
        "fedavg",
        "ensemble",
        *(f"{METHOD} > {step}" for step in ("largest-family:mlp@0.1", "family:lenet5", "families-ensemble")),
        METHOD,
    ]
    told = {name: remarks(row, None) for name, row in rows.items()}
    assert told["fedavg"] == ["of clients 0, 1 alone"]
    assert told[f"{METHOD} > family:lenet5"][:2] == ["a model of lenet5", "1 client"]
    assert told[f"{METHOD} > families-ensemble"][0] == "ensemble of 2 models"
    best = best_single_model(list(rows.values()))
    assert best is not None
    assert not best.architectures
    exported = export_stored(run, f"{METHOD} > family:lenet5", tmp_path / "lenet.safetensors")
    assert exported["model"] == "lenet5"
    about = scenario(SETTINGS, [0], federation.load(SETTINGS).indices())
    assert "train mlp@0.1 (2), mlp@0.2 (1), lenet5 (1); the server's is mlp@0.1 for 1 epoch" in about


def test_a_model_file_that_names_a_foreign_architecture_is_not_built(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    run.save_model(0, 1, "np", (expected_of("mlp"),), ("os:system",))
    with pytest.raises(ConfigurationError, match="unknown model 'os:system'"):
        export_stored(run, "np", tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["compare", "--models", "mlp:4,cnm:1"], "unknown model 'cnm'"),
        (["compare", "--models", "mlp:4"], "--models mlp:4 has 4 clients, and --clients is 5"),
        (["compare", "--models", "mlp:4,cnn:1", "--methods", "fisher"], "'fisher' needs the statistic 'fisher'"),
        (["compare", "--models", "mlp:4,cnn:1", "--init", "shared", "--methods", "ties"], "'ties' needs one start"),
        (["compare", "--models", "mlp:4,cnn:1", "--client-statistics", "gram"], "--client-statistics: statistics of"),
        (["simulate", "--models", "mlp:4,cnn:1", "--align", "identity", "--merge", "mean"], "--merge mean may end in"),
        (
            ["simulate", "--models", "mlp:4,cnn:1", "--align", "identity", "--merge", "best-client"],
            "may end in another",
        ),
    ],
)
def test_a_mix_that_cannot_work_is_told_before_anything_is_trained(
    words: list[str], message: str, tmp_path: Path
) -> None:
    done = CliRunner().invoke(main, [*words, "--out", str(tmp_path / "run")])
    assert done.exit_code == 1
    assert message in done.output
    assert not (tmp_path / "run" / "updates").exists()


def test_checkpoints_of_different_architectures_are_merged_by_the_command(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    for name, client in (("mlp@0.1", 0), ("lenet5", 1)):
        run.save_update(0, 1, replace(update_of(name), partition_id=client))
    paths = sorted(map(str, run.path.glob("updates/*/*/*.safetensors")))
    words = ["merge", *paths, "--model", "mlp@0.1", "--models", "mlp@0.1:1,lenet5:1", "--server-examples", "40"]
    done = CliRunner().invoke(main, [*words, "--methods", "ensemble", "--json", "--out", str(tmp_path / "merged")])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["results"][0]["architectures"] == ["", "lenet5"]
    wrong = CliRunner().invoke(main, [*words, "--models", "mlp@0.1:1,cnn:1", "--out", str(tmp_path / "wrong")])
    assert wrong.exit_code == 1
    assert "is 'cnn' of --models the architecture that it was trained with?" in wrong.output


def test_the_command_that_repeats_a_run_has_its_models() -> None:
    settings = {"command": "compare", "config": SETTINGS.to_mapping(), "methods": ["np"], "seeds": [0]}
    assert f"--models {MODELS}" in repeat_command(settings)


def test_bytes_are_those_of_each_clients_own_model(tmp_path: Path) -> None:
    run = new_run(tmp_path / "run")
    with in_process(SETTINGS) as grid:
        updates = collect(grid, SETTINGS, run, pause=0)
    assert [update.num_bytes for update in updates] == [num_bytes(expected_of(name)) for name in SETTINGS.client_models]


def test_without_models_a_context_of_flower_has_none() -> None:
    context: Context = node_context(Config(), 0)
    assert context.run_config["models"] == ""


def test_a_client_that_misses_a_round_goes_on_with_what_it_had(tmp_path: Path) -> None:
    config = SETTINGS.replace(rounds=3)
    app, broken = client_app(), ClientApp()

    @broken.train()
    def train(message: Message, context: Context) -> Message:
        second = message.content.config_records[CONFIG]["server-round"] == 2
        if second and context.node_config["partition-id"] == 3:
            return Message(Error(CLIENT_FAILED, "client 3: no power"), reply_to=message)
        return app(message, context)

    with in_process(config, app=broken) as grid:
        serve(grid, config, new_run(tmp_path / "run", config), pause=0)
    sent = [message.content for message in grid.sent if message.metadata.dst_node_id == 4]
    second, third = (content.array_records["arrays"].to_torch_state_dict() for content in sent[1:])
    assert sent[2].config_records[CONFIG][MODEL] == "lenet5"
    assert same(second, third)


def test_the_report_says_which_devices_are_weak() -> None:
    config = SETTINGS.replace(devices="epochs=1:2")
    about = scenario(config, [0], federation.load(SETTINGS).indices())
    assert "The first clients' devices are weak: epochs=1:2." in about
