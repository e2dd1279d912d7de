from __future__ import annotations

import dataclasses
import gc
import logging
import os
import subprocess
import sys
import time
import warnings
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from flwr.app import Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from torch import Tensor

import fedmerge
from fedmerge import federation, raygrid, simulation
from fedmerge.client import train_client
from fedmerge.cluster import RAY_SETTINGS
from fedmerge.config import Config
from fedmerge.flower import identity, set_message_id
from fedmerge.problem import Update
from fedmerge.raygrid import Clients, RayGrid, partition_of
from fedmerge.runs import Run
from fedmerge.server import collect
from fedmerge.settings import ConfigurationError
from fedmerge.simulation import recall_from, simulate, train_clients
from fedmerge.strategy import RoundFailed

CONFIG = Config(device="cpu", clients=3, local_epochs="1", align="identity", merge="mean", threads=1)

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # Ray's own processes and files
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


class Faulty(Clients):
    """Clients with faults by their number, which the configuration's `out` tells: "0=die 2=raise"."""

    def answer(self, messages: Sequence[Message], content: RecordDict) -> list[Message]:
        fault = dict(item.split("=") for item in self._config.out.split()).get(str(partition_of(messages[0])))
        if fault == "die":
            os._exit(3)
        if fault == "raise":
            raise ValueError("no disk")
        if fault == "hang":
            time.sleep(600)
        return super().answer(messages, content)


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One Ray for the tests of this module, with more CPUs and a GPU than there are."""
    for name, value in RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    import ray

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ray.init(num_cpus=4, num_gpus=1, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    yield ray
    ray.shutdown()


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def assert_trained(updates: Sequence[Update], config: Config = CONFIG) -> None:
    """Assert that the updates are to the bit those that this process trains."""
    for update in updates:
        expected = train_client(config, federation.load(config), update.partition_id, 1, None)
        assert same(update.state, expected.state)
        assert (update.num_examples, update.label_counts) == (expected.num_examples, expected.label_counts)


def new_run(folder: Path, config: Config = CONFIG) -> Run:
    return Run.create(folder / "run", "simulate", config)


@pytest.mark.parametrize("client_cpus", [2.0, pytest.param(4.0, marks=pytest.mark.slow)], ids=["2 actors", "1 actor"])
def test_any_number_of_actors_gives_the_bits_of_this_process(ray: Any, tmp_path: Path, client_cpus: float) -> None:
    config = CONFIG.replace(client_cpus=client_cpus)
    with simulation.simulation(config, federation.load(config)) as grid:
        updates = collect(grid, config, new_run(tmp_path, config), pause=0)
        assert grid._pool is not None
        assert len(grid._pool._actors) == 4 / client_cpus
    assert [update.partition_id for update in updates] == [0, 1, 2]
    assert_trained(updates)
    assert ray.is_initialized()


@pytest.mark.slow
def test_side_by_side_any_number_of_actors_gives_the_same_bits_which_are_those_of_one_by_one_but_for_rounding(
    ray: Any,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    found = []
    for client_cpus in (2.0, 4.0):
        config = CONFIG.replace(clients=5, min_client_examples=5, client_cpus=client_cpus, batched_clients=2)
        with simulation.simulation(config, federation.load(config)) as grid:
            found.append(collect(grid, config, new_run(tmp_path / str(client_cpus), config), pause=0))
    for one, other in zip(*found, strict=True):
        assert one.partition_id == other.partition_id
        assert same(one.state, other.state)
        alone = train_client(config, federation.load(config), one.partition_id, 1, None)
        for name, tensor in alone.state.items():
            torch.testing.assert_close(one.state[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_an_actor_that_dies_and_a_client_that_raises_are_told_and_the_round_goes_on(
    ray: Any,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(raygrid, "Clients", Faulty)
    config = CONFIG.replace(clients=5, client_cpus=4.0, out="0=die 3=raise")
    with caplog.at_level(logging.WARNING), simulation.simulation(config, federation.load(config)) as grid:
        updates = collect(grid, config, new_run(tmp_path, config), pause=0)
    assert [update.partition_id for update in updates] == [1, 2, 4]
    assert_trained(updates, config)
    assert "client 0: its process died: " in caplog.text
    assert "client 3: ValueError: no disk (node 4)" in caplog.text


@pytest.mark.slow
def test_a_client_that_hangs_is_given_up_after_the_timeout_and_its_actor_replaced(
    ray: Any,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(raygrid, "Clients", Faulty)
    examples = federation.load(CONFIG)
    largest = max(range(3), key=lambda client: len(examples.partition[client]))
    well = CONFIG.replace(client_cpus=4.0)
    hanging = well.replace(out=f"{largest}=hang", timeout=15.0)
    with simulation.simulation(well, examples) as grid:
        assert_trained(collect(grid, well, new_run(tmp_path / "before", well), pause=0))  # the actor has started
        grid.load(hanging, examples)
        with pytest.raises(RoundFailed) as caught:
            collect(grid, hanging, new_run(tmp_path, hanging), pause=0)
        assert f"client {largest}: it has not finished within 15 s; raise --timeout" in str(caught.value)
        assert str(caught.value).count("its turn has not come within 15 s") == 2
        grid.load(well, examples)
        assert_trained(collect(grid, well, new_run(tmp_path / "again", well), pause=0))


@pytest.mark.slow
def test_actors_go_on_with_another_federation(ray: Any, tmp_path: Path) -> None:  # noqa: ARG001
    run = new_run(tmp_path)
    config = CONFIG.replace(client_cpus=4.0)
    with simulation.simulation(config) as grid:
        for seed in range(2):
            seeded = config.replace(seed=seed)
            assert_trained(train_clients(seeded, run, grid=grid), seeded)
        assert grid._pool is not None
        assert len(grid._pool._actors) == 1


class Collected:
    """Tells how many objects the actor's collections overlook, and how many objects of this class there are."""

    made: ClassVar = weakref.WeakSet["Collected"]()

    def __init__(self, _: object) -> None:
        self.myself = self  # a cycle: a collection alone can find it
        self.made.add(self)

    def answer(self, _: str) -> tuple[int, int]:
        gc.collect()
        return gc.get_freeze_count(), len(self.made)


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Garbage stays until a collection is asked for."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_collections_overlook_the_modules_while_there_are_actors_and_find_what_was_made_since(ray: Any) -> None:  # noqa: ARG001
    before = weakref.ref(Collected(None))
    with simulation.simulation(CONFIG.replace(client_cpus=4.0), federation.load(CONFIG)) as grid:
        for _ in range(3):
            [(_, told)] = grid.map(Collected, (), ["count"])
            assert isinstance(told, tuple)
            assert told[0] > 10_000
            assert told[1] == 1
        assert gc.get_freeze_count() > 10_000
        assert before() is None  # garbage is not kept
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_fractions_of_gpus_are_scheduled_and_clients_without_one_stay_on_the_cpu(
    ray: Any,  # noqa: ARG001
    tmp_path: Path,
) -> None:
    config = CONFIG.replace(client_gpus=0.5, device="cpu")
    with simulation.simulation(config, federation.load(config)) as grid:
        assert_trained(collect(grid, config, new_run(tmp_path, config), pause=0))
        assert grid._pool is not None
        assert len(grid._pool._actors) == 2
    anywhere = CONFIG.replace(device="auto")
    assert raygrid._actor_settings(anywhere)["device"] == "cpu"
    assert raygrid._actor_settings(anywhere.replace(client_gpus=0.5))["device"] == "auto"
    assert raygrid._actor_settings(CONFIG.replace(device="cuda:0"))["device"] == "cuda:0"


