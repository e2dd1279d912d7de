"""Memory of merges: measured, foreseen, and spent on no copy of what lies in files."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import problem_of, trained
from torch import Tensor

from fedmerge import memory
from fedmerge.basis import rebase
from fedmerge.catalogue import ALIGNERS, MERGERS
from fedmerge.features import joint_moments, joint_size
from fedmerge.memory import Peak, TooLarge, anonymous, available, foreseen, require
from fedmerge.methods import resolve
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.spilled import spilled
from fedmerge.state import StateDict, num_bytes
from fedmerge.updatefiles import read_update, update_to_bytes


def doubled(name: str) -> tuple[Problem, list[Update]]:
    """A problem and its updates in float64."""
    problem, updates = problem_of(name), trained(name)
    data = replace(problem.data, images=problem.data.images.double())
    states = [{key: tensor.double() for key, tensor in update.state.items()} for update in updates]
    changed = replace(problem, model=copy.deepcopy(problem.model).double(), data=data, start=None)
    return changed, [replace(update, state=state) for update, state in zip(updates, states, strict=True)]


SYSTEM = "MemTotal:  3000 kB\nMemAvailable:   2000 kB\n"


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine with 2,000 kB free, in no group."""
    (tmp_path / "meminfo").write_text(SYSTEM)
    monkeypatch.setattr(memory, "SYSTEM", tmp_path / "meminfo")
    monkeypatch.setattr(memory, "GROUP", tmp_path)
    return tmp_path


def test_what_is_available_is_the_least_of_the_systems_and_the_groups(system: Path) -> None:
    assert available() == 2_048_000
    (system / "memory.current").write_text("1000")
    (system / "memory.max").write_text("max\n")
    assert available() == 2_048_000
    (system / "memory.max").write_text("5000\n")
    assert available() == 4000
    (system / "meminfo").unlink()
    assert available() == 4000
    (system / "memory.max").unlink()
    assert available() is None
    require(10**18, "anything", "nothing")


@pytest.mark.usefixtures("system")
def test_too_much_is_refused_with_the_numbers() -> None:
    require(2_048_000, "it", "do less")
    with pytest.raises(TooLarge, match=r"it needs at least 0\.01 GB of memory, and 0\.00 GB are available: do less"):
        require(5_000_000, "it", "do less")


def test_a_merge_that_cannot_have_its_memory_is_refused_before_it_begins(system: Path) -> None:
    problem, updates = problem_of("mlp@0.5"), trained("mlp@0.5")
    (system / "meminfo").write_text("MemAvailable: 1 kB\n")
    for align, merge, purpose in (("identity", "np", "'np' of 3 models"), ("activations", "mean", "an alignment of 3")):
        with pytest.raises(TooLarge, match=f"{purpose}.*which holds . such states, needs at least"):
            merge_updates(problem, updates, align=align, merge=merge, seed=0)


