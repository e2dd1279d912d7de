"""ZipIt: its greedy merging against the obvious one, and what a zipped model computes."""

import time
from itertools import combinations

import pytest
import torch
from problems import TwoLayers, blobs, problem_of, same, shuffled, trained
from torch import Tensor, nn

from fedmerge.align.comparison import Comparison, deviation
from fedmerge.align.zipit import ZipIt, in_order, similarities, zip_units, zipped, zips
from fedmerge.basis import Linear, Zip
from fedmerge.calibrate import calibrate
from fedmerge.features import joint_moments
from fedmerge.merge.average import mean_state
from fedmerge.problem import Aligned, Examples, Problem
from fedmerge.spaces import Site, Space
from fedmerge.train import predict


def stream(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scores(models: int, size: int, seed: int = 0) -> Tensor:
    """Correlations of all units: of noisy mixtures, so that units are alike within models and across them."""
    generator = stream(seed)
    sources = torch.randn(size, 40, generator=generator, dtype=torch.float64)
    mixed = torch.randn(models * size, size, generator=generator, dtype=torch.float64).pow(3) @ sources
    return torch.corrcoef(mixed).reshape(models, size, models, size)


def align(aligner: ZipIt, problem: Problem, *states: dict[str, Tensor]) -> Aligned:
    return aligner(problem, states, 0, generator=stream())


def obvious(given: Tensor, within: float, decay: float) -> set[frozenset[tuple[int, int]]]:
    """Look at all pairs of groups at every step."""
    models, size = given.shape[:2]
    groups = [frozenset([(model, unit)]) for model in range(models) for unit in range(size)]
    alike = {
        frozenset([first, second]): float(given[(*next(iter(first)), *next(iter(second)))])
        for first, second in combinations(groups, 2)
    }
    budget = dict.fromkeys(range(models), int(within * (models - 1) * size / models + 1e-9))
    while len(groups) > size:
        ranked = []
        for first, second in combinations(groups, 2):
            shared = {model for model, _ in first} & {model for model, _ in second}
            is_allowed = all(budget[model] > 0 for model in shared)
            score = alike[frozenset([first, second])]
            if shared and score > 0:
                score *= decay ** (len(first) + len(second) - 2)
            ranked.append((is_allowed, score, first, second, shared))
        _, _, first, second, shared = max(ranked, key=lambda item: item[:2])
        merged = first | second
        for model in shared:
            budget[model] -= 1
        groups = [group for group in groups if group not in (first, second)]
        for group in groups:
            alike[frozenset([merged, group])] = min(alike[frozenset([one, group])] for one in (first, second))
        groups.append(merged)
    return set(groups)


@pytest.mark.parametrize("models", [2, 3])
@pytest.mark.parametrize(("within", "decay"), [(0.0, 1.0), (0.0, 0.1), (0.3, 0.5), (1.0, 1.0), (1.0, 0.01)])
def test_the_groups_are_those_of_looking_at_all_pairs(models: int, within: float, decay: float) -> None:
    for seed in range(3):
        given = scores(models, 7, seed)
        found = zip_units(given, within=within, decay=decay)
        groups = {
            frozenset((model, unit) for model in range(models) for unit in range(7) if found[model, unit] == group)
            for group in range(7)
        }
        assert groups == obvious(given, within, decay)


def test_without_merges_within_models_two_models_are_permuted() -> None:
    found = zip_units(scores(2, 9), within=0.0, decay=0.5)
    assert all(sorted(of_model.tolist()) == list(range(9)) for of_model in found)
    freely = zip_units(scores(2, 9), within=1.0, decay=1.0)
    assert any(sorted(of_model.tolist()) != list(range(9)) for of_model in freely)


def test_groups_do_not_depend_on_the_order_of_models() -> None:
    given, order = scores(3, 8, 1), [2, 0, 1]
    found = in_order(zip_units(given, within=0.5, decay=0.5), 1)
    again = in_order(zip_units(given[order][:, :, order], within=0.5, decay=0.5), order.index(1))
    kept = set(found[1].tolist())  # the places of groups without a unit of the reference are free
    for position, model in enumerate(order):
        for ours, theirs in zip(found[model].tolist(), again[position].tolist(), strict=True):
            assert (ours in kept) == (theirs in kept)
            assert ours == theirs or ours not in kept


def test_groups_take_the_places_of_the_references_units() -> None:
    groups = torch.tensor([[0, 1, 1], [2, 0, 1]])
    assert in_order(groups, 0).tolist() == [[0, 1, 1], [2, 0, 1]]
    assert in_order(groups, 1).tolist() == [[1, 2, 2], [0, 1, 2]]
    found = zips(groups)
    assert found[0].share.tolist() == pytest.approx([1.0, 2 / 3, 2 / 3])
    assert found[1].share.tolist() == pytest.approx([2.0, 1.0, 2 / 3])


def test_a_wide_space_is_zipped_in_time() -> None:
    given = scores(2, 512)
    started = time.process_time()
    zip_units(given, within=0.5, decay=0.5)
    assert time.process_time() - started < 3  # it takes a tenth; looking at all pairs takes minutes


def test_units_that_never_change_and_are_equal_are_one() -> None:
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    inputs = torch.randn(50, 2, generator=stream(), dtype=torch.float64)
    states = [
        {name: torch.randn(tensor.shape, generator=stream(seed), dtype=torch.float64) for name, tensor in items}
        for seed in range(2)
        for items in (model.state_dict().items(),)
    ]
    for state in states:
        state["0.weight"][2:] = 0.0
        state["0.bias"][2:] = torch.tensor([-1.0, 3.0])  # 0 after the ReLU, and 3
    space = Space(4, (), (), (), Site("_1", 1, (0, 1, 2, 3)))
    (joint,) = joint_moments(model, [space], states, inputs, pairs={(0, 1)})
    found = similarities(joint)
    assert found[:, 2, :, 2].tolist() == found[:, 3, :, 3].tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert found[:, 2, :, 3].tolist() == found[:, 0, :, 2].tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert found[0, 0, 0, 1] != 0


@pytest.mark.parametrize("setting", [(0.5, 0.5, 1.0), (1.0, 1.0, 0.5), (0.0, 0.5, 1.0)])
@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "resnet20@0.25"])
def test_shuffled_copies_are_zipped_back(name: str, setting: tuple[float, float, float]) -> None:
    problem = problem_of(name)
    (update,) = trained(name, 1)
    states = [update.state, *(shuffled(problem, update, seed).state for seed in (3, 4))]
    comparison = Comparison(problem, states, 0, every_pair=True, folded=True)
    merged = mean_state(zipped(comparison, *setting).states)
    images = problem.data.images
    ours, theirs = (
        predict(problem.model, calibrate(problem.model, dict(state), images), images)
        for state in (merged, update.state)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def doubled(seed: int) -> dict[str, Tensor]:
    """A net of two hidden layers that needs half of its units: each is there twice."""
    generator = stream(seed)
    first, second, head = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 36), (4, 3), (3, 4))
    )
    return {
        "1.weight": first.repeat(2, 1),
        "1.bias": torch.randn(3, generator=generator, dtype=torch.float64).repeat(2),
        "3.weight": second.repeat(2, 2) / 2,
        "3.bias": torch.randn(4, generator=generator, dtype=torch.float64).repeat(2),
        "5.weight": head.repeat(1, 2) / 2,
        "5.bias": torch.randn(3, generator=generator, dtype=torch.float64),
    }


