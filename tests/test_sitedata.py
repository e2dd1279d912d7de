"""Clients that bring their own data: read by name, normalised as the federation's, to the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from grids import in_process
from PIL import Image
from torch import Tensor

from fedmerge import data, federation
from fedmerge.client import client_app
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.runs import Run
from fedmerge.server import collect, serve
from fedmerge.settings import ConfigurationError
from fedmerge.sitedata import ImageFormat, federation_of, read

CONFIG = Config(clients=3, local_epochs="1", align="identity", merge="mean", server_examples=60, threads=1)
FORMAT = ImageFormat((1, 2, 3), ("cat", "dog", "eel"), (100.0,), (50.0,))
COLOUR = ImageFormat((3, 2, 3), ("cat", "dog", "eel"), (10.0, 20.0, 30.0), (1.0, 2.0, 4.0))


def pixels(*shape: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def write_npz(folder: Path, **arrays: Any) -> str:
    path = folder / "site.npz"
    np.savez(path, **arrays)
    return str(path)


def write_folder(folder: Path, images: Any, names: list[str]) -> str:
    """Write images (N, height, width) or (N, height, width, 3) in folders of their classes, in their order."""
    for index, (image, name) in enumerate(zip(images, names, strict=True)):
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name / f"{index:05}.png")
    return f"folder:{folder}"


def expected(images: Any, wanted: ImageFormat) -> Tensor:
    """(N, height, width, channels), normalised one channel after the other."""
    channels = torch.from_numpy(images.astype(np.float32)).unbind(-1)
    numbers = zip(channels, wanted.mean, wanted.deviation, strict=True)
    return torch.stack([(channel - mean) / deviation for channel, mean, deviation in numbers], 1)


@pytest.mark.parametrize("wanted", [FORMAT, COLOUR])
def test_a_folder_and_an_npz_file_of_the_same_images_give_the_same_normalised_examples(
    wanted: ImageFormat, tmp_path: Path
) -> None:
    stored = pixels(4, 2, 3, wanted.shape[0])
    names = ["dog", "dog", "eel", "eel"]
    squeezed = stored[..., 0] if wanted.shape[0] == 1 else stored
    for place in (
        write_folder(tmp_path / "images", squeezed, names),
        write_npz(tmp_path, images=squeezed, labels=np.array(names)),
        write_npz(tmp_path, images=stored, labels=np.array([1, 1, 2, 2])),
    ):
        found = read(place, wanted)
        assert torch.equal(found.images, expected(stored, wanted))
        assert found.images.dtype == torch.float32
        assert found.labels.tolist() == [1, 1, 2, 2]


def test_classes_are_matched_by_name_in_any_order_and_some_may_be_missing(tmp_path: Path) -> None:
    numbered = {"images": pixels(3, 2, 3), "labels": np.array([0, 1, 0], dtype=np.uint8)}
    place = write_npz(tmp_path, classes=np.array(["eel", "cat", "an unused name"]), **numbered)
    assert read(place, FORMAT).labels.tolist() == [2, 0, 2]
    (tmp_path / "images" / "wolf").mkdir(parents=True)  # without an image
    assert read(write_folder(tmp_path / "images", pixels(1, 2, 3), ["eel"]), FORMAT).labels.tolist() == [2]


def test_floats_from_0_to_1_are_the_numbers_from_0_to_255(tmp_path: Path) -> None:
    stored = pixels(5, 2, 3)
    for kind in (np.float32, np.float64):
        place = write_npz(tmp_path, images=(stored / 255).astype(kind), labels=np.zeros(5, dtype=np.int64))
        torch.testing.assert_close(read(place, FORMAT).images, expected(stored[..., None], FORMAT), atol=1e-5, rtol=0)


IMAGES, LABELS = pixels(2, 2, 3), np.array([0, 1])


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"labels": LABELS}, "expected the arrays images and labels, got no images"),
        ({}, "got no images and no labels"),
        (
            {"images": IMAGES, "labels": np.array([0, 3])},
            r"labels from 0 to 2 \(the federation's classes\), got 0 to 3",
        ),
        ({"images": IMAGES, "labels": np.array([-1, 0])}, "got -1 to 0"),
        (
            {"images": IMAGES, "labels": LABELS, "classes": np.array(["cat"])},
            r"labels from 0 to 0 \(the file's classes\), got 0 to 1",
        ),
        (
            {"images": IMAGES, "labels": np.array(["cat", "wolf"])},
            "no class 'wolf'. The site's classes: cat, wolf. The federation's: cat, dog, eel",
        ),
        (
            {"images": IMAGES, "labels": LABELS, "classes": np.arange(2)},
            r"classes as names, \(classes,\) str, got int64",
        ),
        ({"images": IMAGES, "labels": LABELS / 2}, r"labels as \(N,\) whole numbers or names \(str\), got float64"),
        ({"images": IMAGES, "labels": LABELS[:, None]}, r"got int64 \(2, 1\)"),
        (
            {"images": IMAGES, "labels": LABELS[:1]},
            "one label for each image, and at least one image, got 2 images and 1",
        ),
        ({"images": IMAGES[:0], "labels": LABELS[:0]}, "at least one image, got 0 images and 0 labels"),
        ({"images": IMAGES[0], "labels": LABELS}, r"images as \(N, height, width\) or .*, got \(2, 3\)"),
        ({"images": IMAGES.astype(np.int64), "labels": LABELS}, "expected images of uint8, or of floats.*, got int64"),
        ({"images": IMAGES.astype(np.float32), "labels": LABELS}, "images of floats must be from 0 to 1"),
        ({"images": np.full((2, 2, 3), np.nan), "labels": LABELS}, "images of floats must be from 0 to 1"),
        ({"images": pixels(2, 3, 3), "labels": LABELS}, "images of 1x2x3 .*, got 1x3x3: convert"),
        ({"images": pixels(2, 2, 3, 3), "labels": LABELS}, "images of 1x2x3 .*, got 3x2x3: convert"),
        ({"images": IMAGES, "labels": np.array(["cat", None])}, "not a readable npz file of plain arrays"),
    ],
)
def test_arrays_that_do_not_fit_get_one_clear_error(arrays: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        read(write_npz(tmp_path, **arrays), FORMAT)


def test_folders_that_do_not_fit_get_one_clear_error(tmp_path: Path) -> None:
    (tmp_path / "empty" / "cat").mkdir(parents=True)
    (tmp_path / "none").mkdir()
    for place, message in (
        (
            write_folder(tmp_path / "unknown", IMAGES, ["cat", "wolf"]),
            "no class 'wolf'. The site's classes: cat, wolf.",
        ),
        (write_folder(tmp_path / "coloured", pixels(1, 2, 3, 3), ["cat"]), "expected grey images"),
        (write_folder(tmp_path / "large", pixels(1, 4, 6), ["cat"]), "expected images of 1x2x3 .*, got 1x4x6"),
        (f"folder:{tmp_path / 'empty'}", "/CLASS/IMAGE, got none in cat"),
        (f"folder:{tmp_path / 'none'}", "needs images as PATH/CLASS/IMAGE"),
        (f"folder:{tmp_path / 'missing'}", "needs images as PATH/CLASS/IMAGE"),
        (str(tmp_path / "missing.npz"), "cannot read .*missing.npz: No such file"),
        ("digits", "a site's data must be folder:PATH or PATH.npz, got 'digits'"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            read(place, FORMAT)


def test_files_that_are_no_npz_or_are_damaged_are_refused(tmp_path: Path) -> None:
    path = Path(write_npz(tmp_path, images=IMAGES, labels=LABELS))
    whole = path.read_bytes()
    for content in (b"", b"no archive", whole[: len(whole) // 2], whole[:80] + b"\xff" * 60 + whole[140:]):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="not a readable npz file"):
            read(str(path), FORMAT)


def test_a_format_goes_through_a_message_unchanged_beside_other_keys() -> None:
    wanted = ImageFormat.of(data.load("digits"))
    assert ImageFormat.from_mapping({"server-round": 1, **wanted.to_mapping()}) == wanted
    assert ImageFormat.from_mapping({"server-round": 1}) is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("image-shape", [1, 2], "image-shape must be a list of 3 finite numbers"),
        ("image-shape", [1, 0, 3], "image-shape must be channels, height and width"),
        ("classes", [], "classes must be a list of names"),
        ("classes", ["a", 1], "classes must be a list of names"),
        ("classes", ["a", "a"], "classes must be different names, got a, a"),
        ("image-mean", [1.0, 2.0], "image-mean must be a list of 1 finite numbers"),
        ("image-mean", [float("nan")], "image-mean must be a list of 1 finite numbers"),
        ("image-deviation", None, "image-deviation must be a list of 1 finite numbers"),
        ("image-deviation", [0.0], "image-deviation must be greater than 0"),
    ],
)
def test_a_format_that_cannot_be_one_is_refused(key: str, value: object, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        ImageFormat.from_mapping({**FORMAT.to_mapping(), key: value})


def test_a_site_sees_its_own_images_alone(tmp_path: Path) -> None:
    own = read(write_npz(tmp_path, images=IMAGES, labels=LABELS), FORMAT)
    seen = federation_of(own, FORMAT, 1, 3)
    assert [len(seen.client(client)) for client in range(3)] == [0, 2, 0]
    assert torch.equal(seen.client(1).images, own.images)
    assert (len(seen.server), len(seen.evaluation), seen.classes) == (0, 0, FORMAT.classes)


def at_sites(places: list[str]) -> ClientApp:
    """Clients on nodes with data of their own, without any file of the federation's."""

    def load(_: Config) -> Federation:
        raise AssertionError("the site has no such files")

    app, sites = client_app(load), ClientApp()

    @sites.train()
    def train(message: Message, context: Context) -> Message:
        context.node_config["data"] = places[int(context.node_config["partition-id"])]
        return app(message, context)

    return sites


