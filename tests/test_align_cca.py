"""CCA Merge: its map, what its ridge does, and its laws."""

from typing import Any

import pytest
import torch
from problems import blobs, problem_of, same, shuffled, trained
from torch import Tensor, nn

from fedmerge.align.cca import CCA, canonical_map
from fedmerge.align.comparison import Comparison
from fedmerge.align.matching import correlation, match
from fedmerge.basis import Linear, rebase
from fedmerge.covariances import Joint, Moments
from fedmerge.features import joint_moments
from fedmerge.merge.average import mean_state
from fedmerge.problem import Aligned, Examples, Problem
from fedmerge.train import predict


def stream(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def align(aligner: CCA, problem: Problem, *states: dict[str, Tensor]) -> Aligned:
    return aligner(problem, states, 0, generator=stream())


def samples(count: int = 200, size: int = 6) -> tuple[Tensor, Tensor]:
    generator = stream()
    first = torch.randn(count, size, generator=generator, dtype=torch.float64) @ torch.rand(
        size, size, generator=generator, dtype=torch.float64
    )
    second = first @ torch.randn(size, size, generator=generator, dtype=torch.float64) + 0.3 * torch.randn(
        count, size, generator=generator, dtype=torch.float64
    )
    return first, second


def moments_of(first: Tensor, second: Tensor) -> Moments:
    size = first.shape[1]
    joint = torch.cov(torch.cat([first, second], 1).T, correction=0)
    parts = {(0, 1): joint[:size, size:], (0, 0): joint[:size, :size], (1, 1): joint[size:, size:]}
    variances = first.var(0, correction=0), second.var(0, correction=0)
    return Joint(len(first), (first.mean(0), second.mean(0)), variances, parts).between(0, 1)


def test_the_map_by_eigenvectors_is_that_by_cholesky_factors() -> None:
    found = moments_of(*samples())
    reference, other = (torch.linalg.cholesky(part) for part in found.own)
    whitened = torch.linalg.solve_triangular(reference, found.cross, upper=False)
    whitened = torch.linalg.solve_triangular(other, whitened.T, upper=False).T
    u, _, vh = torch.linalg.svd(whitened)
    expected = torch.linalg.solve_triangular(other.T, vh.T @ u.T @ reference.T, upper=True)
    torch.testing.assert_close(canonical_map(found.own[0], found.cross, found.own[1]), expected, rtol=1e-8, atol=1e-8)


def test_mapped_features_have_the_references_covariance_and_correlate_canonically() -> None:
    first, second = samples()
    found = moments_of(first, second)
    mapped = second @ canonical_map(found.own[0], found.cross, found.own[1])
    torch.testing.assert_close(torch.cov(mapped.T, correction=0), found.own[0])
    before = torch.trace(correlation(found))
    assert torch.trace(correlation(moments_of(first, mapped))) > before


def test_a_ridge_is_what_samples_of_matched_units_would_add() -> None:
    first, second = samples()
    found = moments_of(first, second)
    index = match(correlation(found)).index
    ridge = 0.7
    of_first, of_second = (ridge * float(part.trace()) / 6 for part in found.own)
    identity = torch.eye(6, dtype=torch.float64)
    count = len(first)
    imagined = torch.cat([first - first.mean(0), (of_first * count) ** 0.5 * identity])
    matched = torch.cat([second - second.mean(0), (of_second * count) ** 0.5 * identity[index]])
    expected = canonical_map(imagined.T @ imagined / count, imagined.T @ matched / count, matched.T @ matched / count)
    torch.testing.assert_close(CCA().change(found, ridge, match(correlation(found))).matrix, expected)


def test_a_great_ridge_is_a_permutation_up_to_scale() -> None:
    found = moments_of(*samples())
    matrix = CCA().change(found, 1e9, match(correlation(found))).matrix
    index = match(correlation(found)).index
    scale = (found.own[0].trace() / found.own[1].trace()).sqrt()
    torch.testing.assert_close(matrix, scale * torch.eye(6, dtype=torch.float64)[index].T, rtol=1e-6, atol=1e-6)


def test_without_an_anchor_it_is_the_papers() -> None:
    found = moments_of(*samples())
    ridge = 0.2
    reference, other = (part + ridge * part.trace() / 6 * torch.eye(6, dtype=torch.float64) for part in found.own)
    expected = canonical_map(reference, found.cross, other)
    torch.testing.assert_close(CCA(anchor="none").change(found, ridge, match(correlation(found))).matrix, expected)


@pytest.mark.parametrize("anchor", ["permutation", "none"])
def test_a_linear_net_that_is_rotated_is_turned_back(anchor: str) -> None:
    layers = nn.Flatten(), nn.Linear(36, 5), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)
    model = nn.Sequential(*layers).double().eval()
    data = blobs(400, seed=3)
    problem = Problem(model, Examples(data.images.double(), data.labels))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    first = problem.spaces[0]
    turn = torch.linalg.qr(torch.randn(5, 5, generator=stream(), dtype=torch.float64)).Q
    rotated = rebase(state, [first], [Linear(turn)])
    assert not torch.allclose(rotated["1.weight"], state["1.weight"])
    found = align(CCA(ridges=(1e-9,), anchor=anchor), problem, state, rotated)
    for name in ("1.weight", "1.bias", "2.weight"):
        torch.testing.assert_close(found.states[1][name], state[name], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        predict(model, mean_state(found.states), problem.data.images), predict(model, state, problem.data.images)
    )


