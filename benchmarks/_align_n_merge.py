"""Merges by align-n-merge, an optional peer: github.com/shoroi/align-n-merge, the code of CCA Merge's paper.

The environment's ALIGN_N_MERGE is the folder of a clone, of which commit 75d7066 is known; it needs fvcore, networkx
and scikit-learn. What it imports beside these, and does not use to merge, is stood in for by empty modules.
"""

from __future__ import annotations

import atexit
import contextlib
import copy
import importlib
import importlib.util
import io
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

PLACE = "ALIGN_N_MERGE"
UNUSED = ("clip", "einops", "ot")
BATCH = 500
"""Images in a batch, as in its own loaders."""


def installed() -> bool:
    """Return whether there is a clone."""
    return bool(os.environ.get(PLACE))


def create(name: str, seed: int) -> nn.Module:
    """Return its network for ten classes of 32×32 colour images, as it initialises it.

    Args:
        name: "resnet20" or "vgg11".
        seed: of the weights.
    """
    torch.manual_seed(seed)
    if name == "resnet20":
        return _module("models.resnets").resnet20()  # type: ignore[no-any-return]
    vgg = _module("models.vgg")
    model: nn.Module = vgg.VGG("VGG11")
    vgg.xavier_init(model)
    return model


def process(name: str, models: Sequence[nn.Module], images: Tensor) -> Callable[[str], dict[str, Tensor]]:
    """Return what merges by a method, in another process, which lives as long as this one.

    Args:
        name: as in `create`.
        models: left as they are.
        images: all that the merge may see.
    """
    pool = get_context("spawn").Pool(1, _begin, (name, models, images))
    atexit.register(pool.terminate)
    return lambda method: pool.apply(_merged, (method,))


def _begin(*given: Any) -> None:
    torch.set_num_threads(1)
    _given.extend(given)


def _merged(method: str) -> dict[str, Tensor]:
    name, models, images = _given
    return merged(name, models, images, method).state_dict()


_given: list[Any] = []


@torch.no_grad()
def merged(name: str, models: Sequence[nn.Module], images: Tensor, method: str) -> nn.Module:
    """Return the merge of networks, with BatchNorm statistics, as its own script makes it.

    Args:
        name: as in `create`.
        models: left as they are.
        images: all that the merge may see.
        method: "permute" or "cca".
    """
    merger, methods, utilities = map(_module, ("core.model_merger", "core.matching_functions", "core.utils"))
    graph = _module("graphs.resnet_graph").resnet20 if name == "resnet20" else _module("graphs.vgg_graph").vgg11
    loader = tuple((part, None) for part in torch.split(images, BATCH))  # a list would be several loaders
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = merger.ModelMerge(*(graph(copy.deepcopy(model)).graphify() for model in models), device="cpu")
        transform = getattr(methods, f"match_tensors_{method}")
        whole.transform(copy.deepcopy(models[0]), loader, transform_fn=transform)
        utilities.reset_bn_stats(whole, loader)
    return whole.merged_model.eval()  # type: ignore[no-any-return]


def _module(name: str) -> Any:
    place = os.environ[PLACE]
    if place not in sys.path:
        sys.path.insert(0, place)
    for unused in UNUSED:
        if unused not in sys.modules and importlib.util.find_spec(unused) is None:
            sys.modules[unused] = ModuleType(unused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)
