"""What one architecture's weights can become in another: the same in other widths and depths, or nothing.

Two architectures are of one family if their modules are the same, but for the numbers of units and for further residual
blocks in the second. That is found by comparing modules and feature spaces, and then proven: weights that have no more
units than either width are carried over, and both networks have to compute the same, on random images. So activations,
strides and all else that modules do not show are compared too.

What has no such proof is another family. A LayerNorm over a residual stream keeps its mean and variance only if all
units are copied equally often: its widths are of one family if one is a multiple of the other. An inner product of
queries and keys has to be scaled by a constant, not by the size of a head.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.adapt.depths import Depths, depths
from fedmerge.adapt.widths import Shapes, Widths, change_width
from fedmerge.spaces import UnsupportedOperation
from fedmerge.state import StateDict
from fedmerge.symmetry import INVARIANCE_TOLERANCE, make_generic, symmetry


@dataclass(frozen=True)
class Adaptation:
    """How states of one architecture become states of another.

    Attributes:
        source: the one architecture.
        depths: of the other, and the other without its further blocks.
        widths: the spaces of both, the further blocks left out; None where all sizes are the same.
    """

    source: nn.Module
    depths: Depths
    widths: Widths | None

    @property
    def kind(self) -> str:
        """What differs: "same", "width", "depth" or "width and depth"."""
        names = [name for name, differs in (("width", self.widths), ("depth", self.depths.added)) if differs]
        return " and ".join(names) or "same"

    def __call__(self, state: StateDict, images: Tensor) -> dict[str, Tensor]:
        """Return a state of the one architecture as the other's.

        Args:
            state: the weights, left as they are.
            images: (examples, …), unlabelled, at least one, on the state's device.
        """
        based = state if self.widths is None else change_width(self.source, self.widths, state, images)
        return self.depths.deepen(based)


def adaptation(source: nn.Module, target: nn.Module, images: Tensor) -> Adaptation | None:
    """Return how states of `source` become states of `target`, or None if they are of different families.

    Args:
        source: an architecture; its own weights are not used.
        target: an architecture; its own weights are not used.
        images: (examples, …), at least one, for their shape alone.

    Raises:
        ValueError: if there are no images.
    """
    if len(images) == 0:
        raise ValueError("expected at least one of the server's images, got none (--server-examples)")
    deeper = depths(source, target)
    if deeper is None:
        return None
    shapes = _shapes(source), _shapes(deeper.base)
    example, widths = images[:2], None
    if shapes[0] != shapes[1]:
        try:
            widths = Widths(symmetry(source, example), symmetry(deeper.base, example), shapes[1])
        except UnsupportedOperation:
            return None
        if not widths.fit(shapes[0]):
            return None
    found = Adaptation(source, deeper, widths)
    if any(_is_proven(found, target, example, repeated=repeated) for repeated in (False, True)):
        return found
    return None


def relation(source: nn.Module, target: nn.Module, images: Tensor) -> str | None:
    """Return how a state of `source` can become one of `target`.

    Args:
        source: an architecture.
        target: an architecture.
        images: (examples, …), at least one, for their shape alone.

    Returns:
        "same", "width", "depth" or "width and depth"; None: they are of different families.

    Example:
        >>> small, large = (nn.Sequential(nn.Linear(4, size), nn.ReLU(), nn.Linear(size, 3)) for size in (8, 12))
        >>> relation(small, large, torch.zeros(1, 4))
        'width'
    """
    found = adaptation(source, target, images)
    return None if found is None else found.kind


def adapt(source: nn.Module, target: nn.Module, state: StateDict, images: Tensor) -> dict[str, Tensor]:
    """Return a state of the architecture `source` as a state of the architecture `target`.

    The function stays, but where units become fewer. `adaptation` does the same for several states, and analyses the
    architectures once.

    Args:
        source: the state's architecture.
        target: the architecture that is asked for.
        state: the weights, left as they are.
        images: (examples, …), unlabelled, at least one, on the state's device.

    Returns:
        A fresh state dict. Where units become fewer, BatchNorm's statistics are to be re-estimated.

    Raises:
        ValueError: if the two are of different families.
    """
    found = adaptation(source, target, images)
    if found is None:
        raise ValueError(
            f"expected architectures of one family, that differ in width or in the number of residual blocks, got "
            f"{_named(source)} and {_named(target)}: the second is not the first, wider, narrower or deeper. "
            "Distil the one into the other instead"
        )
    return found(state, images)


@torch.no_grad()
def _is_proven(found: Adaptation, target: nn.Module, example: Tensor, *, repeated: bool) -> bool:
    """Whether both architectures compute the same with weights of no more different units than either has.

    Args:
        found: the adaptation.
        target: the other architecture.
        example: images.
        repeated: all units of a space are repeated equally often, in both.
    """
    generator = torch.Generator().manual_seed(0)
    source, base, deeper = (
        copy.deepcopy(model).cpu().double().eval() for model in (found.source, found.depths.base, target)
    )
    make_generic(base, generator)
    state = original = dict(base.state_dict())
    if found.widths is not None:
        back = found.widths.turned(_shapes(source))
        original = back.resize(state, back.repeated() if repeated else back.even())
        state = found.widths.resize(original, found.widths.even())
    inputs = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    ours = functional_call(source, original, (inputs,))
    theirs = functional_call(deeper, found.depths.deepen(state), (inputs,))
    return bool((ours - theirs).abs().max() <= INVARIANCE_TOLERANCE * ours.abs().max())


def _shapes(model: nn.Module) -> Shapes:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _named(model: nn.Module) -> str:
    return f"{type(model).__name__} of {sum(weights.numel() for weights in model.parameters()):,} parameters"
