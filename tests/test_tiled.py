"""Triton's kernels against PyTorch's operations, in float64: on a GPU compiled, elsewhere by Triton's interpreter."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedmerge import native
from fedmerge.merge import kernels
from fedmerge.merge.adam import Adam, Rates, first_step
from fedmerge.merge.box import onto_box
from fedmerge.merge.directions import Directions, Moments

pytest.importorskip("triton", reason="Triton comes with PyTorch on Linux alone")
tiled = importlib.import_module("fedmerge.merge.tiled")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROWS, WIDTH = 3, 700  # neither ends where a tile does
BOUNDS = (-0.1, 0.7)


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `kernels` take PyTorch's operations."""
    monkeypatch.setattr(native, "library", lambda _: None)
    monkeypatch.delenv(kernels.SWITCH, raising=False)


@dataclass
class Case:
    """One parameter of several models, and the gradients of three steps."""

    directions: Directions
    start: Tensor
    gradients: list[Tensor]
    rates: list[Rates]

    @property
    def zeros(self) -> Tensor:
        return torch.zeros_like(self.start)

    def coefficients(self, *shape: int) -> Tensor:
        return self.start.new_zeros(len(self.directions), *shape)


def case(count: int, decay: float, *, centred: bool, shape: tuple[int, int] = (ROWS, WIDTH)) -> Case:
    chance = torch.Generator().manual_seed(count)
    start, *others = (torch.randn(shape, generator=chance, dtype=torch.float64) for _ in range(count + 4))
    models, gradients = others[:count], others[count:]
    for model in models:
        model[0, :9] = 0.25  # no direction
    models[0][0, 10] = 1e3
    start, *others = (tensor.to(DEVICE) for tensor in (start, *models, *gradients))
    models, gradients = others[:count], others[count:]
    centre = torch.stack(models).mean(0) if centred else None
    counted, rule = first_step(start), Adam(0.3, decay)
    steps = [counted + number for number in (1, 2, 3)]
    return Case(Directions(tuple(models), centre, count / (count - 1)), start, gradients, list(map(rule.rates, steps)))


def assert_same(found: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.isfinite(ours).all()
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


MANY = pytest.mark.parametrize("count", [2, 3, 8])
CENTRED = pytest.mark.parametrize("centred", [True, False])
DECAY = pytest.mark.parametrize("decay", [0.0, 0.5])


@MANY
@CENTRED
@DECAY
@pytest.mark.parametrize("shown", [True, False])
def test_span(count: int, decay: float, *, centred: bool, shown: bool) -> None:
    given = case(count, decay, centred=centred)
    found = []
    for way in (tiled, kernels):
        theta, moments = given.start.clone(), Moments.zeros(given.start)
        beta = given.coefficients(ROWS, WIDTH) if shown else None
        for gradient, rates in zip(given.gradients, given.rates, strict=True):
            way.span(theta, moments, gradient, given.directions, given.start, rates, beta)
        found.append((theta, moments.first, moments.second, theta if beta is None else beta))
    assert_same(*found)


@MANY
@CENTRED
@DECAY
def test_box(count: int, decay: float, *, centred: bool) -> None:
    given = case(count, decay, centred=centred)
    chance = torch.Generator().manual_seed(0)
    shares = onto_box(torch.rand(count, ROWS, generator=chance, dtype=torch.float64), *BOUNDS).to(DEVICE)
    found = []
    for way in (tiled, kernels):
        theta, moments, beta = given.start.clone(), Moments.zeros(given.start), given.coefficients(ROWS, WIDTH)
        for gradient, rates in zip(given.gradients, given.rates, strict=True):
            way.box(theta, moments, gradient, given.directions, given.start, rates, beta, shares, BOUNDS)
        found.append((theta, moments.first, moments.second, beta))
    assert_same(*found)
    alpha = found[0][-1] + shares[:, :, None]
    assert float(alpha.max()) == pytest.approx(BOUNDS[1])  # some were brought back
    torch.testing.assert_close(alpha.sum(0), torch.ones_like(given.start))


@MANY
@CENTRED
@DECAY
@pytest.mark.parametrize("bounds", [None, BOUNDS])
def test_channel(count: int, decay: float, bounds: tuple[float, float] | None, *, centred: bool) -> None:
    given = case(count, decay, centred=centred)
    limits = () if bounds is None else (given.start.new_full((count, ROWS), 1 / count), bounds)
    found = []
    for way in (tiled, kernels):
        theta, beta = given.start.clone(), given.coefficients(ROWS)
        moments = Moments.zeros(beta)
        for gradient, rates in zip(given.gradients, given.rates, strict=True):
            way.channel(theta, moments, gradient, given.directions, given.start, rates, beta, *limits)
        found.append((theta, moments.first, moments.second, beta))
    assert_same(*found)


@DECAY
def test_pair(decay: float) -> None:
    given = case(2, decay, centred=False)
    found = []
    for way in (tiled, kernels):
        theta, raw = given.start.clone(), given.zeros
        moments = Moments.zeros(raw)
        for gradient, rates in zip(given.gradients, given.rates, strict=True):
            way.pair(theta, moments, gradient.clone(), raw, *given.directions.models, rates)
        found.append((theta, moments.first, moments.second, raw))
    assert_same(*found)


@pytest.mark.parametrize("scale", [0.1, 1.0, 1e4])
@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-2.0, 3.0), (0.14, 0.2)])
def test_any_points_are_brought_to_the_nearest_in_the_box(scale: float, bounds: tuple[float, float]) -> None:
    """A step of directions that are 0 moves nothing: what is left is the projection."""
    given = case(7, 0.0, centred=False, shape=(1, 900))
    models = tuple(torch.zeros_like(given.start) for _ in range(7))
    chance = torch.Generator().manual_seed(1)
    points = (scale * torch.randn(7, 1, 900, generator=chance, dtype=torch.float64)).to(DEVICE)
    beta, shares = points.clone(), given.start.new_full((7, 1), 1 / 7)
    moments = Moments.zeros(given.start)
    tiled.box(given.zeros, moments, given.zeros, Directions(models), given.zeros, given.rates[0], beta, shares, bounds)
    expected = onto_box(shares[:, :, None] + points - points.mean(0), *bounds)
    torch.testing.assert_close(beta + shares[:, :, None], expected, rtol=1e-9, atol=1e-9)


