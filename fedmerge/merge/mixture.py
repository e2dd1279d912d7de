"""Mixtures of models, θ = Σ_k α_k ⊙ θ_k, by the coordinates that a descent moves.

Here the directions d_k are stacked in memory, and every coefficient is stored, for whatever groups them;
`fedmerge.merge.streamed` has the forms that need neither. The forms differ in what α may be: affine (Σ_k α_k = 1, no
bounds), affine times one learned factor (FedLAW's shrinkage: Li, Lin, Chen, Wang, Wu: Revisiting Weighted Aggregation
in Federated Learning with Neural Networks, ICML 2023, arXiv 2302.10911), affine within bounds, and free. The groups say
which numbers of α are one number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedmerge.merge.box import onto_box
from fedmerge.merge.coordinates import Pulled

GROUPS = ("model", "tensor", "channel", "parameter")
COARSE_TO_FINE = ("tensor", "channel", "parameter")
"""The groups of the schedule: each adds to those before it."""


class Ties:
    """Coefficients of all models in all parameters, spread from fewer numbers.

    Args:
        directions: (models, …) by parameter name.
        groups: one of `GROUPS`, or "in-out": the sum of a number for the output channel and one for the input channel.
    """

    def __init__(self, directions: Mapping[str, Tensor], groups: str) -> None:
        self.is_one = groups == "model"
        self.num_dims = {name: tensor.ndim for name, tensor in directions.items()}
        self.values: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}
        for name, tensor in directions.items():
            if self.is_one and self.values:
                self.parts[name] = self.values
                continue
            shapes = [tensor.shape[:1]] if self.is_one else _tied_shapes(tensor.shape, groups)
            self.parts[name] = [tensor.new_zeros(shape) for shape in shapes]
            self.values = [*self.values, *self.parts[name]]

    def spread(self, name: str) -> Tensor:
        """Return a parameter's coefficients, (models, …) broadcastable to its directions."""
        if self.is_one:
            return self.values[0].reshape(-1, *[1] * (self.num_dims[name] - 1))
        first, *others = self.parts[name]
        return sum(others, first)

    def gather(self, products: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the gradients of `values` from those of untied coefficients, summed over what is tied."""
        if self.is_one:
            return [torch.stack([product.flatten(1).sum(1) for product in products.values()]).sum(0)]
        return [product.sum_to_size(part.shape) for name, product in products.items() for part in self.parts[name]]


class Mixture(Pulled):
    """θ = (1 + γ) (start + Σ_k β_k ⊙ d_k), from β = 0 and γ = 0.

    Args:
        start: parameters by name.
        directions: d_k by parameter name, (models, …).
        groups: one of `GROUPS`, "in-out" or "coarse-to-fine".
        factor: of the gradient of β.
        shrinks: whether γ is learned; otherwise it stays 0.
        pace: steps after which the next finer group joins, where groups is "coarse-to-fine".
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        directions: Mapping[str, Tensor],
        groups: str,
        *,
        factor: float = 1.0,
        shrinks: bool = False,
        pace: int = 0,
    ) -> None:
        self.names = list(directions)
        self.start = start
        self.directions = directions
        self.factor = factor
        self.pace = pace
        self.steps = 0
        self.levels = [Ties(directions, item) for item in (COARSE_TO_FINE if groups == "coarse-to-fine" else [groups])]
        self.gamma = next(iter(directions.values())).new_zeros(()) if shrinks else None
        self.values = [value for level in self.levels for value in level.values]
        if self.gamma is not None:
            self.values.append(self.gamma)

    def beta(self, name: str) -> Tensor:
        """Return β of a parameter: (models, …), broadcastable to the directions."""
        first, *others = (level.spread(name) for level in self.levels)
        return sum(others, first)

    def parameters(self) -> dict[str, Tensor]:
        """Return the mixture."""
        mixed = {name: self.start[name] + (self.beta(name) * found).sum(0) for name, found in self.directions.items()}
        if self.gamma is None:
            return mixed
        return {name: (1 + self.gamma) * tensor for name, tensor in mixed.items()}

    def pull_back(self, gradients: Mapping[str, Tensor]) -> list[Tensor | None]:
        """Return the gradients of β, summed over what is tied, and of γ."""
        scale = 1.0 if self.gamma is None else 1 + self.gamma
        products = {name: self.factor * tensor * (scale * gradients[name]) for name, tensor in self.directions.items()}
        found: list[Tensor | None] = []
        for number, level in enumerate(self.levels):
            joins = self.steps >= number * self.pace
            found += level.gather(products) if joins else [None] * len(level.values)
        if self.gamma is not None:
            mixed = self.parameters()
            along = [(gradients[name] * tensor).sum() for name, tensor in mixed.items()]
            found.append(torch.stack(along).sum() / (1 + self.gamma))
        self.steps += 1
        return found


