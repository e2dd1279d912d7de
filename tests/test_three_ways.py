"""The same seed gives the same merged model to the bit, in each of the three ways to run the app."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from flower_processes import flower

from fedmerge.config import Config
from fedmerge.runs import Run
from fedmerge.settings import Value
from fedmerge.simulation import simulate
from fedmerge.state import read_checkpoint

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]

CONFIG = Config(
    clients=2, local_epochs="1", align="activations", merge="np:steps=20", server_examples=100, rounds=2, threads=1
)
MIXED = CONFIG.replace(clients=3, model="mlp@0.2", models="mlp@0.2:1,mlp@0.3:1,lenet5:1", client_examples=300)


def flower_settings() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings: dict[str, Any] = tomllib.load(file)["tool"]["flwr"]["app"]
    return settings


def told(config: Config, folder: Path) -> Mapping[str, Value]:
    """What `--run-config` is given."""
    return config.replace(out=str(folder)).to_mapping(changed_only=True)


@pytest.fixture(scope="module", params=[CONFIG, MIXED], ids=["one model", "mixed models"])
def expected(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run on Ray in this process."""
    run = Run.create(tmp_path_factory.mktemp("simulate") / "run", "simulate", request.param)
    simulate(request.param, run)
    return run


def assert_same_run(run: Run, expected: Run) -> None:
    for server_round in (1, 2):
        for first, second in zip(
            run.load_updates(0, server_round), expected.load_updates(0, server_round), strict=True
        ):
            assert all(tensor.equal(second.state[name]) for name, tensor in first.state.items())
            assert (first.model, first.label_counts) == (second.model, second.label_counts)
    merged = [path.relative_to(run.path) for path in (run.path / "models").rglob("*.safetensors")]
    assert len(merged) >= 2
    for path in merged:
        state, wanted = read_checkpoint(run.path / path)[0], read_checkpoint(expected.path / path)[0]
        assert all(tensor.equal(wanted[name]) for name, tensor in state.items())
    for line, wanted_line in zip(run.results(), expected.results(), strict=True):
        measured = {"seconds": 0, "peak_bytes": 0}
        assert line | measured == wanted_line | measured


def test_the_flower_app_knows_every_setting_with_its_default() -> None:
    assert flower_settings()["config"] == Config().to_mapping()
    assert len(flower_settings()["config"]) == len(dataclasses.fields(Config))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_flwr_run_gives_the_bits_of_the_simulation_in_process(expected: Run, tmp_path: Path) -> None:
    with flower(tmp_path, simulation=True) as started:
        nodes = f"num-supernodes={expected.config.clients} client-resources-num-cpus=1"
        started.run(ROOT, told(expected.config, tmp_path / "run"), nodes)
    assert_same_run(Run.open(tmp_path / "run"), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_supernodes_give_the_bits_of_the_simulation_in_process(expected: Run, tmp_path: Path) -> None:
    with flower(tmp_path, simulation=False) as started:
        clients = expected.config.clients
        for partition_id in reversed(range(clients)):
            started.add_node(partition_id=partition_id, num_partitions=clients)
        started.run(ROOT, told(expected.config, tmp_path / "run"))
    assert_same_run(Run.open(tmp_path / "run"), expected)
