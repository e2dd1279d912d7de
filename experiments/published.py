"""Claim: in FedFisher's setting, one model merged without a label is above what FedFisher makes of 500 labels.

    python experiments/published.py                 # Fashion-MNIST, FedFisher's LeNet, 5 seeds; an hour
    python experiments/published.py --size smoke    # digits, 1 seed, a minute; what CI runs

The setting of FedFisher (arXiv 2403.12329) on Fashion-MNIST: 5 clients, class mixes ~ Dirichlet(0.1), 30 local epochs
from a shared initialisation, a LeNet of 44,190 parameters. Differences: the server's 2,000 images are in no client
(58,000 are left to these), the clients are trained as ours are (the learning rate decays), and `fedfisher` is its
diagonal form. At full size it writes experiments/expected/published.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _run import Rows, accuracies, compare, holds, hours, main, mean_of, merge, rows_of, table, write

CLIENTS = (
    "fedmerge compare --data fashion-mnist --model lenet:lenet --clients 5 --partition dirichlet-equal --alpha 0.1 "
    "--init shared --local-epochs 30 --lr 0.02 --server-examples 2000 --server-labels 0 --client-statistics fisher "
    "--seeds 0,1,2,3,4 --methods fedavg,mean-head,ensemble,ensemble-geometric"
)
SMOKE = (
    "fedmerge compare --partition dirichlet-equal --alpha 0.3 --init shared --server-examples 200 --server-labels 0 "
    "--client-statistics fisher --methods fedavg"
)

OURS, TAUGHT = "np-distill", "np-semi"
WITHOUT = ("ensemble-propagated", "feddf", "fresh-distill", "finetune-distill", "best-client-distill", OURS)
WITH = (
    *("fedfisher", "fisher", "server-only", "finetune", "best-client-finetune", "np", "np-pairwise"),
    *("fresh-semi", "finetune-semi", "best-client-semi", TAUGHT),
)
LONG = "2,000 images, 3,000 steps"
"""Ten times the steps, on seven times the mixtures of images, as chosen on development images."""
BUDGETS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "500 images": ("--server-limit 500 --server-labels 0", WITHOUT),
    "2,000 images": ("--server-limit 2000 --server-labels 0", WITHOUT),
    "500 labels": ("--server-limit 500 --server-labels 500", WITH),
    LONG: (
        "--server-limit 2000 --server-labels 0",
        tuple(f"{name}:steps=3000:mixtures=20000" for name in WITHOUT if name.endswith("distill")),
    ),
}
GOALS = {"500 images": (OURS, 0.82), "2,000 images": (OURS, 0.85), LONG: (OURS, 0.85), "500 labels": (TAUGHT, 0.83)}
"""What to reach, and by which method."""


def published(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        run = compare(SMOKE, out / "published-clients")
        ours = f"{OURS}:steps=60:lrs=0.01"
        merged, told = merge(
            {
                out / "published": (run, f"--methods {ours}"),
                out / "published-labels": (run, "--server-labels 200 --methods fedfisher"),
            }
        )
        check({**rows_of(run), **merged}, ours, "fedavg")
        mean_of(told, "fedfisher")
        return
    run = compare(CLIENTS, out / "clients-lenet")
    words = {name: f"{flags} --methods {','.join(methods)}" for name, (flags, methods) in BUDGETS.items()}
    again = merge({out / f"published-{place}": (run, arguments) for place, arguments in enumerate(words.values())})
    plain = rows_of(run)
    found = {"no data": plain} | dict(zip(words, again, strict=True))
    found[LONG] = {name.partition(":")[0]: row for name, row in found[LONG].items()}
    for name in ("500 images", "2,000 images"):
        check({**plain, **found[name]}, OURS, "fedavg")
        check({**found[name], **found["500 labels"]}, OURS, "fedfisher")
    content = {
        "commands": [CLIENTS, *(f"fedmerge merge RUN {arguments} --out NEW" for arguments in words.values())],
        "hours": hours([run], again),
        "accuracy": accuracies(found),
        "table": table(found, dict.fromkeys([*plain, *WITHOUT, *WITH])),
        "goals": {
            name: {"method": method, "goal": goal, "found": mean_of(found[name], method)}
            for name, (method, goal) in GOALS.items()
        },
    }
    write("published", content, run)


def check(rows: Rows, ours: str, below: str) -> None:
    """Assert that a method is above another.

    Args:
        rows: by method.
        ours: a method.
        below: another.
    """
    found = [(name, mean_of(rows, name)) for name in (ours, below)]
    assert found[0][1] > found[1][1], found
    holds(f"without a label, above {below}", found)


if __name__ == "__main__":
    main(__doc__, published)
