"""Anonymous memory of a merge, in models above the K that are merged, which stay in their files.

Each merge runs in a process of its own, without an alignment where none is named, on 500 images: their batches'
activations are included.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from _measure import Row, main

from fedmerge.machine import reproducible
from fedmerge.memory import Peak, anonymous
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.state import num_bytes
from fedmerge.updatefiles import read_update, update_to_bytes

SHAPE = (3, 32, 32)
STEPS, LOW = "steps=20:lrs=0.001", "--low-memory"
FULL = {
    ("vgg11", 10): (
        "mean",
        f"finetune:{STEPS}",
        f"np:{STEPS}:groups=channel",
        f"np:{STEPS} {LOW}",
        f"np:{STEPS}:groups=parameter",
        f"np:{STEPS}:groups=parameter:form=box",
        f"np-pairwise:{STEPS}",
        "weights+mean",
        f"weights+mean {LOW}",
    ),
    ("resnet18", 100): (
        "mean",
        f"np:{STEPS}:groups=channel",
        f"np:{STEPS} {LOW}",
        f"np:{STEPS}:groups=parameter",
    ),
}
QUICK = {("cnn@0.1", 3): ("mean", f"np:{STEPS} {LOW}", f"np:{STEPS}:groups=parameter")}


def benchmark(quick: bool) -> list[Row]:
    """Return a row for each merge."""
    rows: list[Row] = []
    for (name, count), merges in (QUICK if quick else FULL).items():
        with tempfile.TemporaryDirectory() as folder:
            size = _write(Path(folder), name, count)
            for merge in merges:
                command = [sys.executable, __file__, "--merge", folder, name, merge]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                found = json.loads(done.stdout)
                rows.append(
                    {
                        "merge": f"`{merge}`",
                        "of": f"{count} × {name}, {size / 1e6:.0f} MB each",
                        "models above the inputs": f"{found['growth'] / size:.1f}",
                        "the process at its highest, GB": f"{found['highest'] / 1e9:.2f}",
                        "seconds": f"{found['seconds']:.0f}",
                    }
                )
    return rows


def _write(folder: Path, name: str, count: int) -> int:
    """Write the models' files, and return the size of one model in bytes."""
    state = create(name, shape=SHAPE, num_classes=10, seed=0).state_dict()
    for client in range(count):
        chance = torch.Generator().manual_seed(client)
        moved = {
            key: tensor + 0.01 * tensor.std().nan_to_num() * torch.randn(tensor.shape, generator=chance)
            if tensor.is_floating_point() and "running" not in key
            else tensor
            for key, tensor in state.items()
        }
        (folder / f"{client:05}").write_bytes(update_to_bytes(Update(moved, 100, client)))
    return num_bytes(state)


def _merge(folder: Path, name: str, merge: str) -> None:
    """Merge the models of a folder, and print what it took as JSON."""
    method, _, low = merge.partition(" ")
    align, merge = method.split("+") if "+" in method else ("identity", method)
    model = create(name, shape=SHAPE, num_classes=10, seed=0)
    chance = torch.Generator().manual_seed(0)
    data = Examples(torch.randn(500, *SHAPE, generator=chance), torch.arange(500) % 10)
    updates = [read_update(path) for path in sorted(folder.iterdir())]
    before = anonymous() or 0
    with reproducible(), Peak() as peak:  # as our programs compute
        problem = Problem(model, data, low_memory=low == LOW)
        outcome = merge_updates(problem, updates, align=align, merge=merge, seed=0, screen="off")
    growth = peak.bytes or 0
    print(json.dumps({"growth": growth, "highest": before + growth, "seconds": outcome.seconds}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--merge"]:
        _merge(Path(sys.argv[2]), *sys.argv[3:])
    else:
        main(__doc__, benchmark)
