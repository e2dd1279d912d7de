"""BatchNorm under a dense change of basis: folded into the layer before it, and restored afterwards.

In evaluation mode a BatchNorm after a layer is an affine map unit by unit, d ⊙ (W x) + b′ with d = γ/√(σ² + ε): the
layer with weights W′ = d ⊙ W and shift b′. There a dense basis change is possible: Tᵀ W′ and Tᵀ b′. A running
variance has no such change; Tᵀσ² can be negative.

Afterwards a BatchNorm is restored that computes the same function, and whose scale and shift are what a merge may
average: the standard deviation and the mean that the unit should have after the merge, here those of the original
model's units in the new basis (after Jordan et al., REPAIR, arXiv 2211.08403). They are measured against the
reference's on the same images, so that they are on the scale of the reference's own. The scale of W is free then; it
is put to the reference's, W′ ⊘ d_reference. So the reference stays as it is, bit by bit, a renamed copy of it comes
back as it is, and the mean of the weights is, unit by unit, a multiple of the mean of the folded ones; the multiple
drops out when the running statistics are re-estimated.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.rules import RULES
from fedmerge.spaces import Axis, Site, Space
from fedmerge.state import StateDict
from fedmerge.trace import traced

SMALLEST_SCALE = 1e-3


@dataclass(frozen=True)
class FoldedNorm:
    """A BatchNorm and the layer into which it can be folded.

    Attributes:
        name: of the BatchNorm module.
        layer: name of the convolution or linear layer whose output it alone reads.
        eps: its ε.
        node: name of its node in the traced graph.
    """

    name: str
    layer: str
    eps: float
    node: str

    def key(self, part: str) -> str:
        """Return the state dict's key of one of the BatchNorm's tensors."""
        return f"{self.name}.{part}"

    @property
    def weight(self) -> str:
        """The key of the layer's weights."""
        return f"{self.layer}.weight"

    @property
    def bias(self) -> str:
        """The key of the layer's bias, if it has one."""
        return f"{self.layer}.bias"

    @property
    def tensors(self) -> frozenset[str]:
        """The keys of everything that acts unit by unit."""
        return frozenset(self.key(part) for part in ("weight", "bias", "running_mean", "running_var"))


@dataclass(frozen=True)
class Target:
    """How units should be after a merge, compared with the reference's, for the units of a space in one BatchNorm.

    Attributes:
        norm: the BatchNorm.
        axis: where the space's units are among its channels.
        spread: (units,) standard deviation of the BatchNorm's output, relative to the reference's.
        offset: (units,) its mean less the reference's, in the reference's standard deviations.
    """

    norm: FoldedNorm
    axis: Axis
    spread: Float64[Tensor, " units"]
    offset: Float64[Tensor, " units"]


@dataclass(frozen=True)
class Folding:
    """What can be folded in an architecture.

    Attributes:
        model: the architecture.
        original: its feature spaces.
    """

    model: nn.Module
    original: tuple[Space, ...]

    @cached_property
    def norms(self) -> tuple[FoldedNorm, ...]:
        """The BatchNorms that are folded: those whose spaces can all change to any basis then."""
        norms = _foldable(self.model)
        plain = _mixable(self.model)
        while True:
            blocked = {axis.name for space in self.original if not _is_free(space, norms, plain) for axis in space.axes}
            kept = [norm for norm in norms if not norm.tensors & blocked]
            if len(kept) == len(norms):
                return tuple(norms)
            norms = kept

    @cached_property
    def spaces(self) -> tuple[Space, ...]:
        """The spaces of the folded model: the shift of a folded BatchNorm is written, and nothing of it is scaled."""
        return tuple(self._space(space) for space in self.original)

    @cached_property
    def dense(self) -> tuple[bool, ...]:
        """Whether each space can change to any basis; one that cannot (LayerNorm, groups) may be permuted."""
        plain = _mixable(self.model)
        return tuple(_is_free(space, self.norms, plain) for space in self.original)

    @cached_property
    def observed(self) -> tuple[tuple[int, FoldedNorm, Axis], ...]:
        """The space, BatchNorm and channels of each restored part; `sites` has what to observe for it."""
        return tuple(
            (number, norm, axis)
            for number, space in enumerate(self.original)
            for norm in self.norms
            for axis in space.elementwise
            if axis.name == norm.key("bias")
        )

    @cached_property
    def sites(self) -> tuple[Space, ...]:
        """Spaces to observe the outputs of the folded BatchNorms, in the order of `observed`."""
        return tuple(
            Space(space.size, (), (), (), Site(norm.node, 1, tuple(axis.entries(space.size).flatten().tolist())))
            for number, norm, axis in self.observed
            for space in (self.original[number],)
        )

    def _space(self, space: Space) -> Space:
        folded = frozenset[str]().union(*(norm.tensors for norm in self.norms))
        shifts = {norm.key("bias") for norm in self.norms}
        written = tuple(axis for axis in space.elementwise if axis.name in shifts)
        left = tuple(axis for axis in space.elementwise if axis.name not in folded)
        return replace(space, writers=space.writers + written, elementwise=left)


