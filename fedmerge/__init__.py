"""One-shot federated learning: align independently trained models, then learn how to merge them."""

from __future__ import annotations

import importlib

__version__ = "0.1.0"

_HOMES = {
    # what is merged, and by whom
    "fedmerge.problem": ("Aligner", "Examples", "Merged", "Merger", "Problem", "Update"),
    "fedmerge.oneshot": ("Outcome", "align_updates", "merge_aligned", "merge_updates"),
    # symmetry
    "fedmerge.spaces": ("Axis", "Site", "Space", "UnsupportedOperation"),
    "fedmerge.basis": ("Linear", "Permutation", "rebase"),
    # running a federation
    "fedmerge.config": ("Config",),
    "fedmerge.settings": ("ConfigurationError",),
    "fedmerge.runs": ("Run", "RunError"),
    "fedmerge.strategy": ("OneShotMerge",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command must start without torch, ray and flwr."""
    if name not in _HOME:
        raise AttributeError(f"module 'fedmerge' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOME[name]), name)
