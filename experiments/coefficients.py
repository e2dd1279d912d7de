"""Claim: what NP Merge takes from a client for a class rises with the client's share of the class, untold.

    python experiments/coefficients.py                  # Fashion-MNIST, LeNet-5, 5 clients, Dirichlet(0.1), 5 seeds
    python experiments/coefficients.py --size smoke     # digits, 1 seed, less than a minute; what CI runs

The clients start from initialisations of their own; the server owns 1,000 labelled images; numbers are of development
images. The claim is about merges that start at the mean: the default start knows the label counts already. At full
size it also writes what groups, starts, forms and teachers change, what the merge does to the layers' weights, and the
loss along the straight way from its start to its end and between the clients: experiments/expected/coefficients.json
and docs/figures/coefficients-*.png.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _course import Line, distributions_figure, paths_figure, scatter_figure
from _run import FIGURES, Rows, accuracies, advantage, compare, holds, main, merge, merged_run, rows_of, table, write
from scipy.stats import spearmanr

from fedmerge import federation
from fedmerge.benchmark.drawings import coefficients_figure
from fedmerge.compare import Bench
from fedmerge.figures import to_png
from fedmerge.merge.average import mean_state
from fedmerge.oneshot import prepare
from fedmerge.problem import Examples
from fedmerge.runs import Result, Run, file_name
from fedmerge.seeds import derive
from fedmerge.state import StateDict, read_checkpoint
from fedmerge.summary import Difference, with_interval
from fedmerge.tables import NOTHING, points
from fedmerge.train import evaluate

CLIENTS = (
    "fedmerge compare --data fashion-mnist --model lenet5 --clients 5 --client-examples 20000 --partition dirichlet "
    "--alpha 0.1 --split development --server-examples 1000 --seeds 0,1,2,3,4 "
    "--methods best-client,ensemble,activations+mean,activations+finetune"
)
SMOKE = "fedmerge compare --alpha 0.1 --server-examples 200 --methods fedavg"

OURS = "activations+np:start=mean"
PARAMETERS, CHANNELS = f"{OURS}:groups=parameter", f"{OURS}:groups=channel"
DISTILLED = "activations+np-distill:start=mean"
ABLATIONS: Mapping[str, tuple[str, ...]] = {
    "groups": tuple(
        f"{OURS}:groups={name}" for name in ("model", "tensor", "in-out", "channel", "parameter", "coarse-to-fine")
    ),
    "starts": (OURS, *(f"activations+np:start={name}" for name in ("examples", "counts", "best"))),
    "forms": tuple(f"{OURS}:form={name}" for name in ("shrink", "box", "simplex", "free")),
    "teachers": (
        *(f"{DISTILLED}:teacher={name}" for name in ("mean", "counts", "counts-geometric", "prior", "propagated")),
        "fresh-distill:teacher=propagated",
    ),
}
TOLD = (CHANNELS, PARAMETERS, "activations+np:start=counts", f"{DISTILLED}:teacher=propagated")
"""Methods whose coefficients are put beside the label shares."""

IMAGES = 2000
"""Development images on which losses along a path are measured."""
WAY = np.linspace(-0.2, 1.4, 17)
BETWEEN = np.linspace(0, 1, 11)


class Course(NamedTuple):
    """A seed's merge, from its models to its end, all in one basis."""

    bench: Bench
    came: list[StateDict]
    models: list[StateDict]
    start: StateDict
    end: StateDict

    @property
    def images(self) -> Examples:
        """The development images on which losses are measured."""
        return self.bench.evaluation[slice(IMAGES)]

    def loss(self, state: StateDict) -> float:
        """Return a model's loss, in nats."""
        return evaluate(self.bench.problem.model, [state], self.images).loss


