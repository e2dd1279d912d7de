"""The probe: what it hears, what it learns, how it is chosen, and where it cannot be had."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from problems import blobs, hiding, problem_of, trained
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.merge.nonuniform import NPMerge
from fedmerge.merge.objective import Objective
from fedmerge.merge.pool import Pool, pool_of
from fedmerge.merge.probing import WANTS_UNITS, last_layers, listening, probed
from fedmerge.merge.propagation import FEWEST
from fedmerge.merge.stacking import Stacker, stack, uninformed
from fedmerge.problem import UNKNOWN, Examples, Problem, Update
from fedmerge.train import log_probabilities


def heard(examples: int, units: int) -> tuple[Tensor, Tensor, Tensor]:
    """What three clients say of images of four classes, units of theirs, and the truth."""
    stream = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (examples,), generator=stream)
    opinions = 2 * torch.randn(3, examples, 4, generator=stream, dtype=torch.float64)
    seen = torch.randn(examples, units, generator=stream, dtype=torch.float64)
    seen[:, :4] += functional.one_hot(labels, 4)
    return opinions.log_softmax(2), seen, labels


def probe(problem: Problem, updates: list[Update]) -> Pool:
    found = probed(problem, updates, 1.0)
    assert found is not None
    return found


@pytest.mark.parametrize("units", [5, 200])
@pytest.mark.parametrize("penalty", [10.0, math.inf])
def test_a_fit_is_the_minimum_of_its_equation(units: int, penalty: float) -> None:
    opinions, seen, labels = heard(80, units)
    found = stack(uninformed, opinions, labels, penalty, seen, 0.1)
    assert found.of_units is not None
    values = [value.clone().requires_grad_() for value in (found.weights, found.bias, found.of_units)]
    weights, bias, of_units = values
    scores = torch.einsum("knc,kc->nc", opinions, weights) + bias + seen @ of_units
    loss = functional.cross_entropy(scores, labels, reduction="sum") + 0.05 * of_units.square().sum()
    if penalty < math.inf:
        loss = loss + penalty / 2 * (weights.square().sum() + bias.square().sum())
    else:
        assert not found.weights.any()
        assert not found.bias.any()
        values = [of_units]
    for gradient in torch.autograd.grad(loss, values):
        assert float(gradient.abs().max()) < 2e-3
    torch.testing.assert_close(found(opinions, seen), scores.detach().log_softmax(1))


def test_it_hears_what_the_last_layers_read() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    layers = last_layers(problem, updates)
    assert layers is not None
    hear, own = listening(problem, updates, layers)
    images = blobs(9, seed=3).images
    opinions, units = hear(images)
    states = [update.state for update in updates]
    torch.testing.assert_close(opinions, log_probabilities(problem.model, states, images))
    width = states[0][f"{layers[0]}.weight"].shape[1]
    assert units.shape == (9, 3 * width + 1)
    for number, (update, layer) in enumerate(zip(updates, layers, strict=True)):
        weight = update.state[f"{layer}.weight"].double()
        part = units[:, number * width : (number + 1) * width]
        logits = log_probabilities(problem.model, [update.state], images)[0]
        by_hand = part @ weight.T  # up to the scale and the centre of the units
        centred = (logits - logits.mean(1, keepdim=True), by_hand - by_hand.mean(1, keepdim=True))
        first, second = (item - item.mean(0) for item in centred)
        scale = float((first * second).sum() / second.square().sum())
        torch.testing.assert_close(first, scale * second, rtol=1e-4, atol=1e-4)
    for first, second in zip(hear(problem.data.images), own, strict=True):
        assert torch.equal(first, second)
    own_units = own[1]
    torch.testing.assert_close(
        own_units[:, :-1].mean(0), torch.zeros(3 * width, dtype=torch.float64), rtol=0, atol=1e-6
    )
    lengths = own_units[:, :width].norm(dim=1)
    torch.testing.assert_close(lengths.mean(), torch.tensor(1.0, dtype=torch.float64))
    assert bool((own_units[:, -1] == 1).all())


def strangers() -> list[Update]:
    """Clients that say the same of all images: their opinions tell nothing, their hidden units still do."""
    updates = trained("mlp@0.1")
    for update in updates:
        *_, weight, bias = update.state.values()
        weight *= 1e-6
        bias *= 1e-6
    return updates


def test_units_tell_classes_apart_that_the_clients_have_forgotten() -> None:
    problem, updates, test = problem_of("mlp@0.1", server_examples=120), strangers(), blobs(400, seed=5)
    found = probe(problem, updates)
    right = (found.combine(*found.hear(test.images)).argmax(1) == test.labels).double().mean()
    blind = pool_of("stacked", problem, updates, 1.0)
    guessed = (blind.combine(*blind.hear(test.images)).argmax(1) == test.labels).double().mean()
    assert guessed < 0.5 < 0.7 < right
    assert found.diagnostics["unit-penalty"] is not None
    assert found.diagnostics[WANTS_UNITS]
    merger = NPMerge(targets="mixed", mixtures=20, lrs=(0.01,), steps=20)
    taught = merger.teach(problem, updates)
    for side, groups in ((taught, "parameter"), (replace(taught, lesson={}), "channel")):
        merged = merger(side, updates, generator=torch.Generator().manual_seed(0))
        assert merged.diagnostics["groups"] == groups
        assert merged.diagnostics.get("lesson", {}) == side.lesson


def test_a_fold_is_told_nothing_of_its_validation_part() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=120), trained("mlp@0.1")
    found = probe(problem, updates)
    opinions, units = found.own(problem)
    penalties = [found.diagnostics[name] or math.inf for name in ("penalty", "unit-penalty")]
    assert len(found.apart) == len(problem.splits) == 3
    for (learn, _), combine in zip(problem.splits, found.apart, strict=True):
        assert isinstance(combine, Stacker)
        labels = problem.data.labels[learn]
        again = stack(combine.prior, opinions[:, learn], labels, penalties[0], units[learn], penalties[1])
        assert torch.equal(again(opinions, units), combine(opinions, units))


@pytest.mark.parametrize("forgotten", [True, False])
def test_where_classes_are_spread_the_probe_is_no_worse_than_without(forgotten: bool) -> None:
    size = 2 * FEWEST
    problem = hiding(problem_of("mlp@0.1", server_examples=size), torch.arange(size) >= 100)
    updates, test = strangers() if forgotten else trained("mlp@0.1"), blobs(400, seed=5)
    found = probe(problem, updates)
    plain = pool_of("propagated", problem, updates, 1.0, use_labels=True)
    right, without = (
        (pool.combine(*pool.hear(test.images)).argmax(1) == test.labels).double().mean() for pool in (found, plain)
    )
    assert len(found.apart) == 3
    assert right > without - 0.02
    if forgotten:
        assert found.diagnostics["spread"] == "probe"
        assert right > without + 0.1


def test_each_validation_part_is_judged_by_a_teacher_that_has_not_seen_it() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=120), trained("mlp@0.1")
    pool = probe(problem, updates)
    taught = Objective("mixed", mixtures=10).teach(problem, updates)
    assert len(taught.apart) == len(taught.sides) == len(taught.folds) == 3
    for side, combine, (_, judge), (_, judges) in zip(
        taught.sides, pool.apart, taught.folds, problem.splits, strict=True
    ):
        says = combine(*pool.own(problem)).exp()
        expected = torch.lerp(says, functional.one_hot(problem.data.labels, 3).to(says), 0.5)
        torch.testing.assert_close(judge.targets, expected[judges].float())
        assert side.mixtures is not None
        assert taught.mixtures is not None
        assert torch.equal(side.mixtures.images, taught.mixtures.images)
        assert not torch.equal(side.mixtures.targets, taught.mixtures.targets)  # type: ignore[arg-type]
    assert taught.restricted(problem.data).apart == ()


@pytest.mark.parametrize(
    ("size", "known", "probes"), [(49, 49, False), (50, 50, True), (600, 499, True), (600, 500, False)]
)
def test_it_is_for_few_labels_that_suffice_to_choose(size: int, known: int, probes: bool) -> None:
    problem = hiding(problem_of("mlp@0.1", server_examples=size), torch.arange(size) >= known)
    assert (probed(problem, trained("mlp@0.1"), 1.0) is not None) is probes


class Averaged(nn.Sequential):
    """A net whose last layer is a convolution."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class ByHand(nn.Sequential):
    """A net that does not call its last layer, but reads its weights."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))

    def forward(self, images: Tensor) -> Tensor:
        *body, head = self
        for layer in body:
            images = layer(images)
        assert isinstance(head, nn.Linear)
        return functional.linear(images, head.weight, head.bias)


@pytest.mark.parametrize("kind", [Averaged, ByHand])
def test_where_the_units_cannot_be_heard_the_opinions_teach(kind: type[nn.Sequential]) -> None:
    torch.manual_seed(0)
    model = kind()
    update = Update(model.state_dict(), 10, 0, (4, 3, 3))
    problem = Problem(model, blobs(60, seed=7))
    assert last_layers(problem, [update]) is None
    assert probed(problem, [update], 1.0) is None
    taught = Objective("mixed", mixtures=0).teach(problem, [update])
    assert taught.data.targets is not None


def test_where_memory_is_short_the_opinions_teach() -> None:
    assert probed(replace(problem_of("mlp@0.1"), low_memory=True), trained("mlp@0.1"), 1.0) is None


@pytest.mark.parametrize(("size", "known", "alone"), [(49, 49, True), (50, 50, False), (60, 49, False)])
def test_of_few_labelled_images_and_no_other_the_labels_alone_are_learned(size: int, known: int, alone: bool) -> None:
    problem = problem_of("mlp@0.1", size)
    labels = problem.data.labels.where(torch.arange(size) < known, UNKNOWN)
    server = problem.restricted(Examples(problem.data.images, labels))
    mixed = Objective(targets="mixed").teach(server, trained("mlp@0.1"))
    assert (mixed is Objective().teach(server, trained("mlp@0.1"))) is alone
    assert mixed.taught is not alone


@pytest.mark.parametrize(
    ("images", "known", "judges", "told"),
    [(600, 100, 120, True), (400, 100, 100, False), (600, 500, 100, False), (2600, 500, 520, True)],
)
def test_of_many_images_and_few_classes_all_images_judge(images: int, known: int, judges: int, told: bool) -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=images), trained("mlp@0.1")
    taught = Objective("mixed", mixtures=10).teach(hiding(problem, torch.arange(images) >= known), updates)
    parts = [validation for _, validation in taught.folds]
    assert len(parts) == (1 if images >= 500 else 3)
    assert sum(map(len, parts)) == judges
    assert all(part.labelled for part in parts)
    assert all(len(learn) + len(part) == images for learn, part in taught.folds)
    assert torch.equal(taught.data.labels[:known], problem.data.labels[:known])
    said = taught.data.targets
    assert said is not None
    others = taught.data.labels[known:]
    assert torch.equal(others, said[known:].argmax(1)) if told else bool((others == UNKNOWN).all())
