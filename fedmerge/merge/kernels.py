"""The arithmetic of a step of NP Merge, in one pass over memory, compiled or by PyTorch's operations.

Every function works on one parameter as a matrix (rows, width), a row for each output channel, in place on what the
caller owns. Directions d_k = θ_k − c are never stored: the models are read where they are, which may be mapped files.

With the gradient g of the mixture, that of the coefficient of model k is f d_k ⊙ g (f a factor). Where coefficients are
not tied, Adam's moments of all of them follow from g's alone, f d_k ⊙ m and (f d_k)² ⊙ v; so do their exact steps.
"""

from __future__ import annotations

import ctypes
import importlib
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fedmerge import native
from fedmerge.merge.adam import EPSILON, FIRST, SECOND, Rates
from fedmerge.merge.box import into_box
from fedmerge.merge.directions import Directions, Moments
from fedmerge.merge.source import SOURCE

PART = 1 << 15
SWITCH = "FEDMERGE_TRITON"


def span(
    theta: Tensor,
    moments: Moments,
    gradient: Tensor,
    directions: Directions,
    start: Tensor,
    rates: Rates,
    beta: Tensor | None = None,
) -> None:
    """Move θ = start + Σ_k β_k ⊙ d_k by an Adam step of every β_k, which need not exist.

    Args:
        theta: θ, (rows, width).
        moments: of dL/dθ.
        gradient: dL/dθ.
        directions: d_k.
        start: θ at β = 0.
        rates: of this step.
        beta: β_k, (models, rows, width), moved as well; None: they are not kept.
    """
    tiled, call = _tiled(theta), _compiled("span", theta)
    if tiled:
        tiled.span(theta, moments, gradient, directions, start, rates, beta)
        return
    if call:
        call(
            *_sizes(theta),
            *_given(directions),
            ctypes.c_double(directions.factor),
            _constants(rates),
            *map(native.pointer, (start, theta, moments.first, moments.second, gradient, beta)),
        )
        return
    rate, epsilon = rates.in_units_of_root
    for part in _parts(theta):
        first, root = moments.add(gradient[:, part], part)
        first = first * rate
        moved = theta[:, part]
        if rates.keep != 1:
            moved.sub_(start[:, part]).mul_(rates.keep).add_(start[:, part])
        for index in range(len(directions)):
            direction = directions.direction(index, part)
            step = direction * first
            step.div_(direction.abs().mul_(root).add_(epsilon / directions.factor))
            moved.addcmul_(direction, step)
            if beta is not None:
                beta[index][:, part].mul_(rates.keep).add_(step)


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
    """Move every β_k by Adam, bring each share_k + β_k back into the box, and set θ = start + Σ_k β_k ⊙ d_k.

    Args:
        theta: θ, (rows, width).
        moments: of dL/dθ.
        gradient: dL/dθ.
        directions: d_k.
        start: θ at β = 0.
        rates: of this step.
        beta: β_k, (models, rows, width).
        shares: (models, rows) coefficients at β = 0; they sum to 1.
        bounds: the least and the greatest coefficient.
    """
    tiled, call = _tiled(theta), _compiled("box", theta)
    if tiled:
        tiled.box(theta, moments, gradient, directions, start, rates, beta, shares, bounds)
        return
    if call:
        call(
            *_sizes(theta),
            *_given(directions),
            ctypes.c_double(directions.factor),
            _constants(rates),
            *map(native.pointer, (start, theta, moments.first, moments.second, gradient, beta, shares)),
            *map(ctypes.c_double, bounds),
        )
        return
    rate, epsilon = rates.in_units_of_root
    for part in _parts(theta):
        first, root = moments.add(gradient[:, part], part)
        first = first * rate
        moved = beta[:, :, part]
        for index in range(len(directions)):
            direction = directions.direction(index, part)
            denominator = direction.abs().mul_(root).add_(epsilon / directions.factor)
            moved[index].mul_(rates.keep).addcdiv_(direction * first, denominator)
        into_box(moved, shares[:, :, None], bounds)
        theta[:, part] = start[:, part]
        for index in range(len(directions)):
            theta[:, part].addcmul_(directions.direction(index, part), moved[index])


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
    """Move coefficients that a row shares by Adam, and set θ = start + Σ_k β_k ⊙ d_k.

    Args:
        theta: θ, (rows, width).
        moments: of the coefficients' gradients, (models, rows).
        gradient: dL/dθ.
        directions: d_k.
        start: θ at β = 0.
        rates: of this step.
        beta: β_k, (models, rows).
        shares: (models, rows) coefficients at β = 0, which sum to 1; None: there are no bounds.
        bounds: the least and the greatest coefficient.
    """
    tiled, call = _tiled(theta), _compiled("channel", theta)
    if tiled:
        tiled.channel(theta, moments, gradient, directions, start, rates, beta, shares, bounds)
        return
    if call:
        call(
            *_sizes(theta),
            *_given(directions),
            ctypes.c_double(directions.factor),
            _constants(rates),
            *map(native.pointer, (start, theta, moments.first, moments.second, gradient, beta, shares)),
            *map(ctypes.c_double, bounds),
        )
        return
    rates.move(beta, moments.first, moments.second, products(gradient, directions))
    if shares is not None:
        into_box(beta, shares, bounds)
    mix(theta, directions, start, beta)