def stored_parts() -> list[tuple[Any, list[int]]]:
    """Digits of each client's part of the federation, as they are stored, sorted by class as folders are."""
    stored, whole = data._read_digits().train, federation.load(CONFIG)
    parts = []
    for part in whole.partition:
        indices = whole.pool_indices[part]
        indices = indices[stored.labels[indices].argsort(stable=True)]
        parts.append((stored.images[indices, 0].numpy(), stored.labels[indices].tolist()))
    return parts


def test_sites_with_folders_and_a_file_train_to_the_bits_of_the_same_images_in_the_federation(tmp_path: Path) -> None:
    names = data.load("digits").classes
    parts = stored_parts()
    places = [
        write_folder(tmp_path / str(client), images, [names[label] for label in labels])
        for client, (images, labels) in enumerate(parts[:2])
    ]
    places.append(write_npz(tmp_path, images=parts[2][0], labels=np.array(parts[2][1])))
    run = Run.create(tmp_path / "run", "simulate", CONFIG)
    with in_process(CONFIG, app=at_sites(places)) as grid:
        serve(grid, CONFIG, run, pause=0)
    whole = federation.load(CONFIG)
    ordered = tuple(part[whole.pool.labels[part].argsort(stable=True)] for part in whole.partition)
    wanted = Federation(
        whole.dataset, whole.split, whole.pool_indices, whole.server_indices, whole.evaluation_indices, ordered
    )
    again = Run.create(tmp_path / "again", "simulate", CONFIG)
    with in_process(CONFIG, app=client_app(lambda _: wanted)) as grid:
        serve(grid, CONFIG, again, pause=0)
    for own, built_in, counts in zip(run.load_updates(0), again.load_updates(0), whole.label_counts(), strict=True):
        assert all(torch.equal(tensor, built_in.state[name]) for name, tensor in own.state.items())
        assert (own.num_examples, own.label_counts) == (sum(counts), tuple(counts))
    [line], [wanted_line] = run.results(), again.results()
    measured = {"seconds": 0, "peak_bytes": 0}
    assert line | measured == wanted_line | measured


def test_one_image_of_one_class_is_enough_and_a_site_that_does_not_fit_is_left_out_by_name(tmp_path: Path) -> None:
    one = write_npz(tmp_path, images=np.zeros((1, 8, 8), dtype=np.uint8), labels=np.array(["7"]))
    wolf = write_folder(tmp_path / "wolf", np.zeros((1, 8, 8), dtype=np.uint8), ["wolf"])
    run = Run.create(tmp_path / "run", "simulate", CONFIG)
    with in_process(CONFIG, app=at_sites([one, wolf, one])) as grid:
        updates = collect(grid, CONFIG, run, pause=0)
    assert [update.partition_id for update in updates] == [0, 2]
    assert updates[0].label_counts == (0, 0, 0, 0, 0, 0, 0, 1, 0, 0)
    assert updates[0].num_examples == 1


def test_a_server_that_tells_no_format_leaves_it_to_the_federations_data_set(tmp_path: Path) -> None:
    from test_client import message

    from fedmerge.flower import node_context

    context = node_context(CONFIG, 0)
    context.node_config["data"] = write_npz(tmp_path, images=np.ones((3, 8, 8), dtype=np.uint8), labels=np.arange(3))
    assert client_app()(message(), context).content["metrics"]["num-examples"] == 3
