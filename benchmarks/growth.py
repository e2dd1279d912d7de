"""How costs grow: CPU seconds and memory against models, clients, width and images, with fitted exponents.

Each point is the least of a few runs, each in a process of its own; what Python and its imports take is left out. An
exponent is the slope of the least squares line through the last points on logarithmic scales, where constants matter
least, with its standard error: 1 is linear, 0 does not grow. Memory is the anonymous memory that the work adds, in the
merging process or the server's; of models that are merged, the inputs lie in files.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import HERE, Row, main, tree_seconds
from matplotlib.figure import Figure

from fedmerge.figures import LINES, WIDTH, styled, to_png, to_svg
from fedmerge.memory import Peak
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.updatefiles import read_update, update_to_bytes

FIGURES = HERE / "figures"
SHAPE = (1, 28, 28)
LAST = 4
ROUNDS = 3


@dataclass(frozen=True)
class Series:
    """What grows, and what with.

    Attributes:
        name: what is done.
        axis: what it is done to more and more of.
        sizes: values of the axis, increasing.
        arguments: of `_merge`, or of `_rounds`, with {} for the size.
    """

    name: str
    axis: str
    sizes: tuple[float, ...]
    arguments: tuple[str, ...]


def _np(groups: str) -> str:
    return f"identity+np:steps=20:lrs=0.001:groups={groups}"


FULL = (
    Series("mean", "models, mlp@4", (2, 4, 8, 16, 32, 64), ("merge", "mlp@4", "{}", "500", "identity+mean")),
    Series("np, parameters", "models, mlp@4", (2, 4, 8, 16, 32, 64), ("merge", "mlp@4", "{}", "500", _np("parameter"))),
    Series("np, channels", "models, mlp@4", (2, 4, 8, 16, 32, 64), ("merge", "mlp@4", "{}", "500", _np("channel"))),
    Series(
        "np, parameters", "width of five cnn", (0.25, 0.5, 1, 2, 4), ("merge", "cnn@{}", "5", "500", _np("parameter"))
    ),
    Series(
        "activations+mean",
        "width of five cnn",
        (0.25, 0.5, 1, 2, 4),
        ("merge", "cnn@{}", "5", "500", "activations+mean"),
    ),
    Series(
        "np, parameters",
        "images, five cnn",
        (100, 300, 1000, 3000, 10000),
        ("merge", "cnn", "5", "{}", _np("parameter")),
    ),
    Series(
        "activations+mean",
        "images, five cnn",
        (100, 300, 1000, 3000, 10000),
        ("merge", "cnn", "5", "{}", "activations+mean"),
    ),
    Series(
        "a round, FedAvg",
        "clients of one image, mlp@0.05",
        (10, 30, 100, 300, 1000, 3000),
        ("rounds", "fashion-mnist", "{}"),
    ),
)
QUICK = (
    Series("np, channels", "models, mlp@0.1", (2, 3, 4), ("merge", "mlp@0.1", "{}", "60", _np("channel"))),
    Series("a round, FedAvg", "clients of one image", (2, 4), ("rounds", "digits", "{}")),
)


def benchmark(quick: bool) -> list[Row]:
    """Return a row for each series, and draw them unless quick."""
    found = {
        series: [_least(series, size, 1 if quick else 2) for size in series.sizes]
        for series in (QUICK if quick else FULL)
    }
    if not quick:
        FIGURES.mkdir(exist_ok=True)
        figure = drawn(found)
        (FIGURES / "growth.png").write_bytes(to_png(figure))
        (FIGURES / "growth.svg").write_bytes(to_svg(figure))
    rows: list[Row] = []
    for series, points in found.items():
        seconds, peaks = zip(*points, strict=True)
        rows.append(
            {
                "what": series.name,
                "against": series.axis,
                "at": " · ".join(f"{size:g}" for size in series.sizes),
                "CPU s": " · ".join(f"{value:.3g}" for value in seconds),
                "CPU exponent": told(series.sizes, seconds),
                "memory, MB": " · ".join(f"{value / 1e6:.0f}" for value in peaks),
                "memory exponent": told(series.sizes, peaks),
            }
        )
    return rows


def exponent(sizes: Sequence[float], values: Sequence[float] | np.ndarray[Any, Any]) -> tuple[float, float]:
    """Return the slope of log(value) over log(size) and its standard error; NaN for two points, which tell of none.

    Args:
        sizes: positive, at least two.
        values: positive.
    """
    x, y = np.log(sizes), np.log(values)
    slope, offset = np.polyfit(x, y, 1)
    if len(x) < 3:
        return float(slope), math.nan
    left = y - slope * x - offset
    return float(slope), float(np.sqrt((left**2).sum() / (len(x) - 2) / ((x - x.mean()) ** 2).sum()))


def told(sizes: Sequence[float], values: Sequence[float]) -> str:
    """Return the exponent of the last points with its standard error."""
    slope, error = exponent(sizes[-LAST:], np.maximum(values, 1e-9)[-LAST:])
    return f"{slope:.2f} ± {error:.2f}"


def drawn(found: dict[Series, list[tuple[float, float]]]) -> Figure:
    """Draw each axis' series on logarithmic scales: CPU seconds above, memory below, lines through the last points."""
    axes_names = list(dict.fromkeys(series.axis for series in found))
    with styled():
        figure = Figure(figsize=(1.6 * WIDTH, 4.6), layout="constrained")
        grid = figure.subplots(2, len(axes_names), sharex="col", squeeze=False)
        for column, axis in enumerate(axes_names):
            members = [(series, points) for series, points in found.items() if series.axis == axis]
            for number, (series, points) in enumerate(members):
                for row, values in enumerate(zip(*points, strict=True)):
                    scaled = np.maximum(values, 1e-9) / (1e6 if row else 1)
                    panel, colour = grid[row, column], LINES[number]
                    panel.loglog(series.sizes, scaled, "os^"[number], color=colour, markersize=4)
                    slope, _ = exponent(series.sizes[-LAST:], scaled[-LAST:])
                    x = np.array(series.sizes[-LAST:])
                    middle = np.exp(np.log(scaled[-LAST:]).mean()) * (x / np.exp(np.log(x).mean())) ** slope
                    panel.loglog(x, middle, color=colour, linewidth=1, label=f"{series.name}: {slope:.2f}")
            grid[1, column].set_xlabel(axis)
            for panel in grid[:, column]:
                panel.grid(color="#d8dee4", linewidth=0.5)
                panel.minorticks_off()
                panel.set_xticks(members[0][0].sizes, [f"{size:g}" for size in members[0][0].sizes])
                panel.legend(frameon=False, fontsize=7)
                low, high = panel.get_ylim()
                panel.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
        grid[0, 0].set_ylabel("CPU seconds")
        grid[1, 0].set_ylabel("memory, MB")
    return figure


