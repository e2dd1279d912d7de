"""A step of NP Merge against a step of plain fine-tuning: forward, backward and Adam, batch 32.

The floor is a plain PyTorch loop with torch's foreach Adam; beside it the same loop with torch's fused Adam, which is
the plain step compiled. The images' memory layout is the usual one in all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from _measure import Row, interleaved, main
from torch import Tensor
from torch.nn import functional

from fedmerge import native
from fedmerge.merge.adam import Adam
from fedmerge.merge.average import mean_state
from fedmerge.merge.coordinates import Coordinates, Weights
from fedmerge.merge.descent import gradients, split_state
from fedmerge.merge.mixture import AffineMixture
from fedmerge.merge.pair import SigmoidPair
from fedmerge.merge.starts import Start
from fedmerge.merge.streamed import Box, Channels, Ingredients, Span
from fedmerge.models import create
from fedmerge.problem import Examples, Problem

Variants = dict[str, Callable[[], object]]
FLOOR, COMPILED = "plain, foreach Adam", "plain, fused Adam"


def of_model(name: str, shape: tuple[int, int, int], device: str = "cpu") -> Variants:
    """Return the steps of one architecture, by name."""
    model = create(name, shape=shape, num_classes=10, seed=0).to(device).train()
    chance = torch.Generator().manual_seed(0)
    batch = Examples(torch.randn(32, *shape, generator=chance), torch.randint(10, (32,), generator=chance)).to(device)
    problem = Problem(model, batch)
    parameters, buffers = split_state(problem, {name: tensor.clone() for name, tensor in model.state_dict().items()})
    models = [
        {
            name: tensor + 0.01 * torch.randn(tensor.shape, generator=chance).to(device)
            for name, tensor in parameters.items()
        }
        for _ in range(10)
    ]

    def plain(optimizer: torch.optim.Optimizer) -> Callable[[], object]:
        def step() -> None:
            optimizer.zero_grad()
            functional.cross_entropy(model(batch.images), batch.labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

        return step

    def ours(coordinates: Coordinates, compiled: bool = True) -> Callable[[], object]:
        def step() -> None:
            with _compiler(compiled):
                coordinates.step(gradients(problem, coordinates, buffers, batch.images, batch.labels), Adam(1e-4))

        return step

    def given(count: int, affine: bool = True) -> Ingredients:
        mean = mean_state(models[:count])
        shares = Start(torch.ones(count)).shares(mean)
        return Ingredients(mean, models[:count], shares, mean if affine else None, affine)

    five = given(5)
    return {
        FLOOR: plain(torch.optim.Adam(model.parameters(), lr=1e-6, foreach=True)),
        COMPILED: plain(torch.optim.Adam(model.parameters(), lr=1e-6, fused=True)),
        "fine-tuning": ours(Weights(parameters)),
        "pair": ours(SigmoidPair(*models[:2])),
        "pair, not compiled": ours(SigmoidPair(*models[:2]), compiled=False),
        "affine, K = 5": ours(Span(five)),
        "affine, K = 10": ours(Span(given(10))),
        "free, K = 10": ours(Span(given(10, affine=False))),
        "channels, K = 5": ours(Channels(five)),
        "box, K = 5": ours(Box(five, (-1.0, 2.0))),
        "simplex, K = 5": ours(Box(five, (0.0, 1.0))),
        "affine, K = 10, stacked": ours(_stacked(given(10))),
    }


def benchmark(quick: bool) -> list[Row]:
    """Return a row for each kind of step."""
    models = {"cnn@0.1": (1, 8, 8)} if quick else {"vgg11": (3, 32, 32), "resnet18": (3, 32, 32), "cnn": (1, 28, 28)}
    rows: dict[str, dict[str, str]] = {}
    for name, shape in models.items():
        found = interleaved(of_model(name, shape), repeats=1 if quick else 15, each=10 if name == "cnn" else 1)
        for variant, timing in found.items():
            row = rows.setdefault(variant, {"step": variant})
            row[f"{name}, ms"] = timing.milliseconds
            row[f"{name} / plain"] = timing.over(found[FLOOR])
            row[f"{name} / fused"] = timing.over(found[COMPILED])
    return list(rows.values())


@contextmanager
def _compiler(allowed: bool) -> Iterator[None]:
    was = native.library
    if not allowed:
        native.library = lambda _: None  # type: ignore[assignment]
    try:
        yield
    finally:
        native.library = was


def _stacked(given: Ingredients) -> AffineMixture:
    directions: Mapping[str, Tensor] = {
        name: torch.stack([model[name] - mean for model in given.models]) for name, mean in given.start.items()
    }
    return AffineMixture(given.start, directions, "parameter", shares=given.shares)


if __name__ == "__main__":
    main(__doc__, benchmark)
