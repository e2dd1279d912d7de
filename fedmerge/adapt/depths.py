"""One residual architecture in two depths: the deeper one's further blocks begin as the identity.

A block that adds to its input adds nothing if the last weights before the addition are zero: the scale and shift of a
norm, or the weights of a layer. So a deeper network computes what a shallower one does, and its further blocks can
learn (Chen, Goodfellow, Shlens: Net2Net, ICLR 2016, arXiv 1511.05641, whose Net2DeeperNet makes plain layers the
identity instead). All else in a further block is a copy of the block before it, so that there is something to align.

Where the blocks are is read from the modules: children of one container that follow each other and are of the same
class and shapes are a run, and may be more in the deeper network. Its blocks lie evenly among the further ones.
"""

from __future__ import annotations

import copy
import operator
from dataclasses import dataclass, field
from itertools import groupby

import torch
from torch import Tensor, fx, nn

from fedmerge.rules import RULES
from fedmerge.spaces import UnsupportedOperation
from fedmerge.state import StateDict
from fedmerge.trace import traced

ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")
CONTAINERS = (nn.Sequential, nn.ModuleList)


@dataclass(frozen=True)
class Depths:
    """An architecture in two depths.

    Attributes:
        base: the deeper one without its further blocks, its modules named as the shallower's.
        origin: for each of the deeper's tensors, the base's that it is, or that it is copied from.
        added: names of the further blocks.
        silent: the deeper's tensors that are zero, so that further blocks are the identity.
    """

    base: nn.Module
    origin: dict[str, str]
    added: tuple[str, ...]
    silent: frozenset[str]

    def deepen(self, state: StateDict) -> dict[str, Tensor]:
        """Return a base's state as the deeper one's, of the same function.

        Args:
            state: left as it is.
        """
        return {
            name: torch.zeros_like(state[origin]) if name in self.silent else state[origin].detach().clone()
            for name, origin in self.origin.items()
        }


def depths(shallower: nn.Module, deeper: nn.Module) -> Depths | None:
    """Return how one architecture becomes another by further blocks, which may be none; None: it does not.

    Widths are not compared, and nothing is proven of the function.

    Args:
        shallower: the one, left as it is.
        deeper: the other, left as it is.
    """
    base, pairing = copy.deepcopy(deeper), _Pairing()
    if not pairing.match(shallower, base):
        return None
    silent = {name: _last_weights(deeper.get_submodule(name)) for name in pairing.added}
    if not all(silent.values()):
        return None
    return Depths(
        base,
        {name: pairing.origin[name] for name in deeper.state_dict()},
        tuple(pairing.added),
        frozenset(f"{name}.{key}" for name, keys in silent.items() for key in keys),
    )


@dataclass
class _Pairing:
    """What of a deeper network goes with what of a shallower one."""

    origin: dict[str, str] = field(default_factory=dict)
    added: list[str] = field(default_factory=list)

    def match(self, shallower: nn.Module, deeper: nn.Module, path: str = "", name: str = "") -> bool:
        """Pair the tensors and children of two modules called `path` and `name`; the deeper loses its further ones."""
        own = _tensors(shallower)
        if type(shallower) is not type(deeper) or own != _tensors(deeper):
            return False
        self.origin |= {f"{name}{key}": f"{path}{key}" for key in own}
        ours, theirs = _runs(shallower), _runs(deeper)
        named_alike = [[name for name, _ in run] for run in ours] == [[name for name, _ in run] for run in theirs]
        if len(ours) != len(theirs) or not (named_alike or isinstance(shallower, CONTAINERS)):
            return False
        kept: dict[str, nn.Module] = {}
        for run, longer in zip(ours, theirs, strict=True):
            if len(longer) < len(run):
                return False
            for position, (key, child) in enumerate(longer):
                like, model = run[position * len(run) // len(longer)]
                if like in kept:
                    self.added.append(f"{name}{key}")
                kept.setdefault(like, child)
                if not self.match(model, child, f"{path}{like}.", f"{name}{key}."):
                    return False
        deeper._modules.clear()
        deeper._modules.update(kept)
        return True


def _tensors(module: nn.Module) -> list[str]:
    return [key for key in module.state_dict() if "." not in key]


def _runs(module: nn.Module) -> list[list[tuple[str, nn.Module]]]:
    """Return the children, those together that follow each other and are alike."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not isinstance(module, CONTAINERS):
        return [[child] for child in children]
    return [list(run) for _, run in groupby(children, lambda child: _kind(child[1]))]


def _kind(module: nn.Module) -> tuple[type[nn.Module], list[tuple[str, torch.Size]]]:
    return type(module), [(name, tensor.shape) for name, tensor in module.state_dict().items()]


def _last_weights(block: nn.Module) -> list[str]:
    """Return the names of the weights without which a block is what it adds to; none, if they are not found."""
    try:
        graph = traced(block, RULES).graph
    except UnsupportedOperation:
        return []
    found: list[str] = []
    plain: set[fx.Node] = set()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        branches = [item for item in inputs if item not in plain]
        if node.op == "placeholder" or (inputs and not branches and not _has_weights(block, node)):
            plain.add(node)
        elif node.target in ADDITIONS and len(inputs) == 2 and len(branches) == 1:
            found += _end_of(block, branches[0])
            plain.add(node)
    return found


def _end_of(block: nn.Module, node: fx.Node) -> list[str]:
    """Return the names of the last weights before a node's output, following first arguments back."""
    while not _has_weights(block, node):
        scales = [str(item.target) for item in node.all_input_nodes if item.op == "get_attr"]
        if node.target in PRODUCTS and scales:
            return scales
        if not node.all_input_nodes:
            return []
        node = node.all_input_nodes[0]
    module = block.get_submodule(str(node.target))
    last = "out_proj." if isinstance(module, nn.MultiheadAttention) else ""
    return [f"{node.target}.{name}" for name, _ in module.named_parameters() if name.startswith(last)]


def _has_weights(block: nn.Module, node: fx.Node) -> bool:
    return node.op == "call_module" and any(True for _ in block.get_submodule(str(node.target)).parameters())
