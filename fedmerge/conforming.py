"""Updates checked, ordered and brought to where they are merged."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedmerge.memory import require
from fedmerge.problem import Problem, Update
from fedmerge.state import StateDict, conform, num_bytes


def conformed(problem: Problem, updates: Sequence[Update]) -> list[Update]:
    """Return the updates by partition id, their states checked, in the models' dtypes and where the problem is.

    Args:
        problem: the server's side.
        updates: at least one, in any order.

    Raises:
        ValueError: if there is none, or two are of one client.
    """
    ids = sorted(update.partition_id for update in updates)
    if not ids or len(set(ids)) != len(ids):
        raise ValueError(f"expected updates of different clients, at least one, got partition ids {ids}")
    device = problem.data.images.device
    ordered = sorted(updates, key=lambda update: update.partition_id)
    expected = {name: problem.architecture(name).state_dict() for name in {update.model for update in ordered}}
    if device.type == "cuda":
        size = sum(num_bytes(update.state) for update in ordered if not _is_on(device, update.state))
        require(size, f"{len(ordered)} clients' models", "merge on the CPU (--device cpu), or fewer clients", device)
    return [_placed(update, expected[update.model], device) for update in ordered]


def _placed(update: Update, expected: StateDict, device: torch.device) -> Update:
    statistics = {
        kind: {name: tensor.to(device) for name, tensor in tensors.items()}
        for kind, tensors in update.statistics.items()
    }
    return replace(update, state=conform(update.state, expected, device), statistics=statistics)


def _is_on(device: torch.device, state: StateDict) -> bool:
    return all(tensor.device == device for tensor in state.values())