def coefficients(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "coefficients-clients")
        ours = f"{CHANNELS}:steps=60:lrs=0.03"
        merge({out / "coefficients-smoke": (run, f"--methods {ours}")})
        again = merged_run(out / "coefficients-smoke", ours)
        [correlation] = correlations(again, ours)
        assert correlation > 0, correlation
        draw(run, again, ours, out)
        holds("coefficients rise with the shares of a class", [("rank correlation", correlation)])
        return
    run = compare(CLIENTS, out / "coefficients-clients")
    jobs = {out / f"coefficients-{kind}": (run, f"--methods {','.join(names)}") for kind, names in ABLATIONS.items()}
    rows = rows_of(run) | {name: row for each in merge(jobs) for name, row in each.items()}
    merged = {
        name: merged_run(out, name) for out, names in zip(jobs, ABLATIONS.values(), strict=True) for name in names
    }
    told = {name: with_interval(correlations(merged[name], name)) for name in TOLD}
    found = told[CHANNELS]
    assert found.mean - (found.half_width or 0) > 0, f"{CHANNELS}: {found}"
    holds("coefficients rise with the shares of a class", [(name, found.mean) for name, found in told.items()])
    spreads = draw(run, merged[CHANNELS], CHANNELS, FIGURES)
    content = {
        "commands": [CLIENTS, *(f"fedmerge merge RUN {words} --out NEW" for _, words in jobs.values())],
        "accuracy": accuracies({"development": rows}),
        "correlations": {name: [found.mean, found.half_width] for name, found in told.items()},
        "spreads": {name: [found.mean, found.half_width] for name, found in spreads.items()},
        "tables": {
            "ablations": ablations(rows),
            "correlations": [
                "| Method | classes, by share of the class | layers, by share of all images |",
                "| --- | ---: | ---: |",
                *(
                    f"| `{name}` | {number(of_classes)} | {number(of_layers)} |"
                    for name, of_classes in told.items()
                    for of_layers in [with_interval(correlations(merged[name], name, "tensors"))]
                ),
            ],
        },
    }
    write("coefficients", content, run)


def ablations(rows: Rows) -> list[str]:
    """Return the lines of a Markdown table: accuracies, and by how much `OURS` is above them.

    Args:
        rows: by method.
    """
    methods = list(rows)
    last = [f"`{OURS}` is above by", "---:"]
    last += [points(advantage([rows], OURS, name)) if name != OURS else NOTHING for name in methods]
    return [f"{line} {cell} |" for line, cell in zip(table({"accuracy": rows}, methods), last, strict=True)]


def number(found: Difference) -> str:
    """Return a correlation with its interval's half width."""
    half = "" if found.half_width is None else f" ± {found.half_width:.2f}"
    return f"{found.mean:.2f}{half}".replace("-", "\N{MINUS SIGN}")


def correlations(run: Run, method: str, of: str = "classes") -> list[float]:
    """Return for each seed the rank correlation of coefficients and shares, over clients and classes (or tensors).

    Args:
        run: has the method's results.
        method: a form of NP Merge.
        of: "classes": the head's rows, beside each client's share of the class; "tensors": beside that of all images.
    """
    found = []
    for result in told_by(run, method):
        values, labels = beside(run, result)
        if of == "tensors":
            values = np.array(list(result["diagnostics"]["shares"]["tensors"].values()))
            counts = counted(run, result)
            labels = np.broadcast_to(counts.sum(0) / counts.sum(), values.shape)
        found.append(float(spearmanr(values.ravel(), labels.ravel()).statistic))
    return found


def told_by(run: Run, method: str) -> list[Result]:
    """Return a method's results, one for each seed."""
    return [result for result in run.results() if result["method"] == method]


def counted(run: Run, result: Result) -> np.ndarray:
    """Return how many images of each class the merged clients have, (classes, clients)."""
    counts = federation.load(run.config.replace(seed=result["seed"])).label_counts()
    return np.array(counts, dtype=float).T[:, result["diagnostics"]["shares"]["clients"]]


def beside(run: Run, result: Result) -> tuple[np.ndarray, np.ndarray]:
    """Return the coefficients of the head's rows, and the clients' shares of each class, (classes, clients)."""
    counts = counted(run, result)
    return np.array(result["diagnostics"]["shares"]["classes"]), counts / counts.sum(1, keepdims=True).clip(1)