def fold(state: StateDict, norms: Iterable[FoldedNorm]) -> dict[str, Tensor]:
    """Fold BatchNorms into the layers before them: W′ = d ⊙ W, and the shift b′ as the BatchNorm's own.

    Args:
        state: the model, left as it is.
        norms: what to fold.

    Returns:
        A fresh state dict of the same keys in float64, of the same function in evaluation mode: the folded BatchNorms
        have weight 1, mean 0, variance 1 − ε and bias b′; their layers have no bias.
    """
    result = {name: tensor.detach().to(_wide(tensor), copy=True) for name, tensor in state.items()}
    for norm in norms:
        scale = _scale(result, norm)
        shift = result[norm.key("bias")] - scale * result[norm.key("running_mean")]
        if norm.bias in result:
            shift = shift + scale * result[norm.bias]
            result[norm.bias] = torch.zeros_like(shift)
        result[norm.weight] = _by_unit(scale, result[norm.weight]) * result[norm.weight]
        result[norm.key("weight")] = torch.ones_like(scale)
        result[norm.key("bias")] = shift
        result[norm.key("running_mean")] = torch.zeros_like(scale)
        result[norm.key("running_var")] = torch.full_like(scale, 1 - norm.eps)
    return result


def restore(folded: StateDict, reference: StateDict, targets: Sequence[Target]) -> dict[str, Tensor]:
    """Unfold BatchNorms again, with weights of the reference's scale and the targets as scale and shift.

    Args:
        folded: a model from `fold`, in the reference's basis.
        reference: the reference model, not folded.
        targets: at most one for each channel; one without (of a fixed unit) gets the reference's scale and shift.

    Returns:
        A fresh state dict in the reference's dtypes, of the function of `folded` in evaluation mode.
    """
    result = {name: tensor.detach().clone() for name, tensor in folded.items()}
    for norm in {target.norm.name: target.norm for target in targets}.values():
        own = {name: reference[name].double() for name in norm.tensors}
        own[norm.key("weight")] = _away_from_zero(own[norm.key("weight")])
        scale = _scale(own, norm)
        mean, variance = own[norm.key("bias")].clone(), own[norm.key("running_var")].clone()
        for target in targets:
            if target.norm == norm:
                channels = target.axis.entries(len(target.spread)).flatten().to(mean.device)
                spread, offset = target.spread.to(mean.device), target.offset.to(mean.device)
                mean[channels] += own[norm.key("weight")][channels].abs() * offset
                variance[channels] = (spread.square() * (variance[channels] + norm.eps) - norm.eps).clamp(min=0)
        shift = result[norm.key("bias")]
        bias = reference[norm.bias].double() if norm.bias in reference else torch.zeros_like(shift)
        if norm.bias in result:
            result[norm.bias] = bias
        result[norm.weight] = result[norm.weight] / _by_unit(scale, result[norm.weight])
        result[norm.key("weight")] = scale * (variance + norm.eps).sqrt()
        result[norm.key("bias")] = mean
        result[norm.key("running_mean")] = bias + (mean - shift) / scale
        result[norm.key("running_var")] = variance
    return {name: tensor.to(reference[name].dtype) for name, tensor in result.items()}


def _foldable(model: nn.Module) -> list[FoldedNorm]:
    """Return the BatchNorms that alone read the output of a layer, both called once."""
    graph = traced(model, RULES).graph
    calls = [node for node in graph.nodes if node.op == "call_module"]
    targets = [str(node.target) for node in calls]
    modules: Mapping[str, nn.Module] = dict(model.named_modules())
    found = []
    for node in calls:
        norm = modules[str(node.target)]
        (source, *_) = node.all_input_nodes
        if not isinstance(norm, _BatchNorm) or norm.weight is None or norm.running_mean is None:
            continue
        if source.op != "call_module" or len(source.users) != 1:
            continue
        layer = modules[str(source.target)]
        if _is_plain(layer) and targets.count(str(node.target)) == targets.count(str(source.target)) == 1:
            found.append(FoldedNorm(str(node.target), str(source.target), norm.eps, node.name))
    return found


def _mixable(model: nn.Module) -> frozenset[str]:
    """Return the keys of the weights whose units may be mixed: of linear layers and of convolutions without groups."""
    return frozenset(
        f"{name}.{part}"
        for name, module in model.named_modules()
        if _is_plain(module)
        for part, _ in module.named_parameters(recurse=False)
    )


def _is_plain(module: nn.Module) -> bool:
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return module.groups == 1
    return isinstance(module, nn.Linear)


def _is_free(space: Space, norms: Sequence[FoldedNorm], plain: frozenset[str]) -> bool:
    """Whether nothing acts unit by unit once the norms are folded, each into a layer that writes the space's units."""
    written = {axis.name for axis in space.writers}
    folded = frozenset[str]().union(*(norm.tensors for norm in norms if norm.weight in written))
    return (
        all(axis.name in folded and axis.repeat == 1 for axis in space.elementwise)
        and all(axis.name in plain and axis.repeat == 1 for axis in space.writers)
        and all(axis.name in plain for axis in space.readers)
    )


def _scale(state: StateDict, norm: FoldedNorm) -> Tensor:
    return state[norm.key("weight")] / (state[norm.key("running_var")] + norm.eps).sqrt()


def _away_from_zero(weight: Tensor) -> Tensor:
    """Keep a scale that can be divided by, where the reference has switched a unit off."""
    least = float(weight.abs().max()) * SMALLEST_SCALE or 1.0
    return torch.where(weight.abs() >= least, weight, torch.where(weight < 0, -least, least))


def _by_unit(scale: Tensor, weights: Tensor) -> Tensor:
    return scale.reshape(-1, *[1] * (weights.ndim - 1))


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.is_floating_point() else tensor.dtype
