"""Screening: the useless are left out, and honest clients stay, however few classes they know."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache

import pytest
import torch
from problems import SHAPE, blobs, same
from torch import Tensor

from fedmerge.models import create
from fedmerge.oneshot import merge_updates, prepare, screens
from fedmerge.problem import Examples, Problem, Update
from fedmerge.screening import NORM_LIMIT, Screening, screen
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError
from fedmerge.train import LocalTraining, fit

MODEL = "mlp@0.2"
EVERY = (0, 1, 2)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("fedmerge.screening")
    logger.disabled = True
    yield
    logger.disabled = False


@cache
def client(number: int, classes: tuple[int, ...] = EVERY, *, flipped: bool = False, size: int = 120) -> Update:
    data = blobs(size, seed=number, classes=classes)
    if flipped:
        data = Examples(data.images, (data.labels + 1) % 3)
    model = create(MODEL, shape=SHAPE, num_classes=3, seed=number)
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state, _ = fit(model, start, data, LocalTraining(epochs=8, lr=0.02), generator=generator(number, "fit"))
    return Update(state, size, number, tuple(data.labels.bincount(minlength=3).tolist()))


def problem(size: int = 300, *, labelled: bool = True, classes: tuple[int, ...] = EVERY) -> Problem:
    data = blobs(size, seed=77, classes=classes)
    return Problem(
        create(MODEL, shape=SHAPE, num_classes=3, seed=99), data if labelled else Examples.unlabelled(data.images)
    )


def altered(update: Update, change: Callable[[Tensor], Tensor]) -> Update:
    return replace(update, state={name: change(tensor) for name, tensor in update.state.items()})


def noise(tensor: Tensor) -> Tensor:
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(tensor.numel())) * tensor.std()


def without_counts(update: Update) -> Update:
    return replace(update, label_counts=None)


HONEST = [client(number) for number in range(5)]
ATTACKS: dict[str, tuple[Callable[[Update], Update], str]] = {
    "zeros": (lambda update: altered(update, torch.zeros_like), "outputs are the same on all 300 images"),
    "the other sign": (lambda update: altered(update, torch.neg), "classifies"),
    "noise": (lambda update: altered(update, noise), "classifies"),
    "wrong labels": (lambda update: client(update.partition_id, flipped=True), "classifies"),
    "a hundred times the weights": (
        lambda update: altered(update, lambda tensor: 100 * tensor),
        r"norm is [\d.]+ times the median client's",
    ),
    "weights that overflow": (
        lambda update: altered(update, lambda tensor: torch.full_like(tensor, 1e30)),
        "outputs are NaN or infinite on 300 of 300 images",
    ),
    "a copy": (lambda update: replace(update, state=HONEST[0].state), "outputs are those of client 0"),
}


@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("hostile", [1, 2])
@pytest.mark.parametrize("name", ATTACKS)
def test_the_hostile_are_left_out_with_the_reason_and_the_honest_stay(name: str, hostile: int, labelled: bool) -> None:
    attack, reason = ATTACKS[name]
    updates = [*HONEST, *(attack(client(number)) for number in range(5, 5 + hostile))]
    found = screen(problem(labelled=labelled), updates[::-1], use_labels=True)
    assert [update.partition_id for update in found.updates] == [0, 1, 2, 3, 4]
    assert sorted(found.left_out) == list(range(5, 5 + hostile))
    for text in found.left_out.values():
        assert re.search(reason, text), text
    assert found.judge == ("labels" if labelled else "clients")
    assert found.server_examples == 300


@pytest.mark.parametrize("name", ["the other sign", "noise", "wrong labels", "zeros"])
def test_label_counts_are_not_needed(name: str) -> None:
    attack, _ = ATTACKS[name]
    updates = [without_counts(update) for update in (*HONEST, attack(client(5)))]
    found = screen(problem(), updates, use_labels=True)
    assert list(found.left_out) == [5]


PARTITIONS: dict[str, list[tuple[int, ...]]] = {
    "one class each": [(0,), (1,), (2,)],
    "two classes each": [(0, 1), (1, 2), (2, 0)],
    "disjoint": [(0, 1), (2,)],
    "all, and one that knows one": [EVERY, EVERY, (1,)],
    "few of all": [EVERY, EVERY, EVERY, EVERY],
}


@pytest.mark.parametrize("counts", [True, False], ids=["counts", "no counts"])
@pytest.mark.parametrize("labelled", [True, False], ids=["labels", "no labels"])
@pytest.mark.parametrize("name", PARTITIONS)
@pytest.mark.parametrize("size", [20, 60, 400])
def test_honest_clients_stay_whatever_classes_they_have(name: str, size: int, labelled: bool, counts: bool) -> None:
    updates = [
        client(number, classes, size=20 if name == "few of all" and number == 0 else 120)
        for number, classes in enumerate(PARTITIONS[name])
    ]
    if not counts:
        updates = [without_counts(update) for update in updates]
    found = screen(problem(size, labelled=labelled), updates, use_labels=True)
    assert found.left_out == {}
    assert [update.partition_id for update in found.updates] == list(range(len(updates)))


def test_a_client_is_judged_on_the_classes_that_it_claims_alone() -> None:
    liar = replace(client(3, (0,)), label_counts=(0, 120, 0))
    found = screen(problem(), [*HONEST[:3], client(4, (0,)), liar], use_labels=True)
    assert list(found.left_out) == [3]
    assert found.scores[4] > 0.9
    assert found.scores[3] < 0.1


def test_who_cannot_be_judged_stays() -> None:
    random = altered(client(3, (2,)), noise)
    found = screen(problem(classes=(0, 1)), [*HONEST[:3], random], use_labels=True)  # no image of its class
    assert found.left_out == {}
    assert 3 not in found.scores
    found = screen(problem(49), [*HONEST[:3], altered(client(3), noise)], use_labels=True)
    assert (found.left_out, found.scores, found.judge) == ({}, {}, "outputs")


def test_if_nobody_is_of_use_all_stay() -> None:
    updates = [altered(update, torch.zeros_like) for update in HONEST[:2]]
    found = screen(problem(), updates, use_labels=True)
    assert len(found.updates) == 2
    assert found.left_out == {}


def test_an_exploding_norm_needs_no_label_where_it_is_beyond_all_bounds() -> None:
    large = altered(client(5), lambda tensor: 2 * NORM_LIMIT * tensor)
    found = screen(problem(10), [*HONEST, large], use_labels=False)
    assert list(found.left_out) == [5]
    assert screen(problem(10), [HONEST[0], large], use_labels=False).left_out == {}  # of two, which one is wrong?


def test_a_claim_to_know_everything_makes_nobody_the_judge_of_all() -> None:
    liar = replace(altered(client(5), torch.neg), label_counts=(10**9, 10**9, 10**9), num_examples=3 * 10**9)
    found = screen(problem(labelled=False), [*HONEST, liar], use_labels=False)
    assert list(found.left_out) == [5]


def test_without_labels_a_minority_among_those_who_claim_a_class_has_no_honest_client_left_out() -> None:
    honest = [client(0, (0, 1)), client(1, (0, 1)), client(2, (1, 2)), client(3, (2, 0)), client(4, (1, 2))]
    liars = [client(number, (0, 1), flipped=True) for number in (5, 6)]
    found = screen(problem(labelled=False), [*honest, *liars], use_labels=False)
    assert not set(found.left_out) & {0, 1, 2, 3, 4}


def test_of_copies_the_one_with_the_better_claim_stays() -> None:
    narrow = client(9, (0, 1))
    copy = replace(narrow, partition_id=1, label_counts=(0, 60, 60))
    found = screen(problem(), [copy, narrow], use_labels=True)
    assert found.left_out == {1: "its outputs are those of client 9"}


def test_labels_that_may_not_be_used_change_nothing() -> None:
    server = problem()
    garbage = replace(server, data=Examples(server.data.images, server.data.labels.flip(0)))
    updates = [*HONEST, altered(client(5), torch.neg)]
    first, second = (screen(item, updates, use_labels=False) for item in (server, garbage))
    assert first.diagnostics == second.diagnostics
    assert list(first.left_out) == [5]


def test_nothing_that_is_given_is_changed() -> None:
    updates = [*HONEST, altered(client(5), torch.neg)]
    before = [{name: tensor.clone() for name, tensor in update.state.items()} for update in updates]
    screen(problem(), updates, use_labels=True)
    assert all(same(dict(update.state), state) for update, state in zip(updates, before, strict=True))


def test_a_merge_leaves_out_whom_screening_leaves_out_and_tells() -> None:
    server = problem()
    updates = [*HONEST[:3], altered(client(5), torch.neg)]
    screened = merge_updates(server, updates, align="identity", merge="np:steps=20:lrs=0.01", seed=0)
    honest = merge_updates(server, updates[:3], align="identity", merge="np:steps=20:lrs=0.01", seed=0, screen="off")
    every = merge_updates(server, updates, align="identity", merge="np:steps=20:lrs=0.01", seed=0, screen="off")
    assert same(screened.merged.state, honest.merged.state)
    assert not same(screened.merged.state, every.merged.state)
    assert list(screened.diagnostics["screen"]["left-out"]) == ["5"]
    assert "screen" not in every.diagnostics


@pytest.mark.parametrize(
    ("align", "merge", "expected"),
    [
        ("identity", "fedavg", False),
        ("identity", "ensemble", False),
        ("identity", "server-only", False),
        ("activations", "server-only", False),
        ("identity", "best-client", False),
        ("activations", "mean", True),
        ("identity", "np", True),
        ("identity", "np-distill", True),
        ("identity", "fresh-distill", True),
    ],
)
def test_the_plain_averages_stay_what_they_are(align: str, merge: str, expected: bool) -> None:
    assert screens(align, merge) == expected


def test_a_method_without_labels_is_screened_without_labels() -> None:
    server = problem()
    _, alignment = prepare(server, HONEST[:3], align="identity", merge="np-distill", seed=0)
    assert alignment.screening["judge"] == "clients"
    assert not alignment.server_labels
    _, alignment = prepare(server, HONEST[:3], align="identity", merge="np", seed=0)
    assert alignment.screening["judge"] == "labels"
    assert (alignment.server_labels, alignment.server_examples) == (True, 300)


def test_an_unknown_kind_of_screening_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'on'"):
        merge_updates(problem(), HONEST[:2], align="identity", merge="np", seed=0, screen="on")


def test_the_findings_are_json() -> None:
    found = Screening(tuple(HONEST), {5: "noise"}, {0: 0.5}, "labels", 10)
    assert found.diagnostics == {"judge": "labels", "left-out": {"5": "noise"}, "scores": {"0": 0.5}}
