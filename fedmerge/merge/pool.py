"""Pools: how the clients' predictions become one, by a rule or by what is learned on the server's images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedmerge.merge.propagation import FEWEST, propagated
from fedmerge.merge.stacking import Stacker, bare, stack
from fedmerge.merge.teacher import PROPAGATED, STACKED, Teacher, teacher_of
from fedmerge.problem import LABEL_COUNTS, LABELS, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.train import LEAST_LOG_PROBABILITY, opinions

PENALTIES = (1.0, 10.0, 100.0, 1000.0, 10000.0)
"""Penalties to choose from, for log-probabilities in nats and losses summed over the images."""

Combine = Callable[..., Tensor]
Hear = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Pool:
    """How the clients' predictions become one, and what that was learned from.

    Attributes:
        combine: what they say together, (images, classes) of log-probabilities, of what is heard.
        hear: what is combined, of any images: their log-probabilities (clients, images, classes), and perhaps more.
        server_examples: how many images of the server's had a part in it.
        server_labels: whether labels of them had.
        diagnostics: in JSON's types.
        heard: what was heard of the server's own images, where they had to be looked at.
        apart: the combinations that were learned without the labels of each validation part (`Problem.splits`), where
            `combine` was learned from all.
    """

    combine: Combine
    hear: Hear
    server_examples: int = 0
    server_labels: bool = False
    diagnostics: Mapping[str, Any] = field(default_factory=dict)
    heard: tuple[Tensor, ...] = ()
    apart: tuple[Combine, ...] = ()

    def own(self, problem: Problem) -> tuple[Tensor, ...]:
        """Return what is heard of the server's own images.

        Args:
            problem: that of the pool.
        """
        return self.heard or self.hear(problem.data.images)


def pool_of(
    rule: str, problem: Problem, updates: Sequence[Update], smoothing: float, *, use_labels: bool = False
) -> Pool:
    """Return the combination of these clients' predictions, learned where the rule wants that.

    Args:
        rule: one of `fedmerge.merge.teacher.TEACHERS`.
        problem: the server's side, not taught.
        updates: at least one.
        smoothing: examples added to each label count.
        use_labels: whether "propagated" starts from the classes that are known, and learns from them alone where there
            are too few images to propagate anything; "stacked" always learns from them.

    Raises:
        ConfigurationError: if no class is known, and the rule learns from them.
    """

    def hear(images: Tensor) -> tuple[Tensor, ...]:
        return (opinions(problem, updates, images),)

    if rule not in (PROPAGATED, STACKED):
        return Pool(teacher_of(rule, updates, smoothing), hear)
    if rule == STACKED and not problem.data.known.any():
        raise ConfigurationError(
            "the teacher 'stacked' needs classes of the server's images, and none is known (--server-labels): use one "
            "that needs none (teacher=propagated, teacher=mean)"
        )
    if rule == PROPAGATED and use_labels and len(problem.data) < FEWEST and problem.may_choose:
        rule = STACKED
    counted = rule == PROPAGATED or all(update.label_counts and sum(update.label_counts) for update in updates)
    prior = teacher_of("counts-geometric" if counted else "mean", updates, smoothing)
    part = problem if rule == PROPAGATED else problem.restricted(problem.labelled)
    data = part.data
    heard = opinions(part, updates, data.images)
    said = heard.cpu()
    if rule == STACKED:
        return _chosen(part, prior, said, hear)
    uses_labels = use_labels and bool(data.known.any())
    found = propagated(prior, said, data.labels.cpu() if uses_labels else None)
    return Pool(found, hear, len(data), uses_labels, {"prior": prior.rule}, (heard,))


def needs_of(rule: str) -> frozenset[str]:
    """Return what a teacher cannot do without.

    Args:
        rule: one of `fedmerge.merge.teacher.TEACHERS`.
    """
    return frozenset({STACKED: [LABELS], "mean": []}.get(rule, [LABEL_COUNTS]))


def _chosen(part: Problem, prior: Teacher, said: Tensor, hear: Hear) -> Pool:
    """Choose the penalty on the labelled images' validation parts, and fit again where the protocol refits."""
    if not part.may_choose:
        return Pool(bare(prior, said), hear, diagnostics={"prior": prior.rule, "penalty": None})
    labels = part.data.labels.cpu()
    losses = {"none": 0.0} | {f"{penalty:g}": 0.0 for penalty in PENALTIES}
    fits: list[dict[str, Stacker]] = []
    for learn, validation in part.splits:
        fitted = {"none": bare(prior, said)}
        fitted |= {f"{penalty:g}": stack(prior, said[:, learn], labels[learn], penalty) for penalty in PENALTIES}
        fits.append(fitted)
        for name, stacker in fitted.items():
            found = stacker(said[:, validation]).clamp(min=LEAST_LOG_PROBABILITY)
            losses[name] += -float(found.gather(1, labels[validation, None]).mean()) / len(part.splits)
    best = min(losses, key=lambda name: losses[name])
    chosen = stack(prior, said, labels, float(best)) if part.refits and best != "none" else fits[0][best]
    penalty = None if best == "none" else float(best)
    diagnostics = {"prior": prior.rule, "penalty": penalty, "validation-losses": losses}
    apart = tuple(fitted[best] for fitted in fits) if part.refits else ()
    return Pool(chosen, hear, len(labels), True, diagnostics, apart=apart)
