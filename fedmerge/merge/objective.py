"""What a learned merge descends, labels, a teacher's targets, or both; and what else all descents have in common.

What is learned from labels is learned on the labelled images alone. With a teacher's targets alone the server's data
may be unlabelled. Then every choice that the protocol makes is made on the teacher's targets too, the reference of an
alignment included: the server's labels, if there are any, have no part in the result. Between the two, labels complete
the teacher's targets where they are known. Then the known classes judge if they are 500 and a fifth of all images, or
50 and all images are fewer than 500, each validation part by a teacher that was not told its classes; otherwise a
validation part of all images does: what a teacher says of many judges with less chance than the classes of few.

Hinton, Vinyals, Dean: Distilling the Knowledge in a Neural Network, 2015, arXiv 1503.02531 (soft targets). Lee:
Pseudo-Label, ICML 2013 Workshop on Challenges in Representation Learning (the class where it is known, a model's
elsewhere; his model teaches itself). Polyak, Juditsky: Acceleration of Stochastic Approximation by Averaging, SIAM
Journal on Control and Optimization 30(4), 1992 (the mean over the last steps; ours is of 20). Beyer, Zhai, Royer,
Markeeva, Anil, Kolesnikov: Knowledge Distillation: A Good Teacher Is Patient and Consistent, CVPR 2022,
arXiv 2106.05237 (the teacher tells of mixed images too; ours are mixed once, not anew in each step).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fedmerge.augment import mixtures
from fedmerge.catalogue import AUGMENTATIONS
from fedmerge.merge.pool import Combine, needs_of, pool_of
from fedmerge.merge.probing import probed
from fedmerge.merge.teacher import PROPAGATED, SMOOTHING, TEACHERS, check_smoothing
from fedmerge.problem import FEWEST_TO_CHOOSE, FEWEST_TO_SPLIT, LABELS, Examples, Problem, Update
from fedmerge.seeds import generator
from fedmerge.settings import ConfigurationError

TARGETS = ("labels", "soft", "sharpened", "hard", "mixed", "completed")


@dataclass(frozen=True)
class Objective:
    """What is learned from. Learned mergers inherit these options.

    Attributes:
        targets: "labels", or a teacher's: "soft" (its probabilities), "sharpened" (p^(1/temperature), normalised),
            "hard" (its most probable class); or of both: "mixed" (labels and soft targets, where the class is known;
            of fewer than 50 images of known classes and no other, the labels) and "completed" (the class where it is
            known, the teacher's class elsewhere).
        teacher: how the clients' predictions are combined, one of `fedmerge.merge.teacher.TEACHERS`.
        temperature: of sharpened targets, greater than 0; below 1 they are sharper than the teacher.
        smoothing: examples added to each of the clients' label counts, at least 0.
        label_share: the labels' share in mixed targets, in [0, 1].
        augment: what is done to the images of a step: "none", "shifts", "flips" or "both".
        mixtures: images mixed of pairs of the server's, as many more to learn from, where there is a teacher to tell of
            them. They judge nothing.
        average: take the mean of what is learned over the last steps (20), not the last one.
    """

    targets: str = "labels"
    teacher: str = PROPAGATED
    temperature: float = 0.5
    smoothing: float = SMOOTHING
    label_share: float = 0.5
    augment: str = "none"
    mixtures: int = 3000
    average: bool = True

    def __post_init__(self) -> None:
        for name, names in (("targets", TARGETS), ("teacher", TEACHERS), ("augment", AUGMENTATIONS)):
            if getattr(self, name) not in names:
                raise ValueError(f"{name} must be one of {', '.join(names)}, got {getattr(self, name)!r}")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")
        if self.mixtures < 0:
            raise ValueError(f"mixtures must be a number of images, at least 0, got {self.mixtures}")
        if not 0 <= self.label_share <= 1:
            raise ValueError(f"label_share must be in [0, 1], got {self.label_share}")
        check_smoothing(self.smoothing)

    @property
    def objective(self) -> Objective:
        """These options alone, without those of the merger that inherits them."""
        return Objective(**{item.name: getattr(self, item.name) for item in fields(Objective)})

    @property
    def needs(self) -> frozenset[str]:
        """What cannot be done without."""
        if self.targets == "labels":
            return frozenset([LABELS])
        return needs_of(self.teacher) | frozenset([LABELS] if self.targets == "mixed" else [])

    @property
    def uses_labels(self) -> bool:
        """Whether labels of the server's that are known have a part in what is learned."""
        return LABELS in self.needs or self.targets == "completed"

    @property
    def description(self) -> dict[str, Any]:
        """What differs from learning on labels, for the diagnostics."""
        if self.targets == "labels":
            return {}
        return {"targets": self.targets, "teacher": self.teacher}

    def seen(self, problem: Problem) -> Problem:
        """Return the problem with the images that are learned from: the labelled ones where labels are all that counts.

        Args:
            problem: the server's side.
        """
        alone = self.targets == "labels" and not problem.data.labelled and bool(problem.data.known.any())
        return problem.restricted(problem.labelled) if alone else problem

    def teach(self, problem: Problem, updates: Sequence[Update]) -> Problem:
        """Return the problem with what is to be learned in place of its labels.

        Args:
            problem: the server's side; one that is taught already is returned as it is.
            updates: the clients', whose models are the teacher.

        Raises:
            ConfigurationError: if labels or label counts are needed and not known.
        """
        if problem.taught:
            return problem
        data = problem.data
        known = data.known
        if self.targets in ("labels", "mixed") and not known.any():
            raise ConfigurationError(
                f"targets={self.targets} needs the classes of the server's images, and they are not known "
                "(--server-labels): learn a teacher's (targets=hard; np-distill, finetune-distill)"
            )
        if self.targets == "labels":
            return self.seen(problem)
        if data.labelled and (self.targets == "completed" or (self.targets == "mixed" and not problem.may_choose)):
            return problem  # there is nothing left to tell, or too little for a teacher to tell anything of use
        semi = self.targets in ("mixed", "completed") and bool(known.any())
        pool = probed(problem, updates, self.smoothing) if semi and self.teacher == PROPAGATED else None
        pool = pool or pool_of(self.teacher, problem, updates, self.smoothing, use_labels=semi)
        blind = not semi and not pool.server_labels
        taught = replace(problem, blind=blind, taught=True, lesson=pool.diagnostics)
        own = pool.own(problem)
        images = mixtures(data.images, self.mixtures, generator(problem.seed, "server", "mixtures"))
        mixed = pool.hear(images) if self.mixtures else ()

        def told(combine: Combine) -> Problem:
            part = taught.changed(data=self._targets(data, combine(*own), semi=semi))
            if not mixed:
                return part
            says = combine(*mixed).exp().to(images.dtype)
            return replace(part, mixtures=Examples(images, says.argmax(1), says))

        return told(pool.combine).changed(apart=tuple(map(told, pool.apart)) if semi and _labels_judge(data) else ())

    def _targets(self, data: Examples, says: Tensor, *, semi: bool) -> Examples:
        """Return the server's images with what is to be learned of them, of what a teacher says."""
        classes, known = says.argmax(1), data.known
        if self.targets in ("hard", "completed") and not semi:
            return Examples(data.images, classes)
        if self.targets == "sharpened":
            says = (says / self.temperature).log_softmax(1)
        targets = says.exp()
        if semi:
            classes = data.labels.where(known, classes)
            truth = functional.one_hot(classes, targets.shape[1]).to(targets)
            mixed = torch.lerp(targets, truth, self.label_share).where(known[:, None], targets)
            targets = mixed if self.targets == "mixed" else truth
            if _labels_judge(data):
                classes = data.labels
        return Examples(data.images, classes, targets.to(data.images.dtype))


def _labels_judge(data: Examples) -> bool:
    """Whether the known classes alone judge what learns from them and from a teacher (see the module)."""
    number = int(data.known.sum())
    return number >= (FEWEST_TO_CHOOSE if len(data) < FEWEST_TO_SPLIT else max(FEWEST_TO_SPLIT, len(data) / 5))
