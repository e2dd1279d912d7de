"""Gradients of chains of linear layers by the chain rule, written out: autograd's numbers without its graph.

A step of a small network costs more in calls than in arithmetic, and half of the calls are autograd's. The layers of
such a network need none: the error that arrives at a linear layer, times what the layer was given, is the gradient of
its weights. The kernels are those that autograd calls, so one network's gradients have its bits. Networks of one
architecture may be stacked: then each product is one of stacks of matrices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedmerge import parts

ELEMENTWISE = (nn.ReLU, nn.GELU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.ELU, nn.LeakyReLU, nn.Identity)
"""Layers that act element by element, without statistics and without chance."""


@dataclass(frozen=True)
class Chain:
    """A network of linear layers with element-wise ones between them; of `chain_of`.

    Attributes:
        layers: the layers but for those that flatten, by name.
        flattens: whether one of these comes first; else the images must be vectors.
    """

    layers: tuple[tuple[str, nn.Module], ...]
    flattens: bool

    @torch.no_grad()
    def gradients(
        self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the mean cross-entropy of one network, and its gradients by the weights' names.

        Args:
            weights: of the network.
            images: (images, …), at least one.
            labels: (images,).
        """
        shares = images.new_full(labels.shape, 1 / len(labels))
        loss, errors = self._errors(weights, images, labels, shares)
        found: dict[str, Tensor] = {}
        for weight, bias, error, inputs in errors:
            found[weight] = error.mT @ inputs
            if bias in weights:
                found[bias] = error.sum(-2)
        return loss, {name: found[name] for name in weights}

    @torch.no_grad()
    def accelerate(
        self,
        velocities: Mapping[str, Tensor],
        momentum: float,
        weights: Mapping[str, Tensor],
        images: Tensor,
        labels: Tensor,
        shares: Tensor,
    ) -> Tensor:
        """Add the gradients of stacked networks to their velocities, as they are computed; none is ever stored.

        Args:
            velocities: stacked like the weights; each becomes `momentum` times itself and the gradient.
            momentum: of SGD.
            weights: stacked: (networks, …) each.
            images: (networks, images, …).
            labels: (networks, images).
            shares: (networks, images): what an image counts in its network's loss; 0: nothing.

        Returns:
            The networks' losses, (networks,): the cross-entropies of their images by these shares.
        """
        losses, errors = self._errors(weights, images, labels, shares)
        for weight, bias, error, inputs in errors:
            velocities[weight].baddbmm_(error.mT, inputs, beta=momentum)
            if bias in velocities:
                velocities[bias].mul_(momentum).add_(error.sum(-2))
        return losses

    def _errors(
        self, weights: Mapping[str, Tensor], images: Tensor, labels: Tensor, shares: Tensor
    ) -> tuple[Tensor, Iterator[tuple[str, str, Tensor, Tensor]]]:
        """Return the losses, and from the last linear layer to the first its tensors' names, its error, its inputs."""
        values = [images.flatten(labels.ndim)]
        for (weight, bias), layer in zip(self._names, self._layers, strict=True):
            if type(layer) is nn.Linear:
                values.append(_linear(weights[weight], weights.get(bias), values[-1]))
            else:
                values.append(torch.relu(values[-1]) if type(layer) is nn.ReLU else layer(values[-1]))
        log_probabilities, right = values[-1].log_softmax(-1), labels.unsqueeze(-1)
        losses = -(log_probabilities.gather(-1, right).squeeze(-1) * shares).sum(-1)
        error = torch.zeros_like(log_probabilities).scatter_(-1, right, -shares.unsqueeze(-1))
        error = torch.ops.aten._log_softmax_backward_data.default(error, log_probabilities, -1, error.dtype)
        return losses, self._back(weights, values, error)

    def _back(
        self, weights: Mapping[str, Tensor], values: Sequence[Tensor], error: Tensor
    ) -> Iterator[tuple[str, str, Tensor, Tensor]]:
        for place in range(len(self._layers) - 1, -1, -1):
            layer, (weight, bias) = self._layers[place], self._names[place]
            if type(layer) is nn.Linear:
                yield weight, bias, error, values[place]
                if place == self._first:
                    return
                error = error @ weights[weight]
            elif type(layer) is nn.ReLU:
                error = torch.ops.aten.threshold_backward.default(error, values[place + 1], 0)
            else:
                error = _derived(layer, values[place], error)

    @cached_property
    def _layers(self) -> tuple[nn.Module, ...]:
        return tuple(layer for _, layer in self.layers)

    @cached_property
    def _names(self) -> tuple[tuple[str, str], ...]:
        prefixes = [f"{name}." if name else "" for name, _ in self.layers]
        return tuple((f"{prefix}weight", f"{prefix}bias") for prefix in prefixes)

    @cached_property
    def _first(self) -> int:
        return next(place for place, layer in enumerate(self._layers) if type(layer) is nn.Linear)


def chain_for(model: nn.Module, images: Tensor) -> Chain | None:
    """Return a model as a chain that computes on such images, (images, …), or None."""
    chain = parts.once(chain_of, model)
    return chain if chain is not None and (chain.flattens or images.ndim == 2) else None


def chain_of(model: nn.Module) -> Chain | None:
    """Return a model as a chain; None if it has other layers, hooks, or weights that are frozen or used twice.

    Args:
        model: a linear layer, or an `nn.Sequential` of layers and other sequences.
    """
    modules = [(name, module) for name, module in model.named_modules(remove_duplicate=False)]
    layers = [(name, module) for name, module in modules if type(module) is not nn.Sequential]
    flattened = bool(layers) and flattens(layers[0][1])
    if flattened:
        layers = [(name, layer) for name, layer in layers if not flattens(layer)]
    linear = [layer for _, layer in layers if type(layer) is nn.Linear]
    plain = all(type(layer) in (nn.Linear, *ELEMENTWISE) and _repeatable(layer) for _, layer in layers)
    if not linear or not plain or any(_hooked(module) for _, module in modules):
        return None
    weights = [parameter for layer in linear for parameter in layer.parameters()]
    if len({id(weight) for weight in weights}) < len(weights) or not all(weight.requires_grad for weight in weights):
        return None
    return Chain(tuple(layers), flattened)


def flattens(module: nn.Module) -> bool:
    """Return whether a layer makes a vector of each image."""
    return type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1)


def _repeatable(layer: nn.Module) -> bool:
    """Return whether what a layer is given is still there after it: nothing but a ReLU's inputs may be overwritten."""
    return type(layer) is nn.ReLU or not getattr(layer, "inplace", False)


def _hooked(module: nn.Module) -> bool:
    return any((module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks))


def _linear(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    if inputs.ndim == 2:
        return functional.linear(inputs, weight, bias)
    return inputs @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(-2), inputs, weight.mT)


def _derived(layer: nn.Module, inputs: Tensor, error: Tensor) -> Tensor:
    """Return the error before an element-wise layer."""
    with torch.enable_grad():
        inputs = inputs.detach().requires_grad_()
        return torch.autograd.grad(layer(inputs), inputs, error)[0]
