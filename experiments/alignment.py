"""Claim: aligned models can be averaged, whatever they were trained on.

    python experiments/alignment.py            # pairs of ResNet-20, Fashion-MNIST; an hour and a half on two cores
    python experiments/alignment.py --size smoke     # digits, 1 seed, a minute; what CI runs

Two ResNet-20 are trained from different initialisations, 8 epochs on 10,000 images each: the same images, or disjoint
classes. The server owns 5,000 images. The claim compares uniform means; nothing is learned after the alignment, and
BatchNorm statistics are re-estimated for all. At full size it writes experiments/expected/alignment.json, which the
table of docs/methods.md is made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from _run import Rows, compare, holds, hours, main, mean_of, rows_of, write

from fedmerge.tables import percent

ALIGNERS = ("activations", "weights", "cca", "ot", "zipit", "auto")
METHODS = ("best-client", "ensemble", "mean", *(f"{aligner}+mean" for aligner in ALIGNERS))
SMOKE = ("mean", "activations+mean", "cca+mean")

FULL = (
    "fedmerge compare --data fashion-mnist --model resnet20 --clients 2 --local-epochs 8 --server-examples 5000 "
    f"--seeds 0,1,2 --methods {','.join(METHODS)}"
)
COMMANDS = {
    "full": {
        "same": f"{FULL} --partition same --client-examples 10000",
        "disjoint": f"{FULL} --partition disjoint --client-examples 20000",
    },
    "smoke": {"same": f"fedmerge compare --clients 2 --partition same --methods {','.join(SMOKE)}"},
}
REACH = {
    "same": {"activations+mean": 0.68, "cca+mean": 0.72, "zipit+mean": 0.73},
    "disjoint": {"activations+mean": 0.29, "zipit+mean": 0.39},
}
"""What align-n-merge reached on such pairs, its settings chosen on the images that it was evaluated on."""


def alignment(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/methods.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    runs = {pairs: compare(command, out / f"alignment-{pairs}") for pairs, command in COMMANDS[size].items()}
    found = {pairs: rows_of(run) for pairs, run in runs.items()}
    for pairs, rows in found.items():
        plain = mean_of(rows, "mean")
        for method in rows:
            if method.endswith("+mean"):
                assert mean_of(rows, method) > plain, f"{pairs}: {method} is not above the plain mean, {plain:.3f}"
        if size == "full":
            for method, least in REACH[pairs].items():
                assert mean_of(rows, method) >= least, f"{pairs}: {method} {mean_of(rows, method):.3f} < {least}"
        holds(f"{pairs}: aligned means are above the plain one", [(name, mean_of(rows, name)) for name in rows])
    if size == "full":
        content = {
            "commands": COMMANDS[size],
            "hours": hours(runs.values()),
            "accuracy": {
                pairs: {method: list(row.accuracies.values()) for method, row in rows.items()}
                for pairs, rows in found.items()
            },
            "table": table(found),
        }
        write("alignment", content, runs["same"])


def table(found: Mapping[str, Rows]) -> list[str]:
    """Return the lines of a Markdown table: a row for each method, a column for each kind of pair."""
    lines = [f"| Method | {' | '.join(found)} |", f"| --- |{' ---: |' * len(found)}"]
    for method in METHODS:
        lines.append(f"| `{method}` | {' | '.join(percent(rows[method]) for rows in found.values())} |")
    return lines


if __name__ == "__main__":
    main(__doc__, alignment)
