"""Claim: a learned merge is far above the mean of the models, with labels on the server and without.

    python experiments/methods.py            # Fashion-MNIST, 5 clients, Dirichlet(0.1), 3 seeds; hours
    python experiments/methods.py --size smoke     # digits, 1 seed, a minute; what CI runs

The table of docs/methods.md: every method on the same clients, which start from one initialisation or from their own.
The server owns 5,000 images and knows the classes of 1,000 or of 100 of them. Methods that learn from labels see those
images alone; methods without labels see all images and no label; `-semi` methods see both. At full size it writes
experiments/expected/methods.json.
"""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from _run import Rows, compare, holds, main, mean_of, rows_of, write

from fedmerge.runs import Run
from fedmerge.tables import NOTHING, duration, percent

INITS = ("shared", "independent")
FEW, MANY = 100, 1000

BY_LABELS = (
    *("best-client", "server-only", "finetune", "best-client-finetune", "np", "np-pairwise"),
    *("activations+mean", "weights+mean", "universe+mean", "cca+mean", "zipit+mean", "ot+mean", "auto+mean"),
    *("activations+finetune", "activations+np-pairwise", "activations+np"),
    *("ensemble-stacked", "finetune-semi", "np-semi", "activations+np-semi"),
)
"""Methods that learn or choose by labels."""
WITHOUT = (
    *("fedavg", "mean", "mean-head", "ensemble", "ensemble-counts", "ensemble-geometric"),
    *("fresh-distill", "finetune-distill", "best-client-distill", "np-distill", "activations+np-distill"),
)
"""Methods whose result depends on no label."""

COMMANDS = {
    "full": "fedmerge compare --data fashion-mnist --model lenet5 --clients 5 --client-examples 20000 "
    "--partition dirichlet --alpha 0.1 --server-examples 5000 --seeds 0,1,2 "
    f"--server-labels {MANY} --methods {','.join((*WITHOUT, *BY_LABELS))}",
    "smoke": "fedmerge compare --server-examples 300 --server-labels 60 --methods mean,np,np-distill",
}
AGAIN = f"fedmerge merge RUN --server-labels {FEW} --methods {','.join(BY_LABELS)}"


def methods(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/methods.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        rows = rows_of(compare(COMMANDS[size], out / "methods-smoke"))
        check(rows, {})
        return
    found: dict[str, tuple[Rows, Rows]] = {}
    for init in INITS:
        run = compare(f"{COMMANDS[size]} --init {init}", out / f"methods-{init}-{MANY}")
        found[init] = rows_of(run), rows_of(again(run, out / f"methods-{init}-{FEW}"))
        check(*found[init])
    content = {
        "commands": [*(f"{COMMANDS[size]} --init {init}" for init in INITS), AGAIN],
        "accuracy": {
            f"{init}, {labels} labels": {method: list(row.accuracies.values()) for method, row in rows.items()}
            for init, budgets in found.items()
            for labels, rows in zip((MANY, FEW), budgets, strict=True)
        },
        "table": table(found),
    }
    write("methods", content, run)


def again(run: Run, out: Path) -> Run:
    """Merge the stored updates by the methods that learn from labels, with few of them; or take what is there.

    Args:
        run: the run whose updates are merged.
        out: the run folder for it.
    """
    if not (out / "report.html").exists():
        words = [str(run.path) if word == "RUN" else word for word in shlex.split(AGAIN)[1:]]
        subprocess.run([sys.executable, "-m", "fedmerge", *words, "--out", str(out)], check=True)
    return Run.open(out)


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
        cells: list[str] = []
        for many, few in (found[init] for init in INITS):
            here = [few[method], many[method]] if method in few else [many[method]]
            texts = [percent(row) for row in here]
            cells += [NOTHING, *texts] if method in few else [*texts, NOTHING, NOTHING]
        lines.append(f"| `{method}` | {' | '.join(cells)} | {duration(found[INITS[0]][0][method].seconds)} |")
    return lines


if __name__ == "__main__":
    main(__doc__, methods)
