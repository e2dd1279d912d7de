"""The symmetries of a network: its feature spaces, derived by tracing.

A hidden unit can be renamed without changing the function, if every weight that writes it, reads it or scales it is
renamed with it. A `Space` is a set of units that can be exchanged for each other, with all those weights.

The derivation labels the elements of every intermediate tensor with the unit that they belong to. An operation that
only moves elements (reshape, concatenate, permute, …) is applied to the labels as it is; one that works element by
element makes the labels of its operands equal; a layer reads the labels of its inputs and makes new ones for its
outputs. Units with the same weights and the same history are exchangeable. What an operation does to labels is a *rule*
(`fedmerge.rules`); an operation without one is refused, by name. The result is proven on the example before it is
returned: random permutations must leave the model's outputs unchanged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.basis import Permutation, rebase
from fedmerge.graph import RuleTable
from fedmerge.grouping import spaces_of
from fedmerge.rules import RULES
from fedmerge.spaces import Space, UnsupportedOperation
from fedmerge.trace import Trace

INVARIANCE_TOLERANCE = 1e-8


def symmetry(model: nn.Module, example: Tensor, *, rules: RuleTable | None = None) -> tuple[Space, ...]:
    """Derive the feature spaces of a model.

    Input and output spaces are fixed and left out, and so are units that have no one to be exchanged with.

    Args:
        model: any module that torch.fx can trace; it is not changed.
        example: a batch of inputs, of any size.
        rules: what operations do to units; default `fedmerge.rules.RULES`. Pass `{**RULES, MyModule: my_rule}` to add
            your own; a module with a rule is not traced into.

    Returns:
        The spaces, in the order in which the model writes them.

    Raises:
        UnsupportedOperation: names the node that no rule describes, and how to pass one.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> (space,) = symmetry(model, torch.zeros(1, 4))
        >>> space.size, [axis.name for axis in space.writers], [axis.name for axis in space.readers]
        (8, ['0.weight', '0.bias'], ['2.weight'])
    """
    proof = copy.deepcopy(model).cpu().double().eval()
    example = example.detach().cpu().double()
    trace = Trace(proof, RULES if rules is None else rules)
    trace.run(example)
    spaces = spaces_of(trace)
    with torch.no_grad():
        _prove(proof, example, spaces)
    return spaces


def _prove(model: nn.Module, example: Tensor, spaces: Sequence[Space]) -> None:
    """Raise unless random permutations of all spaces leave the outputs unchanged; the model's weights are changed."""
    generator = torch.Generator().manual_seed(0)
    make_generic(model, generator)
    state = model.state_dict()
    inputs = torch.randn(example.shape, generator=generator, dtype=torch.float64)
    changes = [Permutation(torch.randperm(space.size, generator=generator)) for space in spaces]
    before, after = (
        _outputs(functional_call(model, weights, (inputs,), tie_weights=False))
        for weights in (state, rebase(state, spaces, changes))
    )
    scale = max(float(found.abs().max()) for found in before)
    error = max(float((ours - theirs).abs().max()) for ours, theirs in zip(before, after, strict=True))
    if not error <= INVARIANCE_TOLERANCE * (scale or 1.0):
        raise UnsupportedOperation(
            f"the spaces derived for {type(model).__name__} are wrong: permuting them changes its outputs by "
            f"{error / (scale or 1.0):.1e} (relative). A rule misses something that the model does"
        )


def _outputs(found: object) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    values = found.values() if isinstance(found, Mapping) else found
    return [tensor for item in values for tensor in _outputs(item)] if isinstance(values, Iterable) else []


def make_generic(model: nn.Module, generator: torch.Generator) -> None:
    """Rid a model's weights, in place, of ties and zeros: a new norm's ones, or an empty head, hide a wrong axis.

    Args:
        model: changed; its parameters must not require gradients where gradients are recorded.
        generator: draws the weights' noise.
    """
    weights = model.state_dict(keep_vars=True).values()
    for tensor in {id(tensor): tensor for tensor in weights}.values():  # one of two names is one
        if tensor.is_floating_point():
            noise = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
            inputs = tensor[0].numel() if tensor.ndim > 1 else 1
            tensor.copy_(tensor * (0.5 + noise) + 0.1 / inputs**0.5 * noise)