class AffineMixture(Mixture):
    """θ = θ̄ + Σ_k β_k ⊙ (θ_k − θ̄), which is Σ_k α_k ⊙ θ_k with α_k = 1/K + β_k − mean(β), so that Σ_k α_k = 1.

    From another start Σ_k a_k θ_k with Σ_k a_k = 1, a_k stands for 1/K. The gradient is that of α_k while the other
    models make room equally: K/(K − 1) · (θ_k − θ̄) ⊙ dL/dθ. For two models it is (θ_A − θ_B) ⊙ dL/dθ, the pair's.

    Args:
        start: θ̄, or another start, by parameter name.
        deviations: θ_k − θ̄ by parameter name, (models, …).
        groups: as in `Mixture`.
        shares: a_k by parameter name, (models, …) broadcastable; None: 1/K.
        bounds: the least and the greatest α_k; None: no bounds. Then each coefficient must be one number: not "in-out"
            or "coarse-to-fine", and no coarser than the shares.
        shrinks: whether the mixture is multiplied by a learned factor.
        pace: as in `Mixture`.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        deviations: Mapping[str, Tensor],
        groups: str,
        *,
        shares: Mapping[str, Tensor] | None = None,
        bounds: tuple[float, float] | None = None,
        shrinks: bool = False,
        pace: int = 0,
    ) -> None:
        count = len(next(iter(deviations.values())))
        super().__init__(start, deviations, groups, factor=count / (count - 1), shrinks=shrinks, pace=pace)
        self.shares = shares or {
            name: tensor.new_full((count, *[1] * (tensor.ndim - 1)), 1 / count) for name, tensor in deviations.items()
        }
        self.bounds = bounds

    def coefficients(self) -> dict[str, Tensor]:
        """Return α by parameter name: (models, …), broadcastable to the parameters."""
        scale = 1.0 if self.gamma is None else 1 + self.gamma
        found = {}
        for name in self.directions:
            beta = self.beta(name)
            found[name] = scale * (self.shares[name] + beta - beta.mean(0))
        return found

    def project(self) -> None:
        """Bring each α to the nearest that sums to 1 within the bounds."""
        if self.bounds is None:
            return
        (level,) = self.levels
        for name in self.directions:
            (value,) = level.parts[name]
            share = self.shares[name].reshape(-1) if level.is_one else self.shares[name]
            value.copy_(onto_box(share + value - value.mean(0), *self.bounds) - share)
            if level.is_one:
                break  # one number for all parameters, and one share


class FreeMixture(Mixture):
    """θ = Σ_k (a_k + β_k) ⊙ θ_k, a_k the start's shares: α may be anything, so θ may be anything in the models' span.

    Args:
        start: Σ_k a_k θ_k by parameter name.
        models: θ_k by parameter name, (models, …).
        groups: as in `Mixture`.
        shares: a_k by parameter name, (models, …) broadcastable.
        pace: as in `Mixture`.
    """

    def __init__(
        self,
        start: Mapping[str, Tensor],
        models: Mapping[str, Tensor],
        groups: str,
        *,
        shares: Mapping[str, Tensor],
        pace: int = 0,
    ) -> None:
        super().__init__(start, models, groups, pace=pace)
        self.shares = shares

    def coefficients(self) -> dict[str, Tensor]:
        """Return α by parameter name: (models, …), broadcastable to the parameters."""
        return {name: self.shares[name] + self.beta(name) for name in self.directions}


def _tied_shapes(shape: Sequence[int], groups: str) -> list[tuple[int, ...]]:
    """Return the shapes (models, …) of the summands of the coefficients of a stack of parameters."""
    kept: list[set[int]]
    if groups == "in-out":
        kept = [{0, 1}, {0, 2}] if len(shape) > 2 else [{0, 1}]
    else:
        kept = [set(range({"tensor": 1, "channel": 2, "parameter": len(shape)}[groups]))]
    return [tuple(size if dim in of_part else 1 for dim, size in enumerate(shape)) for of_part in kept]
