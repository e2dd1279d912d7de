"""Run folders as a comparison leaves them, made by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedmerge.config import Config
from fedmerge.runs import Result, Run

HOSTILE = "evil<script>alert(1)</script>&\"'$x_{$+np"
CLASSES = ["ankle boot", "<b>bag</b>", "$coat_$", "_dress"]


def result(method: str, seed: int = 0, accuracy: float = 0.5, **changes: Any) -> Result:
    return {
        "method": method,
        "seed": seed,
        "round": 1,
        "status": "ok",
        "error": None,
        "accuracy": accuracy,
        "loss": 1 - accuracy,
        "per_class_accuracy": [accuracy, accuracy / 2, None, 1.0],
        "seconds": 2.0,
        "bytes_up": 3000,
        "bytes_down": 1000,
        "server_examples": 100,
        "server_labels": True,
        "models": 1,
        "diagnostics": {},
        **changes,
    }


def failed(method: str, seed: int = 0, error: str = "it broke", **changes: Any) -> Result:
    return {"method": method, "seed": seed, "round": 1, "status": "failed", "error": error, **changes}


def make_run(path: Path, results: Sequence[Result], partition: bool = True, **settings: Any) -> Run:
    run = Run.create(path, "compare", Config(clients=3, partition="dirichlet", server_examples=100), **settings)
    for seed in sorted({item["seed"] for item in results}) if partition else ():
        content = {
            "clients": [[0, 1], [2], [3]],
            "server": [4],
            "evaluation": [5, 6],
            "label_counts": [[20, 1, 0, 5], [0, 30, 7, 0], [3, 3, 3, 3]],
            "classes": CLASSES,
            "data": "digits",
            "split": "test",
        }
        run.write(f"partitions/seed-{seed}.json", json.dumps(content).encode())
    for item in results:
        run.append(item)
    return run


RESULTS = [
    *(result("fedavg", seed, 0.4 + 0.01 * seed, bytes_up=1_500_000) for seed in (0, 1, 2)),
    *(result("ensemble", seed, 0.9, models=3) for seed in (0, 1, 2)),
    *(result("activations+np", seed, 0.6 + 0.02 * seed, loss=math.nan) for seed in (0, 1, 2)),
    *(result(HOSTILE, seed, 0.7) for seed in (0, 2)),
    failed(HOSTILE, 1, "ValueError: <img src=x onerror=alert(2)>\n  \x1b[31mline two"),
    failed("server-only", 0),
    failed("server-only", 1),
    failed("server-only", 2),
]
