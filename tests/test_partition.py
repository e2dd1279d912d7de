import pickle
import random
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from flwr_datasets.partitioner import IidPartitioner, SizePartitioner
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedmerge import partition
from fedmerge.names import PARTITIONS
from fedmerge.partition import divide, stratified_order, stratified_sample
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError

NUM_CLASSES = 8
DIVISIONS = sorted(set(PARTITIONS) - {"same"})
SKEWED = sorted(set(DIVISIONS) - {"iid", "quantity"})


def some_labels(size: int, num_classes: int = NUM_CLASSES, seed: int = 0) -> Tensor:
    return torch.randint(num_classes, (size,), generator=generator(seed, "labels"))


def parts_of(
    labels: Tensor, num_clients: int = 4, *, name: str, alpha: float = 0.5, minimum: int = 1, seed: int = 0
) -> tuple[Tensor, ...]:
    return divide(labels, num_clients, name=name, alpha=alpha, minimum=minimum, seed=seed)


def class_shares(labels: Tensor, parts: Sequence[Tensor], num_classes: int = NUM_CLASSES) -> Tensor:
    """(clients, classes): each client's shares of the classes."""
    counts = torch.stack([labels[part].bincount(minlength=num_classes) for part in parts]).double()
    return counts / counts.sum(1, keepdim=True)


def label_skew(labels: Tensor, parts: Sequence[Tensor]) -> float:
    """The mean total variation distance between a client's class shares and those of all."""
    everything = class_shares(labels, [torch.arange(len(labels))])
    return float((class_shares(labels, parts) - everything).abs().sum(1).mean() / 2)


@pytest.mark.parametrize("name", DIVISIONS)
@pytest.mark.parametrize(("size", "num_clients", "minimum", "seed"), [(41, 2, 5, 0), (400, 7, 10, 1), (1203, 8, 20, 2)])
def test_every_example_belongs_to_exactly_one_client(
    name: str, size: int, num_clients: int, minimum: int, seed: int
) -> None:
    parts = parts_of(some_labels(size), num_clients, name=name, alpha=1.0, minimum=minimum, seed=seed)
    assert len(parts) == num_clients
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(size))
    assert min(map(len, parts)) >= minimum
    assert all(part.dtype == torch.int64 and bool((part.diff() > 0).all()) for part in parts)


@pytest.mark.parametrize(("size", "num_clients"), [(41, 2), (40, 8), (1203, 7)])
def test_cuts_of_the_list_are_those_of_flowers_partitioners(size: int, num_clients: int) -> None:
    task = partition._Division(some_labels(size), num_clients, 0.5, 3, generator(0))
    by_flower = partition._by_flower(IidPartitioner(num_clients), task)
    assert all(map(torch.equal, by_flower, partition._iid(task)))
    found = partition._quantity(task)
    by_flower = partition._by_flower(SizePartitioner(list(map(len, found))), task)
    assert all(map(torch.equal, by_flower, found))


def test_clients_with_the_same_images_have_all_of_them() -> None:
    parts = parts_of(some_labels(41), 3, name="same", minimum=41)
    assert [part.tolist() for part in parts] == [list(range(41))] * 3


@pytest.mark.parametrize("name", PARTITIONS)
def test_a_single_client_has_everything(name: str) -> None:
    (part,) = parts_of(some_labels(50), 1, name=name)
    assert torch.equal(part, torch.arange(50))


