"""The feature spaces of torchvision's architectures: small ones of every kind, and the named models in full."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
import torchvision.models as named
from invariance import changed_by_one_side, outputs, permutations, random_state
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.densenet import DenseNet
from torchvision.models.efficientnet import EfficientNet, FusedMBConvConfig, MBConvConfig
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformer,
    SwinTransformerBlockV2,
)
from torchvision.models.vision_transformer import VisionTransformer

from fedmerge.basis import rebase
from fedmerge.features import moments
from fedmerge.spaces import Space
from fedmerge.symmetry import symmetry

CLASSES = 5


@dataclass(frozen=True)
class Case:
    """A network, the side of its images, and how many spaces it has."""

    build: Callable[[], nn.Module]
    side: int
    spaces: int


def efficientnet() -> Any:
    stages = [FusedMBConvConfig(4, 3, 2, 8, 8, 1), MBConvConfig(4, 3, 2, 8, 16, 2), MBConvConfig(6, 5, 1, 16, 16, 1)]
    return EfficientNet(stages, dropout=0.2, num_classes=CLASSES, last_channel=24)


def regnet() -> Any:
    blocks = BlockParams.from_init_params(depth=4, w_0=16, w_a=8, w_m=2, group_width=8, se_ratio=0.25)
    return RegNet(blocks, num_classes=CLASSES, stem_width=8)


def swin(**options: Any) -> Any:
    sizes = {"patch_size": [2, 2], "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 4], "window_size": [3, 3]}
    return SwinTransformer(**sizes, num_classes=CLASSES, **options)


def vit(**options: Any) -> Any:
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 12}
    return VisionTransformer(**sizes, num_classes=CLASSES, **options)


def group_norm(channels: int) -> nn.Module:
    return nn.GroupNorm(4, channels)


SMALL = {
    "resnet18": Case(partial(ResNet, BasicBlock, [2, 2, 2, 2], CLASSES), 32, 12),
    "resnet50": Case(partial(ResNet, Bottleneck, [2, 1, 1, 1], CLASSES), 32, 15),
    "resnext": Case(partial(ResNet, Bottleneck, [1, 1, 1, 1], CLASSES, groups=4, width_per_group=4), 32, 37),
    "resnet18 with GroupNorm": Case(partial(ResNet, BasicBlock, [1, 1, 1, 1], CLASSES, norm_layer=group_norm), 32, 32),
    "densenet": Case(partial(DenseNet, 4, (2, 2, 2), 8, num_classes=CLASSES), 32, 15),
    "efficientnet": Case(efficientnet, 32, 11),
    "mobilenet_v2": Case(partial(named.mobilenet_v2, width_mult=0.25, num_classes=CLASSES), 32, 24),
    "mobilenet_v3": Case(partial(named.mobilenet_v3_small, width_mult=0.25, num_classes=CLASSES), 32, 26),
    "mnasnet": Case(partial(named.mnasnet0_5, num_classes=CLASSES), 32, 25),
    "shufflenet_v2": Case(partial(named.shufflenet_v2_x0_5, num_classes=CLASSES), 32, 80),
    "googlenet": Case(partial(named.googlenet, num_classes=CLASSES, aux_logits=False, init_weights=False), 32, 57),
    "squeezenet": Case(partial(named.squeezenet1_1, num_classes=CLASSES), 32, 25),
    "regnet": Case(regnet, 32, 35),
    "convnext": Case(partial(ConvNeXt, [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 1)], 0.1), 32, 5),
    "vit": Case(vit, 16, 11),
    "swin": Case(swin, 20, 30),
    "swin_v2": Case(partial(swin, block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2), 20, 34),
}

IN_FULL = {
    "resnet18": (32, 12),
    "resnet34": (32, 20),
    "resnet50": (32, 37),
    "wide_resnet50_2": (32, 37),
    "resnext50_32x4d": (32, 1029),
    "densenet121": (32, 120),
    "mobilenet_v2": (32, 25),
    "mobilenet_v3_large": (32, 30),
    "efficientnet_b0": (32, 40),
    "shufflenet_v2_x1_0": (32, 86),
    "squeezenet1_1": (64, 25),
    "mnasnet1_0": (32, 25),
    "regnet_y_400mf": (32, 1083),
    "convnext_tiny": (32, 22),
    "vit_b_16": (224, 301),
    "swin_t": (32, 292),
    "swin_v2_t": (32, 304),
}


def check(model: nn.Module, spaces: tuple[Space, ...], state: dict[str, Tensor], images: Tensor) -> None:
    """Renaming all units changes nothing but the order in which they are seen; renaming one side changes outputs."""
    generator = torch.Generator().manual_seed(1)
    before = outputs(model, state, images)
    assert before.abs().max() > 0
    changes = permutations(spaces, generator)
    renamed = rebase(state, spaces, changes)
    assert (outputs(model, renamed, images) - before).abs().max() <= 1e-10 * before.abs().max()
    for space in spaces[:: max(1, len(spaces) // 5)]:
        for side in ("writers", "readers"):
            assert changed_by_one_side(model, state, space, side, images, before) > 1e-9, (space.site, side)
    alive = 0
    itself, other = moments(model, spaces, [state, renamed], 0, images)
    for space, change, ours, theirs in zip(spaces, changes, itself, other, strict=True):
        scale = ours.own[0].abs().max()
        alive += int(scale > 0)
        assert (theirs.cross - ours.own[0][:, change.index]).abs().max() <= 1e-8 * scale, space.site.node
    assert alive >= 0.9 * len(spaces), "what is seen of most units never changes"


@pytest.mark.parametrize("name", SMALL)
def test_all_spaces_can_be_renamed_and_seen(name: str) -> None:
    case = SMALL[name]
    torch.manual_seed(0)
    model = case.build().double().eval()
    spaces = symmetry(model, torch.zeros(1, 3, case.side, case.side))
    assert len(spaces) == case.spaces
    generator = torch.Generator().manual_seed(0)
    state = random_state(model, generator)
    images = torch.randn(2, 3, case.side, case.side, generator=generator, dtype=torch.float64)
    check(model, spaces, state, images)


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_FULL)
def test_named_models_have_their_spaces(name: str) -> None:
    side, count = IN_FULL[name]
    torch.manual_seed(0)
    model = getattr(named, name)(num_classes=CLASSES).double().eval()
    spaces = symmetry(model, torch.zeros(1, 3, side, side))
    assert len(spaces) == count
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=generator, dtype=torch.float64)
    check(model, spaces, random_state(model, generator), images)
