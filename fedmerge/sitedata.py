"""A site's own data: a folder of images, or an npz file of arrays, in the federation's classes and normalisation.

A site gives its data in the node's configuration (`data='folder:/data/site3'`). It needs no file of the federation's
data set: the server tells every client, with each message, what images look like there (`ImageFormat`). Classes are
matched by their names; nothing is resized, converted or guessed.
"""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedmerge.data import FOLDER, Dataset, normalise, read_folder
from fedmerge.federation import Federation
from fedmerge.problem import Examples
from fedmerge.settings import ConfigurationError

NODE_DATA = "data"
"""Key in a node's configuration of the data that the site brings."""
NPZ = ".npz"
KNOWN_ARRAYS = ("images", "labels", "classes")

SHAPE, CLASSES, MEAN, DEVIATION = KEYS = ("image-shape", "classes", "image-mean", "image-deviation")


@dataclass(frozen=True)
class ImageFormat:
    """What a model of the federation expects of images.

    Attributes:
        shape: channels, height and width.
        classes: the names of the classes 0, 1, …, all different.
        mean: of each channel of the federation's data set, of numbers from 0 to 255.
        deviation: the standard deviation of each channel, greater than 0.
    """

    shape: tuple[int, int, int]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @classmethod
    def of(cls, dataset: Dataset) -> ImageFormat:
        """Return the format of a data set's images."""
        return cls(dataset.shape, dataset.classes, dataset.mean, dataset.deviation)

    def to_mapping(self) -> dict[str, Any]:
        """Return the format in types that JSON and Flower's ConfigRecord have."""
        return dict(zip(KEYS, map(list, (self.shape, self.classes, self.mean, self.deviation)), strict=True))

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, object]) -> ImageFormat | None:
        """Return the format that a message or a file tells, with keys of other meanings; None if it tells none.

        Args:
            mapping: what came.

        Raises:
            ConfigurationError: if a part is missing or cannot be one.
        """
        if not any(key in mapping for key in KEYS):
            return None
        shape = _numbers(mapping, SHAPE, 3)
        if not all(size >= 1 and size == int(size) for size in shape):
            raise ConfigurationError(f"{SHAPE} must be channels, height and width, got {mapping[SHAPE]}")
        channels, height, width = map(int, shape)
        classes = mapping.get(CLASSES)
        if not isinstance(classes, list) or not classes or not all(isinstance(name, str) for name in classes):
            raise ConfigurationError(f"{CLASSES} must be a list of names, got {classes!r}")
        if len(set(classes)) < len(classes):
            raise ConfigurationError(f"{CLASSES} must be different names, got {', '.join(classes)}")
        mean, deviation = _numbers(mapping, MEAN, channels), _numbers(mapping, DEVIATION, channels)
        if min(deviation) <= 0:
            raise ConfigurationError(f"{DEVIATION} must be greater than 0, got {list(deviation)}")
        return cls((channels, height, width), tuple(classes), mean, deviation)


def read(place: str, wanted: ImageFormat) -> Examples:
    """Return a site's images, normalised as the federation's are, and their classes there.

    Args:
        place: folder:PATH with images as PATH/CLASS/IMAGE; or PATH.npz with arrays `images`, (N, height, width) or
            (N, height, width, channels), uint8 or floats from 0 to 1, and `labels`, (N,) names, or numbers of the
            federation's classes, or of the names in the array `classes` if there is one.
        wanted: the federation's format.

    Raises:
        ConfigurationError: if there is no such data, or it does not fit.
    """
    if place.startswith(FOLDER):
        path = Path(place.removeprefix(FOLDER)).expanduser().absolute()
        (stored, targets), names = read_folder(path)
        images, labels = _in_channels(stored, wanted, path), _by_name(names, targets.numpy(), wanted, path)
    elif place.endswith(NPZ):
        path = Path(place).expanduser().absolute()
        arrays = _read_arrays(path)
        labels = _labels(arrays, wanted, path)
        images = _images(arrays["images"], path)
        if len(images) != len(labels) or len(images) == 0:
            raise ConfigurationError(
                f"{path}: expected one label for each image, and at least one image, got {len(images)} images and "
                f"{len(labels)} labels"
            )
    else:
        raise ConfigurationError(f"a site's data must be folder:PATH or PATH{NPZ}, got '{place}'")
    if tuple(images.shape[1:]) != wanted.shape:
        raise ConfigurationError(
            f"{path}: expected images of {_size(wanted.shape)} (channels x height x width), as the federation's, "
            f"got {_size(images.shape[1:])}: convert them first"
        )
    return Examples(normalise(images, wanted.mean, wanted.deviation), labels)