def test_two_nets_that_need_half_of_their_units_are_merged_to_both_side_by_side() -> None:
    layers = nn.Flatten(), nn.Linear(36, 6), nn.ReLU(), nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)
    model = nn.Sequential(*layers).double()
    data = blobs(200, seed=3)
    problem = Problem(model, Examples(data.images.double(), data.labels))
    states = [doubled(1), doubled(2)]
    found = align(ZipIt(within=(1.0,), decay=(1.0,), depth=(1.0,)), problem, *states)
    mean = predict(model, mean_state(found.states), problem.data.images)
    expected = torch.stack([predict(model, state, problem.data.images) for state in states]).mean(0)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-9)
    permuted = align(ZipIt(within=(0.0,), decay=(1.0,), depth=(1.0,)), problem, *states)
    assert not torch.allclose(predict(model, mean_state(permuted.states), problem.data.images), expected, rtol=0.1)


def test_units_that_are_dead_leave_their_places_to_others() -> None:
    model = TwoLayers().double()
    model[2] = nn.ReLU()
    data = blobs(200, seed=3)
    problem = Problem(model.eval(), Examples(data.images.double(), data.labels))
    states = []
    for seed in range(2):
        state = {
            name: torch.randn(tensor.shape, generator=stream(seed), dtype=torch.float64)
            for name, tensor in model.state_dict().items()
        }
        state["1.bias"][2:] = -1e3
        states.append(state)
    found = align(ZipIt(within=(1.0,), decay=(1.0,), depth=(1.0,)), problem, *states)
    expected = torch.stack([predict(model, state, problem.data.images) for state in states]).mean(0)
    torch.testing.assert_close(
        predict(model, mean_state(found.states), problem.data.images), expected, rtol=1e-9, atol=1e-9
    )


