"""The Triton kernels of `fedmerge.merge.tiled`: one pass over a parameter, or two where a channel shares coefficients.

Models are read by their addresses, a tile of (models, entries) at a time, which with its coefficients stays in
registers until it is done. Names are those of the C++ in `fedmerge.merge.source`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fedmerge.merge.adam import EPSILON, FIRST, SECOND

KEPT_FIRST, KEPT_SECOND, LEAST = tl.constexpr(FIRST), tl.constexpr(SECOND), tl.constexpr(EPSILON)


@triton.jit
def step_of(rates, dtype: tl.constexpr):
    """Return the rate, the second moment's correction, and what decay keeps."""
    return tl.load(rates).to(dtype), tl.load(rates + 1).to(dtype), tl.load(rates + 2).to(dtype)


@triton.jit
def moments(m, v, gradient, at, inside):
    """Add a gradient to Adam's moments, and return the first and the root of the second."""
    dtype: tl.constexpr = gradient.dtype
    first = tl.load(m + at, mask=inside, other=0.0)
    first += tl.full([], 1 - KEPT_FIRST, dtype) * (gradient - first)
    second = tl.load(v + at, mask=inside, other=0.0) * tl.full([], KEPT_SECOND, dtype)
    second += tl.full([], 1 - KEPT_SECOND, dtype) * gradient * gradient
    tl.store(m + at, first, mask=inside)
    tl.store(v + at, second, mask=inside)
    return first, tl.sqrt(second)


@triton.jit
def directions(models, centre, at, which, inside, count, dtype: tl.constexpr, CENTRED: tl.constexpr):
    """Return d_k of some entries, (models, entries); 0 where there is none."""
    base = tl.load(models + which, mask=which < count, other=0).to(tl.pointer_type(dtype))
    both = (which < count)[:, None] & inside[None, :]
    found = tl.load(base[:, None] + at[None, :], mask=both, other=0.0)
    if CENTRED:
        middle = tl.load(centre + at, mask=inside, other=0.0)
        found = tl.where(both, found - middle[None, :], tl.zeros_like(found))
    return found


@triton.jit
def onto_box(points, here, count, low, high, epsilon):
    """Return the nearest of sum 1 in [low, high] to points of sum 1: clip(x − τ), τ by Newton's steps in a bracket."""
    nothing = tl.zeros_like(points)
    least, most = nothing + low, nothing + high
    far = tl.full([], float("inf"), points.dtype)
    left = tl.min(tl.where(here, points - most, nothing + far), 0)
    right = tl.max(tl.where(here, points - least, nothing - far), 0)
    tau = tl.zeros_like(left)
    moving, step = tl.full([], 1, tl.int32), tl.full([], 0, tl.int32)
    while (moving > 0) & (step < 4 * count + 60):
        x = points - tau[None, :]
        excess = tl.sum(tl.where(here, tl.minimum(tl.maximum(x, least), most), nothing), 0) - 1
        free = tl.sum(tl.where(here & (x > least) & (x < most), nothing + 1, nothing), 0)
        left, right = tl.where(excess >= 0, tau, left), tl.where(excess <= 0, tau, right)
        newton, halved = tau + excess / tl.maximum(free, 1), (left + right) / 2
        inner = tl.where((newton > left) & (newton < right) & (free > 0), newton, halved)
        after = tl.where(tl.abs(excess) <= 4 * count * epsilon, tau, inner)
        moving = tl.max((after != tau).to(tl.int32), 0)
        tau = after
        step += 1
    return tl.where(here, tl.minimum(tl.maximum(points - tau[None, :], least), most), nothing)


