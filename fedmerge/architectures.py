"""Small networks for simulations, in any width."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

Shape = tuple[int, int, int]
"""Channels, height and width of an image."""

Builder = Callable[[Shape, int, float], nn.Module]
"""Makes a network for images of a shape, a number of classes, and layers that are so many times as wide."""

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


def vgg(depth: int, batch_norm: bool) -> Builder:
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


def resnet(depth: int) -> Builder:
    """Return a factory of He et al.'s networks for small images: three stages of blocks, 16/32/64 channels.

    Args:
        depth: layers: 2, and 6 for each block of a stage.
    """

    def build(shape: Shape, num_classes: int, width: float) -> nn.Module:
        sizes = [_scaled(size, width) for size in (16, 32, 64)]
        layers: list[nn.Module] = [nn.Conv2d(shape[0], sizes[0], 3, padding=1, bias=False), nn.BatchNorm2d(sizes[0])]
        layers.append(nn.ReLU())
        channels = sizes[0]
        for stage, size in enumerate(sizes):
            for block in range((depth - 2) // 6):
                layers.append(ResidualBlock(channels, size, 2 if stage and not block else 1))
                channels = size
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))

    return build


class Patches(nn.Module):
    """Images as tokens: one for each square of `side` pixels, plus a learned vector for its place.

    Pixels at the right and lower edge that fill no square are left out.
    """

    def __init__(self, shape: Shape, side: int, size: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(shape[0], size, side, stride=side)
        nn.init.normal_(self.projection.weight, std=self.projection.weight[0].numel() ** -0.5)
        self.place = nn.Parameter(torch.randn((shape[1] // side) * (shape[2] // side), size))

    def forward(self, images: Tensor) -> Tensor:
        """Map (images, channels, H, W) to (images, tokens, size)."""
        found: Tensor = self.projection(images)
        return found.flatten(2).transpose(1, 2) + self.place


class TransformerBlock(nn.Module):
    """Attention and a layer of twice as many units, each behind a LayerNorm and added to its input.

    Scores are scaled by a constant, not by the heads' size: so a network whose units are all copied computes the same.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)
        self.projections = nn.Linear(size, 3 * size)
        self.attended = nn.Linear(size, size)
        self.hidden = nn.Linear(size, 2 * size)
        self.output = nn.Linear(2 * size, size)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, size) to the same."""
        parts = self.projections(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        found = functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], scale=0.25)
        tokens = tokens + self.attended(found.transpose(1, 2).flatten(2))
        hidden: Tensor = functional.gelu(self.hidden(self.norm2(tokens)))
        changed: Tensor = self.output(hidden)
        return tokens + changed


class MeanToken(nn.Module):
    """The mean of the tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Map (images, tokens, size) to (images, size)."""
        return tokens.mean(1)


def vit(blocks: int) -> Builder:
    """Return a factory of vision transformers for small images (after Dosovitskiy et al. 2021): 4 heads of 16 units.

    Patches of 4 pixels (2 below 16 pixels, more than 4 from 80 on); the tokens' mean is classified. Tokens, their
    places and what is added to them begin on one scale, as small data sets want it under plain SGD.
    """

    def build(shape: Shape, num_classes: int, width: float) -> nn.Module:
        side = min(shape[1:])
        size = 4 * _scaled(16, width)
        model = nn.Sequential(
            Patches(shape, max(2 if side < 16 else 4, side // 16), size),
            *(TransformerBlock(size, heads=4) for _ in range(blocks)),
            nn.LayerNorm(size),
            MeanToken(),
            nn.Linear(size, num_classes),
        )
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        return model

    return build


def _scaled(size: int, width: float) -> int:
    return max(1, round(size * width))


def _output_size(features: nn.Module, shape: Shape) -> int:
    with torch.no_grad():
        return int(features(torch.zeros(1, *shape)).shape[1])


BUILDERS: Mapping[str, Builder] = {
    "mlp": mlp,
    "lenet5": lenet5,
    "cnn": cnn,
    "vgg11": vgg(11, batch_norm=False),
    "vgg11-bn": vgg(11, batch_norm=True),
    "vgg16": vgg(16, batch_norm=False),
    "vgg16-bn": vgg(16, batch_norm=True),
    **{f"resnet{depth}": resnet(depth) for depth in (20, 32, 44, 56)},
    "vit": vit(4),
    "vit8": vit(8),
}