def test_the_setting_with_the_lowest_validation_loss_is_chosen() -> None:
    problem = problem_of("mlp@0.1", server_examples=500)
    states = [dict(update.state) for update in trained("mlp@0.1", 3)]
    aligner = ZipIt(within=(0.5, 0.0), decay=(0.5,), depth=(1.0, 0.5))
    found = align(aligner, problem, *states)
    losses = found.diagnostics["validation-losses"]
    assert list(losses) == [
        f"zipit:within={within}:decay=0.5:depth={depth}" for depth in ("1", "0.5") for within in ("0.5", "0")
    ]
    assert losses[found.diagnostics["chosen"]] == min(losses.values())
    within, _, depth = (float(part.partition("=")[2]) for part in found.diagnostics["chosen"].split(":")[1:])
    assert all(map(same, found.states, align(ZipIt((within,), (0.5,), (depth,)), problem, *states).states))
    default = align(aligner, problem_of("mlp@0.1", server_examples=20), *states)
    assert (default.diagnostics["chosen"], default.server_labels) == (next(iter(losses)), False)


def test_nothing_is_zipped_at_depth_0_and_early_spaces_are_permuted_first() -> None:
    problem = problem_of("mlp@0.1")
    states = [dict(update.state) for update in trained("mlp@0.1", 2)]
    comparison = Comparison(problem, states, 0, every_pair=True, folded=True)
    permuted = comparison.permuted(comparison.matches)
    assert all(map(same, zipped(comparison, 0.5, 0.5, 0.0).states, permuted))
    half = zipped(comparison, 1.0, 1.0, 0.5).states
    assert torch.equal(half[1]["1.bias"], permuted[1]["1.bias"])
    assert not torch.equal(half[1]["3.bias"].sort().values, permuted[1]["3.bias"].sort().values)


def test_a_space_with_weights_of_single_units_is_permuted() -> None:
    layers = nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3)
    problem = Problem(nn.Sequential(*layers).eval(), blobs(60, seed=3))
    states = [
        {name: torch.randn(tensor.shape, generator=stream(seed)) for name, tensor in problem.model.state_dict().items()}
        for seed in range(2)
    ]
    found = align(ZipIt(within=(1.0,)), problem, *states)
    assert found.diagnostics["permuted-spaces"] == [problem.spaces[1].site.node]
    assert torch.equal(found.states[0]["4.weight"], states[0]["4.weight"])
    assert sorted(found.states[1]["4.weight"].tolist()) == sorted(states[1]["4.weight"].tolist())


def test_groups_are_written_as_means_and_read_by_all_readers() -> None:
    weights = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    change = Zip(torch.tensor([2, 0, 0]), torch.tensor([1.0, 0.5, 0.5]))
    assert change.write(weights).tolist() == [[4.0, 5.0], [0.0, 0.0], [1.0, 2.0]]
    assert change.read(weights).tolist() == [[8.0, 10.0], [0.0, 0.0], [1.0, 2.0]]
    with pytest.raises(ValueError, match="unit by unit"):
        change.scale(weights)
    for group, share in (([0, 1, 3], [1.0] * 3), ([0, -1, 1], [1.0] * 3), ([0, 1, 2], [1.0] * 2)):
        with pytest.raises(ValueError, match="a group from 0 to 2 and a share for each of 3 units"):
            Zip(torch.tensor(group), torch.tensor(share))


@pytest.mark.parametrize("name", ["within", "decay", "depth"])
@pytest.mark.parametrize("values", [(), (-0.1,), (1.5,), (float("nan"),)])
def test_unusable_settings_are_refused(name: str, values: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=f"{name} must be numbers from 0 to 1"):
        ZipIt(**{name: values})
    with pytest.raises(ValueError, match="decay must be greater than 0"):
        ZipIt(decay=(0.5, 0.0))


def test_a_group_should_deviate_as_its_units_do_on_average() -> None:
    covariance = torch.tensor([[4.0, -3.0, 0.0], [-3.0, 9.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    change = Zip(torch.tensor([0, 0, 1]), torch.tensor([0.5, 0.5, 1.0]))
    assert deviation(change, covariance).tolist() == [2.5, 1.0, 0.0]
    mixed = Linear(torch.diag(torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)))
    assert deviation(mixed, covariance).tolist() == [4.0, 3.0, 1.0]


def test_how_similarities_are_rounded_does_not_decide() -> None:
    stream = torch.Generator().manual_seed(4)
    scores = torch.rand(30, 30, generator=stream, dtype=torch.float64)
    scores = (scores + scores.T).reshape(3, 10, 3, 10) / 2
    expected = zip_units(scores, within=0.75, decay=0.8)
    for _ in range(5):
        rounded = scores * (1 + 1e-15 * torch.randn(scores.shape, generator=stream, dtype=torch.float64))
        assert torch.equal(zip_units(rounded, within=0.75, decay=0.8), expected)
