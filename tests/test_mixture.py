"""Mixtures of models: groups, forms and starts of NP Merge, by hand-made oracles in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import doubles, problem_of, same, trained
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fedmerge.merge.average import Average, mean_state
from fedmerge.merge.box import onto_box
from fedmerge.merge.descent import Candidate, Schedule, Weights, descend
from fedmerge.merge.finetune import FineTune
from fedmerge.merge.learning import BACK_OFFS
from fedmerge.merge.mixture import GROUPS, AffineMixture, FreeMixture, Mixture
from fedmerge.merge.nonuniform import FORMS, ORDERS, NPMerge, PairwiseNPMerge, ranking
from fedmerge.merge.starts import STARTS, Start, starting
from fedmerge.problem import Update
from fedmerge.train import evaluate

ALL_GROUPS = (*GROUPS, "in-out", "coarse-to-fine")
KEEP_THE_SUM = [form for form in FORMS if form not in ("free", "shrink")]


def stream(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stacked(states: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def mixture(states: list[dict[str, Tensor]], form: str, groups: str, start: Start, pace: int = 2) -> Mixture:
    models, first, mean = stacked(states), start.state(states), mean_state(states)
    shares = start.shares(first)
    if form == "free":
        return FreeMixture(first, models, groups, shares=shares, pace=pace)
    deviations = {name: tensor - mean[name] for name, tensor in models.items()}
    bounds = {"box": (-0.1, 0.7), "simplex": (0.0, 1.0)}.get(form)
    return AffineMixture(first, deviations, groups, shares=shares, bounds=bounds, shrinks=form == "shrink", pace=pace)


def uneven(count: int) -> Start:
    rows = torch.rand(count, 3, generator=stream(), dtype=torch.float64)
    return Start(torch.arange(1.0, count + 1, dtype=torch.float64), rows / rows.sum(0), ("3.weight", "3.bias"))


def random_values(found: Mixture) -> None:
    generator = stream()
    for value in found.values:
        value.copy_(0.3 * torch.randn(value.shape, generator=generator, dtype=torch.float64))


def coefficients(found: Mixture) -> dict[str, Tensor]:
    assert isinstance(found, (AffineMixture, FreeMixture))
    return found.coefficients()


@pytest.mark.parametrize("groups", ALL_GROUPS)
@pytest.mark.parametrize("form", ["affine", "shrink", "free"])
def test_parameters_are_the_models_times_their_coefficients(form: str, groups: str) -> None:
    _, states = doubles(3)
    found = mixture(states, form, groups, uneven(3))
    models = stacked(states)
    start = uneven(3).state(states)
    for name, tensor in found.parameters().items():
        torch.testing.assert_close(tensor, start[name])
    random_values(found)
    for name, alpha in coefficients(found).items():
        torch.testing.assert_close(found.parameters()[name], (alpha * models[name]).sum(0))
        if form == "affine":
            torch.testing.assert_close(alpha.sum(0), torch.ones_like(alpha[0]))
        if form == "shrink" and found.gamma is not None:
            torch.testing.assert_close(alpha.sum(0), torch.ones_like(alpha[0]) * (1 + found.gamma))


@pytest.mark.parametrize("groups", ALL_GROUPS)
@pytest.mark.parametrize("form", ["affine", "shrink", "free"])
def test_gradients_equal_autograd_through_the_merge(form: str, groups: str) -> None:
    problem, states = doubles(3)
    found = mixture(states, form, groups, uneven(3), pace=0)
    random_values(found)
    oracle = mixture(states, form, groups, uneven(3), pace=0)
    for value, other in zip(oracle.values, found.values, strict=True):
        value.copy_(other)
        value.requires_grad_()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        logits = functional_call(problem.model, parameters, (problem.data.images,))
        return functional.cross_entropy(logits, problem.data.labels)

    expected = torch.autograd.grad(loss(oracle.parameters()), oracle.values)
    leaves = {name: tensor.requires_grad_() for name, tensor in found.parameters().items()}
    of_theta = dict(zip(leaves, torch.autograd.grad(loss(leaves), list(leaves.values())), strict=True))
    for index, (got, wanted) in enumerate(zip(found.pull_back(of_theta), expected, strict=True)):
        is_gamma = form == "shrink" and index == len(expected) - 1
        factor = 1.5 if form != "free" and not is_gamma else 1.0  # K / (K - 1)
        assert got is not None
        torch.testing.assert_close(got, factor * wanted)


def test_in_and_out_is_a_sum_of_a_row_and_a_column() -> None:
    _, states = doubles(2)
    found = mixture(states, "affine", "in-out", uneven(2))
    shapes = [tuple(value.shape) for value in found.values]
    assert shapes == [(2, 5, 1), (2, 1, 36), (2, 5), (2, 3, 1), (2, 1, 5), (2, 3)]
    random_values(found)
    rows, columns, *_ = found.values
    torch.testing.assert_close(found.beta("1.weight"), rows + columns)


def test_finer_groups_join_in_time_and_add_to_the_coarser() -> None:
    problem, states = doubles(2)
    made: list[Mixture] = []

    def make() -> Mixture:
        made.append(mixture(states, "affine", "coarse-to-fine", uneven(2), pace=3))
        return made[-1]

    moved = []
    for steps in (3, 4, 7):
        *_, _ = descend(problem, Candidate({}, 0.01, make), {}, problem.data, [0, steps], seed=0)
        moved.append([any(bool(value.any()) for value in level.values) for level in made[-1].levels])
    assert moved == [[True, False, False], [True, True, False], [True, True, True]]


def test_free_coefficients_span_what_affine_ones_do_not() -> None:
    _, (first, second) = doubles(2)
    goal = {name: 2.0 * first[name] - 0.5 * second[name] for name in first}
    start = Start(torch.ones(2, dtype=torch.float64))
    free = mixture([first, second], "free", "model", start)
    free.values[0].copy_(torch.tensor([1.5, -1.0]))
    for name, tensor in free.parameters().items():
        torch.testing.assert_close(tensor, goal[name])
    affine = mixture([first, second], "affine", "parameter", start)
    random_values(affine)
    doubled = {name: 2 * tensor for name, tensor in mean_state([first, second]).items()}
    line = first["3.bias"] - second["3.bias"]  # affine mixtures lie, entry by entry, on the models' line
    assert (line != 0).all()
    alpha = (doubled["3.bias"] - second["3.bias"]) / line
    assert len(set(alpha.tolist())) == 3  # no one coefficient of a tensor reaches the doubled mean
    free.values[0].copy_(torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(free.parameters()["3.bias"], doubled["3.bias"])


# The box.


@settings(deadline=None)
@given(st.integers(1, 6), st.floats(-2, 0.16), st.floats(1, 3), st.integers(0, 999), st.sampled_from([0.1, 1.0, 30.0]))
def test_the_projection_onto_a_box_is_the_nearest_point(
    count: int, low: float, high: float, seed: int, scale: float
) -> None:
    points = scale * torch.randn(count, 7, generator=stream(seed), dtype=torch.float64)
    found = onto_box(points, low, high)
    torch.testing.assert_close(found.sum(0), torch.ones(7, dtype=torch.float64))
    assert (found >= low).all()
    assert (found <= high).all()
    # what was moved alike is neither at the lower bound, unless it would go below, nor at the upper, unless above
    shift = points - found
    for place in range(7):
        inside = (found[:, place] > low + 1e-9) & (found[:, place] < high - 1e-9)
        if inside.any():
            level = shift[inside, place].mean()
            torch.testing.assert_close(shift[inside, place], level.expand(int(inside.sum())))
            torch.testing.assert_close(found[:, place], (points[:, place] - level).clamp(low, high))
    torch.testing.assert_close(onto_box(found, low, high), found)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize(("form", "low", "high"), [("box", -0.1, 0.7), ("simplex", 0.0, 1.0)])
def test_coefficients_stay_in_their_box_and_sum_to_one_whatever_the_steps(
    form: str, low: float, high: float, groups: str
) -> None:
    problem, states = doubles(3)
    start = Start(torch.arange(1.0, 4.0, dtype=torch.float64)) if groups in ("model", "tensor") else uneven(3)
    made: list[Mixture] = []

    def make() -> Mixture:
        made.append(mixture(states, form, groups, start.within(low, high)))
        return made[-1]

    *_, state = descend(problem, Candidate({}, 0.5, make), {}, problem.data, [0, 20], seed=0)
    models = stacked(states)
    bound = False
    for name, alpha in coefficients(made[0]).items():
        torch.testing.assert_close(alpha.sum(0), torch.ones_like(alpha[0]))
        assert alpha.min() >= low - 1e-12
        assert alpha.max() <= high + 1e-12
        torch.testing.assert_close(state[name], (alpha * models[name]).sum(0))
        bound = bound or bool(((alpha < low + 1e-9) | (alpha > high - 1e-9)).any())
    assert bound


def test_a_start_outside_of_the_box_is_brought_into_it() -> None:
    start = Start(torch.tensor([9.0, 1.0], dtype=torch.float64)).within(0.2, 0.8)
    torch.testing.assert_close(start.body, torch.tensor([0.8, 0.2], dtype=torch.float64))
    inside = Start(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert torch.equal(inside.within(0.2, 0.8).body, inside.body / 4)
    with pytest.raises(ValueError, match=r"must hold 1/2 for 2 models, got low=0\.6, high=1"):
        inside.within(0.6, 1.0)


# Starts.


def test_starts_are_what_they_say() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    states = [update.state for update in updates]

    def start(name: str, best_share: float = 0.6) -> dict[str, Tensor]:
        return starting(name, problem, updates, best_share=best_share, smoothing=1.0).state(states)

    assert same(start("mean"), mean_state(states))
    assert same(start("examples"), mean_state(states, [update.num_examples for update in updates]))
    assert same(start("counts"), Average("examples", head="counts")(problem, updates, generator=stream()).state)
    best = ranking(problem, updates)[0]
    for name, tensor in start("best", best_share=1.0).items():
        torch.testing.assert_close(tensor, states[best][name])
    shares = starting("best", problem, updates, best_share=0.6, smoothing=1.0).body.tolist()
    assert sorted(shares) == pytest.approx([0.2, 0.2, 0.6])
    assert shares[best] == 0.6


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_from_every_start_is_no_worse_than_its_start(form: str, start: str) -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=500), trained("mlp@0.1")
    method = NPMerge(groups="channel", form=form, start=start, lrs=(0.02,), steps=40)
    first, second = (method(problem, updates, generator=stream()) for _ in range(2))
    assert same(first.state, second.state)
    assert first.diagnostics["validation-loss"] <= first.diagnostics["start-loss"]
    expected = starting(start, problem, updates, best_share=0.6, smoothing=1.0).state([item.state for item in updates])
    unmoved = NPMerge(groups="channel", form=form, start=start, lrs=(1e-12,), steps=20)
    for name, tensor in unmoved(problem, updates, generator=stream()).state.items():
        torch.testing.assert_close(tensor, expected[name])


@pytest.mark.parametrize("groups", ["in-out", "coarse-to-fine", "model"])
def test_every_group_learns(groups: str) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    found = NPMerge(groups=groups, steps=40)(problem, updates, generator=stream())
    assert found.diagnostics["validation-loss"] < found.diagnostics["start-loss"]
    assert found.diagnostics["groups"] == groups
    assert found.diagnostics["candidates"] == (6 if groups == "coarse-to-fine" else 3)


@pytest.mark.parametrize("form", KEEP_THE_SUM)
@pytest.mark.parametrize("start", STARTS)
def test_equal_models_merge_to_themselves_in_every_form_that_keeps_the_sum(form: str, start: str) -> None:
    problem, (update,) = problem_of("mlp@0.1"), trained("mlp@0.1", 1)
    copies = [replace(update, partition_id=index, num_examples=index + 1) for index in range(3)]
    found = NPMerge(groups="parameter", form=form, start=start, lrs=(0.1,), steps=20)(
        problem, copies, generator=stream()
    )
    assert same(found.state, dict(update.state))


@pytest.mark.parametrize("form", FORMS)
def test_one_model_is_returned_as_it_is_in_every_form(form: str) -> None:
    problem, (update,) = problem_of("mlp@0.1"), trained("mlp@0.1", 1)
    assert same(NPMerge(form=form, start="counts")(problem, [update], generator=stream()).state, dict(update.state))


# Decay, averages, augmentation.


@pytest.mark.parametrize(("steps", "waits"), [(10, 80), (300, 80), (600, 160), (3000, 800)])
def test_longer_descents_wait_longer_for_a_better_loss(steps: int, waits: int) -> None:
    assert Schedule(steps=steps).waits == waits


def descended(schedule: Schedule, make: Callable[[], Mixture], steps: int = 20, lr: float = 0.05) -> dict[str, Tensor]:
    problem, _ = doubles(2)
    *_, found = descend(problem, Candidate({}, lr, make), {}, problem.data, [0, steps], seed=3, schedule=schedule)
    return found


def test_decay_pulls_toward_the_start() -> None:
    _, states = doubles(2)
    start = uneven(2).state(states)

    def make() -> Mixture:
        return mixture(states, "affine", "parameter", uneven(2))

    def distance(decay: float) -> float:
        found = descended(Schedule(decay=decay), make)
        return float(sum((found[name] - start[name]).square().sum() for name in start))

    assert distance(0.0) > distance(2.0) > distance(10.0) > 0


def test_averages_are_the_mean_of_the_states_since_the_last_look() -> None:
    problem, (state, *_) = doubles(1)
    candidate = Candidate({}, 0.05, lambda: Weights(state))
    each = list(descend(problem, candidate, {}, problem.data, range(9), seed=1))
    averaged = list(descend(problem, candidate, {}, problem.data, [0, 3, 8], seed=1, schedule=Schedule(average=True)))
    assert same(averaged[0], state)
    for name in state:
        torch.testing.assert_close(averaged[1][name], torch.stack([item[name] for item in each[1:4]]).mean(0))
        torch.testing.assert_close(averaged[2][name], torch.stack([item[name] for item in each[4:9]]).mean(0))


def test_augmentation_is_seeded_and_changes_no_batch() -> None:
    problem, updates = problem_of("cnn@0.1"), trained("cnn@0.1", 2)
    method = NPMerge(groups="channel", lrs=(0.02,), steps=20, augment="both")
    first, second = (method(problem, updates, generator=stream()) for _ in range(2))
    plain = replace(method, augment="none")(problem, updates, generator=stream())
    assert same(first.state, second.state)
    assert not same(first.state, plain.state)


# Divergence, overfitting, incompatible models.


def test_a_learning_rate_that_diverges_is_backed_off_until_it_learns() -> None:
    problem, updates = problem_of("mlp", server_examples=600), trained("mlp", shared=True)
    found = NPMerge(groups="parameter", lrs=(30.0,), steps=40)(problem, updates, generator=stream())
    assert found.diagnostics["findings"][0] == "diverged with lr 30"
    assert found.diagnostics["findings"][1].startswith("backed off to lr 3")
    assert found.diagnostics["lr"] == 3
    assert found.diagnostics["validation-loss"] < found.diagnostics["start-loss"]


def test_what_diverges_even_then_is_the_start_and_says_so() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    found = NPMerge(groups="parameter", lrs=(1e30,), steps=20)(problem, updates, generator=stream())
    backed_off = [text for text in found.diagnostics["findings"] if text.startswith("backed off")]
    assert len(backed_off) == BACK_OFFS
    assert all(text.endswith("and diverged") for text in backed_off)
    assert found.diagnostics["steps"] == 0


def test_where_nothing_can_be_chosen_divergence_shows_on_the_examples_themselves() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=20), trained("mlp@0.1")
    found = NPMerge(groups="parameter", lrs=(1e30,), start="mean")(problem, updates, generator=stream())
    assert found.diagnostics["findings"] == [f"diverged with lr 1e+{30 - off} on all examples" for off in range(4)]
    mean = mean_state([update.state for update in updates])
    for name, tensor in found.state.items():
        torch.testing.assert_close(tensor, mean[name])


def test_overfitting_is_named() -> None:
    problem, updates = problem_of("mlp"), trained("mlp", 2)
    found = FineTune(start="fresh", lrs=(0.01,))(problem, updates, generator=stream())
    assert any("overfitting: the validation loss rose from" in text for text in found.diagnostics["findings"])


def test_models_that_do_not_go_together_are_named() -> None:
    problem = problem_of("mlp@0.1", server_examples=200)
    (update,) = trained("mlp@0.1", 1)
    opposite = {name: -tensor for name, tensor in update.state.items()}
    flipped = Update(opposite, 60, 1)  # their mean is zero, and its outputs are equal
    found = NPMerge(groups="model", lrs=(1e-9,), steps=20)(problem, [update, flipped], generator=stream())
    worst = min(evaluate(problem.model, [item], problem.data).accuracy for item in (update.state, opposite))
    mixed = evaluate(problem.model, [mean_state([update.state, opposite])], problem.data).accuracy
    named = [text for text in found.diagnostics["findings"] if text.startswith("incompatible models")]
    assert bool(named) is (mixed < worst)
    same_twice = NPMerge(groups="model", steps=20)(
        problem, [update, replace(update, partition_id=1)], generator=stream()
    )
    assert not same_twice.diagnostics["findings"]


# Successive pairs.


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_joins_all_models(order: str) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1", 5)
    found = PairwiseNPMerge(lrs=(0.1,), steps=20, order=order)(problem, updates, generator=stream())
    assert len(found.diagnostics["pairs"]) == 4
    assert all(torch.isfinite(tensor).all() for tensor in found.state.values())


def test_best_first_is_the_given_order_of_the_ranked() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    ranked = [updates[index] for index in ranking(problem, updates)]
    losses = [evaluate(problem.model, [update.state], problem.data).loss for update in ranked]
    assert losses == sorted(losses)
    best_first = PairwiseNPMerge(lrs=(0.1,), steps=20, order="best-first")(problem, updates, generator=stream())
    given = PairwiseNPMerge(lrs=(0.1,), steps=20)(problem, ranked, generator=stream())
    assert same(best_first.state, given.state)
    few = problem_of("mlp@0.1", server_examples=20)
    assert [updates[index].num_examples for index in ranking(few, updates)] == [62, 61, 60]


def test_a_tree_joins_neighbours_and_then_their_results() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1", 5)
    method = PairwiseNPMerge(lrs=(0.1,), steps=20)
    generator = stream()

    def pair(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
        both = [replace(updates[index], state=state) for index, state in enumerate((first, second))]
        return method(problem, both, generator=generator).state

    a, b, c, d, e = (dict(update.state) for update in updates)
    left, right = pair(a, b), pair(c, d)
    expected = pair(pair(left, right), e)
    found = replace(method, order="tree")(problem, updates, generator=stream())
    assert same(found.state, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "cone"}, "form must be one of affine, shrink, box, simplex, free"),
        ({"start": "worst"}, "start must be one of auto, mean, examples, counts, best"),
        ({"best_share": 1.2}, r"best_share must be in \[0, 1\]"),
        ({"decay": -1.0}, "decay must be at least 0"),
        ({"form": "box", "groups": "in-out"}, "use groups=channel or parameter"),
        ({"form": "simplex", "groups": "coarse-to-fine"}, "use groups=channel or parameter"),
        ({"form": "box", "groups": "tensor", "start": "counts"}, "use groups=channel or parameter"),
        ({"groups": "layer"}, "auto or one of model, tensor, channel, parameter, in-out, coarse-to-fine"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NPMerge(**options)  # type: ignore[arg-type]


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="order must be one of given, best-first, tree"):
        PairwiseNPMerge(order="random")
