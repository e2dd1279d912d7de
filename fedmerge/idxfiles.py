"""Files in the format of MNIST (idx), read without torchvision, whose import takes seconds, and their classes' names.

A file has two zero bytes, 8 for unsigned bytes, the number of axes, each axis' length in four bytes, then the numbers.
"""

from __future__ import annotations

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedmerge.settings import ConfigurationError

DIGITS = tuple(
    f"{number} - {name}"
    for number, name in enumerate(("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"))
)
CLOTHES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
"""As torchvision names them."""


def read_idx_file(path: Path) -> Tensor:
    """Return the images (examples, height, width) uint8, or the labels (examples,) int64, of a file named for them.

    Args:
        path: the file, gzipped if it ends so.

    Raises:
        ConfigurationError: if it is not such a file, or cut off.
    """
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, OSError, zlib.error) as error:
        raise ConfigurationError(f"{path} is not a readable idx file: {' '.join(str(error).split())}") from error
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