@triton.jit
def span(
    models,
    centre,
    start,
    theta,
    m,
    v,
    gradient,
    beta,
    rates,
    count,
    size,
    factor: tl.constexpr,
    CENTRED: tl.constexpr,
    DECAYS: tl.constexpr,
    SHOWN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Take the steps of all coefficients of some entries, and move their θ."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dtype: tl.constexpr = theta.dtype.element_ty
    rate, root, keep = step_of(rates, dtype)
    first, under = moments(m, v, tl.load(gradient + at, mask=inside, other=0.0), at, inside)
    scale, epsilon = tl.full([], factor, dtype), tl.full([], LEAST, dtype)
    middle, moved = tl.zeros_like(first), tl.zeros_like(first)
    if CENTRED:
        middle = tl.load(centre + at, mask=inside, other=0.0)
    place = beta + at
    for k in range(count):
        model = tl.load(models + k).to(tl.pointer_type(dtype))
        x = scale * (tl.load(model + at, mask=inside, other=0.0) - middle)
        step = rate * first * x / (tl.abs(x) * under * root + epsilon)
        moved += x * step
        if SHOWN:
            tl.store(place, keep * tl.load(place, mask=inside, other=0.0) - step, mask=inside)
            place += size
    before = tl.load(theta + at, mask=inside, other=0.0)
    if DECAYS:
        begin = tl.load(start + at, mask=inside, other=0.0)
        before = begin + keep * (before - begin)
    tl.store(theta + at, before - moved / scale, mask=inside)


@triton.jit
def box(
    models,
    centre,
    start,
    theta,
    m,
    v,
    gradient,
    beta,
    shares,
    rates,
    count,
    rows,
    width,
    factor: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    eps: tl.constexpr,
    CENTRED: tl.constexpr,
    MODELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move all coefficients of some entries, bring them back into the box, and mix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows * width
    inside, which = at < size, tl.arange(0, MODELS).to(tl.int64)
    here = (which < count)[:, None]
    both = here & inside[None, :]
    dtype: tl.constexpr = theta.dtype.element_ty
    rate, root, keep = step_of(rates, dtype)
    first, under = moments(m, v, tl.load(gradient + at, mask=inside, other=0.0), at, inside)
    direction = directions(models, centre, at, which, inside, count, dtype, CENTRED)
    x = tl.full([], factor, dtype) * direction
    places = beta + which[:, None] * size + at[None, :]
    share = tl.load(shares + which[:, None] * rows + (at // width)[None, :], mask=both, other=0.0)
    moved = keep * tl.load(places, mask=both, other=0.0)
    moved -= rate * first[None, :] * x / (tl.abs(x) * (under * root)[None, :] + tl.full([], LEAST, dtype))
    points = moved - (tl.sum(moved, 0) / count)[None, :] + share
    least, most = tl.full([], low, dtype), tl.full([], high, dtype)
    moved = onto_box(points, here, count, least, most, tl.full([], eps, dtype)) - share
    tl.store(places, moved, mask=both)
    begin = tl.load(start + at, mask=inside, other=0.0)
    tl.store(theta + at, begin + tl.sum(direction * moved, 0), mask=inside)


@triton.jit
def channel(
    models,
    centre,
    start,
    theta,
    m,
    v,
    gradient,
    beta,
    shares,
    rates,
    count,
    rows,
    width,
    factor: tl.constexpr,
    low: tl.constexpr,
    high: tl.constexpr,
    eps: tl.constexpr,
    CENTRED: tl.constexpr,
    BOUNDED: tl.constexpr,
    MODELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Move the coefficients of a channel, after one pass over its weights, and mix it in another."""
    row, which, columns = tl.program_id(0).to(tl.int64), tl.arange(0, MODELS).to(tl.int64), tl.arange(0, BLOCK)
    here = which < count
    dtype: tl.constexpr = theta.dtype.element_ty
    rate, root, keep = step_of(rates, dtype)
    found = tl.zeros([MODELS, BLOCK], dtype)
    for left in range(0, width, BLOCK):
        at, inside = row * width + left + columns, left + columns < width
        direction = directions(models, centre, at, which, inside, count, dtype, CENTRED)
        found += direction * tl.load(gradient + at, mask=inside, other=0.0)[None, :]
    places = which * rows + row
    first, under = moments(m, v, tl.full([], factor, dtype) * tl.sum(found, 1), places, here)
    moved = keep * tl.load(beta + places, mask=here, other=0.0)
    moved -= rate * first / (under * root + tl.full([], LEAST, dtype))
    moved = tl.where(here, moved, tl.zeros_like(moved))
    if BOUNDED:
        share = tl.load(shares + places, mask=here, other=0.0)
        points = (moved - tl.sum(moved, 0) / count + share)[:, None]
        least, most = tl.full([], low, dtype), tl.full([], high, dtype)
        nearest = onto_box(points, here[:, None], count, least, most, tl.full([], eps, dtype))
        moved = tl.sum(nearest, 1) - share
    tl.store(beta + places, moved, mask=here)
    for left in range(0, width, BLOCK):
        at, inside = row * width + left + columns, left + columns < width
        direction = directions(models, centre, at, which, inside, count, dtype, CENTRED)
        begin = tl.load(start + at, mask=inside, other=0.0)
        tl.store(theta + at, begin + tl.sum(direction * moved[:, None], 0), mask=inside)


@triton.jit
def pair(theta, m, v, gradient, raw, one, other, rates, size, BLOCK: tl.constexpr):
    """Move σ's arguments of some entries, and mix."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    dtype: tl.constexpr = theta.dtype.element_ty
    rate, root, keep = step_of(rates, dtype)
    second = tl.load(other + at, mask=inside, other=0.0)
    apart = tl.load(one + at, mask=inside, other=0.0) - second
    before = tl.load(raw + at, mask=inside, other=0.0)
    share = 1 / (1 + tl.exp(-before))
    pulled = apart * tl.load(gradient + at, mask=inside, other=0.0) * share * (1 - share)
    first, under = moments(m, v, pulled, at, inside)
    after = keep * before - rate * first / (under * root + tl.full([], LEAST, dtype))
    tl.store(raw + at, after, mask=inside)
    tl.store(theta + at, second + apart / (1 + tl.exp(-after)), mask=inside)
