"""Data sets in memory: images and labels as tensors, normalised, with a training part and a test part."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fedmerge import datafiles
from fedmerge.datafiles import Part, Raw
from fedmerge.names import DATASETS
from fedmerge.partition import stratified_sample
from fedmerge.problem import Examples
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError, known

if TYPE_CHECKING:
    from torchvision.datasets import ImageFolder

FOLDER = "folder:"
TEST_SHARE = 0.2


@dataclass(frozen=True)
class Dataset:
    """A data set in memory.

    Attributes:
        name: as it was asked for.
        train: the training files; images float32 (examples, channels, height, width), normalised by the mean and the
            standard deviation of each channel of the training files.
        test: the test files, normalised by the same numbers.
        classes: the names of the classes 0, 1, ….
        mean: of each channel of the training files, as they are stored (0 to 255).
        deviation: the standard deviation of each channel of the training files, greater than 0.
    """

    name: str
    train: Examples
    test: Examples
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    deviation: tuple[float, ...]

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    @property
    def num_classes(self) -> int:
        """The number of classes, those without an image included."""
        return len(self.classes)


def load(name: str, data_dir: str = "") -> Dataset:
    """Return a data set; the last ones stay in memory. Its tensors are shared: do not change them.

    An unknown name, files that are nowhere (`datafiles.MissingData`) and damaged files are ConfigurationErrors.

    Args:
        name: one of `fedmerge.names.DATASETS`.
        data_dir: folder that is searched first for the files; then follow the cache ($FEDMERGE_DATA, or fedmerge in
            the user's cache folder) and /usr/share/datasets. What is nowhere is downloaded into the cache.

    Example:
        >>> load("digits").shape
        (1, 8, 8)
    """
    return _load(name, data_dir)


@functools.lru_cache(maxsize=2)
def _load(name: str, data_dir: str) -> Dataset:
    if name.startswith(FOLDER):
        return _normalised(name, _read_folders(Path(name.removeprefix(FOLDER)).expanduser()))
    known("data set", name, DATASETS)
    return _normalised(name, _read_digits() if name == "digits" else datafiles.read(name, data_dir))


def _normalised(name: str, raw: Raw) -> Dataset:
    values = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([channel.flatten().bincount(minlength=256) for channel in raw.train.images.unbind(1)])
    shares = counts.double() / counts.sum(1, keepdim=True)
    mean = shares @ values
    deviation = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    deviation[deviation == 0] = 1  # a channel of one value becomes 0
    numbers = tuple(mean.tolist()), tuple(deviation.tolist())
    parts = [Examples(normalise(part.images, *numbers), part.labels) for part in (raw.train, raw.test)]
    return Dataset(name, parts[0], parts[1], raw.classes, *numbers)


def normalise(images: Tensor, mean: Sequence[float], deviation: Sequence[float]) -> Tensor:
    """Return images minus the mean, divided by the standard deviation, of each channel: float32, a copy.

    Args:
        images: (examples, channels, height, width), 0 to 255.
        mean: one number for each channel.
        deviation: one number for each channel.
    """
    shift, scale = (torch.tensor(numbers, dtype=torch.float32)[:, None, None] for numbers in (mean, deviation))
    return images.to(torch.float32, copy=True).sub_(shift).div_(scale)


def read_folder(path: Path) -> tuple[Part, tuple[str, ...]]:
    """Return the images in PATH/CLASS/IMAGE as RGB, and the names of the class folders; some of them may be empty.

    Args:
        path: the folder.

    Raises:
        ConfigurationError: if there is no class folder or no image, or one that cannot be read or is of another size.
    """
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(path, allow_empty=True)
    except OSError as error:
        raise ConfigurationError(f"folder:PATH needs images as PATH/CLASS/IMAGE: {error}") from error
    if not folder.samples:
        raise ConfigurationError(f"expected images as {path}/CLASS/IMAGE, got none in {', '.join(folder.classes)}")
    return _read_images(folder), tuple(folder.classes)


def _read_digits() -> Raw:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images, labels = torch.from_numpy(digits.images).to(torch.uint8), torch.from_numpy(digits.target).long()
    return _cut(Part(images.unsqueeze(1), labels), tuple(str(name) for name in digits.target_names))


def _cut(part: Part, classes: tuple[str, ...]) -> Raw:
    """Make a stratified share of the examples the test part, the same one always."""
    size = max(1, round(TEST_SHARE * len(part.labels)))
    test = stratified_sample(part.labels, size, generator(0, "data", "test"))
    train = torch.ones(len(part.labels), dtype=torch.bool)
    train[test] = False
    return Raw(Part(part.images[train], part.labels[train]), Part(part.images[test], part.labels[test]), classes)


def _read_folders(path: Path) -> Raw:
    train, tests = path / "train", [path / name for name in ("test", "val") if (path / name).is_dir()]
    if not (train.is_dir() and tests):
        whole = _open_folder(path)
        return _cut(_read_images(whole), tuple(whole.classes))
    opened = _open_folder(train), _open_folder(tests[0])
    if opened[0].classes != opened[1].classes:
        odd = sorted(set(opened[0].classes) ^ set(opened[1].classes))
        raise ConfigurationError(f"{train} and {tests[0]} must have the same class folders, but differ in {odd}")
    parts = [_read_images(folder) for folder in opened]
    _check_one_size(parts[0].images[0], str(train), parts[1].images[0], str(tests[0]))
    return Raw(parts[0], parts[1], tuple(opened[0].classes))


def _open_folder(path: Path) -> ImageFolder:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(path)
    except OSError as error:  # also a class folder without an image, which torchvision names
        raise ConfigurationError(f"--data folder:PATH needs images as PATH/CLASS/IMAGE: {error}") from error
    if len(folder.classes) < 2:
        raise ConfigurationError(
            f"expected at least two class folders in {path}, got only '{folder.classes[0]}'; "
            "PATH/train needs PATH/test or PATH/val beside it"
        )
    return folder


def _read_images(folder: ImageFolder) -> Part:
    """Return a folder's images as RGB."""
    from torchvision.transforms.functional import pil_to_tensor

    images: list[Tensor] = []
    for path, _ in folder.samples:
        try:
            images.append(pil_to_tensor(folder.loader(path)))
        except (OSError, SyntaxError, ValueError) as error:  # Pillow's, for files that are cut off or no images
            raise ConfigurationError(f"{path} is not a readable image: {error}") from error
        _check_one_size(images[0], folder.samples[0][0], images[-1], path)
    return Part(torch.stack(images), torch.tensor(folder.targets))


def _check_one_size(first: Tensor, first_place: str, other: Tensor, other_place: str) -> None:
    if first.shape != other.shape:
        sizes = [f"{image.shape[2]}x{image.shape[1]}" for image in (first, other)]
        raise ConfigurationError(
            f"expected images of one size, got {sizes[0]} in {first_place} and {sizes[1]} in {other_place}: "
            "resize them first"
        )
