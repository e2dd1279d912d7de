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
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from fedmerge.figures import LINES, THEME, WIDTH, styled, to_png, to_svg
from fedmerge.memory import Peak
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.updatefiles import read_update, update_to_bytes

FIGURES = HERE / "figures"
SHAPE = (1, 28, 28)
LAST = 4
LEAST = 10.0
"""MB of memory, below which the system's bookkeeping is what is measured."""
SEPARATOR, UNKNOWN = " · ", "–"
MEASURES = {"CPU s": "CPU exponent", "memory, MB": "memory exponent"}
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
    rows: list[Row] = []
    for series, points in found.items():
        seconds, peaks = zip(*points, strict=True)
        rows.append(
            {
                "what": series.name,
                "against": series.axis,
                "at": SEPARATOR.join(f"{size:g}" for size in series.sizes),
                "CPU s": SEPARATOR.join(f"{value:.3g}" for value in seconds),
                "CPU exponent": told(series.sizes, seconds),
                "memory, MB": SEPARATOR.join(f"{value / 1e6:.0f}" for value in peaks),
                "memory exponent": told(series.sizes, [value / 1e6 for value in peaks], LEAST),
            }
        )
    if not quick:
        draw(rows)
    return rows


def draw(rows: Sequence[Row]) -> None:
    """Write the figure of rows."""
    FIGURES.mkdir(exist_ok=True)
    (FIGURES / "growth.png").write_bytes(to_png(drawn(rows)))
    (FIGURES / "growth.svg").write_bytes(to_svg(drawn(rows)))


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


def told(sizes: Sequence[float], values: Sequence[float], least: float = 0.0) -> str:
    """Return the exponent of the last points with its standard error; unknown if one is below what can be measured."""
    if min(values[-LAST:]) <= least:
        return UNKNOWN
    slope, error = exponent(sizes[-LAST:], values[-LAST:])
    return f"{slope + 0.0:.2f} ± {error:.2f}".replace("-0.00", "0.00")


def drawn(rows: Sequence[Row]) -> Figure:
    """Draw each axis' rows on logarithmic scales: CPU seconds above, memory below, lines through the last points."""
    names = list(dict.fromkeys(row["against"] for row in rows))
    with styled():
        figure = Figure(figsize=(1.7 * WIDTH, 5), layout="constrained")
        grid = figure.subplots(2, len(names), sharex="col", squeeze=False)
        for column, axis in enumerate(names):
            members = [row for row in rows if row["against"] == axis]
            for panel, (measure, fitted) in zip(grid[:, column], MEASURES.items(), strict=True):
                for number, row in enumerate(members):
                    _draw(panel, numbers(row["at"]), numbers(row[measure]), f"{row['what']}: {row[fitted]}", number)
                _finish(panel, numbers(members[0]["at"]))
            grid[1, column].set_xlabel(axis.replace(", ", "\n", 1))
        for panel, measure in zip(grid[:, 0], MEASURES, strict=True):
            panel.set_ylabel(measure)
    return figure


def numbers(cell: str) -> list[float]:
    """Return the numbers of a cell."""
    return [float(part) for part in cell.split(SEPARATOR)]


def _draw(panel: Axes, sizes: Sequence[float], values: Sequence[float], label: str, number: int) -> None:
    seen = np.maximum(values, 0.5 if max(values) > 0.5 and min(values) == 0 else 0)
    panel.loglog(sizes, seen, "os^"[number], color=LINES[number], markersize=4, label=label)
    if UNKNOWN in label:
        return
    slope, _ = exponent(sizes[-LAST:], seen[-LAST:])
    x, y = np.log(sizes[-LAST:]), np.log(seen[-LAST:])
    panel.loglog(sizes[-LAST:], np.exp(y.mean() + slope * (x - x.mean())), color=LINES[number], linewidth=1)


def _finish(panel: Axes, sizes: Sequence[float]) -> None:
    panel.grid(color=THEME["rule"], linewidth=0.5)
    panel.minorticks_off()
    panel.set_xticks(sizes, [f"{size / 1000:g}k" if size >= 1000 else f"{size:g}" for size in sizes])
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    low, high = panel.get_ylim()
    panel.set_ylim(low, high * (high / low) ** 0.45)  # room for the legend
    panel.legend(frameon=False, fontsize=6.5, loc="upper left", handletextpad=0.2, borderaxespad=0)


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
            state = {  # near each other: a merge that diverges backs off and tries again
                key: tensor + 0.001 * torch.randn(tensor.shape, generator=chance)
                for key, tensor in model.state_dict().items()
            }
            Path(folder, str(client)).write_bytes(update_to_bytes(Update(state, 100, client)))
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