@pytest.mark.parametrize("name", DIVISIONS)
def test_the_seed_alone_decides(name: str) -> None:
    labels = some_labels(600)
    first, again, other = (torch.cat(parts_of(labels, name=name, seed=seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("name", PARTITIONS)
def test_global_random_states_are_left_alone_and_nothing_is_printed(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def states() -> tuple[object, ...]:
        legacy = pickle.dumps(np.random.get_state())  # noqa: NPY002
        return random.getstate(), legacy, torch.get_rng_state().tolist()

    before = states()
    parts_of(some_labels(200), name=name)
    assert states() == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", PARTITIONS)
def test_labels_may_leave_out_classes(name: str) -> None:
    compact = some_labels(300, num_classes=4)
    with_gaps = torch.tensor([0, 2, 5, 90])[compact]
    assert all(map(torch.equal, parts_of(with_gaps, name=name), parts_of(compact, name=name)))


@pytest.mark.parametrize("name", SKEWED)
def test_partitions_by_label_are_skewed_and_iid_is_not(name: str) -> None:
    labels = some_labels(4000)
    for seed in range(3):
        assert label_skew(labels, parts_of(labels, name="iid", seed=seed)) < 0.05
        assert label_skew(labels, parts_of(labels, name=name, seed=seed)) > 0.2


@pytest.mark.parametrize("name", ["iid", "dirichlet-equal", "shards"])
def test_equal_partitions_have_equal_sizes(name: str) -> None:
    sizes = [len(part) for part in parts_of(some_labels(4001), 8, name=name)]
    assert max(sizes) - min(sizes) <= (2 if name == "shards" else 1)


@pytest.mark.parametrize("name", ["dirichlet", "dirichlet-equal"])
def test_a_smaller_alpha_skews_labels_more(name: str) -> None:
    labels = some_labels(2000)
    skews = [
        np.mean([label_skew(labels, parts_of(labels, name=name, alpha=alpha, seed=seed)) for seed in range(5)])
        for alpha in (0.1, 0.5, 2.0, 100.0)
    ]
    assert skews == sorted(skews, reverse=True)
    assert skews[0] > 0.4 > 0.15 > skews[-1]


@pytest.mark.parametrize("alpha", [0.3, 3.0])
@pytest.mark.parametrize("name", ["dirichlet", "quantity"])
def test_shares_have_the_concentration_of_the_dirichlet_distribution(name: str, alpha: float) -> None:
    # For shares p ~ Dirichlet(alpha) over K clients: E[sum of p²] = (alpha + 1) / (K alpha + 1).
    num_clients, labels = 4, some_labels(8000)
    found = []
    for seed in range(60 if name == "quantity" else 8):
        parts = parts_of(labels, num_clients, name=name, alpha=alpha, seed=seed)
        counts = torch.stack([labels[part].bincount(minlength=NUM_CLASSES) for part in parts]).double()
        counts = counts.sum(1, keepdim=True) if name == "quantity" else counts
        found.append((counts / counts.sum(0)).square().sum(0).mean())
    assert float(torch.stack(found).mean()) == pytest.approx((alpha + 1) / (num_clients * alpha + 1), rel=0.12)


def test_quantity_skews_sizes_but_not_labels() -> None:
    labels = some_labels(8000)
    parts = parts_of(labels, name="quantity", alpha=0.5, minimum=400)
    assert max(map(len, parts)) > 2 * min(map(len, parts))
    assert label_skew(labels, parts) < 0.07


def test_disjoint_clients_share_no_class() -> None:
    labels = some_labels(500)
    owners = (class_shares(labels, parts_of(labels, 3, name="disjoint")) > 0).sum(0)
    assert owners.tolist() == [1] * NUM_CLASSES


@pytest.mark.parametrize("num_clients", [2, 6])
def test_80_20_gives_each_side_four_fifths_of_its_half_of_the_classes(num_clients: int) -> None:
    labels = torch.arange(NUM_CLASSES).repeat(200)
    parts = parts_of(labels, num_clients, name="80-20")
    shares = class_shares(labels, parts)
    halves = shares > 1 / NUM_CLASSES
    assert halves.sum(1).tolist() == [NUM_CLASSES // 2] * num_clients
    assert (shares * halves).sum(1).tolist() == pytest.approx([0.8] * num_clients, abs=0.02)
    for client in range(2, num_clients):
        assert torch.equal(halves[client], halves[client - 2])
    assert torch.equal(halves[0], ~halves[1])
    assert {len(part) for part in parts} <= set(range(1600 // num_clients - 3, 1600 // num_clients + 4))


def test_shards_hold_few_classes() -> None:
    labels = torch.arange(NUM_CLASSES).repeat(100)
    held = (class_shares(labels, parts_of(labels, NUM_CLASSES, name="shards")) > 0).sum(1)
    assert int(held.max()) <= partition.SHARDS_PER_CLIENT


def test_draws_that_fail_are_repeated_with_other_seeds() -> None:
    # At this alpha priors underflow, and Flower's InnerDirichletPartitioner fails on about every second seed.
    labels = some_labels(1400, num_classes=10)
    for seed in range(6):
        parts = parts_of(labels, 5, name="dirichlet-equal", alpha=0.01, seed=seed)
        assert [len(part) for part in parts] == [280] * 5


@pytest.mark.parametrize(
    ("name", "alpha", "advice"), [("dirichlet", 0.05, "raise --alpha"), ("disjoint", 1.0, "lower --clients")]
)
def test_a_minimum_that_no_draw_reaches_is_an_error_that_says_what_to_change(
    name: str, alpha: float, advice: str
) -> None:
    labels = torch.cat([torch.zeros(390, dtype=torch.int64), torch.ones(10, dtype=torch.int64)])
    with pytest.raises(ConfigurationError, match=rf"2 clients 199 images in .* attempts: .*{advice}"):
        parts_of(labels, 2, name=name, alpha=alpha, minimum=199)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match="did you mean 'dirichlet'"):
        parts_of(some_labels(9), 2, name="dirichlett")


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan"), float("inf")])
def test_alpha_must_be_positive(alpha: float) -> None:
    with pytest.raises(ConfigurationError, match="--alpha must be greater than 0"):
        parts_of(some_labels(9), 2, name="iid", alpha=alpha)


def test_there_must_be_a_client() -> None:
    with pytest.raises(ConfigurationError, match="--clients must be at least 1, got 0"):
        parts_of(some_labels(9), 0, name="iid")


@pytest.mark.parametrize(("num_clients", "minimum"), [(10, 0), (3, 4)])
def test_more_clients_than_examples_for_them_are_refused(num_clients: int, minimum: int) -> None:
    with pytest.raises(ConfigurationError, match="there are 9 for the clients"):
        parts_of(some_labels(9), num_clients, name="iid", minimum=minimum)


def test_a_minimum_of_zero_still_gives_every_client_an_example() -> None:
    for name in sorted(set(PARTITIONS) - {"disjoint"}):
        assert min(map(len, parts_of(some_labels(60), 6, name=name, alpha=1.0, minimum=0))) >= 1


def test_disjoint_needs_as_many_classes_as_clients() -> None:
    with pytest.raises(ConfigurationError, match=r"4 clients .* more than the 3 classes"):
        parts_of(torch.tensor([0, 2, 5] * 10), 4, name="disjoint")


@given(st.lists(st.integers(0, 5), max_size=60), st.data())
def test_a_stratified_sample_has_each_class_share_rounded_down_or_up(values: list[int], data: st.DataObject) -> None:
    labels = torch.tensor(values, dtype=torch.int64)
    size = data.draw(st.integers(0, len(values)))
    sample = stratified_sample(labels, size, generator(data.draw(st.integers(0, 99))))
    assert len(sample) == size
    assert bool((sample.diff() > 0).all())
    for each in range(6):
        exact = values.count(each) * size / max(1, len(values))
        assert abs(int((labels[sample] == each).sum()) - exact) < 1


def test_stratified_samples_reach_every_example_equally_often() -> None:
    labels = torch.tensor([0] * 7 + [1] * 3)
    drawn = torch.cat([stratified_sample(labels, 4, generator(seed)) for seed in range(2000)])
    assert (drawn.bincount(minlength=10) / 2000).tolist() == pytest.approx([0.4] * 10, abs=0.05)


def test_a_stratified_sample_cannot_exceed_the_examples() -> None:
    with pytest.raises(ValueError, match="at most 3 examples, got 4"):
        stratified_sample(torch.zeros(3, dtype=torch.int64), 4, generator(0))


@given(st.lists(st.sampled_from([0, 1, 2, 5]), min_size=1, max_size=80), st.integers(0, 9))
def test_every_beginning_of_a_stratified_order_has_every_class_by_its_share(values: list[int], seed: int) -> None:
    labels = torch.tensor(values)
    order = stratified_order(labels, generator(seed))
    assert order.sort().values.tolist() == list(range(len(values)))
    shares = labels.bincount() / len(labels)
    for size in range(len(values) + 1):
        assert ((labels[order[:size]].bincount(minlength=len(shares)) - size * shares).abs() < 2).all()
