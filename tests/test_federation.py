import dataclasses
import json
from collections.abc import Iterator

import pytest
import torch

from fedmerge import data, federation
from fedmerge.config import Config
from fedmerge.data import Dataset
from fedmerge.federation import Federation, load
from fedmerge.problem import UNKNOWN, Examples
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError

CONFIG = Config(data="digits", clients=4, partition="dirichlet", server_examples=100)
DEVELOPMENT = CONFIG.replace(split="development")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    federation._load.cache_clear()
    yield
    federation._load.cache_clear()


def numbered(size: int, test_size: int = 20, num_classes: int = 4) -> Dataset:
    """A data set whose images are their own numbers: training images from 0, test images from 1,000,000."""
    labels = torch.randint(num_classes, (size,), generator=generator(0, "labels"))

    def examples(start: int, labels: torch.Tensor) -> Examples:
        return Examples(torch.arange(start, start + len(labels), dtype=torch.float64)[:, None], labels)

    classes = tuple(f"class {index}" for index in range(num_classes + 1))  # the last class has no image
    return Dataset("numbered", examples(0, labels), examples(1_000_000, labels[:test_size]), classes, (0.0,), (1.0,))


@pytest.fixture
def numbers(monkeypatch: pytest.MonkeyPatch) -> Dataset:
    dataset = numbered(1200)
    monkeypatch.setattr(data, "load", lambda *_: dataset)
    return dataset


def owners(federated: Federation) -> list[set[float]]:
    """The numbers of each client's, the server's and the evaluation's images."""
    clients = [federated.client(index) for index in range(len(federated.partition))]
    return [set(part.images.flatten().tolist()) for part in (*clients, federated.server, federated.evaluation)]


@pytest.mark.parametrize("config", [CONFIG, DEVELOPMENT, CONFIG.replace(client_examples=500)])
@pytest.mark.parametrize("partition", ["iid", "dirichlet", "disjoint", "quantity"])
def test_no_image_has_two_owners(numbers: Dataset, config: Config, partition: str) -> None:
    federated = load(config.replace(partition=partition))
    sets = owners(federated)
    assert len(set.union(*sets)) == sum(map(len, sets))
    *clients, server, evaluation = sets
    assert set(federated.pool.images.flatten().tolist()) == set.union(*clients)
    assert all(min(client) >= 0 and max(client) < 1_000_000 for client in (*clients, server))
    assert len(server) == 100
    if config.split == "test":
        assert evaluation == set(numbers.test.images.flatten().tolist())
    else:
        assert max(evaluation) < 1_000_000


@pytest.mark.usefixtures("numbers")
def test_the_clients_have_all_that_is_left_or_as_much_as_asked_for() -> None:
    assert len(load(CONFIG).pool) == 1200 - 100
    assert len(load(DEVELOPMENT).pool) == 1200 - 100 - 200
    assert len(load(CONFIG.replace(client_examples=300)).pool) == 300
    assert len(load(CONFIG.replace(server_examples=0)).pool) == 1200
    assert len(load(CONFIG.replace(server_examples=0)).server) == 0


@pytest.mark.usefixtures("numbers")
def test_a_part_of_what_is_left_is_drawn_at_random() -> None:
    first, other = (load(CONFIG.replace(client_examples=600, seed=seed)).pool_indices for seed in (0, 1))
    assert len(set(first.tolist()) & set(other.tolist())) < 400
    assert 500 < float(first.double().mean()) < 700


@pytest.mark.parametrize(("size", "expected"), [(600, 100), (90_000, 10_000)])
def test_the_development_evaluation_is_a_sixth_but_not_more_than_ten_thousand(
    monkeypatch: pytest.MonkeyPatch, size: int, expected: int
) -> None:
    dataset = numbered(size)
    monkeypatch.setattr(data, "load", lambda *_: dataset)
    assert len(load(DEVELOPMENT.replace(partition="iid")).evaluation) == expected


@pytest.mark.usefixtures("numbers")
def test_the_same_seed_gives_the_same_owners_and_another_seed_others() -> None:
    first = load(CONFIG).indices()
    federation._load.cache_clear()
    assert load(CONFIG).indices() == first
    other = load(CONFIG.replace(seed=1)).indices()
    assert other["clients"] != first["clients"]
    assert other["server"] != first["server"]


@pytest.mark.usefixtures("numbers")
def test_the_development_evaluation_is_the_same_for_every_seed() -> None:
    first, other = load(DEVELOPMENT), load(DEVELOPMENT.replace(seed=1, server_examples=7, clients=2))
    assert torch.equal(first.evaluation_indices, other.evaluation_indices)
    assert not torch.equal(first.server_indices[:7], other.server_indices)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("name", ["alpha", "partition", "clients", "client_examples", "min_client_examples"])
