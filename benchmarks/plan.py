"""The figures of docs/scale.md, computed from what the benchmarks measured; `python benchmarks/plan.py` writes them.

Costs are carried linearly to sizes that nobody here has run, which growth.py's exponents allow; seconds are of cores as
those that measured.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from _measure import HERE, RESULTS

PAGE = HERE.parent / "docs" / "scale.md"
MARK = "<!-- plan: {} -->"
MILLION, SAMPLED, ROUNDS = 1_000_000, 1_000, 100
MLP_BYTES = 4 * 118_282
IMAGES = 200
IMAGE_BYTES = 4 * 28 * 28
BILLION_BYTES, CLIENTS, STEPS = 4 * 10**9, 10, 60
VGG_BYTES = 4 * 9_225_610


def million() -> dict[str, str]:
    """Return the costs of a million clients, by what costs."""
    rows = _rows("rounds", "federation")
    side, alone = (rows[f"mlp, Dirichlet(0.3){more}"] for more in (", 10 side by side", ""))
    idle = float(rows["mlp@0.05, 1 image each, 10000 clients"]["more, CPU ms a client"]) / 1e3
    together, single = (float(row["round, CPU ms"]) / 1e3 / 100 for row in (side, alone))
    everybody = MILLION * together
    return {
        "a client: 200 images once, training and messages, ten side by side": _time(together),
        "the same, one by one": _time(single),
        "of which is a client's message, at 10,000 clients": _time(idle),
        f"a round of {SAMPLED:,} sampled clients": f"{_time(SAMPLED * together)} of CPU",
        f"{ROUNDS} such rounds": f"{_time(ROUNDS * SAMPLED * together)} of CPU",
        "all clients once (one shot)": f"{_time(everybody)} of CPU, {_time(everybody / 64)} on 64 cores",
        f"on the wire, a round of {SAMPLED:,}": f"{_size(SAMPLED * MLP_BYTES)} down, {_size(SAMPLED * MLP_BYTES)} up",
        "on the wire, all clients once": f"{_size(MILLION * MLP_BYTES)} each way",
        f"the server's memory, a round of {SAMPLED:,}": _size(SAMPLED * MLP_BYTES),
        "the server's memory, all clients at once": _size(MILLION * MLP_BYTES),
        "images of all clients in one memory, float32": _size(MILLION * IMAGES * IMAGE_BYTES),
    }


def billion() -> dict[str, str]:
    """Return the costs of a billion parameters in ten clients, by what costs."""
    memory, steps, space = _rows("memory", "merge"), _rows("np_step", "step"), _rows("align", "what")
    share = BILLION_BYTES / VGG_BYTES

    def held(merge: str) -> str:
        return _size(BILLION_BYTES * float(memory[f"`{merge}`"]["models above the inputs"]))

    def step(variant: str) -> float:
        more = float(steps[variant]["vgg11, ms"]) - float(steps["plain, fused Adam"]["vgg11, ms"])
        return max(0.0, more) / 1e3 * share

    solved = float(space["matching, 5000 samples of 512 units"]["CPU ms"]) / 1e3
    given = "np:steps=20:lrs=0.001"
    return {
        "a client's file, and message": _size(BILLION_BYTES),
        f"{CLIENTS} clients, on the wire and on the server's disk": _size(CLIENTS * BILLION_BYTES),
        "above the inputs: `mean`": held("mean"),
        "above the inputs: `np --low-memory`": held(f"{given} --low-memory"),
        "above the inputs: `np:groups=channel`": held(f"{given}:groups=channel"),
        "above the inputs: `np:groups=parameter`": held(f"{given}:groups=parameter"),
        "above the inputs: `finetune`": held("finetune:steps=20:lrs=0.001"),
        "a step's mixing of ten, coefficients of parameters, beside forward and backward": _time(
            step("affine, K = 10")
        ),
        f"{STEPS} steps' reading of ten models, in bytes": _size(STEPS * CLIENTS * BILLION_BYTES),
        "matching 4,096 units of a space (cubic in the units)": _time(solved * (4096 / 512) ** 3),
        "covariances of such a space, of two models": _size(3 * 8 * 4096**2),
    }


TABLES: Mapping[str, Callable[[], dict[str, str]]] = {"million": million, "billion": billion}


def with_figures(text: str) -> str:
    """Return the page with each table between its two marks made again.

    Args:
        text: the page.
    """
    for name, costs in TABLES.items():
        mark = MARK.format(name)
        before, _, after = text.split(mark)
        lines = ["| what | costs |", "| --- | --- |", *(f"| {what} | {cost} |" for what, cost in costs().items())]
        text = "\n".join([f"{before}{mark}", *lines, f"{mark}{after}"])
    return text


def _rows(name: str, column: str) -> dict[str, Any]:
    """Return a result's rows by a column; of several that are alike, the first."""
    rows = json.loads(Path(RESULTS, f"{name}.json").read_text(encoding="utf-8"))["rows"]
    return {row[column]: row for row in reversed(rows)}


def _time(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{1e3 * seconds:.3g} ms"


def _size(count: float) -> str:
    for unit, size in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count / 1e6:.3g} MB"


if __name__ == "__main__":
    PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
