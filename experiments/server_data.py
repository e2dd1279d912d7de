"""Claim: the fewer images and labels the server has, the more the clients' opinions of them are worth.

    python experiments/server_data.py               # Fashion-MNIST, LeNet-5, Dirichlet(0.1), 5 seeds
    python experiments/server_data.py --size smoke  # digits, 1 seed, a minute; what CI runs

The same clients, from initialisations of their own, are merged with 200 to 5,000 images without labels, with 10 to
5,000 labelled ones, and with 5,000 images of which 10 to 1,000 are labelled. At full size it writes
experiments/expected/server_data.json.
"""

from __future__ import annotations

from pathlib import Path

from _run import accuracies, compare, holds, hours, main, mean_of, merge, rows_of, table, write

CLIENTS = (
    "fedmerge compare --data fashion-mnist --model lenet5 --clients 5 --client-examples 20000 --partition dirichlet "
    "--alpha 0.1 --init independent --server-examples 5000 --server-labels 0 --seeds 0,1,2,3,4 "
    "--methods fedavg,ensemble"
)
SMOKE = "fedmerge compare --server-examples 300 --server-labels 0 --methods fedavg"

UNLABELLED, LABELLED, MIXED = (200, 1000, 5000), (10, 50, 100, 500, 1000, 5000), (10, 100, 1000)
WITHOUT = ("ensemble-propagated", "fresh-distill", "best-client-distill", "activations+np-distill")
BY_LABELS = ("ensemble-stacked", "server-only", "best-client-finetune", "activations+finetune", "activations+np")
SEMI = ("fresh-semi", "best-client-semi", "activations+np-semi")

CELLS = {
    **{f"{count:,} images": (count, 0, WITHOUT) for count in UNLABELLED},
    **{f"{count:,} labels": (count, count, (*BY_LABELS, *SEMI)) for count in LABELLED},
    **{f"5,000 images, {count:,} labels": (5000, count, (*BY_LABELS[:1], *SEMI)) for count in MIXED},
}
"""Images that the server uses, labels among them, and methods, by name."""


def arguments(cell: str) -> str:
    """Return how the clients are merged in a cell.

    Args:
        cell: a key of `CELLS`.
    """
    images, labels, methods = CELLS[cell]
    return f"--server-limit {images} --server-labels {labels} --methods {','.join(methods)}"


def server_data(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "server-data-clients")
        names = ("server-only:steps=60:lrs=0.01", "activations+np-semi:steps=60:lrs=0.01")
        [few] = merge({out / "few": (run, f"--server-limit 40 --server-labels 40 --methods {','.join(names)}")})
        accuracy = {name: mean_of(few, name) for name in names}
        assert accuracy[names[1]] > accuracy[names[0]]
        holds("with 40 labels, above training on them", accuracy.items())
        return
    run = compare(CLIENTS, out / "server-data-clients")
    again = merge({out / name.replace(", ", "-").replace(" ", "-"): (run, arguments(name)) for name in CELLS})
    found = dict(zip(CELLS, again, strict=True))
    gains = {
        name: mean_of(found[name], SEMI[-1]) - mean_of(found[name], "server-only")
        for name in (f"{count:,} labels" for count in LABELLED)
    }
    assert gains["100 labels"] > gains["1,000 labels"] > gains["5,000 labels"], gains
    holds("the gain over training on the server's labels alone falls with their number", list(gains.items()))
    content = {
        "commands": [CLIENTS, *(f"fedmerge merge RUN {arguments(name)} --out NEW" for name in CELLS)],
        "hours": hours([run], again),
        "accuracy": {"no data": accuracies({"": rows_of(run)})[""], **accuracies(found)},
        "tables": {
            "unlabelled": table({name: found[name] for name in list(CELLS)[:3]}, WITHOUT),
            "labelled": table({name: found[name] for name in list(CELLS)[3:9]}, (*BY_LABELS, *SEMI)),
            "both": table({name: found[name] for name in list(CELLS)[9:]}, (*BY_LABELS[:1], *SEMI)),
        },
    }
    write("server_data", content, run)


if __name__ == "__main__":
    main(__doc__, server_data)