def _least(series: Series, size: float, repeats: int) -> tuple[float, float]:
    """Return the least CPU seconds and bytes of some runs."""
    arguments = [argument.format(f"{size:g}") for argument in series.arguments]
    runs = [json.loads(_output([sys.executable, __file__, *arguments]).splitlines()[-1]) for _ in range(repeats)]
    return min(seconds for seconds, _ in runs), min(peak for _, peak in runs)


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _merge(name: str, count: int, images: int, method: str) -> tuple[float, int]:
    """Merge models that lie in files, and return CPU seconds and bytes."""
    align, merge = method.split("+")
    model = create(name, shape=SHAPE, num_classes=10, seed=0)
    chance = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(images, *SHAPE, generator=chance), torch.arange(images) % 10)
    with tempfile.TemporaryDirectory() as folder:
        for client in range(count):
            state = create(name, shape=SHAPE, num_classes=10, seed=client).state_dict()
            Path(folder, str(client)).write_bytes(update_to_bytes(Update(dict(state), 100, client)))
        updates = [read_update(path) for path in sorted(Path(folder).iterdir())]
        problem = Problem(model, data)
        problem.spaces  # noqa: B018 - found once, before
        began = time.process_time()
        with Peak() as peak:
            merge_updates(problem, updates, align=align, merge=merge, seed=0, screen="off")
        return time.process_time() - began, peak.bytes or 0


def _rounds(data: str, clients: int) -> tuple[float, int]:
    """Run rounds, and return the least CPU seconds of one, of all processes, and the server's bytes."""
    from rounds import COMMON, run_rounds

    from fedmerge import federation
    from fedmerge.simulation import simulation

    config = COMMON.replace(data=data, model="mlp@0.05", partition="iid", clients=clients, client_examples=clients)
    seconds: list[float] = []
    with simulation(config, federation.load(config)) as grid, Peak() as peak:
        run_rounds(grid, config, lambda *_: seconds.append(tree_seconds()), ROUNDS + 1)
    return min(later - before for before, later in pairwise(seconds)), peak.bytes or 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["merge"]:
        print(json.dumps(_merge(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
    elif sys.argv[1:2] == ["rounds"]:
        print(json.dumps(_rounds(sys.argv[2], int(sys.argv[3]))))
    else:
        main(__doc__, benchmark)
