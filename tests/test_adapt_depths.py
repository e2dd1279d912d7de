"""Deeper residual networks compute what shallower ones do, and what is silent in them can be aligned and merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from invariance import outputs, random_state
from problems import blobs
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.resnet import BasicBlock, ResNet
from torchvision.models.vision_transformer import VisionTransformer

from fedmerge.adapt import adapt, relation
from fedmerge.adapt.depths import depths
from fedmerge.architectures import ResidualBlock
from fedmerge.calibrate import calibrate
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Problem, Update

Pair = tuple[nn.Module, nn.Module]


def named(first: str, second: str) -> Pair:
    ours, theirs = (create(name, shape=(3, 16, 16), num_classes=4, seed=0) for name in (first, second))
    return ours, theirs


def transformers() -> Pair:
    build = partial(VisionTransformer, 16, 4, num_heads=2, hidden_dim=16, mlp_dim=12, num_classes=4)
    return build(num_layers=2), build(num_layers=5)


def convnexts() -> Pair:
    """Scaled branches, whose blocks differ in how often they are left out in training."""
    stages = [CNBlockConfig(8, 12, 2), CNBlockConfig(12, None, 2)]
    return ConvNeXt(stages, 0.1, num_classes=4), ConvNeXt([stages[0], CNBlockConfig(12, None, 4)], 0.1, num_classes=4)


class Listed(nn.Module):
    """Blocks in a list, the branch of each behind a dropout."""

    def __init__(self, count: int, kind: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.blocks, self.head = (
            nn.Linear(768, 8),
            nn.ModuleList(kind() for _ in range(count)),
            nn.Linear(8, 4),
        )

    def forward(self, inputs: Tensor) -> Tensor:
        found = self.first(inputs.flatten(1))
        for block in self.blocks:
            found = block(found)
        logits: Tensor = self.head(found)
        return logits


class Branch(nn.Module):
    def __init__(self, *, adds: bool = True, plain: bool = True) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8), nn.Dropout(0.1))
        self.adds, self.plain = adds, plain

    def forward(self, inputs: Tensor) -> Tensor:
        found: Tensor = self.layers(inputs)
        found = found.add(inputs) if self.adds else found
        return found if self.plain else torch.tanh(found)


CASES: dict[str, Callable[[], Pair]] = {
    "resnet20 to 32": lambda: named("resnet20@0.25", "resnet32@0.25"),
    "resnet20 to 56": lambda: named("resnet20@0.1", "resnet56@0.1"),
    "vit": lambda: named("vit@0.25", "vit8@0.25"),
    "torchvision's resnets": lambda: (ResNet(BasicBlock, [2, 1, 1, 1], 4), ResNet(BasicBlock, [4, 1, 1, 1], 4)),
    "torchvision's transformers": transformers,
    "torchvision's convnexts": convnexts,
    "lists": lambda: (Listed(2, Branch), Listed(5, Branch)),
}


def images(count: int = 4) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("name", CASES)
def test_a_deeper_network_computes_exactly_the_same(name: str) -> None:
    source, target = (model.double().eval() for model in CASES[name]())
    assert relation(source, target, images()) == "depth"
    assert relation(target, source, images()) is None
    state = random_state(source, torch.Generator().manual_seed(0))
    deeper = adapt(source, target, state, images())
    assert list(deeper) == list(target.state_dict())
    expected = outputs(source, state, images())
    torch.testing.assert_close(outputs(target, deeper, images()), expected, rtol=1e-12, atol=1e-12)


def test_depth_and_width_go_together() -> None:
    source, target = (model.double() for model in named("resnet20@0.25", "resnet32@0.5"))
    assert relation(source, target, images()) == "width and depth"
    state = random_state(source, torch.Generator().manual_seed(0))
    found = adapt(source, target, state, images())
    expected = outputs(source, state, images())
    torch.testing.assert_close(outputs(target, found, images()), expected, rtol=1e-10, atol=1e-10)


def test_a_stages_blocks_lie_evenly_among_the_further_ones_which_are_silent_copies() -> None:
    source, target = named("resnet20@0.1", "resnet32@0.1")
    found = depths(source, target)
    assert found is not None
    assert found.added == ("4", "6", "10", "12", "15", "17")
    assert [found.origin[f"{block}.conv1.weight"][0] for block in range(3, 8)] == ["3", "3", "4", "4", "5"]
    assert found.silent == {f"{block}.bn2.{part}" for block in found.added for part in ("weight", "bias")}
    assert list(found.base.state_dict()) == list(source.state_dict())


@pytest.mark.parametrize(
    "kind",
    [partial(Branch, adds=False), partial(Branch, plain=False)],
    ids=["no addition", "something after the addition"],
)
def test_a_block_that_cannot_be_the_identity_makes_another_family(kind: Callable[[], nn.Module]) -> None:
    assert relation(Listed(2, kind), Listed(3, kind), images().float()) is None


def test_fewer_blocks_and_other_stages_are_other_families() -> None:
    resnet = named("resnet20@0.1", "resnet32@0.1")
    assert depths(resnet[1], resnet[0]) is None
    stages = [
        nn.Sequential(*blocks, nn.Flatten(), nn.Linear(64, 2))
        for blocks in (
            (ResidualBlock(1, 4, 1), ResidualBlock(4, 4, 1)),
            (ResidualBlock(1, 4, 1), ResidualBlock(4, 8, 1), ResidualBlock(8, 4, 1)),
        )
    ]
    assert depths(*stages) is None


def tiny(blocks: int) -> nn.Module:
    stage = [ResidualBlock(4, 4, 1) for _ in range(blocks)]
    layers = nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), *stage, nn.AdaptiveAvgPool2d(1), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(4, 3)).eval()


@pytest.mark.parametrize("align", ["activations", "weights", "cca", "zipit"])
def test_models_of_two_depths_are_aligned_calibrated_and_merged(align: str) -> None:
    """Units of a scale of 0 are dead: no correlation, no variance."""
    problem = Problem(tiny(3), blobs(40, seed=7), batch_size=16)
    images = problem.data.images
    deep, shallow = (
        {key: tensor.to(images.dtype) if tensor.is_floating_point() else tensor for key, tensor in found.items()}
        for found in (random_state(tiny(blocks), torch.Generator().manual_seed(blocks)) for blocks in (3, 1))
    )
    deeper = adapt(tiny(1), problem.model, shallow, images)
    calibrated = calibrate(problem.model, deeper, images)
    assert all(tensor.isfinite().all() for tensor in calibrated.values())
    updates = [Update(deep, 60, 0), Update(deeper, 60, 1)]
    for reference in (
        updates,
        [replace(updates[1], partition_id=0, num_examples=90), replace(updates[0], partition_id=1)],
    ):
        for merge in ("mean", "np:steps=3"):
            merged = merge_updates(problem, reference, align=align, merge=merge, seed=0, screen="off").merged.state
            assert all(tensor.isfinite().all() for tensor in merged.values()), merge
            assert outputs(problem.model, merged, blobs(5, seed=1).images).isfinite().all()
