"""Claim: from a shared start, the less alike the clients' data, the more a merge without a label is above FedAvg.

    python experiments/noniid.py                    # Fashion-MNIST, LeNet-5, seven partitions, two starts, 5 seeds
    python experiments/noniid.py --size smoke       # digits, 1 seed, a minute; what CI runs

From starts of their own FedAvg is at chance whatever the skew, and the claim is that the merge is above it. The server
owns 1,000 images and no class of any. `fedmerge report` on the folder (--out) draws accuracy against the skew. At full
size it writes experiments/expected/noniid.json.
"""

from __future__ import annotations

from pathlib import Path

from _run import Rows, accuracies, advantage, compare, compare_all, holds, hours, main, mean_of, rows_of, table, write

from fedmerge.tables import points

PARTITIONS = {
    **{f"{alpha:g}": f"--partition dirichlet --alpha {alpha:g}" for alpha in (0.05, 0.1, 0.3, 0.5, 1)},
    "iid": "--partition iid",
    "disjoint": "--partition disjoint",
}
INITS = ("shared", "independent")
OURS = "activations+np-distill"
CONTROLS = ("fresh-distill", "best-client-distill")
METHODS = ("fedavg", "ensemble", "ensemble-propagated", *CONTROLS, OURS)


def command(partition: str, init: str) -> str:
    """Return the command of a cell.

    Args:
        partition: a key of `PARTITIONS`.
        init: "shared" or "independent".
    """
    return (
        "fedmerge compare --data fashion-mnist --model lenet5 --clients 5 --client-examples 20000 "
        f"{PARTITIONS[partition]} --init {init} --server-examples 1000 --server-labels 0 --seeds 0,1,2,3,4 "
        f"--methods {','.join(METHODS)}"
    )


def noniid(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        ours = "activations+np-distill:steps=60:lrs=0.01"
        words = f"--alpha 0.1 --server-examples 200 --server-labels 0 --methods fedavg,{ours}"
        rows = rows_of(compare(f"fedmerge compare {words}", out / "noniid-smoke"))
        gain = mean_of(rows, ours) - mean_of(rows, "fedavg")
        assert gain > 0
        holds("without a label, above FedAvg by", [(ours, gain)])
        return
    cells = [(name, init) for init in INITS for name in PARTITIONS]
    of_all = compare_all({out / f"noniid-{name}-{init}": command(name, init) for name, init in cells})
    runs = dict(zip(cells, of_all, strict=True))
    found = {f"{name}, {init}": rows_of(run) for (name, init), run in runs.items()}
    gains = {
        init: {name: advantage([found[f"{name}, {init}"]], OURS, "fedavg").mean for name in PARTITIONS}
        for init in INITS
    }
    shared, independent = gains["shared"], gains["independent"]
    assert shared["0.1"] > shared["1"] > shared["iid"] - 0.01, shared
    holds("the gain over FedAvg grows with the skew, shared", shared.items())
    assert min(independent.values()) > 0, independent
    holds("the gain over FedAvg, independent", independent.items())
    content = {
        "commands": [command(name, init) for name, init in runs],
        "hours": hours(runs.values()),
        "accuracy": accuracies(found),
        "tables": {init: _lines({name: found[f"{name}, {init}"] for name in PARTITIONS}) for init in INITS},
    }
    write("noniid", content, next(iter(runs.values())))


def _lines(columns: dict[str, Rows]) -> list[str]:
    """Return a table's lines, and by how much ours is above the single models that learn from the same targets."""
    ahead = [
        f"| `{OURS}` is above `{control}` by | "
        f"{' | '.join(points(advantage([rows], OURS, control)) for rows in columns.values())} |"
        for control in CONTROLS
    ]
    return [*table(columns, METHODS), *ahead]


if __name__ == "__main__":
    main(__doc__, noniid)
