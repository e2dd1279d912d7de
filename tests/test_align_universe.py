"""Cycle-consistent matching: better for all pairs than matching with the reference, and no order matters."""

import itertools

import torch
from problems import problem_of, same, shuffled, trained
from torch import Tensor

from fedmerge.align.matching import match
from fedmerge.align.universe import Universe, agreement, universe
from fedmerge.basis import Permutation
from fedmerge.merge.average import mean_state


def similarities(count: int, size: int, seed: int) -> list[list[Tensor]]:
    """Similarities of noisy copies of the same units, in unknown orders."""
    stream = torch.Generator().manual_seed(seed)
    units = torch.randn(size, 8, generator=stream, dtype=torch.float64)
    models = [
        (units + 1.5 * torch.randn(size, 8, generator=stream, dtype=torch.float64))[
            torch.randperm(size, generator=stream)
        ]
        for _ in range(count)
    ]
    return [[first @ second.T for second in models] for first in models]


def star(given: list[list[Tensor]], reference: int) -> list[Permutation]:
    size = len(given[0][0])
    return [
        match(part) if index != reference else Permutation(torch.arange(size))
        for index, part in enumerate(given[reference])
    ]


def test_all_pairs_agree_at_least_as_well_as_by_matching_with_the_reference() -> None:
    better = 0
    for seed in range(10):
        given = similarities(4, 6, seed)
        ours, theirs = (agreement(given, found) for found in (universe(given, 0), star(given, 0)))
        assert ours >= theirs - 1e-9
        better += ours > theirs + 1e-9
    assert better >= 5


def test_no_model_alone_can_be_permuted_to_agree_better() -> None:
    given = similarities(3, 4, 1)
    found = universe(given, 0)
    reached = agreement(given, found)
    for model, index in itertools.product(range(3), itertools.permutations(range(4))):
        changed = [Permutation(torch.tensor(index)) if n == model else change for n, change in enumerate(found)]
        assert agreement(given, changed) <= reached + 1e-9


def test_the_reference_keeps_its_order() -> None:
    for reference in range(3):
        assert universe(similarities(3, 5, 2), reference)[reference].index.tolist() == list(range(5))


def test_the_order_of_the_models_does_not_matter() -> None:
    given = similarities(4, 6, 3)
    found = universe(given, 1)
    order = [2, 0, 3, 1]
    reordered = [[given[p][q] for q in order] for p in order]
    again = universe(reordered, order.index(1))
    for position, model in enumerate(order):
        assert torch.equal(again[position].index, found[model].index)


def test_the_order_of_the_models_does_not_matter_to_real_ones() -> None:
    problem = problem_of("mlp@0.1")
    states = [update.state for update in trained("mlp@0.1")]
    forward = Universe()(problem, states, 0, generator=torch.Generator()).states
    backward = Universe()(problem, states[::-1], 2, generator=torch.Generator()).states
    assert all(map(same, forward, backward[::-1]))


def test_shuffled_copies_come_back_together() -> None:
    problem = problem_of("mlp@0.1")
    (update,) = trained("mlp@0.1", 1)
    copies = [update.state, *(shuffled(problem, update, seed).state for seed in range(3))]
    found = Universe()(problem, copies, 0, generator=torch.Generator())
    for name, tensor in mean_state(found.states).items():
        torch.testing.assert_close(tensor, update.state[name])
    assert found.diagnostics["matched-correlation"] > 0.99


def test_two_models_are_matched_as_by_activations() -> None:
    given = similarities(2, 6, 4)
    assert [change.index.tolist() for change in universe(given, 0)] == [
        change.index.tolist() for change in star(given, 0)
    ]