def draw(run: Run, merged: Run, method: str, folder: Path) -> dict[str, Difference]:
    """Draw the figures of a merge, and return how the weights' spread changes by layer.

    Args:
        run: the clients.
        merged: has the method's models.
        method: a form of NP Merge that starts at the mean of the clients.
        folder: gets the figures.

    Returns:
        By tensor of weights and source, the standard deviation over that of the clients' own weights.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results = told_by(merged, method)
    both = [beside(merged, result) for result in results]
    panels = {
        f"seed {result['seed']}": (result["diagnostics"]["shares"], labels)
        for result, (_, labels) in zip(results[:2], both, strict=False)
    }
    classes = federation.load(run.config).classes
    points = {"": [np.concatenate([pair[side].ravel() for pair in both]).tolist() for side in (1, 0)]}
    courses = [course(run, merged, method, result["seed"]) for result in results]
    weights = [name for name, tensor in courses[0].start.items() if tensor.ndim > 1]
    sources = [spread_out(each, weights) for each in courses]
    figures = {
        "map": coefficients_figure(panels, classes),
        "shares": scatter_figure(
            {title: (x, y) for title, (x, y) in points.items()},
            "client's share of the images of a class",
            "coefficient of the client, in the class's row",
        ),
        "paths": paths_figure(paths(courses), "loss on development images, nats"),
        "weights": distributions_figure(sources[0]),
    }
    for name, figure in figures.items():
        (folder / f"coefficients-{name}.png").write_bytes(to_png(figure))
    return {
        f"{name}, {source}": with_interval(
            [float(each[name][source].std() / each[name]["clients"].std()) for each in sources]
        )
        for name in weights
        for source in ("mean", "merged")
    }


def course(run: Run, merged: Run, method: str, seed: int) -> Course:
    """Return a seed's models, aligned as the merge had them, its start and its end.

    Args:
        run: the clients.
        merged: has the method's models.
        method: ALIGNER+MERGER.
        seed: of the run.
    """
    config = merged.config.replace(seed=seed)
    bench = Bench(config.to_mapping(), federation.load(config), run.load_updates(seed))
    align, _, words = method.partition("+")
    chance = derive(seed, "merge", 1)
    _, alignment = prepare(bench.problem, bench.updates, align=align, merge=words, seed=chance, screen=config.screen)
    places = {update.partition_id for update in alignment.updates}
    models = [update.state for update in alignment.updates]
    end, _ = read_checkpoint(merged.path / "models" / f"seed-{seed}" / "round-1" / f"{file_name(method)}.safetensors")
    came = [update.state for update in bench.updates if update.partition_id in places]
    return Course(bench, came, models, mean_state(models), end)


def spread_out(of: Course, weights: Sequence[str]) -> dict[str, dict[str, np.ndarray]]:
    """Return the numbers of tensors by source: the clients', their mean's, and the merged model's."""
    return {
        name: {
            "clients": np.concatenate([state[name].numpy().ravel() for state in of.models]),
            "mean": of.start[name].numpy().ravel(),
            "merged": of.end[name].numpy().ravel(),
        }
        for name in weights
    }


def paths(courses: Sequence[Course]) -> dict[str, tuple[str, dict[str, Line]]]:
    """Return losses along the straight ways: from the merge's start to its end, and between pairs of clients.

    Args:
        courses: one for each seed.
    """
    way = [(place, [each.loss(between(each.start, each.end, place)) for each in courses]) for place in WAY]
    pairs = {name: [(place, list[float]()) for place in BETWEEN] for name in ("as they came", "aligned")}
    for each in courses:
        for name, states in zip(pairs, (each.came, each.models), strict=True):
            ends = list(combinations(states, 2))
            for place, losses in pairs[name]:
                losses.append(float(np.mean([each.loss(between(*two, place)) for two in ends])))
    return {
        "the merge": ("0: mean of the clients, 1: merged", {"on the way": interval(way)}),
        "between two clients": ("0: one client, 1: another", {name: interval(line) for name, line in pairs.items()}),
    }


def interval(line: Sequence[tuple[float, Sequence[float]]]) -> Line:
    """Return a line's values with their intervals over the seeds."""
    return [(float(place), with_interval(values)) for place, values in line]


def between(first: StateDict, second: StateDict, place: float) -> dict[str, Any]:
    """Return the model on the straight way from one to another: 0 is the first, 1 the second."""
    return {name: first[name] + place * (second[name] - first[name]) for name in first}


if __name__ == "__main__":
    main(__doc__, coefficients)