@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "resnet20@0.25"])
def test_a_shuffled_copy_is_aligned_back(name: str) -> None:
    problem = problem_of(name)
    (update,) = trained(name, 1)
    found = align(CCA(ridges=(1e-2,)), problem, dict(update.state), dict(shuffled(problem, update, 3).state))
    merged = predict(problem.model, mean_state(found.states), problem.data.images)
    torch.testing.assert_close(merged, predict(problem.model, update.state, problem.data.images), rtol=1e-3, atol=1e-3)


def test_its_spaces_that_can_only_be_permuted_are_named() -> None:
    layers = nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    problem = Problem(nn.Sequential(*layers).eval(), blobs(60, seed=3))
    states = [
        {name: torch.randn(tensor.shape, generator=stream(seed)) for name, tensor in problem.model.state_dict().items()}
        for seed in range(2)
    ]
    found = align(CCA(), problem, *states)
    (permuted,) = found.diagnostics["permuted-spaces"]
    assert permuted == problem.spaces[1].site.node
    assert found.diagnostics["dense-spaces"] == 1
    assert sorted(found.states[1]["4.weight"].tolist()) == sorted(states[1]["4.weight"].tolist())


def test_the_ridge_with_the_lowest_validation_loss_is_chosen() -> None:
    problem = problem_of("mlp@0.1", server_examples=500)
    states = [dict(update.state) for update in trained("mlp@0.1", 2)]
    found = align(CCA(), problem, *states)
    losses = found.diagnostics["validation-losses"]
    assert set(losses) == {f"cca:ridges={ridge:g}" for ridge in CCA().ridges}
    assert losses[found.diagnostics["chosen"]] == min(losses.values())
    ridge = float(found.diagnostics["chosen"].partition("=")[2])
    assert all(map(same, found.states, align(CCA(ridges=(ridge,)), problem, *states).states))


def test_below_fifty_examples_the_default_ridge_is_taken() -> None:
    problem = problem_of("mlp@0.1", server_examples=20)
    states = [dict(update.state) for update in trained("mlp@0.1", 2)]
    found = align(CCA(), problem, *states)
    assert found.diagnostics["chosen"] == f"cca:ridges={CCA().ridges[0]:g}"
    assert (found.diagnostics["validation-losses"], found.server_labels) == ({}, False)


def test_models_are_compared_once_for_all_ridges(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> list[Joint]:
        calls.append(1)
        return joint_moments(*arguments, **options)

    monkeypatch.setattr("fedmerge.align.comparison.joint_moments", counted)
    problem = problem_of("mlp@0.1", server_examples=500)
    states = [update.state for update in trained("mlp@0.1", 2)]
    comparison = Comparison(problem, states, 0, folded=True)
    for candidate in CCA().candidates(comparison).values():
        candidate()
    assert calls == [1]


@pytest.mark.parametrize("ridges", [(), (0.0,), (-1.0,), (float("inf"),), (float("nan"),)])
def test_unusable_ridges_are_refused(ridges: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="ridges must be numbers greater than 0"):
        CCA(ridges=ridges)


def test_an_unknown_anchor_is_refused() -> None:
    with pytest.raises(ValueError, match=f"permutation, none, got {'identity'!r}"):
        CCA(anchor="identity")
