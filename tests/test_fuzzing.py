"""Whatever arrives or lies in a run folder is read, or refused by one of our errors: no crash, no pickle."""

from __future__ import annotations

import ast
import json
import logging
import resource
import shutil
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from fuzzing import ANY, CHECKPOINT, mutated
from hypothesis import given, settings
from hypothesis import strategies as st
from made_runs import make_run, result

from fedmerge.errors import FedmergeError
from fedmerge.problem import Update
from fedmerge.runs import Run, RunError
from fedmerge.state import MalformedState, read_checkpoint
from fedmerge.updatefiles import read_update, update_to_bytes
from fedmerge.wire import MalformedUpdate, update_from_records, update_to_records

ROOT = Path(__file__).parents[1]
FAST, SLOW = 400, 10_000
MEBIBYTE = 2**20


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("fedmerge")
    before = logger.disabled, logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.disabled, logger.level = before


def update() -> Update:
    stream = torch.Generator().manual_seed(0)
    state = {
        "weight": torch.randn(4, 3, generator=stream),
        "bias": torch.randn(4, generator=stream),
        "count": torch.tensor(7),
        "half": torch.ones(2).half(),
    }
    return Update(state, 6, 1, (1, 2, 3), {"loss": 0.5, "accuracy": 0.75}, 100)


STATE = update().state


def read_mutated_checkpoints(folder: Path, count: int, first: int = 0) -> dict[str, int]:
    whole, path = update_to_bytes(update()), folder / "client-00001.safetensors"
    found = {"read": 0, "refused": 0}
    for seed in range(first, first + count):
        path.write_bytes(mutated(whole, seed, CHECKPOINT))
        for read in (read_checkpoint, read_update):
            try:
                read(path)
                found["read"] += 1
            except MalformedState as error:
                found["refused"] += str(path) in str(error)
    assert sum(found.values()) == 2 * count, "an error does not name the file"
    return found


def test_a_mutated_checkpoint_is_read_or_refused_by_name(tmp_path: Path) -> None:
    found = read_mutated_checkpoints(tmp_path, FAST)
    assert min(found.values()) > FAST / 20, "the mutations are to hit both ways"


@pytest.mark.slow
def test_ten_thousand_mutated_checkpoints_are_read_or_refused_in_little_memory(tmp_path: Path) -> None:
    read_mutated_checkpoints(tmp_path, FAST)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_mutated_checkpoints(tmp_path, SLOW, FAST)
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 64 * MEBIBYTE


@pytest.mark.parametrize("shape", [[10**12], [2**20, 2**20], [10**6, 10**6, 0]])
def test_a_header_that_promises_much_costs_no_memory(tmp_path: Path, shape: list[int]) -> None:
    size = int(np.prod(shape, dtype=object)) * 4
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, size]}}).encode()
    path = tmp_path / "large.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if size:
        with pytest.raises(MalformedState, match="not a readable safetensors file"):
            read_checkpoint(path)
    else:
        assert read_checkpoint(path)[0]["w"].numel() == 0
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 16 * MEBIBYTE


def test_an_array_that_promises_much_costs_no_memory() -> None:
    content = update_to_records(update(), upload_dtype="float32")
    array = content.array_records["arrays"]["weight"]
    array.data = array.data.replace(b"(4, 3)", b"(9999999999, 9999)")
    tracemalloc.start()
    with pytest.raises(MalformedUpdate):
        update_from_records(content, STATE, fallback_id=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < MEBIBYTE


NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70), st.floats(), st.lists(st.integers(-5, 2**70), max_size=4), st.just(10**400)
)
SHAPES = st.lists(st.integers(0, 5), max_size=3)
DTYPES = st.sampled_from(["f4", "f8", "f2", "i8", "i4", "u1", "?", "c8", "U2", "S3", ">f4", "O", "M8[s]"])


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    made = Array(np.zeros(draw(SHAPES), draw(DTYPES.filter(lambda name: name != "O"))))
    for name, values in {
        "dtype": st.one_of(DTYPES, st.text(max_size=5)),
        "shape": SHAPES,
        "stype": st.sampled_from(["numpy.ndarray", "pickle", ""]),
        "data": st.one_of(st.binary(max_size=80), st.integers(0, 10**6).map(lambda seed: mutated(made.data, seed))),
    }.items():
        if draw(st.integers(0, 3)) == 0:
            setattr(made, name, draw(values))
    return made


@st.composite
def replies(draw: st.DrawFn) -> RecordDict:
    content = update_to_records(update(), upload_dtype=draw(st.sampled_from(["float32", "float16"])))
    model, metrics = content.array_records["arrays"], content.metric_records["metrics"]
    for name in draw(st.lists(st.sampled_from([*STATE, "more", "../escaped", ""]), max_size=2)):
        model[name] = draw(arrays())
    for name in draw(st.lists(st.sampled_from([*metrics, "more"]), max_size=3)):
        metrics[name] = draw(NUMBERS)
    for name in draw(st.lists(st.sampled_from([*STATE, *metrics]), max_size=1)):
        (model if name in model else metrics).pop(name, None)
    extra: list[tuple[str, Any]] = [
        ("more", ArrayRecord()),
        ("metrics-too", MetricRecord({"num-examples": 1})),
        ("config", ConfigRecord({"path": "../escaped"})),
    ]
    for name, record in draw(st.lists(st.sampled_from(extra), max_size=1)):
        content[name] = record
    return content