def test_the_peak_is_the_growth_inside_the_block(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    status = tmp_path / "status"
    monkeypatch.setattr(memory, "STATUS", status)
    status.write_text("VmRSS: 9 kB\nRssAnon:  1000 kB\n")
    with Peak() as peak:
        status.write_text("RssAnon: 800 kB\n")
    assert peak.bytes == 0
    with Peak() as peak:
        status.write_text("RssAnon: 5800 kB\n")
        deadline = time.monotonic() + 30
        while not peak.bytes and time.monotonic() < deadline:
            time.sleep(memory.INTERVAL)
        status.write_text("RssAnon: 900 kB\n")
    assert peak.bytes == 5_120_000


def test_the_system_tells_of_memory_that_is_held() -> None:
    if anonymous() is None:
        pytest.skip("the system does not tell")
    script = """
from fedmerge.memory import Peak
with Peak() as peak:
    held = b"x" * 400_000_000
print(peak.bytes)
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    # Kernels before 6.2 count a thread's last 64 faults late: of huge pages, up to 128 MB.
    assert 200_000_000 < int(told) < 500_000_000


def test_nothing_is_measured_where_nothing_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "STATUS", tmp_path / "none")
    with Peak() as peak:
        pass
    assert peak.bytes is None
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    assert merge_updates(problem, updates, align="identity", merge="mean", seed=0).peak_bytes is None


def test_updates_from_files_are_mapped_and_merge_to_the_same_bits(tmp_path: Path) -> None:
    problem, updates = problem_of("mlp@0.5"), trained("mlp@0.5")
    for update in updates:
        (tmp_path / f"{update.partition_id}").write_bytes(update_to_bytes(update))
    mapped = [read_update(tmp_path / f"{update.partition_id}") for update in updates]
    for merge in ("mean", "np:groups=parameter:lrs=0.01:steps=20", "np-pairwise:lrs=0.1:steps=20"):
        one, other = (merge_updates(problem, side, align="identity", merge=merge, seed=0) for side in (updates, mapped))
        assert all(torch.equal(tensor, other.merged.state[name]) for name, tensor in one.merged.state.items())
    for update, item in zip(updates, mapped, strict=True):
        assert all(torch.equal(tensor, item.state[name]) for name, tensor in update.state.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_a_spilled_state_is_the_same_in_any_layout(dtype: torch.dtype) -> None:
    numbers = torch.arange(120_000).view(300, 400)
    state = {
        "large": numbers.to(dtype),
        "turned": numbers.T.to(dtype),
        "small": numbers[0].to(dtype),
        "one": torch.ones(()),
    }
    found = spilled(state)
    assert list(found) == list(state)
    for name, tensor in state.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)
        assert found[name].data_ptr() != tensor.data_ptr()


def test_a_spilled_state_takes_no_anonymous_memory() -> None:
    if anonymous() is None:
        pytest.skip("the system does not tell")
    script = """
import torch
from fedmerge.memory import anonymous
from fedmerge.spilled import spilled
state = {"w": torch.ones(100_000_000)}
held = anonymous()
state = spilled(state)
assert float(state["w"][::4096].sum()) == 24415
print(held - anonymous())
"""
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert int(told) > 250_000_000


@pytest.mark.parametrize("merge", ["np", "np:start=examples", "np:form=box", "np:form=free", "np:form=shrink"])
def test_a_merge_in_little_memory_is_that_of_coefficients_of_channels(merge: str) -> None:
    problem, updates = doubled("mlp@0.5")
    options = ":".join([merge, "steps=20:lrs=0.01"]) if ":" not in merge else f"{merge}:steps=20:lrs=0.01"
    least = problem.changed(low_memory=True)
    found = merge_updates(least, updates, align="activations", merge=options, seed=0)
    wanted = merge_updates(problem, updates, align="activations", merge=f"{options}:groups=channel", seed=0)
    for name, tensor in wanted.merged.state.items():
        torch.testing.assert_close(found.merged.state[name], tensor, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("align", ["activations", "weights", "cca:ridges=1", "zipit"])
def test_an_alignment_in_little_memory_is_the_same(align: str) -> None:
    problem, updates = problem_of("mlp@0.5"), trained("mlp@0.5")
    least = problem.changed(low_memory=True)
    one, other = (merge_updates(each, updates, align=align, merge="mean", seed=0) for each in (problem, least))
    assert all(torch.equal(tensor, other.merged.state[name]) for name, tensor in one.merged.state.items())


def test_coefficients_of_parameters_are_refused_in_little_memory() -> None:
    least = problem_of("mlp@0.5").changed(low_memory=True)
    with pytest.raises(ConfigurationError, match="groups=parameter keeps more than --low-memory allows"):
        merge_updates(least, trained("mlp@0.5"), align="identity", merge="np:groups=parameter", seed=0)


def test_less_memory_is_foreseen_and_its_lack_refused_with_the_way_out(system: Path) -> None:
    problem, updates = problem_of("mlp@0.5"), trained("mlp@0.5")
    size = num_bytes(problem.model.state_dict())
    (system / "meminfo").write_text(f"MemAvailable: {4 * size // 1024} kB\n")
    with pytest.raises(TooLarge, match=r"holds 7 such states.*: give --low-memory"):
        merge_updates(problem, updates, align="identity", merge="np", seed=0)
    least = problem.changed(low_memory=True)
    merge_updates(least, updates, align="weights", merge="np:steps=20:lrs=0.01", seed=0)
    (system / "meminfo").write_text(f"MemAvailable: {5 * size // 2 // 1024} kB\n")
    with pytest.raises(TooLarge, match=r"'np' of 3 models.*holds 3 such states"):
        merge_updates(least, updates, align="weights", merge="np", seed=0)


@pytest.mark.parametrize("align", ["activations", "zipit"])
def test_memory_for_covariances_is_foreseen_to_the_byte(system: Path, align: str) -> None:
    problem, updates = problem_of("mlp@0.5").changed(low_memory=True), trained("mlp@0.5")
    pairs, own = (2, False) if align == "activations" else (3, True)
    states = [update.state for update in updates]
    compared = list(combinations(range(3), 2))[:pairs]
    joint = joint_moments(problem.model, problem.spaces, states, problem.data.images, pairs=compared, own=own)
    size = sum(matrix.nbytes for found in joint for matrix in found.covariances.values())
    assert joint_size(problem.spaces, 3, pairs, own=own) == size
    (system / "meminfo").write_text(f"MemAvailable: {size // 1024 - 1} kB\n")
    with pytest.raises(TooLarge, match=rf"comparing 3 models' units, {pairs} pairs of models, .*--align weights"):
        resolve("aligner", align, ALIGNERS)(problem, states, 0, generator=torch.Generator())


@pytest.mark.parametrize("passes", [0, 2])
def test_matching_by_weights_copies_a_model_only_to_rename_it(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short, all but one of its copies are in files."""
    problem, updates = problem_of("mlp@0.5").changed(low_memory=True), trained("mlp@0.5")
    made: list[weakref.ref[Tensor]] = []
    most = 0

    def counted(state: StateDict, *arguments: Any) -> dict[str, Tensor]:
        nonlocal most
        found = rebase(state, *arguments)
        made.append(weakref.ref(found["1.weight"]))
        most = max(most, sum(one() is not None for one in made))
        return found

    for module in ("comparison", "running_mean"):
        monkeypatch.setattr(f"fedmerge.align.{module}.rebase", counted)
    states = [update.state for update in updates]
    found = resolve("aligner", f"weights:passes={passes}", ALIGNERS)(problem, states, 0, generator=torch.Generator())
    assert len(found.states) == 3
    assert len(made) >= 2
    assert most == 1


@pytest.mark.parametrize("name", ["np", "np:groups=in-out", "np:groups=coarse-to-fine", "np:form=box", "np-pairwise"])
def test_what_is_held_grows_with_the_models_only_where_it_must(name: str) -> None:
    merger = resolve("merger", name, MERGERS)
    grows = merger.held(10) > merger.held(5)
    assert grows is (name not in ("np", "np-pairwise"))


def test_a_gpus_memory_is_what_is_free_there_and_what_torch_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    told = {"mem_get_info": (5_000_000_000, 80_000_000_000), "memory_reserved": 3_000_000_000}
    told |= {"memory_allocated": 1_000_000_000, "max_memory_allocated": 1_500_000_000, "reset_peak_memory_stats": None}
    for name, value in told.items():
        monkeypatch.setattr(torch.cuda, name, {device: value}.__getitem__)
    assert available(device) == 7_000_000_000
    with foreseen(1_000_000_000, 7, "'np'", device) as peak:
        pass
    assert peak.bytes == 500_000_000
    with pytest.raises(
        TooLarge, match=r"needs at least 8\.00 GB of memory on cuda:0, and 7\.00 GB are available: .*CPU"
    ):
        foreseen(1_000_000_000, 8, "'np'", device)