def test_float32_is_read_and_written_as_such() -> None:
    given = case(3, 0.0, centred=True, shape=(2, 40))
    single = Directions(
        tuple(model.float() for model in given.directions.models),
        None if given.directions.centre is None else given.directions.centre.float(),
        given.directions.factor,
    )
    theta, moments = given.start.float(), Moments.zeros(given.start.float())
    tiled.span(theta, moments, given.gradients[0].float(), single, given.start.float(), given.rates[0])
    expected = given.start.clone()
    kernels.span(expected, Moments.zeros(expected), given.gradients[0], given.directions, given.start, given.rates[0])
    near = given.directions.models[0].abs() < 100
    torch.testing.assert_close(theta.double()[near], expected[near], rtol=1e-4, atol=1e-5)


COMPILED = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from fedmerge.merge import tiles

OTHERS = {"models": "*i64", "rates": "*fp64", "count": "i32", "rows": "i32", "width": "i32", "size": "i32"}
GIVEN = {"factor": 1.25, "low": 0.0, "high": 1.0, "eps": 1e-7, "MODELS": 8, "BLOCK": 128}
for kernel in (tiles.span, tiles.box, tiles.channel, tiles.pair):
    names = kernel.arg_names
    fixed = {name: GIVEN.get(name, True) for name in names if name in GIVEN or name.isupper()}
    fixed |= {name: 1 for name in names if name == "rows"}  # as Triton takes a 1
    kinds = {name: "constexpr" if name in fixed else OTHERS.get(name, f"*{sys.argv[1]}") for name in names}
    source = ASTSource(kernel, kinds, {(names.index(name),): value for name, value in fixed.items()})
    print(kernel.__name__, len(triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("numbers", ["fp32", "fp64"])
def test_they_compile_for_a_gpu_that_is_not_there(numbers: str, tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = tmp_path / "compiled.py"
    script.write_text(COMPILED)
    done = subprocess.run(
        [sys.executable, script, numbers],
        capture_output=True,
        text=True,
        timeout=300,
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(Path(kernels.__file__).parents[2])},
    )
    assert done.stdout.split() == ["span", "True", "box", "True", "channel", "True", "pair", "True"], done.stderr


def test_they_are_for_gpus_where_the_environment_asks_for_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.SWITCH, "1")
    assert kernels._tiled(torch.zeros(1)) is None
