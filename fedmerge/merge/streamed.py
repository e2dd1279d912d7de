"""Mixtures θ = start + Σ_k β_k ⊙ (θ_k − c) that hold, beside the models themselves, a few states of a model's size.

Models are read where they are, once or twice a step. `fedmerge.merge.mixture` has the same forms over stacked
directions: slower, for groups that are not rows of a parameter, and the tests' oracle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedmerge.merge import kernels
from fedmerge.merge.adam import Adam, first_step
from fedmerge.merge.box import into_box
from fedmerge.merge.coordinates import Pulled
from fedmerge.merge.directions import Directions, Moments
from fedmerge.state import StateDict


@dataclass(frozen=True)
class Ingredients:
    """What a mixture is made of.

    Attributes:
        start: θ at β = 0, parameters by name.
        models: θ_k by parameter name, at least two.
        shares: coefficients at β = 0 by parameter name, (models, …) broadcastable; a row of a parameter has one.
        centre: c by parameter name; None: 0.
        affine: whether only β_k − mean(β) counts, as it does where c is the models' mean; then a coefficient's gradient
            is taken while the other models make room equally, K/(K − 1) · (θ_k − c) ⊙ dL/dθ.
    """

    start: StateDict
    models: Sequence[StateDict]
    shares: StateDict
    centre: StateDict | None = None
    affine: bool = False


class Streamed:
    """What streamed mixtures share; they differ in how β moves.

    Args:
        given: the models and the start; nothing of it is changed.
    """

    def __init__(self, given: Ingredients) -> None:
        self.given = given
        self.names = list(given.start)
        self.count = len(given.models)
        self.weights = {
            name: tensor.detach().clone(memory_format=torch.contiguous_format) for name, tensor in given.start.items()
        }
        self.theta = {name: self._matrix(name, tensor) for name, tensor in self.weights.items()}
        self.steps = first_step(next(iter(self.weights.values())))
        self.start = {name: self._matrix(name, tensor) for name, tensor in given.start.items()}
        self.directions = {
            name: Directions(
                tuple(self._matrix(name, model[name]) for model in given.models),
                None if given.centre is None else self._matrix(name, given.centre[name]),
                self.count / (self.count - 1) if given.affine else 1.0,
            )
            for name in self.names
        }

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture; the next step changes it."""
        return self.weights

    def coefficients(self) -> dict[str, Tensor]:
        """Return α by parameter name: (models, …), broadcastable to the parameters."""
        found = {}
        for name in self.names:
            beta = self.beta(name)
            found[name] = self.given.shares[name] + (beta - beta.mean(0) if self.given.affine else beta)
        return found

    def beta(self, name: str) -> Tensor:
        """Return β of a parameter: (models, …), broadcastable to it."""
        raise NotImplementedError

    def _rows(self, name: str) -> int:
        """Return of how many rows a parameter is taken to be."""
        shape = self.weights[name].shape
        return shape[0] if shape else 1

    def _matrix(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.detach().contiguous().view(self._rows(name), -1)

    def _shares(self, name: str) -> Tensor:
        """Return the coefficients at β = 0, (models, rows)."""
        shares = self.given.shares[name].reshape(self.count, -1)
        return shares.expand(self.count, self._rows(name)).contiguous()

    def _alike(self, name: str, found: Tensor) -> Tensor:
        """Return (models, rows, width or 1) as (models, …) of the parameter's shape, or broadcastable to it."""
        shape = self.weights[name].shape
        if found[0].numel() == shape.numel():
            return found.reshape(self.count, *shape)
        return found.reshape(self.count, -1, *[1] * max(0, len(shape) - 1)) if shape else found.reshape(self.count)


class Span(Streamed):
    """A coefficient for each parameter, without bounds: neither they nor their moments need exist.

    Args:
        given: the models and the start.
        kept: whether the coefficients are kept all the same, to be shown.
    """

    def __init__(self, given: Ingredients, *, kept: bool = False) -> None:
        super().__init__(given)
        self.values = list(self.weights.values())
        self.moments = {name: Moments.zeros(tensor) for name, tensor in self.theta.items()}
        self.kept = {name: tensor.new_zeros(self.count, *tensor.shape) for name, tensor in self.theta.items() if kept}

    def beta(self, name: str) -> Tensor:
        """Return β of a parameter.

        Raises:
            KeyError: if the coefficients are not kept.
        """
        return self._alike(name, self.kept[name])

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move the mixture as Adam would by moving its coefficients."""
        self.steps += 1
        rates = rule.rates(self.steps)
        for name, theta in self.theta.items():
            gradient = self._matrix(name, gradients[name])
            given = self.directions[name], self.start[name], rates, self.kept.get(name)
            kernels.span(theta, self.moments[name], gradient, *given)

    def _rows(self, name: str) -> int:
        return 1


class Box(Streamed):
    """A coefficient for each parameter; all sum to 1, within bounds. The moments follow from the mixture's gradient's.

    Args:
        given: the models and the start.
        bounds: the least and the greatest coefficient.
    """

    def __init__(self, given: Ingredients, bounds: tuple[float, float]) -> None:
        super().__init__(given)
        self.limits = {name: (self._shares(name), bounds) for name in self.names}
        self.values = list(self.weights.values())
        self.moments = {name: Moments.zeros(tensor) for name, tensor in self.theta.items()}
        self.moved = {name: tensor.new_zeros(self.count, *tensor.shape) for name, tensor in self.theta.items()}

    def beta(self, name: str) -> Tensor:
        """Return β of a parameter."""
        return self._alike(name, self.moved[name])

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move the coefficients, bring them back into the box, and mix."""
        self.steps += 1
        rates = rule.rates(self.steps)
        for name, theta in self.theta.items():
            gradient = self._matrix(name, gradients[name])
            given = self.directions[name], self.start[name], rates, self.moved[name]
            kernels.box(theta, self.moments[name], gradient, *given, *self.limits[name])

    def _rows(self, name: str) -> int:
        return self.given.shares[name][0].numel()


class Channels(Streamed):
    """A coefficient for each output channel.

    Args:
        given: the models and the start.
        bounds: the least and the greatest coefficient, of an affine mixture; None: no bounds.
        light: whether `values` are the coefficients, so that their means take no memory, and not the mixture, which
            then is mixed anew whenever it is asked for.
    """

    def __init__(self, given: Ingredients, bounds: tuple[float, float] | None = None, *, light: bool = False) -> None:
        super().__init__(given)
        self.light = light
        self.moved = {name: tensor.new_zeros(self.count, len(tensor)) for name, tensor in self.theta.items()}
        self.values = list((self.moved if light else self.weights).values())
        self.moments = {name: Moments.zeros(tensor) for name, tensor in self.moved.items()}
        self.limits: dict[str, tuple[Tensor, tuple[float, float]]] = {}
        if bounds is not None:
            self.limits = {name: (self._shares(name), bounds) for name in self.names}

    def beta(self, name: str) -> Tensor:
        """Return β of a parameter."""
        return self._alike(name, self.moved[name][:, :, None])

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture; the next step or call changes it."""
        for name, theta in self.theta.items() if self.light else ():
            kernels.mix(theta, self.directions[name], self.start[name], self.moved[name])
        return self.weights

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move the coefficients, bring them back within their bounds, and mix."""
        self.steps += 1
        rates = rule.rates(self.steps)
        for name, theta in self.theta.items():
            gradient, limits = self._matrix(name, gradients[name]), self.limits.get(name, ())
            given = self.directions[name], self.start[name], rates, self.moved[name]
            kernels.channel(theta, self.moments[name], gradient, *given, *limits)


class Tied(Streamed, Pulled):
    """A coefficient for each model or tensor.

    Args:
        given: the models and the start.
        groups: "model" or "tensor".
        bounds: the least and the greatest coefficient, of an affine mixture; None: no bounds.
    """

    def __init__(self, given: Ingredients, groups: str, bounds: tuple[float, float] | None = None) -> None:
        super().__init__(given)
        self.bounds = bounds
        if groups == "model":
            value = next(iter(self.theta.values())).new_zeros(self.count, 1)
            self.tied = dict.fromkeys(self.names, value)
            self.values = [value]
        else:
            self.tied = {name: tensor.new_zeros(self.count, 1) for name, tensor in self.theta.items()}
            self.values = list(self.tied.values())

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture; the next call changes it."""
        for name, theta in self.theta.items():
            beta = self.tied[name].expand(self.count, len(theta)).contiguous()
            kernels.mix(theta, self.directions[name], self.start[name], beta)
        return self.weights

    def beta(self, name: str) -> Tensor:
        """Return β of a parameter."""
        return self._alike(name, self.tied[name][:, :, None])

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the gradients of β, summed over what is tied."""
        found = [
            kernels.products(self._matrix(name, gradients[name]), self.directions[name]).sum(1, keepdim=True)
            for name in self.names
        ]
        return list(found) if len(self.values) == len(found) else [torch.stack(found).sum(0)]

    def project(self) -> None:
        """Bring each coefficient to the nearest that sum to 1 within the bounds."""
        if self.bounds is None:
            return
        for name, value in zip(self.names, self.values, strict=False):  # one value for all: the shares are alike too
            share = self.given.shares[name].reshape(self.count, -1)
            into_box(value, share, self.bounds)


class Shrunk:
    """A streamed mixture times a learned factor 1 + γ (FedLAW's; see `fedmerge.merge.mixture`).

    Args:
        mixture: with γ = 0.
    """

    def __init__(self, mixture: Span | Channels | Tied) -> None:
        self.mixture = mixture
        self.names = mixture.names
        self.gamma = next(iter(mixture.weights.values())).new_zeros(())
        self.values = [*mixture.values, self.gamma]
        self.optimizer: torch.optim.Optimizer | None = None

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture."""
        return {name: (1 + self.gamma) * tensor for name, tensor in self.mixture.parameters().items()}

    def coefficients(self) -> dict[str, Tensor]:
        """Return α by parameter name: (models, …), broadcastable to the parameters."""
        return {name: (1 + self.gamma) * tensor for name, tensor in self.mixture.coefficients().items()}

    def step(self, gradients: Mapping[str, Tensor], rule: Adam) -> None:
        """Move the coefficients and γ."""
        along = [(gradients[name] * tensor).sum() for name, tensor in self.mixture.weights.items()]
        self.mixture.step({name: (1 + self.gamma) * tensor for name, tensor in gradients.items()}, rule)
        self.optimizer = self.optimizer or rule.optimizer([self.gamma])
        self.gamma.grad = torch.stack(along).sum()
        self.optimizer.step()
