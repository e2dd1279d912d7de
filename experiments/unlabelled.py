"""Claim: without a single label on the server, one model comes near the ensemble of all clients, and far above FedAvg.

    python experiments/unlabelled.py                    # Fashion-MNIST, 5 clients, Dirichlet(0.1), 5 seeds
    python experiments/unlabelled.py --size smoke       # digits, 1 seed, a minute; what CI runs

The server owns 5,000 images and no class of any. `fresh-distill` is the control that tells what the merge itself adds:
a new network taught by the same teacher. What the teacher can be at most is told by the same ensemble, taught by the
classes of all 5,000 images. At full size it writes experiments/expected/unlabelled.json.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from _clients import SERVER, SMOKE, clients, command
from _run import Rows, accuracies, compare, holds, main, mean_of, merge, rows_of, table, write

PARTITION = "Dirichlet(0.1)"
OURS = {"shared": "np-distill", "independent": "activations+np-distill"}
"""By the clients' initialisation: models that started alike need no alignment."""
GOALS = {"shared": 0.85, "independent": 0.84}
"""Accuracies to reach."""

ENSEMBLES = ("ensemble", "ensemble-geometric", "ensemble-propagated")
CONTROLS = ("feddf", "fresh-distill", "finetune-distill", "best-client-distill")
CEILING, ALL_LABELS = "ensemble-stacked", f"--server-labels {SERVER}"
METHODS = (*ENSEMBLES[1:], *CONTROLS, "activations+np-distill")


def again(methods: Iterable[str], labels: str = "--server-labels 0") -> str:
    """Return how the clients are merged again."""
    return f"{labels} --methods {','.join(methods)}"


def unlabelled(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "unlabelled-clients")
        ours = f"{OURS['independent']}:steps=60:lrs=0.01"
        [merged] = merge({out / "unlabelled": (run, f"--methods {ours}")})
        check("smoke", {**rows_of(run), **merged}, ours, ("fedavg",))
        return
    runs = dict(zip(OURS, clients([(PARTITION, init) for init in OURS], out), strict=True))
    jobs = {out / f"unlabelled-{init}": (run, again(METHODS)) for init, run in runs.items()}
    *aligned, plain = merge({**jobs, out / "unlabelled-shared-as-they-are": (runs["shared"], again(["np-distill"]))})
    told = {out / f"unlabelled-ceiling-{init}": (run, again([CEILING], ALL_LABELS)) for init, run in runs.items()}
    found = {init: {**rows_of(run), **new} for (init, run), new in zip(runs.items(), aligned, strict=True)}
    found["shared"] |= plain
    for rows, ceiling in zip(found.values(), merge(told), strict=True):
        rows[f"{CEILING}, {SERVER:,} labels"] = ceiling[CEILING]
    for init, rows in found.items():
        check(init, rows, OURS[init], ("fedavg", "feddf", "fresh-distill"))
    content = {
        "commands": [
            *(command(PARTITION, init) for init in OURS),
            *(f"fedmerge merge RUN {again(names)} --out NEW" for names in (METHODS, ["np-distill"])),
            f"fedmerge merge RUN {again([CEILING], ALL_LABELS)} --out NEW",
        ],
        "accuracy": accuracies(found),
        "table": table(found, dict.fromkeys(name for rows in found.values() for name in rows)),
        "goals": {init: {"goal": goal, "found": mean_of(found[init], OURS[init])} for init, goal in GOALS.items()},
    }
    write("unlabelled", content, runs["shared"])


def check(name: str, rows: Rows, ours: str, below: Sequence[str]) -> None:
    """Assert the claim.

    Args:
        name: of the clients.
        rows: by method.
        ours: a method.
        below: methods that it is to be above.
    """
    first, *others = [(method, mean_of(rows, method)) for method in (ours, *below)]
    assert all(first[1] > accuracy for _, accuracy in others), f"{first} is not above {others}"
    holds(f"without a label, {name}", [first, *others])


if __name__ == "__main__":
    main(__doc__, unlabelled)
