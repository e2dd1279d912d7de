"""Random weights and renamings, for tests of feature spaces in float64."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedmerge.basis import Permutation, rebase
from fedmerge.spaces import Space


def random_state(model: nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights and statistics without ties; variances are positive."""
    state = {}
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            positive = name.endswith("running_var") or (tensor.ndim == 1 and name.endswith("weight"))
            state[name] = noise.abs() + 0.5 if positive else noise / max(1, tensor[0].numel()) ** 0.5
        else:
            state[name] = tensor.clone()
    return state


def outputs(model: nn.Module, state: dict[str, Tensor], images: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = torch.func.functional_call(model, state, (images,))
    return found


def permutations(spaces: tuple[Space, ...], generator: torch.Generator) -> list[Permutation]:
    return [Permutation(torch.randperm(space.size, generator=generator)) for space in spaces]


def changed_by_one_side(
    model: nn.Module, state: dict[str, Tensor], space: Space, side: str, images: Tensor, before: Tensor
) -> float:
    """Return how much outputs change, relatively, when only one side of a space is renamed."""
    kept = {"writers": (), "readers": (), "elementwise": ()} | {side: getattr(space, side)}
    half = Space(space.size, site=space.site, **kept)
    renamed = rebase(state, [half], [Permutation(torch.arange(space.size).roll(1))])
    return float((outputs(model, renamed, images) - before).abs().max() / before.abs().max())
