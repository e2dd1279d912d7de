"""Benchmark folders made by hand: results are a formula, so that every number of a report can be foretold."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from made_runs import result

from fedmerge.config import Config
from fedmerge.runs import Result, Run

Accuracy = Callable[[Config, str, int, int], float | str]
"""Accuracy of a method by configuration, seed and round; a message where it fails."""

OURS = "activations+np"
METHODS = ("fedavg", "ensemble", "finetune", OURS)
GAINS = {"fedavg": 0.0, "ensemble": 0.25, "finetune": 0.2, OURS: 0.3}


def by_formula(config: Config, method: str, seed: int, server_round: int) -> float | str:
    """The harder the division the lower; NP Merge is ahead of fine-tuning where clients differ much."""
    level = (
        0.3 + 0.1 * (config.alpha >= 0.5) + 0.05 * (config.init == "shared") + 0.01 * seed + 0.1 * (server_round - 1)
    )
    lost = 0.15 * (method == OURS and config.alpha >= 0.5)
    labels = 0.05 * (config.num_server_labels >= 100) * (method in (OURS, "finetune"))
    return level + GAINS.get(method, 0.1) - lost + labels


def breaking(config: Config, method: str, seed: int, server_round: int) -> float | str:
    """The formula, and fine-tuning fails."""
    return by_formula(config, method, seed, server_round) if method != "finetune" else "ValueError: <b>no</b> label"


def add_run(
    folder: Path,
    name: str,
    accuracy: Accuracy = by_formula,
    *,
    methods: Sequence[str] = METHODS,
    seeds: Sequence[int] = (0, 1, 2),
    divided: bool = True,
    **changes: Any,
) -> Run:
    """Write a run as `compare` does, or as `simulate` does where it has several rounds."""
    config = Config(**{"clients": 3, "server_examples": 100, **changes})
    several = config.rounds > 1
    config = config.replace(align="identity", merge=methods[0], seed=seeds[0]) if several else config
    settings = {} if several else {"methods": list(methods), "seeds": list(seeds)}
    run = Run.create(folder / name, "simulate" if several else "compare", config, **settings)
    counts = [[20, 1, 0], [0, 30, 7], [3, 3, 3]][: config.clients]
    content = {
        "label_counts": counts,
        "classes": ["boot", "<b>bag</b>", "$coat_$"],
        "evaluation": [0],
        "clients": [[0]],
    }
    for seed in seeds:
        if divided:
            run.write(f"partitions/seed-{seed}.json", json.dumps(content).encode())
        for server_round in range(1, config.rounds + 1):
            for method in methods:
                run.append(line(config, method, seed, server_round, accuracy(config, method, seed, server_round)))
    return run


def line(config: Config, method: str, seed: int, server_round: int, found: float | str) -> Result:
    """A line of results.jsonl."""
    if isinstance(found, str):
        return {"method": method, "seed": seed, "round": server_round, "status": "failed", "error": found}
    clients = list(range(config.clients))
    shares = {
        "clients": clients,
        "tensors": {"conv1.weight": [0.5, 0.3, 0.2][: len(clients)], "fc.weight": [0.2, 0.9, -0.1][: len(clients)]},
        "explained": {"conv1.weight": 0.9, "fc.weight": 0.45},
        "classes": [[0.8, 0.1, 0.1][: len(clients)], [0.0, 0.9, 0.1][: len(clients)], [0.2, 0.7, 0.1][: len(clients)]],
    }
    return result(
        method,
        seed,
        found,
        round=server_round,
        models=config.clients if method.startswith("ensemble") else 1,
        bytes_up=0 if method == "server-only" else 1000 * config.clients,
        bytes_down=500 * config.clients,
        per_class_accuracy=[found, found / 2, None],
        diagnostics={"shares": shares} if "np" in method else {},
    )


def small(folder: Path) -> Path:
    """A benchmark of few runs that has every figure, a failure and something unfinished."""
    for alpha in (0.1, 0.5):
        for init in ("shared", "independent"):
            add_run(folder, f"noniid/{alpha}-{init}", alpha=alpha, init=init)
    add_run(folder, "labels/0", breaking, alpha=0.1, init="shared", server_labels=0)
    unfinished = add_run(folder, "labels/10", alpha=0.1, init="shared", server_labels=10)
    lines = (unfinished.path / "results.jsonl").read_text().splitlines(keepends=True)
    (unfinished.path / "results.jsonl").write_text("".join(lines[:-1]))
    add_run(folder, "images/20", alpha=0.1, init="shared", server_limit=20, methods=("fedavg", OURS))
    for seed in (0, 1):
        add_run(folder, f"rounds/fedavg-{seed}", methods=["fedavg"], seeds=[seed], alpha=0.1, init="shared", rounds=4)
    return folder