def test_the_servers_images_depend_on_no_setting_of_the_clients(name: str) -> None:
    changes: dict[str, float | str] = {
        "alpha": 5.0,
        "partition": "iid",
        "clients": 2,
        "client_examples": 99,
        "min_client_examples": 1,
    }
    assert torch.equal(load(CONFIG).server_indices, load(CONFIG.replace(**{name: changes[name]})).server_indices)


@pytest.mark.parametrize("config", [CONFIG, DEVELOPMENT])
def test_the_server_and_the_development_evaluation_have_the_class_shares_of_the_training_files(config: Config) -> None:
    federated = load(config)
    everything = federated.dataset.train.labels.bincount() / len(federated.dataset.train)
    for part in (federated.server, federated.evaluation):
        shares = part.labels.bincount(minlength=10) / len(part)
        assert float((shares - everything).abs().max()) <= 1.5 / len(part) + 0.003


def test_development_never_touches_the_test_files(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = load(DEVELOPMENT)
    garbage = Examples(torch.full((3, 1, 8, 8), torch.nan), torch.tensor([9, 9, 9]))
    spoilt_data = dataclasses.replace(honest.dataset, test=garbage)
    federation._load.cache_clear()
    monkeypatch.setattr(data, "load", lambda *_: spoilt_data)
    spoilt = load(DEVELOPMENT)
    assert spoilt is not honest
    assert spoilt.indices() == honest.indices()
    for name in ("pool", "server", "evaluation"):
        assert torch.equal(getattr(spoilt, name).images, getattr(honest, name).images)
        assert torch.equal(getattr(spoilt, name).labels, getattr(honest, name).labels)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("config", [CONFIG, DEVELOPMENT.replace(client_examples=400)])
def test_indices_are_json_and_name_the_files_of_each_owner(config: Config) -> None:
    federated = load(config)
    indices = json.loads(json.dumps(federated.indices()))
    assert (indices["data"], indices["split"]) == ("numbered", config.split)
    assert indices["classes"] == [*(f"class {index}" for index in range(5))]
    clients = [federated.client(index) for index in range(4)]
    for listed, part in zip((*indices["clients"], indices["server"]), (*clients, federated.server), strict=True):
        assert listed == part.images.flatten().tolist()
    first = 1_000_000 if config.split == "test" else 0
    assert [first + index for index in indices["evaluation"]] == federated.evaluation.images.flatten().tolist()
    assert indices["label_counts"] == [client.labels.bincount(minlength=5).tolist() for client in clients]


def test_a_federation_is_made_once_for_the_settings_that_matter() -> None:
    first = load(CONFIG)
    assert load(CONFIG.replace(lr=1.0, merge="average", rounds=3, min_completed=1, out="elsewhere")) is first
    assert load(CONFIG.replace(alpha=0.31)) is not first


def test_a_single_client_has_the_whole_pool() -> None:
    alone = load(CONFIG.replace(clients=1, min_completed=1))
    assert torch.equal(alone.client(0).images, alone.pool.images)


def test_federations_share_the_images_of_their_data_set() -> None:
    first, second = load(CONFIG), load(CONFIG.replace(seed=1))
    assert first.dataset is second.dataset
    assert first.evaluation is first.dataset.test
    assert first.pool is first.pool


@pytest.mark.usefixtures("numbers")
def test_a_client_s_part_is_of_the_files_that_are_there_and_copied_when_it_is_asked_for() -> None:
    federated = load(CONFIG)
    for client in range(4):
        part, own = federated.part(client, torch.device("cpu")), federated.client(client)
        assert part.whole is federated.dataset.train
        assert len(part) == len(own)
        assert torch.equal(part.copied().images, own.images)
        assert torch.equal(part.copied().labels, own.labels)
        assert torch.equal(federated.client_labels(client), own.labels)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize(("room", "stays"), [(None, True), (8 * 9600, True), (8 * 9600 - 8, False)])
def test_a_device_gets_all_files_once_if_there_is_room_and_else_the_client_s_own(
    monkeypatch: pytest.MonkeyPatch, room: int | None, stays: bool
) -> None:
    monkeypatch.setattr(federation, "available", lambda _: room)
    federated = dataclasses.replace(load(CONFIG))
    first, second = (federated.part(client, torch.device("meta")) for client in (0, 1))
    assert first.whole.images.device.type == "meta"
    assert (first.whole is second.whole) == stays
    assert len(first.whole) == (1200 if stays else len(federated.client(0)))
    assert len(first) == len(federated.client(0))


@pytest.mark.parametrize("partition_id", [-1, 4])
def test_there_is_no_client_beyond_the_partition(partition_id: int) -> None:
    with pytest.raises(ValueError, match=f"partition id from 0 to 3, got {partition_id}"):
        load(CONFIG).client(partition_id)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"server_examples": 1201}, r"--server-examples 1201 .* need 1201 training images, but 'digits' has 1200"),
        ({"server_examples": 700, "client_examples": 501}, "--client-examples 501 need 1201 training images"),
        ({"split": "development", "server_examples": 1001}, r"'digits' has 1000 for them \(--split development\)"),
        ({"server_examples": 1200}, r"\(--min-client-examples\) need 40 images, but there are 0 for the clients"),
        ({"client_examples": 39}, "there are 39 for the clients"),
    ],
)
def test_more_images_than_there_are_is_an_error_that_counts_them(changes: dict[str, str | int], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load(CONFIG.replace(**changes))


# Labels of a part.


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("labels", [0, 1, 30, 100])
def test_the_server_knows_as_many_classes_as_asked_for_and_nobody_owns_other_images(labels: int) -> None:
    whole, part = load(CONFIG), load(CONFIG.replace(server_labels=labels))
    assert owners(part) == owners(whole)
    known = part.server.labels != UNKNOWN
    assert int(known.sum()) == labels
    assert torch.equal(part.server.labels[known], whole.server.labels[known])
    assert whole.server.labelled
    if labels == 100:
        assert torch.equal(part.server.labels, whole.server.labels)


@pytest.mark.usefixtures("numbers")
def test_the_labelled_images_of_a_smaller_budget_are_among_those_of_a_larger_one() -> None:
    def labelled(count: int, **changes: int) -> set[int]:
        listed = load(CONFIG.replace(server_labels=count, **changes)).indices()["server_labelled"]
        assert isinstance(listed, list)
        return set(listed)

    assert labelled(5) < labelled(20) < labelled(99) < set(load(CONFIG).server_indices.tolist())
    assert labelled(20) == labelled(20, clients=3, client_examples=300)
    assert len(labelled(20, seed=1) & labelled(20)) < 10
    assert "server_labelled" not in load(CONFIG).indices()


def test_the_labelled_images_have_the_class_shares_of_the_servers() -> None:
    whole, part = load(CONFIG).server, load(CONFIG.replace(server_labels=40)).server
    found = part.labels[part.labels != UNKNOWN].bincount(minlength=10)
    assert ((found - 0.4 * whole.labels.bincount(minlength=10)).abs() < 2).all()


# A part of the server's images.


@pytest.mark.usefixtures("numbers")
def test_a_limit_takes_nothing_from_anybody_but_the_server() -> None:
    whole, part = load(CONFIG), load(CONFIG.replace(server_limit=30))
    assert owners(part)[:-2] == owners(whole)[:-2]
    assert owners(part)[-1] == owners(whole)[-1]
    assert torch.equal(part.server_indices, whole.server_indices)
    assert len(part.server) == 30
    assert owners(part)[-2] < owners(whole)[-2]
    assert part.indices() == {**whole.indices(), "server_used": [int(image) for image in part.server.images[:, 0]]}


@pytest.mark.usefixtures("numbers")
def test_the_images_of_a_smaller_limit_are_among_those_of_a_larger_one_and_the_labelled_among_the_used() -> None:
    def used(limit: int, **changes: int) -> set[float]:
        return owners(load(CONFIG.replace(server_limit=limit, **changes)))[-2]

    def labelled(labels: int, limit: int) -> set[float]:
        server = load(CONFIG.replace(server_limit=limit, server_labels=labels)).server
        return set(server[server.known].images.flatten().tolist())

    assert used(5) < used(20) < used(99) < used(100)
    assert used(20) == used(20, clients=3, client_examples=300)
    assert len(used(20, seed=1) & used(20)) < 10
    assert labelled(10, 50) == labelled(10, 100) < labelled(50, 50) == used(50)
    assert labelled(10, -1) == labelled(10, 10) == used(10)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("labels", [-1, 0, 7])
def test_a_limit_of_all_images_is_no_limit(labels: int) -> None:
    whole, part = (load(CONFIG.replace(server_limit=limit, server_labels=labels)) for limit in (-1, 100))
    assert torch.equal(part.server.images, whole.server.images)
    assert torch.equal(part.server.labels, whole.server.labels)
    assert "server_used" not in whole.indices()


def test_the_images_that_are_used_have_the_class_shares_of_the_servers() -> None:
    whole, part = load(CONFIG).server, load(CONFIG.replace(server_limit=40)).server
    found = part.labels.bincount(minlength=10)
    assert ((found - 0.4 * whole.labels.bincount(minlength=10)).abs() < 2).all()