@pytest.mark.parametrize("wanted", [{"client_cpus": 5.0}, {"client_gpus": 2.0}])
def test_more_than_the_cluster_has_is_refused_at_once(ray: Any, tmp_path: Path, wanted: dict[str, float]) -> None:
    config = CONFIG.replace(**wanted)
    with (
        pytest.raises(
            ConfigurationError, match=r"--client-cpus .* --client-gpus .* have 4 CPUs and 1 GPUs; ask for less"
        ),
        simulation.simulation(config, federation.load(config)) as grid,
    ):
        collect(grid, config, new_run(tmp_path, config), pause=0)
    assert ray.is_initialized()


@pytest.mark.slow
def test_actors_that_cannot_start_fail_their_clients_with_the_cause(
    ray: Any,  # noqa: ARG001
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    @dataclasses.dataclass
    class Missing:
        """Known here alone: the actors find no such class."""

    Missing.__module__ = "fedmerge.raygrid"
    monkeypatch.setattr(raygrid, "Clients", Missing)
    with simulation.simulation(CONFIG, federation.load(CONFIG)) as grid, pytest.raises(RoundFailed) as caught:
        collect(grid, CONFIG, new_run(tmp_path), pause=0)
    assert "client 0: its process died: no Ray actor could start: AttributeError" in str(caught.value)


def test_flowers_private_parts_are_as_this_library_uses_them() -> None:
    with pytest.raises(RuntimeError):
        _ = TaskIdentity.run_id
    with identity():
        message = Message(RecordDict(), 3, "train", ttl=5)
        assert (message.metadata.run_id, message.metadata.src_node_id, message.metadata.dst_node_id) == (1, 0, 3)
        message_id = set_message_id(message)
        assert message.metadata.message_id == message_id
        reply = Message(RecordDict(), reply_to=message)
        assert reply.metadata.reply_to_message_id == message_id
        assert reply.metadata.src_node_id == 3
    for name in ("task_id", "run_id", "node_id"):
        with pytest.raises(RuntimeError):
            getattr(TaskIdentity, name)


def test_a_run_with_all_its_updates_is_resumed_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = new_run(tmp_path)
    for partition_id in range(3):
        run.save_update(0, 1, train_client(CONFIG, federation.load(CONFIG), partition_id, 1, None))
    monkeypatch.setattr(raygrid, "ActorPool", None)
    result = simulate(CONFIG, run, resume=True)
    assert result.evaluate_metrics_serverapp[1]["accuracy"] == run.results()[0]["accuracy"]
    with simulation.simulation(CONFIG) as grid:
        assert_trained(train_clients(CONFIG, run, grid=grid, resume=True))


def test_only_training_is_recalled(tmp_path: Path) -> None:
    run = new_run(tmp_path)
    run.save_update(0, 1, train_client(CONFIG, federation.load(CONFIG), 0, 1, None))
    with identity():
        assert recall_from(run, CONFIG)(Message(RecordDict(), 1, "evaluate")) is None


def test_a_grid_without_a_federation_or_a_run_says_so() -> None:
    grid = RayGrid(CONFIG)
    with identity(), pytest.raises(RuntimeError, match="call load first"):
        grid.send_and_receive([grid.create_message(RecordDict(), "train", 1, "")], timeout=1)
    with pytest.raises(RuntimeError, match="set_run gives it one"):
        _ = grid.run
    assert list(grid.get_node_ids()) == [1, 2, 3]
    assert list(grid.send_and_receive([], timeout=1)) == []


SCRIPT = """
import sys
from pathlib import Path
from fedmerge.config import Config
from fedmerge.runs import Run
from fedmerge.simulation import simulate
import ray

config = Config.from_mapping(dict(item.split("=") for item in sys.argv[2:]))
run = Run.create(Path(sys.argv[1]), "simulate", config)
simulate(config, run)
assert not ray.is_initialized()
"""


@pytest.mark.slow
def test_actors_run_this_fedmerge_whatever_lies_in_the_working_directory(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("fedmerge", "clients", "server", "torch"):
        (elsewhere / name).mkdir(parents=True)
        (elsewhere / name / "__init__.py").write_text("raise RuntimeError('the wrong module')\n")
    script = tmp_path / "script" / "main.py"
    script.parent.mkdir()
    script.write_text(SCRIPT)
    checkout = Path(fedmerge.__file__).parents[1]
    settings = [f"{name}={value}" for name, value in CONFIG.to_mapping(changed_only=True).items()]
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "run"), *settings],
        cwd=elsewhere,
        env=os.environ | {"PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert_trained(Run.open(tmp_path / "run").load_updates(0))
