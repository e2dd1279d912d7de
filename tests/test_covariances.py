"""Running sums of features: what they are, and that C++ and PyTorch's operations give the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge import native
from fedmerge.covariances import Joint, Sums
from fedmerge.covariancesource import SOURCE

HAS_COMPILER = native.library(f"using T = double;\n{SOURCE}") is not None
compiled = pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
ORDER, COMPARED = (1, 2, 0), {2: [1], 0: [1, 2], 1: []}
"""Models as they come, and with which before them each is compared: the smaller index comes first, and last."""


def drawn(samples: int, units: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Three models' features, whose means must not cancel what they differ in."""
    chance = torch.Generator().manual_seed(samples + units)
    return [torch.randn(samples, units, generator=chance, dtype=dtype) + 100 for _ in ORDER]


def summed(features: list[Tensor], batch: int, *, own: bool = True) -> Joint:
    """Sum features that come in batches."""
    sums = Sums(own=own)
    for begin in range(0, len(features[0]), batch):
        now = [part[begin : begin + batch] for part in features]
        for index in ORDER:
            sums.add(index, now[index], {other: now[other] for other in COMPARED[index]})
    return sums.joint()


def check(found: Joint, features: list[Tensor], rtol: float, atol: float) -> None:
    """Compare with the covariances over all samples at once."""
    units = features[0].shape[1]
    expected = torch.cov(torch.cat(features, 1).double().T, correction=0).reshape(3 * units, 3 * units)
    assert found.count == len(features[0])
    for first in range(3):
        torch.testing.assert_close(found.means[first], features[first].double().mean(0), rtol=rtol, atol=0.0)
        variances = features[first].double().var(0, correction=0)
        torch.testing.assert_close(found.variances[first], variances, rtol=rtol, atol=atol)
        for second in range(3):
            if first == second and (first, first) not in found.covariances:
                continue
            block = expected[first * units :, second * units :][:units, :units]
            torch.testing.assert_close(found.covariance(first, second), block, rtol=rtol, atol=atol)


@compiled
@settings(deadline=None)
@given(samples=st.integers(1, 400), units=st.integers(1, 70), batch=st.integers(1, 400), own=st.booleans())
def test_sums_are_the_covariances_over_all_samples(samples: int, units: int, batch: int, own: bool) -> None:
    features = drawn(samples, units)
    check(summed(features, batch, own=own), features, 1e-12, 1e-11)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", ["compiled", "operations"])
def test_many_samples_in_few_batches(way: str, dtype: torch.dtype, own: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if way == "operations":
        monkeypatch.setattr(native, "library", lambda _: None)
    elif not HAS_COMPILER:
        pytest.skip("no C++ compiler")
    features = drawn(20_000, 19, dtype)
    exact = dtype == torch.float64
    check(summed(features, 9_000, own=own), features, 1e-12 if exact else 1e-6, 1e-11 if exact else 1e-5)


@compiled
@pytest.mark.parametrize("own", [True, False])
def test_threads_change_no_bit(own: bool) -> None:
    features = drawn(30_000, 33, torch.float32)
    was = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(summed(features, 25_000, own=own))
    finally:
        torch.set_num_threads(was)
    one, other = found
    assert all(torch.equal(one.covariances[pair], other.covariances[pair]) for pair in one.covariances)
    assert all(map(torch.equal, (*one.means, *one.variances), (*other.means, *other.variances)))


@compiled
def test_rows_that_are_not_side_by_side_are_summed_as_copies_of_them_are() -> None:
    features = [part.T.contiguous().T for part in drawn(300, 20)]
    assert not features[0].is_contiguous()
    check(summed(features, 128), features, 1e-12, 1e-11)
