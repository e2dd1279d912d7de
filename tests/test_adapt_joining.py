"""Which units become one: against all pairs of few units, by hand, and by laws."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from fedmerge.adapt.joining import join
from fedmerge.basis import Resize


def features(units: int, seed: int) -> Tensor:
    """Rectified features, correlated."""
    stream = torch.Generator().manual_seed(seed)
    mixed = torch.randn(200, units, generator=stream, dtype=torch.float64)
    return torch.relu(mixed @ torch.randn(units, units, generator=stream, dtype=torch.float64) + 0.3)


def second(seen: Tensor) -> Tensor:
    return seen.T @ seen / len(seen)


def lost(found: Resize, seen: Tensor, importance: Tensor) -> float:
    """What readers that have nothing in common lose, by its definition."""
    error = seen - (seen @ found.writing) @ found.reading.T
    return float((error.square().mean(0) * importance).sum())


def pair_joined(seen: Tensor, first: int, other: int, share: float) -> Resize:
    """Join two units in given shares, each read at its best scale."""
    units = seen.shape[1]
    writing, reading = torch.eye(units, dtype=torch.float64), torch.eye(units, dtype=torch.float64)
    writing[first, first], writing[other, first] = share, 1 - share
    one = seen @ writing[:, first]
    for unit in (first, other):
        reading[unit, first] = (one @ seen[:, unit]) / (one @ one)
    kept = [unit for unit in range(units) if unit != other]
    return Resize(writing[:, kept], reading[:, kept])


@pytest.mark.parametrize("seed", range(4))
def test_the_first_two_units_are_those_that_lose_least_in_the_best_shares(seed: int) -> None:
    seen = features(4, seed)
    importance = 0.1 + torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = lost(join(second(seen), importance, 3), seen, importance)
    shares = torch.linspace(0, 1, 101).tolist()
    others = [
        lost(pair_joined(seen, first, other, share), seen, importance)
        for first, other in combinations(range(4), 2)
        for share in shares
    ]
    assert 0.999 * min(others) <= found <= min(others) + 1e-12


def test_all_units_stay_as_they_are() -> None:
    found = join(second(features(6, 0)), torch.ones(6, dtype=torch.float64), 6)
    assert torch.equal(found.writing, torch.eye(6, dtype=torch.float64))
    assert torch.equal(found.reading, torch.eye(6, dtype=torch.float64))


def test_copies_are_joined_before_anything_else_and_read_together() -> None:
    seen = features(5, 1)[:, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4]]
    importance = torch.tensor([1.0, 2, 3, 4, 5, 5, 4, 3, 2, 1], dtype=torch.float64)
    found = join(second(seen), importance, 5)
    torch.testing.assert_close(found.reading, torch.eye(5, dtype=torch.float64).repeat(2, 1))
    torch.testing.assert_close(seen @ found.writing, seen[:, :5])


def test_a_multiple_of_a_unit_is_read_as_often() -> None:
    one = features(1, 0)
    found = join(second(torch.cat([one, 3 * one], 1)), torch.ones(2, dtype=torch.float64), 1)
    assert float(found.reading[1] / found.reading[0]) == pytest.approx(3)
    assert lost(found, torch.cat([one, 3 * one], 1), torch.ones(2)) == pytest.approx(0, abs=1e-12)


def test_of_units_that_have_nothing_in_common_those_that_matter_least_are_lost() -> None:
    energies = torch.tensor([4.0, 1.0, 3.0, 2.0], dtype=torch.float64)
    importance = torch.tensor([1.0, 9.0, 1.0, 1.0], dtype=torch.float64)
    found = join(torch.diag(energies), importance, 2)
    kept = found.writing.argmax(0).tolist()
    assert kept == [0, 1]
    torch.testing.assert_close(found.writing[[0, 1]], torch.eye(2, dtype=torch.float64))
    assert not found.reading[[2, 3]].any()


def test_units_that_oppose_each_other_are_not_mixed() -> None:
    moments = torch.tensor([[1.0, -0.9], [-0.9, 0.5]], dtype=torch.float64)
    found = join(moments, torch.ones(2, dtype=torch.float64), 1)
    torch.testing.assert_close(found.writing, torch.tensor([[1.0], [0.0]], dtype=torch.float64))
    torch.testing.assert_close(found.reading, torch.tensor([[1.0], [-0.9]], dtype=torch.float64))


@pytest.mark.parametrize("left", [1, 2, 5])
@pytest.mark.parametrize("silent", ["units", "readers", "both"])
def test_what_does_nothing_is_joined_without_a_warning(silent: str, left: int) -> None:
    seen = features(6, 2)
    importance = torch.ones(6, dtype=torch.float64)
    if silent != "readers":
        seen[:, ::2] = 0
    if silent != "units":
        importance[:] = 0
    found = join(second(seen), importance, left)
    assert found.writing.isfinite().all()
    assert found.reading.isfinite().all()
    torch.testing.assert_close(found.writing.sum(0), torch.ones(left, dtype=torch.float64))
    assert (found.writing >= 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_more_units_lose_less(seed: int) -> None:
    seen, importance = features(12, seed), torch.ones(12, dtype=torch.float64)
    losses = [lost(join(second(seen), importance, left), seen, importance) for left in (2, 4, 8, 12)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] == 0
