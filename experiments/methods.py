"""Claim: a learned merge is far above the mean of the models, with labels on the server and without.

    python experiments/methods.py            # Fashion-MNIST, 5 clients, Dirichlet(0.1), 3 seeds; hours
    python experiments/methods.py --size smoke     # digits, 1 seed, a minute; what CI runs

The table of docs/methods.md: every method on the same clients, which start from one initialisation or from their own.
The server owns 5,000 images and knows the classes of 1,000 or of 100 of them. Methods that learn from labels see those
images alone; methods without labels see all images and no label; `-semi` methods see both. At full size it writes
experiments/expected/methods.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _run import Rows, compare, compare_all, holds, hours, main, mean_of, merge, rows_of, write

from fedmerge.methods import needs
from fedmerge.tables import NOTHING, duration, percent

INITS = ("shared", "independent")
FEW, MANY = 100, 1000

WITHOUT = (
    *("fedavg", "mean", "mean-head", "ensemble", "ensemble-counts", "ensemble-geometric", "ensemble-propagated"),
    *("fresh-distill", "finetune-distill", "best-client-distill", "np-distill", "activations+np-distill", "feddf"),
    *("adamerging-entropy", "flower-median", "flower-trimmed-mean", "flower-krum", "flower-multikrum"),
)
"""Methods whose result depends on no label."""
BY_FEW_LABELS = (
    *("best-client", "server-only", "finetune", "best-client-finetune", "np", "np-pairwise", "activations+np"),
    *("ensemble-stacked", "np-semi"),
)
BY_LABELS = (
    *BY_FEW_LABELS,
    *("activations+finetune", "activations+np-pairwise", "head-finetune", "finetune-semi"),
    *("activations+mean", "weights+mean", "universe+mean", "cca+mean", "zipit+mean", "ot+mean", "auto+mean"),
    *("fisher", "fedfisher", "regmean", "activations+pleas", "task-arithmetic", "ties", "adamerging"),
    *("flower-fedadam", "flower-fedyogi", "flower-fedadagrad", "flower-fedavgm"),
)
"""Methods that learn or choose by labels."""

SCENARIO = (
    "fedmerge compare --data fashion-mnist --model lenet5 --clients 5 --client-examples 20000 "
    f"--partition dirichlet --alpha 0.1 --server-examples 5000 --server-labels {MANY} --seeds 0,1,2"
)
SMOKE = "fedmerge compare --server-examples 300 --server-labels 60 --methods mean,np,np-distill"


def command(init: str) -> str:
    """Return the command that trains the clients and merges them by every method that works from such a start."""
    names = [name for name in (*WITHOUT, *BY_LABELS) if init == "shared" or "start" not in needs([name])]
    return f"{SCENARIO} --init {init} --methods {','.join(names)}"


AGAIN = f"--server-labels {FEW} --methods {','.join(BY_FEW_LABELS)}"
"""What merges the same clients with few labels."""


def methods(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/methods.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        check(rows_of(compare(SMOKE, out / "methods-smoke")), {})
        return
    of_many = compare_all({out / f"methods-{init}-{MANY}": command(init) for init in INITS})
    many = dict(zip(INITS, of_many, strict=True))
    few = merge({out / f"methods-{init}-{FEW}": (run, AGAIN) for init, run in many.items()})
    found = {init: (rows_of(many[init]), rows) for init, rows in zip(INITS, few, strict=True)}
    for rows in found.values():
        check(*rows)
    content = {
        "commands": [*map(command, INITS), f"fedmerge merge RUN {AGAIN} --out NEW"],
        "accuracy": {
            f"{init}, {labels} labels": {method: list(row.accuracies.values()) for method, row in rows.items()}
            for init, budgets in found.items()
            for labels, rows in zip((MANY, FEW), budgets, strict=True)
        },
        "hours": hours(of_many, few),
        "table": table(found),
    }
    write("methods", content, many[INITS[0]])


def check(many: Rows, few: Rows) -> None:
    """Assert the claim.

    Args:
        many: rows by method, with many labels.
        few: with few labels.
    """
    mean, distilled, learned = [(name, mean_of(many, name)) for name in ("mean", "np-distill", "np")]
    assert distilled[1] > mean[1] + 0.05, f"{distilled} is not above {mean}"
    assert learned[1] > mean[1] + 0.05, f"{learned} is not above {mean}"
    for name in few:
        mean_of(few, name)  # finished on every seed
    holds("learned merges are above the mean, with labels and without", [mean, distilled, learned])


def table(found: Mapping[str, tuple[Rows, Rows]]) -> list[str]:
    """Return the lines of a Markdown table: a row for each method, three columns for each initialisation."""
    columns = [f"{init}, {what}" for init in INITS for what in ("no label", f"{FEW} labels", f"{MANY:,} labels")]
    lines = [f"| Method | {' | '.join(columns)} | Seconds |", f"| --- |{' ---: |' * (len(columns) + 1)}"]
    for method in (*WITHOUT, *BY_LABELS):
        cells = [
            percent(rows[method]) if method in rows and (method in WITHOUT) is without else NOTHING
            for many, few in (found[init] for init in INITS)
            for rows, without in ((many, True), (few, False), (many, False))
        ]
        lines.append(f"| `{method}` | {' | '.join(cells)} | {duration(found[INITS[0]][0][method].seconds)} |")
    return lines


if __name__ == "__main__":
    main(__doc__, methods)
