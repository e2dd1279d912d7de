"""Claim: one round and a learned merge are worth more than ten rounds of FedAvg, at a tenth of the bytes.

    python experiments/many_rounds.py                   # Fashion-MNIST, 5 clients, Dirichlet(0.1), 5 seeds
    python experiments/many_rounds.py --size smoke      # digits, 1 seed, less than a minute; what CI runs

FedAvg and FedProx train one epoch a round, so that their tenth round has cost the clients as much computing as our one
round of ten epochs. Ours merges without any label on the server, whose 5,000 images the others do not need; it is also
made with uploads in half precision, and in every one of ten rounds. At full size it writes
experiments/expected/many_rounds.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from _clients import PARTITIONS, SERVER, clients, command
from _run import Rows, compare, compare_all, holds, main, mean_of, merge, write

from fedmerge.runs import Run
from fedmerge.summary import Difference, Row, with_interval
from fedmerge.tables import NOTHING, percent, points
from fedmerge.tables import size as written

PARTITION = "Dirichlet(0.1)"
SEEDS = (0, 1, 2, 3, 4)
SHOWN = (1, 2, 5, 10, 20)
OURS = "np-distill"
EVERY = f"`{OURS}` in every round"
COURSES = {
    "FedAvg": "--align identity --merge fedavg --rounds 20",
    "FedProx(0.01)": "--align identity --merge fedavg --rounds 20 --proximal-mu 0.01",
    EVERY: f"--align identity --merge {OURS}:steps=100:lrs=0.01 --rounds 10",
}
"""Flags of what goes on from round to round, by name; a merge of every round has 100 steps at one rate, not tuned."""
FRESH = "fresh-distill"
AGAIN = f"--server-labels 0 --methods {OURS},{FRESH}"
SMOKE = "fedmerge simulate --init shared --local-epochs 1 --align identity --merge fedavg --rounds 3"


def rounds(name: str, seed: int) -> str:
    """Return the command of some rounds.

    Args:
        name: a key of `COURSES`.
        seed: of the run.
    """
    return (
        f"fedmerge simulate --data fashion-mnist --model cnn --clients 5 --client-examples 20000 "
        f"{PARTITIONS[PARTITION]} --init shared --local-epochs 1 --server-examples {SERVER} --server-labels 0 "
        f"{COURSES[name]} --seed {seed}"
    )


def many_rounds(size: str, out: Path) -> None:
    """Run, assert, and at full size write what docs/benchmark.md quotes.

    Args:
        size: "full" or "smoke".
        out: folder for the runs.
    """
    if size == "smoke":
        course = accuracy_by_round(compare(SMOKE, out / "rounds-smoke"))
        assert len(course) == 3
        holds("FedAvg goes on from round to round", [("first", course[0]), ("last", course[-1])])
        return
    [run, halved] = clients([(PARTITION, "shared"), (PARTITION, "shared", "--upload-dtype float16")], out)
    single, half = merge({out / "one-round-shared": (run, AGAIN), out / "one-round-halved": (halved, AGAIN)})
    one = mean_of(single, OURS)
    cells = {out / f"rounds-{place}-{seed}": rounds(name, seed) for place, name in enumerate(COURSES) for seed in SEEDS}
    of_all = iter(compare_all(cells))
    runs = {name: [next(of_all) for _ in SEEDS] for name in COURSES}
    courses = {name: [accuracy_by_round(item) for item in found] for name, found in runs.items()}
    means = {name: [statistics.fmean(values) for values in zip(*found, strict=True)] for name, found in courses.items()}
    tenth = {name: found[9] for name, found in means.items() if name != EVERY}
    assert all(one >= accuracy for accuracy in tenth.values()), f"{one} is below {tenth}"
    holds("one round of ours is at least as good as ten", [(OURS, one), *tenth.items()])
    traffic = {name: bytes_of_round(found[0]) for name, found in runs.items()}
    rows = {
        f"`{OURS}`, one round of ten epochs": single[OURS],
        "the same, uploads in float16": half[OURS],
        f"`{FRESH}`, that round's targets": single[FRESH],
    }
    content = {
        "commands": [
            *(command(PARTITION, "shared"), command(PARTITION, "shared", "--upload-dtype float16")),
            *(f"fedmerge merge RUN {AGAIN} --out NEW", *(rounds(name, SEEDS[0]) for name in COURSES)),
        ],
        "accuracy": {**{name: list(row.accuracies.values()) for name, row in rows.items()}, **courses},
        "one round is above by": {
            f"{name}, {number} rounds": points(above(single[OURS], found, number))
            for name, found in courses.items()
            for number in (10, 20)
            if number <= len(found[0])
        },
        "bytes a round": {**{name: sent(row) for name, row in rows.items()}, **traffic},
        "table": table(rows, means, traffic),
    }
    write("many_rounds", content, run)


def above(row: Row, courses: Sequence[Sequence[float]], number: int) -> Difference:
    """Return by how much a method is more accurate than some rounds are, paired by seed.

    Args:
        row: of all `SEEDS`.
        courses: accuracy by seed and round.
        number: of rounds.
    """
    pairs = zip(SEEDS, courses, strict=True)
    return with_interval([row.accuracies[seed] - course[number - 1] for seed, course in pairs])


def sent(row: Row) -> int:
    """Return what all clients send and receive in one round."""
    return (row.bytes_up or 0) + (row.bytes_down or 0)


def accuracy_by_round(run: Run) -> list[float]:
    """Return the accuracy after each round."""
    lines = sorted(run.results(), key=lambda line: int(line["round"]))
    assert all(line["status"] == "ok" for line in lines)
    return [line["accuracy"] for line in lines]


def bytes_of_round(run: Run) -> int:
    """Return what all clients send and receive in a round."""
    line = run.results()[-1]
    return int(line["bytes_up"] + line["bytes_down"])


def table(rows: Rows, means: Mapping[str, Sequence[float]], traffic: Mapping[str, int]) -> list[str]:
    """Return the lines of a Markdown table: accuracy in percent after so many rounds, and what they sent.

    Args:
        rows: of one round, by name; the first is what others are to reach.
        means: accuracy by round, by name.
        traffic: bytes a round, by name.
    """
    titles = [f"{number} round{'s' if number > 1 else ''}" for number in SHOWN]
    lines = [
        f"| Method | {' | '.join(titles)} | Rounds to reach the first row | Bytes until then |",
        f"| --- |{' ---: |' * (len(SHOWN) + 2)}",
    ]
    one = mean_of(rows, next(iter(rows)))
    for name, row in rows.items():
        lines.append(f"| {name} | {percent(row)} |{f' {NOTHING} |' * len(SHOWN)} {written(sent(row))} |")
    for name, course in means.items():
        cells = [f"{100 * course[number - 1]:.1f}" if number <= len(course) else NOTHING for number in SHOWN]
        reached = next((number for number, accuracy in enumerate(course, 1) if accuracy >= one), None)
        until = f"not in {len(course)}" if reached is None else str(reached)
        all_bytes = written((reached or len(course)) * traffic[name])
        lines.append(f"| {name} | {' | '.join([*cells, until, all_bytes])} |")
    return lines


if __name__ == "__main__":
    main(__doc__, many_rounds)
