"""Claim: up to 20 clients a joint NP Merge loses nothing to successive pairs, and takes a fraction of their time.

    python experiments/many_clients.py                  # Fashion-MNIST, LeNet-5, 2 to 50 clients, 5 seeds
    python experiments/many_clients.py --size smoke     # digits, 1 seed, a minute; what CI runs

The same 20,000 images are divided among more and more clients by Dirichlet(0.3); the server has 1,000 labelled images.
Pairs are merged in three orders, of more than ten clients in one. At full size it writes
experiments/expected/many_clients.json.
"""

from __future__ import annotations

from pathlib import Path

from _run import accuracies, advantage, compare, compare_all, holds, hours, main, mean_of, rows_of, table, write

from fedmerge.runs import Run
from fedmerge.tables import duration, points
from fedmerge.tables import size as size_of

COUNTS = (2, 5, 10, 20, 50)
OURS = "activations+np"
PAIRS = tuple(f"activations+np-pairwise:order={order}" for order in ("tree", "given", "best-first"))
FEW = 10
"""Clients up to which all orders are tried."""
LEVEL = 20
"""Clients up to which a joint merge is within a point of successive pairs; of 50 it was not."""
METHODS = ("fedavg", "ensemble", "server-only", "best-client-finetune", "activations+finetune", OURS, *PAIRS)


def command(count: int) -> str:
    """Return the command of so many clients."""
    methods = METHODS if count <= FEW else METHODS[: METHODS.index(PAIRS[0]) + 1]
    return (
        f"fedmerge compare --data fashion-mnist --model lenet5 --clients {count} --client-examples 20000 "
        "--partition dirichlet --alpha 0.3 --init independent --server-examples 1000 --seeds 0,1,2,3,4 "
        f"--methods {','.join(methods)}"
    )


def many_clients(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        names = ("activations+np-pairwise:steps=20:lrs=0.1", "activations+np:steps=20:lrs=0.01")
        words = f"--clients 8 --server-examples 60 --local-epochs 2 --methods {','.join(names)}"
        rows = rows_of(compare(f"fedmerge compare {words}", out / "clients-smoke"))
        assert (rows[names[1]].seconds or 0) < (rows[names[0]].seconds or 0)
        holds("joint takes less time", [(name, mean_of(rows, name)) for name in names])
        return
    of_all = compare_all({out / f"many-clients-{count}": command(count) for count in COUNTS})
    runs = dict(zip(COUNTS, of_all, strict=True))
    found = {f"{count} clients": rows_of(run) for count, run in runs.items()}
    pairs = PAIRS[0]
    for count in (count for count in COUNTS if count <= LEVEL):
        rows = found[f"{count} clients"]
        assert mean_of(rows, OURS) > mean_of(rows, pairs) - 0.01, count
    most = found[f"{COUNTS[-1]} clients"]
    assert (most[OURS].seconds or 0) < (most[pairs].seconds or 0) / 5
    holds(f"joint NP Merge of up to {LEVEL} clients", [(name, mean_of(rows, name)) for name in (OURS, pairs)])
    timed = {name: {cell: rows[name].seconds for cell, rows in found.items() if name in rows} for name in METHODS}
    seconds = [
        f"| Seconds of `{name}` | {' | '.join(duration(timed[name].get(cell)) for cell in found)} |"
        for name in (OURS, *PAIRS)
    ]
    peaks = {
        name: {cell: _peak(run, name) for cell, run in zip(found, runs.values(), strict=True) if name in found[cell]}
        for name in (OURS, pairs)
    }
    memory = [
        f"| Memory of `{name}`, at most | {' | '.join(size_of(peaks[name].get(cell)) for cell in found)} |"
        for name in peaks
    ]
    ahead = [
        f"| `{OURS}` is above `{control}` by | "
        f"{' | '.join(points(advantage([rows], OURS, control)) for rows in found.values())} |"
        for control in (pairs, "best-client-finetune")
    ]
    content = {
        "commands": [command(count) for count in COUNTS],
        "hours": hours(runs.values()),
        "accuracy": accuracies(found),
        "seconds": timed,
        "peak bytes": peaks,
        "table": [*table(found, METHODS), *ahead, *seconds, *memory],
    }
    write("many_clients", content, runs[COUNTS[0]])


def _peak(run: Run, method: str) -> int:
    """Return by how much a merge grew the process's memory, at most over the seeds."""
    return max(result["peak_bytes"] or 0 for result in run.results() if result["method"] == method)


if __name__ == "__main__":
    main(__doc__, many_clients)