def read_reply(content: RecordDict) -> None:
    try:
        found = update_from_records(content, STATE, fallback_id=9, num_classes=3)
    except MalformedUpdate:
        return
    assert {name: tensor.shape for name, tensor in found.state.items()} == {
        name: tensor.shape for name, tensor in STATE.items()
    }
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.state.values())
    assert 1 <= found.num_examples <= 2**53
    assert found.label_counts is None or 0 < sum(found.label_counts) <= found.num_examples


@settings(max_examples=FAST, deadline=None)
@given(replies())
def test_whatever_a_reply_holds_it_is_an_update_or_refused(content: RecordDict) -> None:
    read_reply(content)


@pytest.mark.slow
@settings(max_examples=SLOW, deadline=None)
@given(replies())
def test_ten_thousand_replies_are_updates_or_refused(content: RecordDict) -> None:
    read_reply(content)


def made(folder: Path) -> Run:
    run = make_run(folder, [result("np"), result("fedavg")])
    run.save_update(0, 1, update())
    return run


def read_run(path: Path) -> None:
    run = Run.open(path)
    assert run.config.clients
    run.results()
    run.load_updates(0)


@pytest.mark.parametrize("name", ["config.json", "results.jsonl", "updates/seed-0/round-1/client-00001.safetensors"])
def test_a_run_folder_with_a_mutated_file_is_read_or_refused(tmp_path: Path, name: str) -> None:
    run = made(tmp_path / "run")
    path = run.path / name
    whole, read = path.read_bytes(), 0
    mutations = CHECKPOINT if name.endswith("safetensors") else ANY
    for seed in range(FAST // 4):
        path.write_bytes(mutated(whole, seed, mutations))
        try:
            read_run(run.path)
            read += 1
        except FedmergeError:
            continue
    assert read > 0
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]


@pytest.mark.parametrize(
    "content", ["", "[]", "3", "{}", '{"command": 1, "config": {}}', '{"command": "x"}', "[" * 9999]
)
def test_a_damaged_configuration_is_refused_by_name(tmp_path: Path, content: str) -> None:
    run = made(tmp_path / "run")
    (run.path / "config.json").write_text(content)
    with pytest.raises(RunError, match=r"config\.json is damaged: "):
        _ = Run.open(run.path).config


@pytest.mark.parametrize(
    "line", [b'"text"', b"[1]", b'{"seed": 1}', b'{"method": "np", "seed": []}', b"\xff\xfe", b"{" * 99]
)
def test_a_line_that_is_no_result_is_left_out(tmp_path: Path, line: bytes) -> None:
    run = made(tmp_path / "run")
    with (run.path / "results.jsonl").open("ab") as file:
        file.write(line + b"\n")
    assert [item["method"] for item in run.results()] == ["np", "fedavg"]


def test_a_damaged_update_is_told_with_what_to_do(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    path = run.path / "updates" / "seed-0" / "round-1" / "client-00001.safetensors"
    shutil.copy(path, path.with_name("client-00007.safetensors"))
    shutil.copy(path, path.with_name("client-x.safetensors"))
    with pytest.raises(RunError, match=r"client-00007\.safetensors holds the update of client 1: move it"):
        run.load_updates(0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunError, match=r"client-00001\.safetensors is not .* delete the file, and --resume the run"):
        run.load_update(0, 1, 1)


@pytest.mark.parametrize("name", ["../escaped", "figures/../../escaped", "/tmp/escaped-from-a-run"])
def test_nothing_is_written_outside_the_run_folder(tmp_path: Path, name: str) -> None:
    run = made(tmp_path / "run")
    with pytest.raises(RunError, match="is not in the run folder"):
        run.write(name, b"escaped")
    assert sorted(item.name for item in tmp_path.iterdir()) == ["run"]
    assert not Path("/tmp/escaped-from-a-run").exists()


def test_a_link_out_of_the_run_folder_is_not_written_through(tmp_path: Path) -> None:
    run = made(tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    (run.path / "models").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="is not in the run folder"):
        run.save_model(0, 1, "np", ({"w": torch.zeros(1)},))
    assert list((tmp_path / "elsewhere").iterdir()) == []


CODE_RUNNERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def refuses_pickles(call: ast.Call) -> bool:
    """Whether a call says allow_pickle=False, as numpy's load understands it."""
    said = {keyword.arg: keyword.value for keyword in call.keywords}.get("allow_pickle")
    return isinstance(said, ast.Constant) and said.value is False


@pytest.mark.parametrize(
    ("text", "refused"),
    [("np.load(p, allow_pickle=False)", True), ("np.load(p, allow_pickle=True)", False), ("np.load(p)", False)],
)
def test_a_load_counts_as_plain_only_if_it_says_so(text: str, refused: bool) -> None:
    call = ast.parse(text, mode="eval").body
    assert isinstance(call, ast.Call)
    assert refuses_pickles(call) is refused


@pytest.mark.parametrize("folder", ["fedmerge", "clients", "server", "experiments"])
def test_nothing_is_unpickled(folder: str) -> None:
    paths = sorted((ROOT / folder).rglob("*.py"))
    assert paths
    for path in paths:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        plain = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call) and refuses_pickles(node)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not CODE_RUNNERS & {name.name.split(".")[0] for name in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").split(".")[0] not in CODE_RUNNERS, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and id(node) not in plain:
                assert (node.value.id, node.attr) not in {("torch", "load"), ("np", "load"), ("numpy", "load")}, path
            elif isinstance(node, ast.keyword):
                assert node.arg != "allow_pickle" or ast.unparse(node.value) == "False", path
