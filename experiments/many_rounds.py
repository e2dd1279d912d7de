"""Claim: one round and a learned merge are worth more than ten rounds of FedAvg, at a tenth of the bytes.

    python experiments/many_rounds.py                   # Fashion-MNIST, 5 clients, Dirichlet(0.1), 5 seeds
    python experiments/many_rounds.py --size smoke      # digits, 1 seed, less than a minute; what CI runs

FedAvg and FedProx train one epoch a round, so that their tenth round has cost the clients as much computing as our one
round of ten epochs. Ours merges without any label on the server, whose 5,000 images the others do not need. At full
size it writes experiments/expected/many_rounds.json.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from _clients import PARTITIONS, SERVER, clients, command
from _run import compare, compare_all, holds, main, merge, write

from fedmerge.runs import Run
from fedmerge.tables import size as written

PARTITION = "Dirichlet(0.1)"
SEEDS = (0, 1, 2, 3, 4)
SHOWN = (1, 2, 5, 10, 20)
RIVALS = {
    "FedAvg": "",
    "FedProx(0.01)": "--proximal-mu 0.01",
}
OURS = "np-distill"
AGAIN = f"--server-labels 0 --methods {OURS}"
SMOKE = "fedmerge simulate --init shared --local-epochs 1 --align identity --merge fedavg --rounds 3"


def rounds(rival: str, seed: int) -> str:
    """Return the command of a rival's rounds.

    Args:
        rival: a key of `RIVALS`.
        seed: of the run.
    """
    command = (
        f"fedmerge simulate --data fashion-mnist --model cnn --clients 5 --client-examples 20000 "
        f"{PARTITIONS[PARTITION]} --init shared --local-epochs 1 --server-examples {SERVER} --server-labels 0 "
        f"--align identity --merge fedavg --rounds {SHOWN[-1]} {RIVALS[rival]}"
    )
    return f"{command.strip()} --seed {seed}"


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
    [run] = clients([(PARTITION, "shared")], out)
    [merged] = merge({out / "one-round-shared": (run, AGAIN)})
    ours = merged[OURS]
    one = statistics.fmean(ours.accuracies[seed] for seed in SEEDS)
    cells = {
        out / f"rounds-{place}-{seed}": rounds(rival, seed) for place, rival in enumerate(RIVALS) for seed in SEEDS
    }
    of_all = iter(compare_all(cells))
    runs = {rival: [next(of_all) for _ in SEEDS] for rival in RIVALS}
    courses = {rival: [accuracy_by_round(item) for item in of_rival] for rival, of_rival in runs.items()}
    means = {
        rival: [statistics.fmean(course[number - 1] for course in of_rival) for number in SHOWN]
        for rival, of_rival in courses.items()
    }
    tenth = {rival: of_rival[SHOWN.index(10)] for rival, of_rival in means.items()}
    assert all(one >= accuracy for accuracy in tenth.values()), f"{one} is below {tenth}"
    holds("one round of ours is at least as good as ten", [(OURS, one), *tenth.items()])
    traffic = {rival: bytes_of_round(of_rival[0]) for rival, of_rival in runs.items()}
    content = {
        "commands": [command(PARTITION, "shared"), f"fedmerge merge RUN {AGAIN} --out NEW"]
        + [rounds(rival, SEEDS[0]) for rival in RIVALS],
        "accuracy": {OURS: [ours.accuracies[seed] for seed in SEEDS], **courses},
        "bytes a round": {OURS: (ours.bytes_up or 0) + (ours.bytes_down or 0), **traffic},
        "table": table(one, (ours.bytes_up or 0) + (ours.bytes_down or 0), means, traffic, courses),
    }
    write("many_rounds", content, run)


def accuracy_by_round(run: Run) -> list[float]:
    """Return the accuracy after each round."""
    lines = sorted(run.results(), key=lambda line: int(line["round"]))
    assert all(line["status"] == "ok" for line in lines)
    return [line["accuracy"] for line in lines]


def bytes_of_round(run: Run) -> int:
    """Return what all clients send and receive in a round."""
    line = run.results()[-1]
    return int(line["bytes_up"] + line["bytes_down"])


def table(
    one: float,
    sent: int,
    means: Mapping[str, Sequence[float]],
    traffic: Mapping[str, int],
    courses: Mapping[str, Sequence[Sequence[float]]],
) -> list[str]:
    """Return the lines of a Markdown table: accuracy in percent after so many rounds, and what they sent.

    Args:
        one: accuracy of ours.
        sent: its bytes.
        means: each rival's accuracy at `SHOWN`.
        traffic: its bytes a round.
        courses: its accuracy by seed and round.
    """
    lines = [
        f"| Method | {' | '.join(f'{number} rounds' for number in SHOWN)} | Rounds to reach ours | Bytes until then |",
        f"| --- |{' ---: |' * (len(SHOWN) + 2)}",
        f"| `{OURS}`, one round of ten epochs | {100 * one:.1f} |{' – |' * len(SHOWN)} {written(sent)} |",
    ]
    for rival, accuracies in means.items():
        course = [statistics.fmean(values) for values in zip(*courses[rival], strict=True)]
        reached = next((number for number, accuracy in enumerate(course, 1) if accuracy >= one), None)
        until = (
            (f"not in {SHOWN[-1]}", written(SHOWN[-1] * traffic[rival]))
            if reached is None
            else (str(reached), written(reached * traffic[rival]))
        )
        lines.append(
            f"| {rival} | {' | '.join(f'{100 * accuracy:.1f}' for accuracy in accuracies)} | {' | '.join(until)} |"
        )
    return lines


if __name__ == "__main__":
    main(__doc__, many_rounds)
