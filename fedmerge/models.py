"""Models by name: small ones for simulations, torchvision's classifiers, and the user's own.

`create("resnet20@2", shape=(3, 32, 32), num_classes=10, seed=0)` is a ResNet-20 of twice the width.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.architectures import BUILDERS, Shape
from fedmerge.seeds import default_generator
from fedmerge.settings import ConfigurationError, known


def create(name: str, *, shape: Shape, num_classes: int, seed: int) -> nn.Module:
    """Build a model and initialise it from `seed`.

    Args:
        name: a key of `BUILDERS`, with `@WIDTH` after it to scale its layers; a classification model of torchvision,
            adapted to the channels and classes; or `package.module:function`, called with `shape` and `num_classes`.
        shape: (channels, height, width) of an image.
        num_classes: outputs of the model.
        seed: of the initialisation; torch's own generators are left as they were.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        ConfigurationError: if the name is unknown or the model cannot take such images.
    """
    with default_generator(seed):
        try:
            model = _build(name, shape, num_classes)
        except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as error:
            if isinstance(error, ConfigurationError):
                raise
            raise ConfigurationError(f"--model {name} cannot be built for {_images(shape)}: {error}") from error
        model.eval()
        try:
            with torch.no_grad():
                outputs = model(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            raise ConfigurationError(f"--model {name} cannot take {_images(shape)}: {error}") from error
    if not isinstance(outputs, Tensor) or outputs.shape != (2, num_classes):
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ConfigurationError(f"--model {name} must give logits (images, {num_classes}), it gave {got} for 2 images")
    return model


def _build(name: str, shape: Shape, num_classes: int) -> nn.Module:
    if ":" in name:
        return _from_user(name, shape, num_classes)
    base, _, width = name.partition("@")
    if base in BUILDERS:
        return BUILDERS[base](shape, num_classes, _width(name, width))
    return _from_torchvision(name, shape[0], num_classes)


def _from_user(name: str, shape: Shape, num_classes: int) -> nn.Module:
    module_name, _, function = name.partition(":")
    try:
        factory: Any = getattr(importlib.import_module(module_name), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"--model {name}: cannot import '{function}' from '{module_name}': {error}; "
            "expected package.module:function, importable at the server and at the clients"
        ) from error
    model = factory(shape=shape, num_classes=num_classes)
    if not isinstance(model, nn.Module):
        raise ConfigurationError(f"--model {name} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _from_torchvision(name: str, channels: int, num_classes: int) -> nn.Module:
    from torchvision import models as zoo

    known("model", name, [*BUILDERS, *zoo.list_models(module=zoo)])
    options: dict[str, Any] = {"num_classes": num_classes, "weights": None}
    if name in ("googlenet", "inception_v3"):
        options |= {"aux_logits": False, "init_weights": False}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model: nn.Module = zoo.get_model(name, **options)
    if channels != 3:
        _replace_first_convolution(model, channels)
    return model


def _replace_first_convolution(model: nn.Module, channels: int) -> None:
    """Give the model's first convolution `channels` inputs; all of torchvision's classifiers start with one."""
    name, first = next((name, item) for name, item in model.named_modules() if isinstance(item, nn.Conv2d))
    if getattr(model, "transform_input", False):
        model.transform_input = False  # type: ignore[assignment]
    parent, _, attribute = name.rpartition(".")
    replacement = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type]
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    setattr(model.get_submodule(parent), attribute, replacement)


def _width(name: str, text: str) -> float:
    if "@" not in name:
        return 1.0
    try:
        width = float(text)
    except ValueError:
        width = 0.0
    if not 0 < width < 1000:
        raise ConfigurationError(f"--model {name}: the width after '@' must be between 0 and 1000, got '{text}'")
    return width


def _images(shape: Shape) -> str:
    return f"{shape[0]}×{shape[1]}×{shape[2]} images"


__all__ = ["BUILDERS", "Shape", "create"]
