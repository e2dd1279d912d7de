"""Claim: merging pays under differential privacy too, and label counts with noise do nearly what exact ones do.

    python experiments/privacy.py            # Fashion-MNIST, 5 clients, 5 seeds; half an hour
    python experiments/privacy.py --size smoke     # digits, 1 seed, a minute; what CI runs

Clients of 2,400 images, label-skewed, train a LeNet-5 from one initialisation, by SGD or by DP-SGD of two strengths.
The server owns 500 images; `np` learns from their labels, `np-distill` from the clients' ensemble, weighted by the
clients' label counts: exact, with noise, or (`teacher=mean`) none. Then what is left where the server sees no single
model: the mean of clients from initialisations of their own, which fit their units to an anchor (`--anchor`) or do not.
Accuracies are on development images cut from the training files. At full size it writes
experiments/expected/privacy.json, which the tables of docs/privacy.md are made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from _run import Rows, compare, holds, main, mean_of, rows_of, write

from fedmerge.metrics import COUNT_EPSILON, DELTA, EPSILON
from fedmerge.runs import Run
from fedmerge.tables import NOTHING, percent

COUNTED, UNCOUNTED = "np-distill:lrs=0.01", "np-distill:teacher=mean:lrs=0.01"
LEARNED = "np:lrs=0.01"
FRESH = "fresh-distill:lrs=0.01"
METHODS = ("fedavg", LEARNED, COUNTED, UNCOUNTED, FRESH)
MOST_LOSS = 0.01
"""Of accuracy: what noise on label counts may cost."""

FULL = (
    "fedmerge compare --data fashion-mnist --split development --model lenet5 --clients 5 --client-examples 12000 "
    "--partition dirichlet-equal --alpha 0.5 --init shared --local-epochs 10 --batch-size 128 --server-examples 500 "
    f"--seeds 0,1,2,3,4 --methods {','.join(METHODS)}"
)
SMOKE = (
    "fedmerge compare --split development --init shared --local-epochs 5 --batch-size 64 --server-examples 100 "
    "--methods fedavg,np:lrs=0.01:steps=50"
)
NOISED = "--label-count-noise 10"
SCENARIOS = {
    "full": {
        "without": FULL,
        "counts": f"{FULL} {NOISED}",
        "weak": f"{FULL} --dp-clip 1 --dp-noise 0.75 {NOISED}",
        "strong": f"{FULL} --dp-clip 1 --dp-noise 1.5 {NOISED}",
    },
    "smoke": {"without": SMOKE, "weak": f"{SMOKE} --dp-clip 1 --dp-noise 0.75 {NOISED}"},
}
ANCHORS = {
    "full": "fedmerge compare --data fashion-mnist --split development --model mlp --clients 5 --client-examples 12000 "
    "--partition dirichlet-equal --alpha 0.5 --local-epochs 10 --server-examples 500 --seeds 0,1,2,3,4 "
    "--methods mean,best-client",
    "smoke": "fedmerge compare --split development --methods mean,best-client",
}


def privacy(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/privacy.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    runs = {name: compare(command, out / f"privacy-{size}-{name}") for name, command in SCENARIOS[size].items()}
    found = {name: rows_of(run) for name, run in runs.items()}
    told = {name: guarantee(run) for name, run in runs.items()}
    anchored = {
        name: rows_of(compare(f"{ANCHORS[size]}{flag}", out / f"privacy-{size}-{name}"))
        for name, flag in (("plain", ""), ("anchored", " --anchor"))
    }
    plain, fitted = mean_of(anchored["plain"], "mean"), mean_of(anchored["anchored"], "mean")
    assert fitted > plain + 0.05, f"the mean of anchored models, {fitted:.3f}, is not above the plain one, {plain:.3f}"
    holds("a mean of anchored models is above the plain one", [("plain", plain), ("anchored", fitted)])
    for name, rows in found.items():
        averaged = mean_of(rows, "fedavg")
        for method in [method for method in rows if method.startswith("np:")]:
            assert mean_of(rows, method) > averaged, f"{name}: {method} is not above the average, {averaged:.3f}"
            holds(f"{name}: learning is above averaging", [("fedavg", averaged), (method, mean_of(rows, method))])
    assert not told["without"]
    assert told["weak"].keys() == {EPSILON, DELTA, COUNT_EPSILON, "clients"}
    if size == "full":
        exact, noised = (mean_of(found[name], COUNTED) for name in ("without", "counts"))
        assert noised >= exact - MOST_LOSS, f"noise on label counts costs {exact - noised:.3f}"
        holds("noise on label counts costs little", [("exact", exact), ("with noise", noised)])
        content = {
            "commands": [*SCENARIOS[size].values(), ANCHORS[size], f"{ANCHORS[size]} --anchor"],
            "privacy": told,
            "accuracy": {
                name: {method: list(row.accuracies.values()) for method, row in rows.items()}
                for name, rows in (*found.items(), *anchored.items())
            },
            "table": table(found, told),
            "anchors": [
                "| | mean | best client |",
                "| --- | ---: | ---: |",
                *(
                    f"| {name} | {percent(rows['mean'])} | {percent(rows['best-client'])} |"
                    for name, rows in (("as they came", anchored["plain"]), ("`--anchor`", anchored["anchored"]))
                ),
            ],
        }
        write("privacy", content, runs["without"])


def guarantee(run: Run) -> dict[str, Any]:
    """Return what a run's clients were promised, the same for every method that uses them; empty for nothing."""
    found = [(result["seed"], result.get("privacy", {})) for result in run.results()]
    for seed, told in found:
        assert all(told == other for of, other in found if of == seed), "a merge has changed what clients were promised"
    return {name: max(told[name] for _, told in found) for name in (*found[0][1],)}


def table(found: Mapping[str, Rows], told: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table: a row for each method and kind of label counts, a column for each ε.

    Args:
        found: rows by method, of each scenario.
        told: what each scenario's clients were promised.
    """
    columns = [
        "no noise",
        *(f"ε ≤ {told[name][EPSILON]:.1f}, δ = {told[name][DELTA]:.1g}" for name in ("weak", "strong")),
    ]
    lines = [f"| Method | Label counts | {' | '.join(columns)} |", "| --- | --- |" + " ---: |" * len(columns)]
    count_epsilon = told["weak"][COUNT_EPSILON]
    noise = f"noise, ε = {count_epsilon:g}"
    for method, counts, scenarios in (
        ("fedavg", "not used", ("without", "weak", "strong")),
        (LEARNED, "not used", ("without", "weak", "strong")),
        (COUNTED, "exact", ("without",)),
        (COUNTED, noise, ("counts", "weak", "strong")),
        (FRESH, noise, ("counts", "weak", "strong")),
        (UNCOUNTED, "none", ("without", "weak", "strong")),
    ):
        cells = [percent(found[name][method]) for name in scenarios]
        cells += [NOTHING] * (len(columns) - len(cells))
        lines.append(f"| `{method}` | {counts} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    main(__doc__, privacy)
