"""Claim: after one round from independent initialisations, averaging fails, and aligning and NP-merging does not.

    python experiments/one_round.py            # Fashion-MNIST, 5 clients, Dirichlet(0.1), 5 seeds; the README's table
    python experiments/one_round.py --size smoke     # digits, 1 seed, a minute; what CI runs

It runs `fedmerge compare`, asserts the claim on the mean over the seeds, and at full size writes the results to
experiments/expected/one_round.json and the figures to docs/figures/.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from _run import FIGURES, compare, holds, main, mean_of, rows_of, write

from fedmerge.catalogue import METHODS
from fedmerge.tables import markdown_table

OURS = "activations+np"
FAILING = ("fedavg", "mean", "activations+mean")
LEAST_GAIN = 0.05
HEAD = "activations+head-finetune"
TOLD = ("fresh-semi", "best-client-semi", "activations+np-semi")
"""Methods that learn from the labels and from the clients' opinions: ours, and its controls."""

COMMANDS = {
    "full": "fedmerge compare --data fashion-mnist --model cnn --clients 5 --client-examples 20000 "
    "--partition dirichlet --alpha 0.1 --init independent --server-examples 1000 --seeds 0,1,2,3,4 "
    f"--methods {','.join((*METHODS, HEAD, *TOLD))}",
    "smoke": f"fedmerge compare --methods {','.join((*FAILING, OURS))}",
}


def one_round(size: str, out: Path) -> None:
    """Run, assert, and at full size write what the README quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the run.
    """
    run = compare(COMMANDS[size], out / "one-round")
    rows = rows_of(run)
    ours, *theirs = [(method, mean_of(rows, method)) for method in (OURS, *FAILING)]
    assert all(ours[1] > accuracy + LEAST_GAIN for _, accuracy in theirs), f"{ours} is not above {theirs}"
    holds("aligned NP Merge is well above every average", [ours, *theirs])
    if size == "full":
        FIGURES.mkdir(parents=True, exist_ok=True)
        for name in ("accuracy", "labels", "classes"):
            shutil.copy(run.path / "figures" / f"{name}.png", FIGURES / f"{name}.png")
        content = {
            "command": COMMANDS[size],
            "accuracy": {method: list(row.accuracies.values()) for method, row in rows.items()},
            "table": markdown_table(list(rows.values())).splitlines(),
        }
        write("one_round", content, run)


if __name__ == "__main__":
    main(__doc__, one_round)
