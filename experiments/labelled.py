"""Claim: with 100 labels on the server, NP Merge is ahead of every control that ends in one model.

    python experiments/labelled.py                  # Fashion-MNIST, 5 clients, four partitions, 5 seeds; hours
    python experiments/labelled.py --size smoke     # digits, 1 seed, a minute; what CI runs

The server owns these labelled images and nothing else; all methods learn from the same ones. The clients start from
initialisations of their own. `…-semi` methods are told by the clients too what is on the images, and on mixtures of
them; the others learn from the labels alone. Differences are paired by client set. At full size it writes
experiments/expected/labelled.json. `one_round.py` has 1,000 labels at Dirichlet(0.1), `methods.py` Fisher's and
RegMean's averages, `labels_and_images.py` the same clients and labels with 4,900 images more.
"""

from __future__ import annotations

from pathlib import Path

from _clients import PARTITIONS, SMOKE, clients, command
from _run import accuracies, advantage, compare, holds, hours, main, mean_of, merge, rows_of, table, write

from fedmerge.tables import NOTHING, points

LABELS = 100
GOAL = 0.02
"""Accuracy by which ours is to be ahead of each control on average."""

OURS = "activations+np-semi"
BY_LABELS = (
    *("activations+pleas", "server-only", "activations+finetune", "best-client-finetune"),
    "activations+head-finetune",
)
TOLD = ("fresh-semi", "activations+finetune-semi", "activations+head-finetune:targets=mixed", "best-client-semi")
CONTROLS = (*BY_LABELS, *TOLD)
SHOWN = ("best-client", "ensemble-stacked", "ensemble-propagated", *CONTROLS, "activations+np", OURS)
ARGUMENTS = f"--server-limit {LABELS} --server-labels {LABELS} --methods {','.join(SHOWN)}"
"""How the clients are merged again."""


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
    runs = clients([(name, "independent") for name in PARTITIONS], out)
    again = merge({out / f"labelled-{run.path.name}": (run, ARGUMENTS) for run in runs})
    found = dict(zip(PARTITIONS, again, strict=True))
    ahead = {control: advantage(found.values(), OURS, control) for control in CONTROLS}
    nearest = min(CONTROLS, key=lambda control: ahead[control].mean)
    last = [f"`{OURS}` is above by", "---:", *(points(ahead[name]) if name in ahead else NOTHING for name in SHOWN)]
    content = {
        "commands": [
            *(command(name, "independent") for name in PARTITIONS),
            f"fedmerge merge RUN {ARGUMENTS} --out NEW",
        ],
        "hours": hours(runs, again),
        "accuracy": accuracies(found),
        "table": [f"{line} {cell} |" for line, cell in zip(table(found, SHOWN), last, strict=True)],
        "goal": {"goal": GOAL, "found": ahead[nearest].mean, "interval": ahead[nearest].half_width, "control": nearest},
    }
    write("labelled", content, runs[0])
    assert ahead[nearest].mean > 0, f"{nearest} is above {OURS}: {points(ahead[nearest])}"
    holds(f"above every control, of which {nearest} is nearest", [("by", ahead[nearest].mean)])


if __name__ == "__main__":
    main(__doc__, labelled)