def federation_of(own: Examples, wanted: ImageFormat, partition_id: int, clients: int) -> Federation:
    """Return a federation as a site with data of its own sees it: its images alone are in it.

    Args:
        own: the site's images.
        wanted: the federation's format.
        partition_id: the client's number, from 0.
        clients: the number of clients.
    """
    everything = torch.arange(len(own))
    nothing = everything[:0]
    dataset = Dataset("the site's own", own, own[nothing], wanted.classes, wanted.mean, wanted.deviation)
    parts = tuple(everything if client == partition_id else nothing for client in range(clients))
    return Federation(dataset, "test", everything, nothing, nothing, parts)


def _numbers(mapping: Mapping[str, object], key: str, count: int) -> tuple[float, ...]:
    found = mapping.get(key)
    if (
        not isinstance(found, list)
        or len(found) != count
        or not all(isinstance(number, (int, float)) and math.isfinite(number) for number in found)
    ):
        raise ConfigurationError(f"{key} must be a list of {count} finite numbers, got {found!r}")
    return tuple(map(float, found))


def _in_channels(images: Tensor, wanted: ImageFormat, path: Path) -> Tensor:
    """Return RGB images as grey ones, if the federation's are and the colours are equal."""
    if wanted.shape[0] != 1:
        return images
    if not bool((images == images[:, :1]).all()):
        raise ConfigurationError(f"{path}: expected grey images, as the federation's, got coloured ones: convert them")
    return images[:, :1]


def _read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with zipfile.ZipFile(path) as file:
            found = {name.removesuffix(".npy") for name in file.namelist()}
        with np.load(path, allow_pickle=False) as stored:
            arrays: dict[str, npt.NDArray[Any]] = {name: stored[name] for name in KNOWN_ARRAYS if name in found}
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror or error}") from error
    except (EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigurationError(
            f"{path} is not a readable npz file of plain arrays (names as str, not objects): {error}"
        ) from error
    if missing := sorted({"images", "labels"} - found):
        raise ConfigurationError(f"{path}: expected the arrays images and labels, got no {' and no '.join(missing)}")
    return arrays


def _images(stored: npt.NDArray[Any], path: Path) -> Tensor:
    """Return images as (N, channels, height, width), 0 to 255."""
    if stored.ndim not in (3, 4):
        raise ConfigurationError(
            f"{path}: expected images as (N, height, width) or (N, height, width, channels), got {stored.shape}"
        )
    channels_last = stored[..., None] if stored.ndim == 3 else stored
    if stored.dtype.kind == "f":
        if not bool(((stored >= 0) & (stored <= 1)).all()):
            raise ConfigurationError(f"{path}: images of floats must be from 0 to 1, or give them as uint8, 0 to 255")
        channels_last = (channels_last * np.float64(255)).astype(np.float32)
    elif stored.dtype != np.uint8:
        raise ConfigurationError(f"{path}: expected images of uint8, or of floats from 0 to 1, got {stored.dtype}")
    return torch.from_numpy(np.ascontiguousarray(channels_last.transpose(0, 3, 1, 2)))


def _labels(arrays: Mapping[str, npt.NDArray[Any]], wanted: ImageFormat, path: Path) -> Tensor:
    labels, names = arrays["labels"], arrays.get("classes")
    if names is not None and (names.ndim != 1 or names.dtype.kind != "U"):
        raise ConfigurationError(f"{path}: expected classes as names, (classes,) str, got {names.dtype} {names.shape}")
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise ConfigurationError(
            f"{path}: expected labels as (N,) whole numbers or names (str), got {labels.dtype} {labels.shape}"
        )
    if labels.dtype.kind == "U":
        found, numbers = np.unique(labels, return_inverse=True)
        return _by_name(found.tolist(), numbers, wanted, path)
    known: Sequence[str] = wanted.classes if names is None else names.tolist()
    if len(labels) and not (labels.min() >= 0 and labels.max() < len(known)):
        whose = "the federation's classes" if names is None else "the file's classes"
        raise ConfigurationError(
            f"{path}: expected labels from 0 to {len(known) - 1} ({whose}), got {labels.min()} to {labels.max()}"
        )
    return _by_name(known, labels, wanted, path)


def _by_name(names: Sequence[str], labels: npt.NDArray[Any], wanted: ImageFormat, path: Path) -> Tensor:
    """Return labels, indices of the site's `names`, as indices of the federation's; names without images are free."""
    places = {name: index for index, name in enumerate(wanted.classes)}
    used = [names[index] for index in np.unique(labels).tolist()]
    if unknown := [name for name in used if name not in places]:
        raise ConfigurationError(
            f"{path}: the federation has no class {', '.join(map(repr, unknown))}. The site's classes: "
            f"{', '.join(used)}. The federation's: {', '.join(wanted.classes)}. Rename or leave out those that differ"
        )
    table = np.array([places.get(name, -1) for name in names], dtype=np.int64)
    return torch.from_numpy(table[labels])


def _size(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))
