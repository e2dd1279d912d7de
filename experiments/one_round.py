"""Claim: after one round from independent initialisations, averaging fails, and aligning and NP-merging does not.

    python experiments/one_round.py            # Fashion-MNIST, 5 clients, Dirichlet(0.1), 3 seeds; the README's table
    python experiments/one_round.py --size smoke     # digits, 1 seed, a minute; what CI runs

It runs `fedmerge compare`, asserts the claim on the mean over the seeds, and at full size writes the results to
experiments/expected/one_round.json and the figures to docs/figures/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from fedmerge.runs import Run
from fedmerge.summary import Row, summarize
from fedmerge.tables import markdown_table

HERE = Path(__file__).parent
OURS = "activations+np"
FAILING = ("fedavg", "mean", "activations+mean")
LEAST_GAIN = 0.05

COMMANDS = {
    "full": "fedmerge compare --data fashion-mnist --model cnn --clients 5 --client-examples 20000 "
    "--partition dirichlet --alpha 0.1 --init independent --server-examples 1000 --seeds 0,1,2",
    "smoke": f"fedmerge compare --methods {','.join((*FAILING, OURS))}",
}


def main() -> None:
    """Run the experiment at the size asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=COMMANDS, default="full")
    parser.add_argument("--out", type=Path, help="run folder; one that is there already is gone on with")
    arguments = parser.parse_args()
    command = COMMANDS[arguments.size]
    with tempfile.TemporaryDirectory() as temporary:
        out = arguments.out or Path(temporary) / "run"
        resume = ["--resume", "--out", str(out)] if (out / "config.json").exists() else ["--out", str(out)]
        words = [] if len(resume) == 3 else shlex.split(command)[2:]
        subprocess.run([sys.executable, "-m", "fedmerge", "compare", *words, *resume], check=True)
        run = Run.open(out)
        rows = {row.method: row for row in summarize(run.results(), run.settings["seeds"])}
        check(rows)
        if arguments.size == "full":
            write(run, command, rows)


def check(rows: dict[str, Row]) -> None:
    """Assert the claim: NP Merge of aligned models is well above every average.

    Args:
        rows: by method.
    """
    ours = rows[OURS].mean
    assert ours is not None, f"{OURS} did not finish: {rows[OURS].errors}"
    for method in FAILING:
        theirs = rows[method].mean
        assert theirs is not None, f"{method} did not finish: {rows[method].errors}"
        assert ours > theirs + LEAST_GAIN, f"{OURS} reached {ours:.3f}, {method} {theirs:.3f}"
    print(f"holds: {OURS} {ours:.3f}, " + ", ".join(f"{method} {rows[method].mean:.3f}" for method in FAILING))


def write(run: Run, command: str, rows: dict[str, Row]) -> None:
    """Write the expected results and the figures.

    Args:
        run: the finished run.
        command: that made it.
        rows: by method.
    """
    content = {
        "command": command,
        "versions": {name: text for name, text in run.settings["versions"].items() if name != "platform"},
        "accuracy": {method: list(row.accuracies.values()) for method, row in rows.items()},
        "table": markdown_table(list(rows.values())).splitlines(),
    }
    figures = HERE.parent / "docs" / "figures"
    for folder in (HERE / "expected", figures):
        folder.mkdir(parents=True, exist_ok=True)
    (HERE / "expected" / "one_round.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("accuracy", "labels", "classes"):
        shutil.copy(run.path / "figures" / f"{name}.png", figures / f"{name}.png")
    print(markdown_table(list(rows.values())))


if __name__ == "__main__":
    main()
