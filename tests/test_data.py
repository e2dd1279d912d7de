import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from written_files import write_idx

from fedmerge import data, datafiles
from fedmerge.data import Dataset, load
from fedmerge.datafiles import Part, Raw
from fedmerge.names import DATASETS
from fedmerge.problem import Examples
from fedmerge.settings import ConfigurationError

FASHION_MNIST = datafiles.SYSTEM / "fashion-mnist"


def write_images(folder: Path, classes: dict[str, int], *, size: tuple[int, int] = (6, 5), mode: str = "RGB") -> None:
    """Write random PNG images (width, height) in folders of their classes."""
    generator = np.random.default_rng(len(str(folder)))
    for name, count in classes.items():
        (folder / name).mkdir(parents=True)
        for index in range(count):
            values = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(values).convert(mode).save(folder / name / f"{index}.png")


def assert_normalised(examples: Examples) -> None:
    assert examples.images.dtype == torch.float32
    for channel in examples.images.double().unbind(1):
        assert float(channel.mean()) == pytest.approx(0, abs=1e-5)
        assert float(channel.std(correction=0)) == pytest.approx(1, abs=1e-5)


def test_listing_data_sets_does_not_import_the_ecosystem() -> None:
    heavy = {"torchvision", "sklearn", "flwr_datasets", "datasets", "flwr", "scipy", "PIL"}
    code = f"import sys, fedmerge.data; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_data_set_has_a_description_of_one_line() -> None:
    assert {*datafiles.FILES, "digits", "folder:PATH"} == set(DATASETS)
    assert all(text and "\n" not in text for text in DATASETS.values())


def test_digits_are_all_of_scikit_learns_in_two_disjoint_parts() -> None:
    digits = load("digits")
    assert digits.shape == (1, 8, 8)
    assert digits.num_classes == 10
    stored, original = data._read_digits(), load_digits()
    rows = torch.cat([stored.train.images, stored.test.images]).flatten(1).tolist()
    labels = torch.cat([stored.train.labels, stored.test.labels]).tolist()
    assert sorted(zip(rows, labels, strict=True)) == sorted(zip(original.data.tolist(), original.target, strict=True))
    assert_normalised(digits.train)


def test_the_test_part_of_digits_is_a_fifth_of_each_class_and_always_the_same() -> None:
    digits = load("digits")
    assert len(digits.test) == 359
    shares = digits.test.labels.bincount() / (digits.test.labels.bincount() + digits.train.labels.bincount())
    assert shares.tolist() == pytest.approx([0.2] * 10, abs=0.01)
    assert digits.test.labels[:20].tolist() == [0, 5, 8, 9, 8, 1, 4, 7, 5, 8, 1, 0, 3, 3, 4, 1, 3, 5, 6, 6]


def test_a_data_set_is_read_once() -> None:
    assert load("digits") is load("digits", data_dir="")


