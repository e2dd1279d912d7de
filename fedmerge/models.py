"""Models by name: small ones for simulations, torchvision's classifiers, and the user's own.

`create("resnet20@2", shape=(3, 32, 32), num_classes=10, seed=0)` is a ResNet-20 of twice the width.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge.seeds import default_generator
from fedmerge.settings import ConfigurationError, known

Shape = tuple[int, int, int]
VGG_STAGES: Mapping[int, tuple[tuple[int, ...], ...]] = {
    11: ((64,), (128,), (256, 256), (512, 512), (512, 512)),
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
}


def mlp(shape: Shape, num_classes: int, width: float) -> nn.Module:
    """Two hidden layers of 128 units."""
    hidden = _scaled(128, width)
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(shape[0] * shape[1] * shape[2], hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, num_classes),
    )


def lenet5(shape: Shape, num_classes: int, width: float) -> nn.Module:
    """LeCun et al. 1998, with ReLU and max pooling."""
    first, second = _scaled(6, width), _scaled(16, width)
    features = nn.Sequential(
        nn.Conv2d(shape[0], first, 5, padding=2),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 5, padding=2 if min(shape[1:]) < 20 else 0),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    size = _output_size(features, shape)
    third, fourth = _scaled(120, width), _scaled(84, width)
    return nn.Sequential(
        *features,
        nn.Linear(size, third),
        nn.ReLU(),
        nn.Linear(third, fourth),
        nn.ReLU(),
        nn.Linear(fourth, num_classes),
    )


def cnn(shape: Shape, num_classes: int, width: float) -> nn.Module:
    """Two convolutions and two linear layers: 421,642 parameters on 28×28 grey images."""
    first, second, third = (_scaled(size, width) for size in (32, 64, 128))
    features = nn.Sequential(
        nn.Conv2d(shape[0], first, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(first, second, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
    )
    size = _output_size(features, shape)
    return nn.Sequential(*features, nn.Linear(size, third), nn.ReLU(), nn.Linear(third, num_classes))


def vgg(depth: int, batch_norm: bool) -> Callable[[Shape, int, float], nn.Module]:
    """Return a factory of VGG networks for small images: convolutions, average pooling, one linear layer."""

    def build(shape: Shape, num_classes: int, width: float) -> nn.Module:
        layers: list[nn.Module] = []
        channels, side = shape[0], min(shape[1:])
        for stage in VGG_STAGES[depth]:
            for size in stage:
                following = _scaled(size, width)
                layers.append(nn.Conv2d(channels, following, 3, padding=1, bias=not batch_norm))
                layers += [nn.BatchNorm2d(following), nn.ReLU()] if batch_norm else [nn.ReLU()]
                channels = following
            if side >= 2:
                layers.append(nn.MaxPool2d(2))
                side //= 2
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes)]
        model = nn.Sequential(*layers)
        for module in model.modules():  # as torchvision's: without it, eleven layers without a norm do not train
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        return model

    return build


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with BatchNorm around a shortcut, projected where the shape changes."""

    def __init__(self, channels: int, following: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, following, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(following)
        self.conv2 = nn.Conv2d(following, following, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(following)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != following:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels, following, 1, stride, bias=False), nn.BatchNorm2d(following)
            )

    def forward(self, inputs: Tensor) -> Tensor:
        """Map (images, channels, H, W) to (images, following, H / stride, W / stride)."""
        hidden = torch.relu(self.bn1(self.conv1(inputs)))
        return torch.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


def resnet20(shape: Shape, num_classes: int, width: float) -> nn.Module:
    """He et al. 2016 for small images: three stages of three blocks, 16/32/64 channels."""
    sizes = [_scaled(size, width) for size in (16, 32, 64)]
    layers: list[nn.Module] = [nn.Conv2d(shape[0], sizes[0], 3, padding=1, bias=False), nn.BatchNorm2d(sizes[0])]
    layers.append(nn.ReLU())
    channels = sizes[0]
    for stage, size in enumerate(sizes):
        for block in range(3):
            layers.append(ResidualBlock(channels, size, 2 if stage and not block else 1))
            channels = size
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


BUILDERS: Mapping[str, Callable[[Shape, int, float], nn.Module]] = {
    "mlp": mlp,
    "lenet5": lenet5,
    "cnn": cnn,
    "vgg11": vgg(11, batch_norm=False),
    "vgg11-bn": vgg(11, batch_norm=True),
    "vgg16": vgg(16, batch_norm=False),
    "vgg16-bn": vgg(16, batch_norm=True),
    "resnet20": resnet20,
}


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


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


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


def _output_size(features: nn.Module, shape: Shape) -> int:
    with torch.no_grad():
        return int(features(torch.zeros(1, *shape)).shape[1])


def _images(shape: Shape) -> str:
    return f"{shape[0]}×{shape[1]}×{shape[2]} images"
