"""Alignment of two models, in units of bare forward passes of both over the same images.

Statistics are of every position of every feature space, in one pass: for permutations the models' covariances with each
other and variances, for any alignment each model's own covariances too. The whole merge is what a user calls: the
choice of the reference, statistics, solution, change of basis, mean, and BatchNorm statistics. `align_peer.py` has it
beside align-n-merge's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from _measure import Row, interleaved, main
from torch import Tensor

from fedmerge.align.cca import CCA
from fedmerge.align.matching import correlation, match
from fedmerge.covariances import Moments
from fedmerge.features import joint_moments, moments, with_reference
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.train import laid_out, predict

FULL = {
    "resnet20": ((3, 32, 32), 5000, 3),
    "vgg11": ((3, 32, 32), 1000, 3),
    "cnn": ((1, 28, 28), 2000, 5),
    "resnet18": ((3, 32, 32), 1000, 3),
}
QUICK = {"cnn@0.1": ((1, 8, 8), 60, 1)}
SAMPLES, WIDTH = 5000, 512


def benchmark(quick: bool) -> list[Row]:
    """Return a row for each architecture, and for the solution of one space."""
    rows: list[Row] = []
    for name, (shape, images, repeats) in (QUICK if quick else FULL).items():
        found = interleaved(of_model(name, shape, images), repeats=repeats)
        floor = found.pop("forward passes")
        for what, timing in found.items():
            rows.append(_row(f"{what}, 2 × {name}, {images} images", timing.milliseconds, timing.over(floor)))
        rows.append(_row(f"forward passes, 2 × {name}, {images} images", floor.milliseconds, "1"))
    for what, timing in interleaved(of_space(40 if quick else WIDTH), repeats=1 if quick else 7).items():
        rows.append(_row(f"{what}, {SAMPLES} samples of {WIDTH} units", timing.milliseconds, ""))
    return rows


def of_model(
    name: str, shape: tuple[int, int, int], images: int, device: str = "cpu"
) -> dict[str, Callable[[], object]]:
    """Return what is timed of an architecture."""
    model = create(name, shape=shape, num_classes=10, seed=0).to(device)
    chance = torch.Generator().manual_seed(0)
    examples = Examples(torch.randn(images, *shape, generator=chance), torch.arange(images) % 10).to(device)
    problem = Problem(model, laid_out(model, examples))
    states = [create(name, shape=shape, num_classes=10, seed=seed).to(device).state_dict() for seed in (0, 1)]
    updates = [Update(state, 100, client) for client, state in enumerate(states)]
    problem.spaces  # noqa: B018 - found once, before

    def forward() -> list[Tensor]:
        return [predict(model, state, problem.data.images) for state in states]

    def statistics(*, own: bool) -> object:
        return moments(model, problem.spaces, states, 0, problem.data.images, own=own)

    def merge(align: str) -> Callable[[], object]:
        return lambda: merge_updates(problem, updates, align=align, merge="mean", seed=0, screen="off")

    return {
        "forward passes": forward,
        "statistics for permutations": lambda: statistics(own=False),
        "statistics for any alignment": lambda: statistics(own=True),
        "merge by activations": merge("activations"),
        "merge by CCA": merge("cca:ridges=1"),
    }


def of_space(width: int) -> dict[str, Callable[[], object]]:
    """Return what is timed of one space: a linear layer's units in two models."""
    chance = torch.Generator().manual_seed(0)
    inputs = torch.randn(SAMPLES, width, generator=chance)
    model = torch.nn.Sequential(
        torch.nn.Identity(), torch.nn.Linear(width, width), torch.nn.ReLU(), torch.nn.Linear(width, 2)
    )
    states = [
        {name: torch.randn(tensor.shape, generator=chance) / width**0.5 for name, tensor in model.state_dict().items()}
        for _ in range(2)
    ]
    problem = Problem(model.eval(), Examples(inputs, torch.zeros(SAMPLES, dtype=torch.int64)))
    (found,) = joint_moments(model, problem.spaces, states, inputs, pairs=with_reference(2, 0))
    of_other: Moments = found.between(0, 1)
    permutation = match(correlation(of_other))
    return {
        "forward and covariances in shifted float32": lambda: moments(model, problem.spaces, states, 0, inputs),
        "CCA in float64": lambda: CCA(anchor="none").change(of_other, 1.0, permutation),
        "matching": lambda: match(correlation(of_other)),
    }


def _row(what: str, milliseconds: str, ratio: str) -> Row:
    return {"what": what, "CPU ms": milliseconds, "/ forward passes": ratio}


if __name__ == "__main__":
    main(__doc__, benchmark)