def test_files_become_normalised_examples(tmp_path: Path) -> None:
    write_idx(tmp_path)
    mnist = load("mnist", str(tmp_path))
    assert isinstance(mnist, Dataset)
    assert (mnist.name, mnist.shape, len(mnist.train), len(mnist.test)) == ("mnist", (1, 5, 4), 30, 10)
    assert_normalised(mnist.train)
    stored = datafiles.read("mnist", str(tmp_path))
    for part, examples in ((stored.train, mnist.train), (stored.test, mnist.test)):
        pixels = stored.train.images.double()
        expected = (part.images.double() - pixels.mean()) / pixels.std(correction=0)
        torch.testing.assert_close(examples.images.double(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs Debian's package dataset-fashion-mnist")
def test_fashion_mnist_of_debian_is_complete() -> None:
    fashion = load("fashion-mnist")
    assert fashion.train.labels.bincount().tolist() == [6000] * 10
    assert fashion.test.labels.bincount().tolist() == [1000] * 10
    assert fashion.shape == (1, 28, 28)
    assert fashion.classes[9] == "Ankle boot"
    assert float(fashion.train.images.min()) == pytest.approx(-0.2860 / 0.3530, abs=1e-3)  # published mean, deviation


def test_a_channel_of_one_value_becomes_zero() -> None:
    images = torch.zeros(4, 2, 3, 3, dtype=torch.uint8)
    images[:, 0], images[:2, 1] = 7, 200
    part = Part(images, torch.tensor([0, 1, 0, 1]))
    normalised = data._normalised("two channels", Raw(part, part, ("a", "b"))).train.images
    assert bool((normalised[:, 0] == 0).all())
    assert set(normalised[:, 1].flatten().tolist()) == {-1.0, 1.0}


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown data set 'fashon-mnist'; did you mean 'fashion-mnist'\?"):
        load("fashon-mnist")


@pytest.mark.parametrize("second", ["test", "val"])
def test_a_folder_with_train_and_test_is_read_as_such(tmp_path: Path, second: str) -> None:
    write_images(tmp_path / "train", {"cat": 5, "dog": 3})
    write_images(tmp_path / second, {"cat": 2, "dog": 1})
    pets = load(f"folder:{tmp_path}")
    assert (pets.name, pets.shape, pets.classes) == (f"folder:{tmp_path}", (3, 5, 6), ("cat", "dog"))
    assert pets.train.labels.tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    assert pets.test.labels.tolist() == [0, 0, 1]
    assert_normalised(pets.train)


def test_a_folder_of_classes_is_cut_into_two_parts_the_same_way_always(tmp_path: Path) -> None:
    write_images(tmp_path, {"cat": 20, "dog": 10, "train": 5})
    first = load(f"folder:{tmp_path}")
    data._load.cache_clear()
    again = load(f"folder:{tmp_path}")
    assert first.classes == ("cat", "dog", "train")
    assert first.train.labels.bincount().tolist() == [16, 8, 4]
    assert first.test.labels.bincount().tolist() == [4, 2, 1]
    assert torch.equal(first.test.images, again.test.images)


def test_grey_images_of_a_folder_are_read_as_rgb(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 3, "b": 3}, mode="L")
    assert load(f"folder:{tmp_path}").shape == (3, 5, 6)


def test_images_of_several_sizes_are_refused_naming_two(tmp_path: Path) -> None:
    write_images(tmp_path, {"a": 2})
    write_images(tmp_path, {"b": 1}, size=(7, 5))
    with pytest.raises(ConfigurationError, match=r"one size, got 6x5 in .*a/0\.png and 7x5 in .*b/0\.png"):
        load(f"folder:{tmp_path}")


def test_training_and_test_images_must_have_one_size(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "test", {"a": 1, "b": 1}, size=(7, 5))
    with pytest.raises(ConfigurationError, match=r"one size, got 6x5 in .*train and 7x5 in .*test"):
        load(f"folder:{tmp_path}")


def test_training_and_test_folders_must_have_the_same_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "train", {"a": 2, "b": 2})
    write_images(tmp_path / "test", {"a": 1, "c": 1})
    with pytest.raises(ConfigurationError, match=r"the same class folders, but differ in \['b', 'c'\]"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize("damage", [lambda content: content[:60], lambda _: b"", lambda _: b"no image"])
def test_a_damaged_image_is_named(tmp_path: Path, damage: object) -> None:
    write_images(tmp_path, {"a": 2, "b": 2})
    path = tmp_path / "b" / "1.png"
    assert callable(damage)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigurationError, match=f"{path} is not a readable image"):
        load(f"folder:{tmp_path}")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({}, "needs images as PATH/CLASS/IMAGE"),
        ({"a": 2, "b": 0}, "no valid file for the classes b"),
        ({"train": 2}, r"at least two class folders in .* only 'train'; PATH/train needs PATH/test"),
    ],
)
def test_folders_in_another_layout_are_refused(tmp_path: Path, classes: dict[str, int], message: str) -> None:
    write_images(tmp_path / "pets", classes)
    with pytest.raises(ConfigurationError, match=message):
        load(f"folder:{tmp_path / 'pets'}")