def products(gradient: Tensor, directions: Directions) -> Tensor:
    """Return the gradients (models, rows) of coefficients that a row shares, f d_k · g.

    Args:
        gradient: dL/dθ, (rows, width).
        directions: d_k.
    """
    found = gradient.new_empty(len(directions), len(gradient))
    call = _compiled("products", gradient)
    if call:
        call(
            *_sizes(gradient),
            *_given(directions),
            ctypes.c_double(directions.factor),
            *map(native.pointer, (gradient, found)),
        )
        return found
    for index in range(len(directions)):
        torch.sum(directions.direction(index) * gradient, 1, out=found[index])
    return found.mul_(directions.factor)


def mix(theta: Tensor, directions: Directions, start: Tensor, beta: Tensor) -> None:
    """Set θ = start + Σ_k β_k ⊙ d_k, with a coefficient for each row.

    Args:
        theta: θ, (rows, width).
        directions: d_k.
        start: θ at β = 0.
        beta: (models, rows), contiguous.
    """
    call = _compiled("mix", theta)
    if call:
        call(*_sizes(theta), *_given(directions), *map(native.pointer, (start, theta, beta)))
        return
    theta.copy_(start)
    for index in range(len(directions)):
        theta.addcmul_(directions.direction(index), beta[index][:, None])


def pair(
    theta: Tensor, moments: Moments, gradient: Tensor, raw: Tensor, first: Tensor, second: Tensor, rates: Rates
) -> None:
    """Move a by Adam, and set θ = σ(a) ⊙ A + (1 − σ(a)) ⊙ B; a's gradient is (A − B) ⊙ dL/dθ ⊙ σ(a)(1 − σ(a)).

    Args:
        theta: θ, (rows, width).
        moments: of dL/da.
        gradient: dL/dθ, which may be overwritten.
        raw: a.
        first: A.
        second: B.
        rates: of this step.
    """
    tiled, call = _tiled(theta), _compiled("pair", theta)
    if tiled:
        tiled.pair(theta, moments, gradient, raw, first, second, rates)
        return
    if call:
        call(
            *_sizes(theta),
            *map(native.pointer, (first, second)),
            _constants(rates),
            *map(native.pointer, (theta, moments.first, moments.second, gradient, raw)),
        )
        return
    for part in _parts(theta):
        found = gradient[:, part].mul_(first[:, part] - second[:, part])
        torch.ops.aten.sigmoid_backward(found, raw[:, part].sigmoid(), grad_input=found)
    rates.move(raw, moments.first, moments.second, gradient)
    for part in _parts(theta):
        torch.lerp(second[:, part], first[:, part], raw[:, part].sigmoid(), out=theta[:, part])


def _parts(theta: Tensor) -> Iterator[slice]:
    """Return columns of as many entries as stay in a processor's cache while several operations are done on them."""
    size = PART if theta.device.type == "cpu" else theta.numel()
    width = max(1, size // len(theta))
    return (slice(place, place + width) for place in range(0, theta.shape[1], width))


def _tiled(like: Tensor) -> ModuleType | None:
    """Return the same functions as Triton's kernels, for tensors of a GPU where they are asked for; None elsewhere."""
    if like.dtype not in native.TYPES or not like.is_cuda or os.environ.get(SWITCH) != "1":
        return None
    return importlib.import_module("fedmerge.merge.tiled")


def _compiled(name: str, like: Tensor) -> Callable[..., Any] | None:
    return native.function(SOURCE, name, like)


def _sizes(theta: Tensor) -> tuple[ctypes.c_int64, ...]:
    return tuple(map(ctypes.c_int64, (*theta.shape, torch.get_num_threads())))


def _given(directions: Directions) -> tuple[Any, ...]:
    models = [model.data_ptr() for model in directions.models]
    return ctypes.c_int64(len(models)), (ctypes.c_void_p * len(models))(*models), native.pointer(directions.centre)


def _constants(rates: Rates) -> Any:
    return (ctypes.c_double * 6)(rates.rate, rates.root, rates.keep, FIRST, SECOND, EPSILON)
