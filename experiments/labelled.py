"""Claim: with 100 or 1,000 labels on the server, NP Merge is ahead of every control that ends in one model.

    python experiments/labelled.py                  # Fashion-MNIST, 5 clients, four partitions, 5 seeds; hours
    python experiments/labelled.py --size smoke     # digits, 1 seed, a minute; what CI runs

The server owns these labelled images and nothing else; all methods learn from the same ones. The clients start from
initialisations of their own. `…-semi` methods are told by the clients too what is on the images, and on mixtures of
them; the others learn from the labels alone. Differences are paired by client set. At full size it writes
experiments/expected/labelled.json.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from _clients import PARTITIONS, SMOKE, clients, command
from _run import accuracies, advantage, compare, holds, main, mean_of, merge, rows_of, table, write

from fedmerge.tables import NOTHING, points

BUDGETS = (1000, 100)
GOALS = {100: 0.02, 1000: 0.005}
"""Accuracy by which ours is to be ahead of each control on average, by labels."""

OURS = "activations+np-semi"
BY_LABELS = ("server-only", "activations+finetune", "best-client-finetune", "head-finetune", "activations+np")
TOLD = ("fresh-semi", "activations+finetune-semi", "best-client-semi")
CONTROLS = (*BY_LABELS, *TOLD)
ENSEMBLES = ("ensemble-stacked", "ensemble-propagated")


def arguments(labels: int) -> str:
    """Return how the clients are merged again with so many labels."""
    methods = ",".join(("best-client", *ENSEMBLES, *CONTROLS, OURS))
    return f"--server-limit {labels} --server-labels {labels} --methods {methods}"


def labelled(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "labelled-clients")
        ours = f"{OURS}:steps=40:lrs=0.01"
        [merged] = merge({out / "labelled": (run, f"--server-limit 60 --server-labels 60 --methods {ours}")})
        accuracy = mean_of(merged, ours)
        assert accuracy > mean_of(rows_of(run), "fedavg")
        holds("60 labels, above fedavg", [(ours, accuracy)])
        return
    runs = dict(zip(PARTITIONS, clients([(name, "independent") for name in PARTITIONS], out), strict=True))
    commands = [command(name, "independent") for name in PARTITIONS]
    content: dict[str, Any] = {"commands": commands, "accuracy": {}, "tables": {}, "goals": {}}
    for labels in BUDGETS:
        again = merge({out / f"labelled-{labels}-{run.path.name}": (run, arguments(labels)) for run in runs.values()})
        found = dict(zip(runs, again, strict=True))
        ahead = {control: advantage(found.values(), OURS, control) for control in CONTROLS}
        nearest = min(CONTROLS, key=lambda control: ahead[control].mean)
        shown = ("best-client", *ENSEMBLES, *CONTROLS, OURS)
        last = [f"`{OURS}` is above by", "---:"]
        last += [points(ahead[name]) if name in ahead else NOTHING for name in shown]
        commands.append(f"fedmerge merge RUN {arguments(labels)} --out NEW")
        content["accuracy"][f"{labels}"] = accuracies(found)
        content["tables"][f"{labels}"] = [
            f"{line} {cell} |" for line, cell in zip(table(found, shown), last, strict=True)
        ]
        goal = {"goal": GOALS[labels], "found": ahead[nearest].mean, "interval": ahead[nearest].half_width}
        content["goals"][f"{labels}"] = goal
        write("labelled", content, runs["Dirichlet(0.1)"])
        assert ahead[nearest].mean > 0, f"{nearest} is above {OURS}: {points(ahead[nearest])}"
        holds(f"{labels} labels, above every control, of which {nearest} is nearest", [("by", ahead[nearest].mean)])


if __name__ == "__main__":
    main(__doc__, labelled)
