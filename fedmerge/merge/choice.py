"""How a merger in closed form chooses its settings: the same protocol, and as many candidates, as a learned merge has.

Nothing is fitted to the server's examples, so below 500 all of them judge; BatchNorm statistics alone are estimated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fedmerge.calibrate import calibrate, has_statistics
from fedmerge.problem import Merged, Problem
from fedmerge.train import evaluate


@dataclass(frozen=True)
class Setting:
    """One setting that the protocol may choose.

    Attributes:
        values: what it is, for the diagnostics.
        merge: makes the model, fresh.
    """

    values: Mapping[str, Any]
    merge: Callable[[], dict[str, Tensor]]


def choose_setting(problem: Problem, settings: Sequence[Setting]) -> Merged:
    """Return the model of the setting that has the least validation loss; the first, where nothing can be chosen.

    Args:
        problem: the server's side.
        settings: at least one; the first is the default.
    """
    losses: list[float] = []
    if problem.may_choose and len(settings) > 1:
        for number, setting in enumerate(settings):
            state = calibrate(problem.model, setting.merge(), problem.learn.images)
            loss = evaluate(problem.model, [state], problem.validation).loss
            losses.append(loss if math.isfinite(loss) else math.inf)
            problem.progress("settings tried", number + 1, len(settings))
    chosen = min(range(len(losses)), key=lambda index: losses[index], default=0)
    state = calibrate(problem.model, settings[chosen].merge(), problem.data.images)
    return Merged(
        (state,),
        server_examples=len(problem.data) if losses or has_statistics(problem.model) else 0,
        server_labels=bool(losses) and not problem.blind,
        diagnostics={
            **settings[chosen].values,
            "candidates": len(losses) or 1,
            "validation-loss": losses[chosen] if losses and math.isfinite(losses[chosen]) else None,
        },
    )
