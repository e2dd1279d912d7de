"""The graph of a model, and the rule for each of its nodes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from fedmerge.spaces import UnsupportedOperation

if TYPE_CHECKING:
    from fedmerge.trace import Trace

Rule = Callable[["Trace", fx.Node], Any]
"""What an operation does to units: given the trace and the node, returns the labels of the node's output."""

RuleTable = Mapping[Any, Rule]
"""Rules by module class, function, or method name; a class or function that should not be imported goes by its
qualified name, such as "torchvision.ops.stochastic_depth.stochastic_depth"."""

_OPENED = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)
"""Modules of torch.nn that are made of others, and are traced into."""

_FORWARD = ("forward", "_conv_forward")


def rule_for_class(kind: type[nn.Module], rules: RuleTable) -> Rule | None:
    """Return the rule for a module class: its own, or that of the class whose forward pass it inherits."""
    for base in kind.__mro__:
        rule = rules.get(base) or rules.get(qualified_name(base))
        if rule is not None:
            inherited = all(getattr(kind, name, None) is getattr(base, name, None) for name in _FORWARD)
            return rule if inherited else None
    return None


def rule_for_target(target: Any, rules: RuleTable) -> Rule | None:
    """Return the rule for a function or the name of a method."""
    return rules.get(target) or (None if isinstance(target, str) else rules.get(qualified_name(target)))


def qualified_name(target: Any) -> str:
    """Return the name by which a class or function can be imported."""
    return f"{getattr(target, '__module__', None)}.{getattr(target, '__name__', target)}"


def traced(model: nn.Module, rules: RuleTable) -> fx.GraphModule:
    """Trace a model in evaluation mode; modules that have a rule stay whole.

    Args:
        model: the module, left as it is.
        rules: the rule table.

    Raises:
        UnsupportedOperation: if torch.fx cannot trace it.
    """

    class Tracer(fx.Tracer):
        proxy_buffer_attributes = True  # what is computed from a buffer is each model's own, not a constant

        def is_leaf_module(self, module: nn.Module, module_qualified_name: str) -> bool:
            if rule_for_class(type(module), rules) is not None:
                return True
            return not isinstance(module, _OPENED) and super().is_leaf_module(module, module_qualified_name)

    was_training, was_fused = model.training, torch.backends.mha.get_fastpath_enabled()
    model.eval()
    torch.backends.mha.set_fastpath_enabled(False)  # the fused path of transformer layers branches on its inputs
    try:
        return fx.GraphModule(model, Tracer().trace(model))
    except (fx.proxy.TraceError, TypeError) as error:
        raise UnsupportedOperation(
            f"torch.fx cannot trace {type(model).__name__}: {error}. Put the part that it cannot follow into a module "
            "of its own and pass a rule for it, or merge without alignment (--align identity)"
        ) from error
    finally:
        torch.backends.mha.set_fastpath_enabled(was_fused)
        model.train(was_training)
