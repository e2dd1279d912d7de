"""Claim: from 100 labels and images without any, NP Merge makes one model above every client and near their ensemble.

    python experiments/labels_and_images.py               # Fashion-MNIST, 5 clients, four partitions, 5 seeds
    python experiments/labels_and_images.py --size smoke  # digits, 1 seed, a minute; what CI runs

The clients of `labelled.py`; the server owns 5,000 images and knows the classes of 100. Differences are paired by
client set. At full size it writes experiments/expected/labels_and_images.json.
"""

from __future__ import annotations

from pathlib import Path

from _clients import PARTITIONS, SMOKE, clients, command
from _run import accuracies, advantage, compare, holds, hours, main, mean_of, merge, table, write

from fedmerge.tables import points

LABELS = 100
WITHIN = 0.01
"""Of the best ensemble, or above it: the goal."""
OURS = "activations+np-semi"
ENSEMBLES = ("ensemble", "ensemble-stacked", "ensemble-propagated")
FRESH = "fresh-semi"
"""A fresh network on the same targets: what the merge adds is above it."""
METHODS = ("best-client", *ENSEMBLES, FRESH, OURS)
ARGUMENTS = f"--server-labels {LABELS} --methods {','.join(METHODS)}"
"""How the clients are merged again."""


def labels_and_images(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "labels-and-images-clients")
        ours = f"{OURS}:steps=40:lrs=0.01"
        [merged] = merge({out / "labels-and-images": (run, f"--server-labels 60 --methods best-client,{ours}")})
        found = {name: mean_of(merged, name) for name in merged}
        assert found[ours] > found["best-client"]
        holds("60 labels among 300 images, above the best client", list(found.items()))
        return
    runs = clients([(name, "independent") for name in PARTITIONS], out)
    again = merge({out / f"labelled-both-{run.path.name}": (run, ARGUMENTS) for run in runs})
    cells = dict(zip(PARTITIONS, again, strict=True))
    ahead = {name: advantage([rows], OURS, "best-client") for name, rows in cells.items()}
    best = {name: max(ENSEMBLES, key=lambda method: mean_of(rows, method)) for name, rows in cells.items()}
    from_fresh = {name: advantage([rows], OURS, FRESH) for name, rows in cells.items()}
    from_best = {name: advantage([rows], OURS, best[name]) for name, rows in cells.items()}
    extra = [
        f"| `{OURS}` is above the best client by | {' | '.join(map(points, ahead.values()))} |",
        f"| `{OURS}` is above `{FRESH}` by | {' | '.join(map(points, from_fresh.values()))} |",
        f"| `{OURS}` is above the best ensemble by | {' | '.join(map(points, from_best.values()))} |",
    ]
    content = {
        "commands": [
            *(command(name, "independent") for name in PARTITIONS),
            f"fedmerge merge RUN {ARGUMENTS} --out NEW",
        ],
        "hours": hours((), again),
        "accuracy": accuracies(cells),
        "table": [*table(cells, METHODS), *extra],
        "goals": {name: {"goal": -WITHIN, "found": from_best[name].mean, "ensemble": best[name]} for name in cells},
    }
    write("labels_and_images", content, runs[0])
    assert all(difference.mean > 0 for difference in ahead.values()), ahead
    holds("above the best client by", [(name, difference.mean) for name, difference in ahead.items()])


if __name__ == "__main__":
    main(__doc__, labels_and_images)
