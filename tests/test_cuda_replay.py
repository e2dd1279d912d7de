"""Steps that a GPU repeats: the bits of the steps that it is told one by one."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from gpus import DEVICE, NEEDS_GPU, on_gpu
from problems import SHAPE, blobs, problem_of, same, trained
from torch import Tensor, nn

from fedmerge.machine import reproducible
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.replay import SWITCH, Replay
from fedmerge.sgd import LocalTraining
from fedmerge.train import fit

pytestmark = NEEDS_GPU


class Spy(Replay):
    """Tells of each recording whether it worked."""

    told: ClassVar[list[bool]] = []

    def _recorded(self, *arguments: Any) -> bool:
        self.told.append(super()._recorded(*arguments))
        return self.told[-1]


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each recording, whether it worked; steps are to be recorded."""
    monkeypatch.setenv(SWITCH, "1")
    monkeypatch.setattr("fedmerge.replay.Replay", Spy)
    monkeypatch.setattr("fedmerge.merge.descent.Replay", Spy)
    monkeypatch.setattr(Spy, "told", [])
    return Spy.told


class Waiting(nn.Module):
    """Decides by a result."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(36, 3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.linear(images.flatten(1))
        return found if float(found.detach().sum()) > 0 else 2 * found


def network(name: str) -> nn.Module:
    if name == "waits":
        return Waiting()
    if name == "drops out":
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    return create(name, shape=SHAPE, num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *((name, [True, True]) for name in ("mlp@0.1", "lenet5", "cnn@0.1", "resnet20@0.25", "vgg11@0.05")),
        ("waits", [False]),
        ("drops out", []),
    ],
)
def test_clients_train_to_the_same_bits(
    name: str, expected: list[bool], told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = LocalTraining(epochs=4, batch_size=16, lr=0.02, weight_decay=1e-3, proximal_mu=0.1)
    model = network(name).to(DEVICE)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}

    def clients() -> list[tuple[dict[str, Tensor], float]]:
        found = []
        with reproducible():
            for size in (70, 33, 150):  # a last batch of 6, of 17, and of 6
                chance = torch.Generator().manual_seed(size)
                found.append(fit(model, start, blobs(size, seed=size).to(DEVICE), recipe, generator=chance))
        return found

    replayed = clients()
    assert told == expected
    monkeypatch.setenv(SWITCH, "0")
    for (ours, loss), (theirs, wanted) in zip(replayed, clients(), strict=True):
        assert same(ours, theirs)
        assert loss == wanted
    assert told == expected


STEPS = ":steps=20:lrs=0.01"


@pytest.mark.parametrize(
    ("merge", "name", "recorded"),
    [
        *((f"np{STEPS}:groups={groups}", "cnn@0.1", True) for groups in ("parameter", "channel", "tensor", "in-out")),
        *(
            (f"np{STEPS}:form={form}:groups=parameter", "cnn@0.1", True)
            for form in ("shrink", "box", "simplex", "free")
        ),
        *((f"{merge}{STEPS}", "cnn@0.1", True) for merge in ("np-pairwise", "finetune", "np-distill", "np-semi")),
        (f"np{STEPS}:augment=both:decay=0.1", "cnn@0.1", True),
        (f"np{STEPS}:groups=coarse-to-fine", "cnn@0.1", False),
        *((f"{merge}{STEPS}", "resnet20@0.25", True) for merge in ("np:groups=parameter", "np-pairwise", "finetune")),
    ],
)
def test_merges_learn_the_same_bits(
    merge: str, name: str, recorded: bool, told: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, updates = problem_of(name, 60), trained(name)

    def merged() -> dict[str, Tensor]:
        with reproducible():
            return merge_updates(on_gpu(problem), updates, align="identity", merge=merge, seed=0).merged.state

    found = merged()
    assert bool(told) == recorded
    assert all(told)
    monkeypatch.setenv(SWITCH, "0")
    assert same(found, merged())
