"""The clients that the experiments on the server's data share: trained once, merged again by each of them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from _run import compare_all

from fedmerge.runs import Run

SERVER = 5000
"""Images of the server's, in no client; experiments use all or some of them."""
PARTITIONS = {
    "Dirichlet(0.1)": "--partition dirichlet --alpha 0.1",
    "Dirichlet(0.3)": "--partition dirichlet --alpha 0.3",
    "Dirichlet(0.5)": "--partition dirichlet --alpha 0.5",
    "disjoint": "--partition disjoint",
}
"""Flags by name, from much to little skew, and clients with classes of their own."""
SMOKE = "fedmerge compare --partition dirichlet --alpha 0.3 --server-examples 300 --server-labels 0 --methods fedavg"
"""Clients for the smoke size."""


def command(partition: str, init: str, flags: str = "") -> str:
    """Return the command that trains clients: a CNN of 420,000 parameters on Fashion-MNIST, five clients, 10 epochs.

    Args:
        partition: a key of `PARTITIONS`.
        init: "shared" or "independent".
        flags: more of them.
    """
    return (
        "fedmerge compare --data fashion-mnist --model cnn --clients 5 --client-examples 20000 "
        f"{PARTITIONS[partition]} --init {init} --server-examples {SERVER} --server-labels 0 "
        f"--seeds 0,1,2,3,4 --methods fedavg,ensemble {flags}"
    ).strip()


def clients(kinds: Iterable[tuple[str, ...]], out: Path) -> list[Run]:
    """Return the runs of such clients, trained now if they are not there.

    Args:
        kinds: arguments of `command`.
        out: folder of the clients.
    """
    return compare_all({out / f"clients-{'-'.join(map(_letters, kind))}": command(*kind) for kind in kinds})


def _letters(text: str) -> str:
    return "".join(letter for letter in text.lower() if letter.isalnum() or letter == ".")
