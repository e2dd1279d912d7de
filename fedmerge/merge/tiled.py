"""The arithmetic of `fedmerge.merge.kernels` in Triton: one pass over a GPU's memory instead of one for each operation.

Arguments are those of the functions of the same names there. Triton comes with PyTorch where there are GPUs; it
compiles a kernel (`fedmerge.merge.tiles`) when it is first called.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from fedmerge.merge import tiles
from fedmerge.merge.adam import Rates
from fedmerge.merge.directions import Directions, Moments

ENTRIES = 1024
"""Numbers of a tile, and the least of its columns."""
COLUMNS = 16


def span(
    theta: Tensor,
    moments: Moments,
    gradient: Tensor,
    directions: Directions,
    start: Tensor,
    rates: Rates,
    beta: Tensor | None = None,
) -> None:
    """Move θ by an Adam step of every β_k, which need not exist."""
    _launch(
        tiles.span,
        triton.cdiv(theta.numel(), ENTRIES),
        *_given(directions, theta),
        *(start, theta, moments.first, moments.second, gradient, theta if beta is None else beta, rates.packed),
        *(len(directions), theta.numel(), directions.factor),
        CENTRED=directions.centre is not None,
        DECAYS=rates.keep != 1,
        SHOWN=beta is not None,
        BLOCK=ENTRIES,
    )


def box(
    theta: Tensor,
    moments: Moments,
    gradient: Tensor,
    directions: Directions,
    start: Tensor,
    rates: Rates,
    beta: Tensor,
    shares: Tensor,
    bounds: tuple[float, float],
) -> None:
    """Move every β_k by Adam, bring each coefficient back into the box, and mix."""
    tile = _tile(directions)
    _launch(
        tiles.box,
        triton.cdiv(theta.numel(), tile["BLOCK"]),
        *_given(directions, theta),
        *(start, theta, moments.first, moments.second, gradient, beta, shares, rates.packed),
        *(len(directions), *theta.shape, directions.factor, *bounds, torch.finfo(theta.dtype).eps),
        CENTRED=directions.centre is not None,
        **tile,
    )


def channel(
    theta: Tensor,
    moments: Moments,
    gradient: Tensor,
    directions: Directions,
    start: Tensor,
    rates: Rates,
    beta: Tensor,
    shares: Tensor | None = None,
    bounds: tuple[float, float] = (0.0, 0.0),
) -> None:
    """Move coefficients that a row shares by Adam, and mix."""
    _launch(
        tiles.channel,
        len(theta),
        *_given(directions, theta),
        *(start, theta, moments.first, moments.second, gradient, beta),
        *(beta if shares is None else shares, rates.packed),
        *(len(directions), *theta.shape, directions.factor, *bounds, torch.finfo(theta.dtype).eps),
        CENTRED=directions.centre is not None,
        BOUNDED=shares is not None,
        **_tile(directions),
    )


def pair(
    theta: Tensor, moments: Moments, gradient: Tensor, raw: Tensor, first: Tensor, second: Tensor, rates: Rates
) -> None:
    """Move a by Adam, and set θ = σ(a) ⊙ A + (1 − σ(a)) ⊙ B."""
    _launch(
        tiles.pair,
        triton.cdiv(theta.numel(), ENTRIES),
        *(theta, moments.first, moments.second, gradient, raw, first, second, rates.packed, theta.numel()),
        BLOCK=ENTRIES,
    )


def _launch(kernel: Any, programs: int, *arguments: object, **options: object) -> None:
    """Launch a kernel on the device of its first argument, which need not be the current one."""
    with torch.cuda.device_of(arguments[0]):  # type: ignore[no-untyped-call]
        kernel[(programs,)](*arguments, **options)


def _given(directions: Directions, instead: Tensor) -> tuple[Tensor, Tensor]:
    return directions.addresses, instead if directions.centre is None else directions.centre


def _tile(directions: Directions) -> dict[str, int]:
    models = triton.next_power_of_2(len(directions))
    return {"MODELS": models, "BLOCK": max(COLUMNS, ENTRIES // models)}
