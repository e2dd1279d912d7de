"""Streamed mixtures against stacked ones, compiled and not: the same coefficients after the same steps, in float64."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import doubles, problem_of, same, trained
from torch import Tensor

from fedmerge import native
from fedmerge.merge import kernels
from fedmerge.merge.adam import Adam
from fedmerge.merge.average import mean_state
from fedmerge.merge.box import onto_box
from fedmerge.merge.coordinates import Coordinates, Weights
from fedmerge.merge.descent import Candidate, Schedule, descend
from fedmerge.merge.directions import Directions, Moments
from fedmerge.merge.mixture import GROUPS, AffineMixture, FreeMixture, Mixture
from fedmerge.merge.nonuniform import NPMerge, PairwiseNPMerge
from fedmerge.merge.pair import SigmoidPair
from fedmerge.merge.source import SOURCE
from fedmerge.merge.starts import Start
from fedmerge.merge.streamed import Box, Channels, Ingredients, Shrunk, Span, Tied

BOUNDS = {"box": (-0.1, 0.7), "simplex": (0.0, 1.0)}
FORMS = ("affine", "shrink", "box", "simplex", "free")
HAS_COMPILER = native.library(f"using T = double;\n{SOURCE}") is not None


@pytest.fixture(params=["compiled", "operations"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a test by the compiled functions, where there is a compiler, and by PyTorch's operations."""
    if request.param == "operations":
        monkeypatch.setattr(native, "library", lambda _: None)
    elif not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    return str(request.param)


def doubles_with_edges(count: int) -> list[dict[str, Tensor]]:
    """Models in which some numbers are equal, so that they have no direction, and one is far away."""
    _, states = doubles(count)
    for state in states:
        state["1.weight"][0] = 0.25
        state["3.bias"][1] *= 1e-9
    states[0]["1.bias"][0] = 1e3
    return states


