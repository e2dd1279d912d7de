"""Claim: clients of several architectures give a better model together than the best family of them gives alone.

    python experiments/architectures.py            # Fashion-MNIST and digits, 5 seeds each; under an hour of one core
    python experiments/architectures.py --size smoke     # digits, 1 seed, a minute; what CI runs

The tables of docs/architectures.md. `mixed`: clients of two widths and of two families, merged into the server's
architecture, with labels on the server (activations+np) and without (activations+np-distill); each step of the merge is
a row. `depths`: clients of two depths of one family. The claim is asserted on the mean over the seeds for `mixed`. At
full size it writes experiments/expected/architectures.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from _run import Rows, compare, holds, hours, main, mean_of, rows_of, write

from fedmerge.outcomes import SEPARATOR
from fedmerge.tables import markdown_table

WITH_LABELS, WITHOUT = "activations+np", "activations+np-distill"
CONTROLS = "fedavg,best-client,ensemble,ensemble-counts,server-only,best-client-finetune,fresh-distill"

COMMANDS = {
    "mixed": "fedmerge compare --data fashion-mnist --model lenet5 --models lenet5:2,lenet5@0.5:2,resnet20@0.25:1 "
    "--clients 5 --client-examples 10000 --partition dirichlet --alpha 0.3 --min-client-examples 300 --local-epochs 5 "
    f"--server-examples 1000 --seeds 0,1,2,3,4 --methods {CONTROLS},{WITH_LABELS},{WITHOUT}",
    "depths": "fedmerge compare --data digits --model resnet32@0.25 --models resnet20@0.25:2,resnet32@0.25:2 "
    "--clients 4 --partition dirichlet --alpha 0.3 --min-client-examples 60 --local-epochs 20 --server-examples 500 "
    f"--seeds 0,1,2,3,4 --methods fedavg,best-client,ensemble-counts,fresh-distill,{WITHOUT}",
}
SMOKE = (
    "fedmerge compare --model mlp --models mlp:2,mlp@0.5:2,lenet5:1 --server-examples 500 --local-epochs 5 "
    f"--methods fedavg,{WITH_LABELS}:steps=100,{WITHOUT}:steps=100"
)


def architectures(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/architectures.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        rows = rows_of(compare(SMOKE, out / "architectures-smoke"))
        for method in (WITH_LABELS, WITHOUT):
            mean_of(rows, f"{method}:steps=100")
        return
    runs = {name: compare(command, out / f"architectures-{name}") for name, command in COMMANDS.items()}
    found = {name: rows_of(run) for name, run in runs.items()}
    for method in (WITH_LABELS, WITHOUT):
        check(found["mixed"], method)
    content = {
        "commands": COMMANDS,
        "hours": hours(runs.values()),
        "accuracy": {
            name: {method: list(row.accuracies.values()) for method, row in rows.items()}
            for name, rows in found.items()
        },
        "tables": {name: table(rows) for name, rows in found.items()},
    }
    write("architectures", content, runs["mixed"])


def check(rows: Rows, method: str) -> None:
    """Assert the claim.

    Args:
        rows: by method and step.
        method: whose final model is compared with those of its families.
    """
    families = [name for name in rows if name.startswith(f"{method}{SEPARATOR}") and "ensemble" not in name]
    final, *alone = [(name, mean_of(rows, name)) for name in (method, *families)]
    assert len(alone) > 1, "a mixed federation has several families"
    assert all(final[1] > accuracy for _, accuracy in alone), f"{final} is not above {alone}"
    holds("the mixed federation is above its best family", [final, *alone])


def table(rows: Rows) -> Sequence[str]:
    """Return the lines of a Markdown table."""
    return markdown_table(list(rows.values())).splitlines()


if __name__ == "__main__":
    main(__doc__, architectures)
