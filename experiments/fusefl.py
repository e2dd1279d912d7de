"""Claim: with the clients' label counts and unlabelled images, one round makes a better model than FuseFL's exchanges.

    python experiments/fusefl.py                    # Fashion-MNIST, 55,000 client images, three α, 5 seeds; hours
    python experiments/fusefl.py --size smoke       # digits, 1 seed, a minute; what CI runs

The table that DENSE and FuseFL (arXiv 2410.20380) print: 5 clients, Dirichlet(0.1, 0.3, 0.5), a shared initialisation.
Differences: the server owns 5,000 of the 60,000 training images, without labels, which are in no client; the network is
a CNN of 420,000 parameters trained for 10 epochs (theirs: ResNet-18, 200 epochs); FuseFL exchanges blocks as often as
it has blocks, this is one round. At full size it writes experiments/expected/fusefl.json.
"""

from __future__ import annotations

from pathlib import Path

from _run import accuracies, compare, compare_all, holds, hours, main, mean_of, merge, rows_of, table, write

ALPHAS = (0.1, 0.3, 0.5)
PUBLISHED = {"FedAvg": (41.69, 82.96, 83.72), "DENSE": (50.29, 83.96, 85.94), "FuseFL": (83.20, 89.94, 90.50)}
"""Their Fashion-MNIST columns, in percent."""

OURS = "np-distill"
METHODS = ("ensemble-propagated", "fresh-distill", "best-client-distill", OURS)
AGAIN = f"--server-labels 0 --methods {','.join(METHODS)}"
SMOKE = "fedmerge compare --alpha 0.3 --init shared --server-examples 200 --server-labels 0 --methods fedavg"


def command(alpha: float) -> str:
    """Return the command that trains the clients.

    Args:
        alpha: of the Dirichlet distribution.
    """
    return (
        "fedmerge compare --data fashion-mnist --model cnn --clients 5 --client-examples 55000 --partition dirichlet "
        f"--alpha {alpha:g} --init shared --server-examples 5000 --server-labels 0 --seeds 0,1,2,3,4 "
        "--methods fedavg,best-client,ensemble"
    )


def fusefl(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "fusefl-clients")
        ours = f"{OURS}:steps=60:lrs=0.01"
        [merged] = merge({out / "fusefl": (run, f"--methods {ours}")})
        accuracy = mean_of(merged, ours)
        assert accuracy > mean_of(rows_of(run), "fedavg")
        holds("without a label, above fedavg", [(ours, accuracy)])
        return
    runs = compare_all({out / f"fusefl-clients-{alpha:g}": command(alpha) for alpha in ALPHAS})
    again = merge({out / f"fusefl-{alpha:g}": (run, AGAIN) for alpha, run in zip(ALPHAS, runs, strict=True)})
    found = {
        f"α = {alpha:g}": {**rows_of(run), **merged} for alpha, run, merged in zip(ALPHAS, runs, again, strict=True)
    }
    for name, rows in found.items():
        assert mean_of(rows, OURS) > mean_of(rows, "fedavg")
        holds(f"above fedavg, {name}", [(method, mean_of(rows, method)) for method in (OURS, "fedavg")])
    theirs = [
        f"| {name}, published | {' | '.join(f'{value:.1f}' for value in row)} |" for name, row in PUBLISHED.items()
    ]
    content = {
        "commands": [*map(command, ALPHAS), f"fedmerge merge RUN {AGAIN} --out NEW"],
        "hours": hours(runs, again),
        "accuracy": accuracies(found),
        "table": [*table(found, ("fedavg", "best-client", "ensemble", *METHODS)), *theirs],
        "goals": {
            name: {"goal": goal / 100, "found": mean_of(rows, OURS)}
            for (name, rows), goal in zip(found.items(), PUBLISHED["FuseFL"], strict=True)
        },
    }
    write("fusefl", content, runs[0])


if __name__ == "__main__":
    main(__doc__, fusefl)
