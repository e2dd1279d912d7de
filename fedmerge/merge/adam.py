"""Adam, as all descents of a merge use it: a rule that anything which is moved may apply in its own way.

Kingma, Ba: Adam: A Method for Stochastic Optimization, ICLR 2015, arXiv 1412.6980. Loshchilov, Hutter: Decoupled Weight
Decay Regularization, ICLR 2019, arXiv 1711.05101.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

FIRST, SECOND, EPSILON = 0.9, 0.999, 1e-8
"""Shares of the moments that a step keeps, and what is added to the denominator."""

FUSED = ("cpu", "cuda")
"""Kinds of devices on which torch has Adam as one kernel."""


def first_step(like: Tensor) -> Any:
    """Return 0 for coordinates to count their steps by: on a GPU a tensor, which a recorded step counts on.

    Args:
        like: on the coordinates' device.
    """
    return torch.zeros((), dtype=torch.float64, device=like.device) if like.is_cuda else 0


@dataclass(frozen=True)
class Rates:
    """One step: x ← keep · x − rate · m / (√v · root + ε).

    Attributes:
        lr: learning rate.
        step: its number, from 1 (see `first_step`); then what follows from it is tensors too.
        keep: what decay leaves of the coordinate.
    """

    lr: float
    step: Any
    keep: float = 1.0

    @cached_property
    def rate(self) -> Any:
        """The learning rate, corrected for the first moment's bias."""
        return self.lr / (1 - FIRST**self.step)

    @cached_property
    def root(self) -> Any:
        """What corrects the second moment's bias."""
        return (1 - SECOND**self.step) ** -0.5

    @cached_property
    def in_units_of_root(self) -> tuple[Any, Any]:
        """The step's factor and ε where √v is taken as it is: −rate / root and ε / root."""
        return -self.rate / self.root, EPSILON / self.root

    @cached_property
    def packed(self) -> Tensor:
        """The rate, the second moment's correction and `keep`, (3,) in float64, on the device that counts the steps."""
        if isinstance(self.rate, Tensor):
            return torch.stack([self.rate, self.root, torch.full_like(self.rate, self.keep)])
        return torch.tensor([self.rate, self.root, self.keep], dtype=torch.float64)

    def move(self, value: Tensor, first: Tensor, second: Tensor, gradient: Tensor) -> None:
        """Take the step in place, by torch's own Adam.

        Args:
            value: x.
            first: m before the step.
            second: v before the step.
            gradient: of x.
        """
        if self.keep != 1:
            value.mul_(self.keep)
        taken = torch.zeros((), device=value.device).add_(self.step - 1)
        adam(
            [value],
            [gradient],
            [first],
            [second],
            [],
            [taken],
            fused=value.device.type in FUSED,
            amsgrad=False,
            beta1=FIRST,
            beta2=SECOND,
            lr=self.lr,
            weight_decay=0.0,
            eps=EPSILON,
            maximize=False,
        )


@dataclass(frozen=True)
class Adam:
    """The hyper-parameters.

    Attributes:
        lr: learning rate.
        decay: pull of the coordinates toward 0, as a share of the learning rate (AdamW's weight decay).
    """

    lr: float
    decay: float = 0.0

    def rates(self, step: Any) -> Rates:
        """Return the factors of a step.

        Args:
            step: its number, from 1; a number or a tensor.
        """
        return Rates(self.lr, step, 1 - self.lr * self.decay)

    def optimizer(self, values: Sequence[Tensor]) -> torch.optim.Optimizer:
        """Return torch's own, for tensors that hold their gradients.

        Args:
            values: what it moves, on one device.
        """
        fused = all(value.device.type in FUSED and value.is_floating_point() for value in values)
        recordable = all(value.is_cuda for value in values)
        way: dict[str, Any] = {"fused": fused, "foreach": not fused, "capturable": recordable}
        if self.decay:
            return torch.optim.AdamW(values, lr=self.lr, weight_decay=self.decay, **way)
        return torch.optim.Adam(values, lr=self.lr, **way)