def start_of(groups: str, count: int) -> Start:
    body = torch.arange(2.0, count + 2, dtype=torch.float64)
    rows = torch.rand(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5
    return Start(body) if groups in ("model", "tensor") else Start(body, rows / rows.sum(0), ("3.weight", "3.bias"))


def stacked(states: list[dict[str, Tensor]], form: str, groups: str, start: Start) -> Mixture:
    first, mean = start.state(states), mean_state(states)
    models = {name: torch.stack([state[name] for state in states]) for name in first}
    if form == "free":
        return FreeMixture(first, models, groups, shares=start.shares(first))
    deviations = {name: tensor - mean[name] for name, tensor in models.items()}
    bounds, shrinks = BOUNDS.get(form), form == "shrink"
    return AffineMixture(first, deviations, groups, shares=start.shares(first), bounds=bounds, shrinks=shrinks)


def streamed(
    states: list[dict[str, Tensor]], form: str, groups: str, start: Start
) -> Span | Channels | Tied | Box | Shrunk:
    first, affine, bounds = start.state(states), form != "free", BOUNDS.get(form)
    given = Ingredients(first, states, start.shares(first), mean_state(states) if affine else None, affine)
    if groups == "parameter" and bounds is not None:
        return Box(given, bounds)
    found: Span | Channels | Tied
    if groups == "parameter":
        found = Span(given, kept=True)
    else:
        found = Channels(given, bounds) if groups == "channel" else Tied(given, groups, bounds)
    return Shrunk(found) if form == "shrink" else found


def descended(make: Callable[[], Coordinates], lr: float, schedule: Schedule) -> list[dict[str, Tensor]]:
    problem, _ = doubles(1)
    return list(descend(problem, Candidate({}, lr, make), {}, problem.data, [0, 7, 40], seed=3, schedule=schedule))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", FORMS)
def test_a_streamed_mixture_takes_the_steps_of_the_stacked_one(form: str, groups: str, count: int) -> None:
    states = doubles_with_edges(count)
    start = start_of(groups, count)
    if form in BOUNDS:
        start = start.within(*BOUNDS[form]) if count > 2 or form == "simplex" else start_of("model", count)
    slow, fast = stacked(states, form, groups, start), streamed(states, form, groups, start)
    schedule = Schedule(decay=0.5, average=True) if count == 4 else Schedule()
    expected, found = (descended(lambda made=made: made, 0.05, schedule) for made in (slow, fast))  # type: ignore[misc]
    for wanted, got in zip(expected, found, strict=True):
        for name, tensor in wanted.items():
            torch.testing.assert_close(got[name], tensor, rtol=1e-12, atol=1e-12)
    assert isinstance(slow, (AffineMixture, FreeMixture))
    wanted, got = slow.coefficients(), fast.coefficients()
    for name, tensor in wanted.items():
        torch.testing.assert_close(got[name].expand_as(tensor), tensor, rtol=1e-11, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", FORMS)
def test_what_is_given_is_left_as_it_is(form: str, groups: str) -> None:
    states = doubles_with_edges(3)
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    start = start_of("model", 3).within(-0.1, 0.7)
    descended(lambda: streamed(states, form, groups, start), 0.1, Schedule())
    assert all(map(same, states, before))


@pytest.mark.usefixtures("way")
def test_a_pair_is_autograd_through_the_sigmoid() -> None:
    first, second = doubles_with_edges(2)
    problem, _ = doubles(1)
    made = SigmoidPair(first, second)
    *_, found = descended(lambda: made, 0.3, Schedule())
    raw = {name: torch.zeros_like(tensor, requires_grad=True) for name, tensor in first.items()}
    optimizer = torch.optim.Adam(raw.values(), lr=0.3)

    def mixed() -> dict[str, Tensor]:
        return {
            name: value.sigmoid() * first[name] + (1 - value.sigmoid()) * second[name] for name, value in raw.items()
        }

    class Autograd(Weights):
        def parameters(self) -> dict[str, Tensor]:
            return {name: tensor.detach() for name, tensor in mixed().items()}

        def step(self, gradients: object, rule: Adam) -> None:
            assert isinstance(gradients, dict)
            optimizer.zero_grad()
            torch.autograd.backward(list(mixed().values()), [gradients[name] for name in raw])
            optimizer.step()

    *_, expected = descended(lambda: Autograd(first), 0.3, Schedule())
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(made.coefficients()[name], raw[name].sigmoid().detach(), rtol=1e-12, atol=1e-12)
    assert problem.model.training is False


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 700), st.floats(-2, 0.16), st.floats(1, 3), st.sampled_from([0.1, 1.0, 1e4]))
def test_the_compiled_box_is_the_nearest_point(count: int, width: int, low: float, high: float, scale: float) -> None:
    """One step with directions that are all one moves β by hand: what is left is the projection."""
    chance = torch.Generator().manual_seed(count + width)
    shape = (count, 1, width)
    points = scale * torch.randn(shape, generator=chance, dtype=torch.float64)
    theta = torch.zeros(1, width, dtype=torch.float64)
    beta = points.clone()
    shares = torch.full((count, 1), 1 / count, dtype=torch.float64)
    directions = Directions(tuple(torch.zeros_like(theta) for _ in range(count)))
    given_ = Moments.zeros(theta), torch.zeros_like(theta), directions, torch.zeros_like(theta), Adam(0.1).rates(1)
    kernels.box(theta, *given_, beta, shares, (low, high))
    expected = onto_box(shares[:, :, None] + points - points.mean(0), low, high)
    torch.testing.assert_close(beta + shares[:, :, None], expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_no_bit_depends_on_the_number_of_threads(dtype: torch.dtype, threads: int) -> None:
    chance = torch.Generator().manual_seed(0)
    theta, gradient, *models = (torch.randn(300, 900, generator=chance).to(dtype) for _ in range(5))
    directions = Directions(tuple(models), theta.clone(), 1.5)
    was = torch.get_num_threads()
    found = []
    for number in (1, threads):
        torch.set_num_threads(number)
        moved = theta.clone()
        kernels.span(moved, Moments.zeros(theta), gradient, directions, theta, Adam(0.1, 0.2).rates(1))
        mixed = torch.empty_like(theta)
        kernels.mix(mixed, directions, theta, torch.ones(3, 300, dtype=dtype))
        found.append((moved, mixed, kernels.products(gradient, directions)))
    torch.set_num_threads(was)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    "method",
    [
        NPMerge(groups="parameter", lrs=(0.02,), steps=20),
        NPMerge(groups="parameter", form="box", lrs=(0.02,), steps=20),
        PairwiseNPMerge(lrs=(0.1,), steps=20),
    ],
)
def test_float32_merges_learn_either_way(method: NPMerge | PairwiseNPMerge) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    found = method(problem, updates, generator=torch.Generator().manual_seed(5))
    for stage in found.diagnostics.get("pairs", [found.diagnostics]):
        assert stage["validation-loss"] < stage["start-loss"]


# The compiler.


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty cache of compiled files, and no memory of what was compiled."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native.library.cache_clear()
    yield tmp_path
    native.library.cache_clear()


SMALL = 'extern "C" int answer() { return 42; }'


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_what_is_compiled_is_kept(fresh: Path) -> None:
    for _ in range(2):
        found = native.library(SMALL)
        assert found is not None
        assert found.answer() == 42
        (kept,) = (fresh / "fedmerge").iterdir()
        made = kept.stat().st_mtime_ns
        native.library.cache_clear()
    assert kept.stat().st_mtime_ns == made


def test_a_compiler_that_fails_is_done_without(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = fresh / "broken"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(broken.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(broken))
    assert native.library(SMALL) is None
    assert "C++ could not be compiled" in caplog.text


@pytest.mark.parametrize(("name", "value"), [("FEDMERGE_COMPILE", "0"), ("CXX", "no-such-compiler")])
def test_no_compiler_is_told(
    fresh: Path, name: str, value: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(name, value)
    with caplog.at_level("INFO"):
        assert native.library(SMALL) is None
    assert "no C++ compiler is used" in caplog.text
    assert not list(fresh.iterdir())


@pytest.mark.skipif(not HAS_COMPILER or os.geteuid() == 0, reason="no C++ compiler, or nothing is forbidden to root")
def test_a_cache_that_cannot_be_written_is_no_hindrance(fresh: Path) -> None:
    fresh.chmod(0o500)
    assert native.library(SMALL) is not None
