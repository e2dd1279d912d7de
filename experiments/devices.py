"""Claim: devices that differ are handled: weak ones send fewer bytes, and what is learned of all stays above FedAvg.

    python experiments/devices.py      # Fashion-MNIST, 5 clients, Dirichlet(0.1), 5 seeds; half an hour of one core
    python experiments/devices.py --size smoke     # digits, 1 seed, a minute; what CI runs

The table of docs/architectures.md: full devices; weak ones (one client trains an epoch, one an epoch and sends float16,
one trains and sends its last two layers alone); and the same weak ones with FedProx, whose pull toward the start is
meant for such unequal work. At full size it writes experiments/expected/devices.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _run import Rows, compare, holds, hours, main, mean_of, rows_of, write

from fedmerge.tables import percent, size

METHODS = ("fedavg", "ensemble-counts", "np")
SCENARIO = (
    "fedmerge compare --data fashion-mnist --model lenet5 --clients 5 --client-examples 10000 --partition dirichlet "
    "--alpha 0.1 --min-client-examples 300 --local-epochs 5 --init shared --server-examples 500 --seeds 0,1,2,3,4 "
    f"--methods {','.join(METHODS)}"
)
SMOKE = f"fedmerge compare --model mlp@0.5 --init shared --local-epochs 5 --methods {','.join(METHODS)}"
WEAK = " --devices epochs=1:1,epochs=1+float16:1,layers=2:1"
VARIANTS = {
    "full": ("all devices alike", ""),
    "weak": ("weak devices", WEAK),
    "weak-prox-0.01": ("weak devices, `--proximal-mu 0.01`", f"{WEAK} --proximal-mu 0.01"),
    "weak-prox-0.1": ("weak devices, `--proximal-mu 0.1`", f"{WEAK} --proximal-mu 0.1"),
}


def devices(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/architectures.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    scenario, names = (SCENARIO, list(VARIANTS)) if size == "full" else (SMOKE, ["full", "weak"])
    commands = {name: scenario + VARIANTS[name][1] for name in names}
    runs = {name: compare(command, out / f"devices-{size}-{name}") for name, command in commands.items()}
    found = {name: rows_of(run) for name, run in runs.items()}
    check(found)
    if size == "full":
        content = {
            "commands": commands,
            "hours": hours(runs.values()),
            "accuracy": {
                name: {method: list(row.accuracies.values()) for method, row in rows.items()}
                for name, rows in found.items()
            },
            "table": table(found),
        }
        write("devices", content, runs["full"])


def check(found: Mapping[str, Rows]) -> None:
    """Assert the claim.

    Args:
        found: rows by method, by variant.
    """
    bytes_up = {name: rows["fedavg"].bytes_up or 0 for name, rows in found.items()}
    assert bytes_up["weak"] < bytes_up["full"], f"weak devices send {bytes_up}"
    learned, average = (mean_of(found["weak"], method) for method in ("np", "fedavg"))
    assert learned > average, f"np {learned} is not above fedavg {average}"
    holds("with weak devices NP Merge is above FedAvg", [("np", learned), ("fedavg", average)])


def table(found: Mapping[str, Rows]) -> list[str]:
    """Return the lines of a Markdown table: a row for each variant, a column for each method."""
    lines = [
        f"| Clients | {' | '.join(f'`{method}`' for method in METHODS)} | Up |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rows in found.items():
        cells = [percent(rows[method]) for method in METHODS]
        lines.append(f"| {VARIANTS[name][0]} | {' | '.join(cells)} | {size(rows['fedavg'].bytes_up)} |")
    return lines


if __name__ == "__main__":
    main(__doc__, devices)
