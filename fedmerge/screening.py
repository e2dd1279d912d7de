"""Screening: which clients' models are of no use, found on the server's images before anything is aligned or merged.

Validation of what arrives (`fedmerge.wire`) refuses the malformed. What is well-formed may still be worthless, by
accident or by intent: noise, zeros, weights of the wrong sign or size, a model trained on wrong labels, a copy. In one
round there is no history to judge by, and distances between weights, which robust means go by (Blanchard, El Mhamdi,
Guerraoui, Stainer: Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017, and its
successors), mean nothing between independent initialisations or between clients with different classes. Neither does
the ensemble's loss without a client: honest clients of few classes harm an ensemble more than noise does. So a model is
judged by what it does with the server's images, and against what its own client claims to know. Its score is
Σ_c w(c) · recall(c), where w is the client's own distribution of classes: its label counts; without them, the classes
that it predicts. A guess scores 1 / classes. A client stays if

- its outputs are finite numbers, and depend on the image;
- its score is above chance, by `DEVIATIONS` standard deviations of a guess's score and by `LEAST_SHARE` of what the
  best other client reaches on the same distribution;
- the norm of its weights is within a factor `NORM_FACTOR` of the median of its architecture's clients (from three
  on); or within `NORM_LIMIT`, if its probabilities are not known to be worse than a guess's: Σ_c w(c) · loss(c) below
  log(classes);
- its outputs are not those of another client: of copies, the one with the highest score (to a tenth) stays, or
  the first.

A client that knows one class or two is judged on these alone, whatever it says of the others, so clients with disjoint
classes all stay. A client has no score where that would rest on fewer than `FEWEST_JUDGED` examples or on less than
half of its own distribution, and nobody has one below 50 examples, of which nothing is chosen.

Where the labels are not known, or must have no part in the result, the other clients stand in for them, if all tell
their label counts: their probabilities weighted by their counts, in the classes that most clients know (those that have
half as many examples as the judged client): one's word against another's is no evidence. Then a score must only be
above chance; the worst client is left out, and the rest are judged again. Here a client's counts add up to no more than
`CAP` times the median's: a claim to know everything makes nobody the judge of all.

What this cannot see: a model that does what it claims, and something else on other images (a back door); a wrong model
of one class, which says the same of every image as an honest one does; without labels, all that concerns classes which
few clients know, and a majority of hostile clients among those who claim a class, which can have the honest ones left
out; without label counts, a model that is sure and wrong in most classes, but right in the one that it
names most.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from fedmerge.problem import FEWEST_TO_CHOOSE, UNKNOWN, Problem, Update
from fedmerge.train import predict

logger = logging.getLogger(__name__)

NORM_FACTOR = 5.0
NORM_LIMIT = 50.0
LEAST_SHARE = 1 / 3
DEVIATIONS = 2.0
FEWEST_JUDGED = 5.0
CAP = 2.0
SAME = 1e-5
"""Outputs whose difference is smaller than this, relative to their size, are the same."""


@dataclass(frozen=True)
class Screening:
    """What was found out about the clients.

    Attributes:
        updates: of the clients that stay, at least one, by partition id.
        left_out: why, by the partition ids of the others.
        scores: by partition id, in [0, 1]; a client that could not be judged has none.
        judge: "labels", "clients", or "outputs" where there were too few examples for scores.
        server_examples: how many of the server's examples were looked at.
    """

    updates: tuple[Update, ...]
    left_out: Mapping[int, str]
    scores: Mapping[int, float]
    judge: str
    server_examples: int

    @property
    def diagnostics(self) -> dict[str, Any]:
        """The findings in JSON's types."""
        return {
            "judge": self.judge,
            "left-out": {str(client): reason for client, reason in self.left_out.items()},
            "scores": {str(client): score for client, score in self.scores.items()},
        }


@dataclass(frozen=True)
class _Verdict:
    """A client's score, and what it must exceed."""

    score: float
    bound: float

    @property
    def reason(self) -> str | None:
        if self.score > self.bound:
            return None
        return f"it classifies {self.score:.1%} of what it claims to know, and must exceed {self.bound:.1%}"


def screen(problem: Problem, updates: Sequence[Update], *, use_labels: bool) -> Screening:
    """Leave out the clients whose models are of no use.

    If none is of any use, all stay: there is nothing to prefer.

    Args:
        problem: the server's side.
        updates: at least one, checked, on the problem's device.
        use_labels: whether the server's labels may have a part in it.
    """
    ordered = sorted(updates, key=lambda update: update.partition_id)
    images, labels = problem.data.images, problem.data.labels
    models = [problem.architecture(update.model) for update in ordered]
    outputs = [predict(model, update.state, images) for model, update in zip(models, ordered, strict=True)]
    logits = torch.stack(outputs).double()
    reasons = _faults(logits)
    sound = [place for place in range(len(ordered)) if place not in reasons]
    log_probabilities = logits.log_softmax(2)
    claims = _claims(ordered, log_probabilities)
    norms = _relative_norms(problem, ordered)
    known = labels != UNKNOWN
    judge = "outputs"
    verdicts: dict[int, _Verdict] = {}
    losses: dict[int, float] = {}
    if use_labels and int(known.sum()) >= FEWEST_TO_CHOOSE:
        judge = "labels"
        verdicts, losses = _judged_by_labels(log_probabilities[:, known], labels[known], claims, sound)
    elif len(labels) >= FEWEST_TO_CHOOSE and all(update.label_counts for update in ordered):
        judge = "clients"
        verdicts = _judged_by_each_other(log_probabilities.exp(), claims, sound)
    for place in sound:
        if place in verdicts and (reason := verdicts[place].reason):
            reasons[place] = reason
        else:
            factor = NORM_FACTOR if losses.get(place, 0.0) >= math.log(logits.shape[2]) else NORM_LIMIT
            if not 1 / factor <= norms[place] <= factor:
                reasons[place] = f"its weights' norm is {norms[place]:.3g} times the median client's"
    scores = {place: verdict.score for place, verdict in verdicts.items()}
    for place, original in _copies(logits, [place for place in sound if place not in reasons], scores).items():
        reasons[place] = f"its outputs are those of client {ordered[original].partition_id}"
    if len(reasons) == len(ordered):
        logger.warning("screening finds no client's model of use, and leaves none out")
        reasons = {}
    left_out = {ordered[place].partition_id: reasons[place] for place in sorted(reasons)}
    for client, reason in left_out.items():
        logger.warning("client %d is left out of the merge: %s", client, reason)
    return Screening(
        tuple(update for place, update in enumerate(ordered) if place not in reasons),
        left_out,
        {ordered[place].partition_id: scores[place] for place in sorted(scores)},
        judge,
        len(labels),
    )


def _faults(logits: Float64[Tensor, "clients examples classes"]) -> dict[int, str]:
    """Return what is wrong with models whatever the images show, by place."""
    found = {}
    for place, outputs in enumerate(logits):
        if not bool(outputs.isfinite().all()):
            count = int((~outputs.isfinite().all(1)).sum())
            found[place] = f"its outputs are NaN or infinite on {count} of {len(outputs)} images"
        elif len(outputs) > 1 and _alike(outputs, outputs[:1].expand_as(outputs)):
            found[place] = f"its outputs are the same on all {len(outputs)} images"
    return found


def _alike(first: Tensor, second: Tensor) -> bool:
    return float((first - second).abs().max()) <= SAME * float(first.abs().max())


def _relative_norms(problem: Problem, updates: Sequence[Update]) -> list[float]:
    """Return the norm of each model's parameters over its architecture's median; 1 where fewer than three can tell."""
    norms: dict[str, dict[int, float]] = {}
    for place, update in enumerate(updates):
        names = [name for name, _ in problem.architecture(update.model).named_parameters()]
        squares = sum(float(update.state[name].double().square().sum()) for name in names)
        norms.setdefault(update.model, {})[place] = math.sqrt(squares)
    relative = [1.0] * len(updates)
    for of_model in norms.values():
        median = sorted(of_model.values())[(len(of_model) - 1) // 2]
        for place, norm in of_model.items() if len(of_model) >= 3 else ():
            relative[place] = norm / median if median else math.inf
    return relative


def _claims(
    updates: Sequence[Update], log_probabilities: Float64[Tensor, "clients examples classes"]
) -> Float64[Tensor, "clients classes"]:
    """Return how many examples of each class each client claims to have, at most `CAP` times the median in all."""
    predicted = log_probabilities.exp().mean(1).nan_to_num()
    claims = torch.stack(
        [
            torch.tensor(update.label_counts, dtype=torch.float64, device=shares.device)
            if update.label_counts
            else shares * update.num_examples
            for update, shares in zip(updates, predicted, strict=True)
        ]
    )
    sizes = claims.sum(1).clamp(min=1.0)
    return claims * (CAP * sizes.median() / sizes).clamp(max=1)[:, None]


def _shares(
    labels: Int64[Tensor, " examples"], claim: Float64[Tensor, " classes"]
) -> tuple[Float64[Tensor, " classes"], float] | None:
    """Return a client's distribution over the classes that there are labels of, and a guess's standard deviation.

    None where the labels tell too little of what the client claims to know.
    """
    counts = labels.bincount(minlength=len(claim)).double()
    shares = torch.where(counts > 0, claim, 0.0)
    if float(shares.sum()) <= float(claim.sum()) / 2:
        return None
    shares = shares / shares.sum()
    spread = float((shares.square() / counts.clamp(min=1)).sum())
    if spread * FEWEST_JUDGED > 1:
        return None
    chance = 1 / len(claim)
    return shares, math.sqrt(chance * (1 - chance) * spread)


def _judged_by_labels(
    log_probabilities: Float64[Tensor, "clients examples classes"],
    labels: Int64[Tensor, " examples"],
    claims: Float64[Tensor, "clients classes"],
    sound: Sequence[int],
) -> tuple[dict[int, _Verdict], dict[int, float]]:
    """Return the verdicts, and the models' mean losses on their clients' distributions, by place."""
    number = claims.shape[1]
    of_class = torch.nn.functional.one_hot(labels, number).double()
    of_class = of_class / of_class.sum(0).clamp(min=1)
    recalls = (log_probabilities.argmax(2) == labels).double() @ of_class
    true = log_probabilities.gather(2, labels.expand(len(claims), -1)[:, :, None])[:, :, 0]
    class_losses = -true @ of_class
    verdicts, losses = {}, {}
    for place in sound:
        judged = _shares(labels, claims[place])
        if judged is None:
            continue
        shares, deviation = judged
        scores = recalls @ shares
        best = max((float(scores[other]) for other in sound if other != place), default=0.0)
        chance = 1 / number
        bound = chance + max(DEVIATIONS * deviation, LEAST_SHARE * (best - chance))
        verdicts[place] = _Verdict(float(scores[place]), bound)
        losses[place] = float(class_losses[place] @ shares)
    return verdicts, losses


def _judged_by_each_other(
    probabilities: Float64[Tensor, "clients examples classes"],
    claims: Float64[Tensor, "clients classes"],
    sound: Sequence[int],
) -> dict[int, _Verdict]:
    """Judge each client by the labels of the others, without the worst, until the rest are all better than chance."""
    classes = probabilities.argmax(2)
    opinions = claims[:, None, :] * probabilities
    judges, guilty = list(sound), dict[int, _Verdict]()
    while len(judges) > 1:
        verdicts = {}
        all_opinions, all_claims = opinions[judges].sum(0), claims[judges].sum(0)
        for place in judges:
            others = all_claims - claims[place]
            labels = ((all_opinions - opinions[place]) / others.clamp(min=1.0)).argmax(1)
            peers = (claims[judges] > 0) & (claims[judges] >= claims[place] / 2)  # itself among them, where it claims
            judged = ((peers.sum(0) > max(2, len(judges) / 2)) & (claims[place] > 0))[labels]
            labels, agrees = labels[judged], (classes[place] == labels)[judged]
            if (found := _shares(labels, claims[place])) is not None:
                shares, deviation = found
                counts = labels.bincount(minlength=len(shares)).clamp(min=1)
                recalls = labels[agrees].bincount(minlength=len(shares)) / counts
                verdicts[place] = _Verdict(float(recalls.double() @ shares), 1 / len(shares) + DEVIATIONS * deviation)
        worst = min(verdicts, key=lambda place: verdicts[place].score - verdicts[place].bound, default=None)
        if worst is None or not verdicts[worst].reason:
            return guilty | verdicts
        guilty[worst] = verdicts[worst]
        judges.remove(worst)
    return guilty


def _copies(
    logits: Float64[Tensor, "clients examples classes"], sound: Sequence[int], scores: Mapping[int, float]
) -> dict[int, int]:
    """Return for each copy the place of the model that it copies; the best comes first, and is no copy."""
    found: dict[int, int] = {}
    order = sorted(sound, key=lambda place: (-round(scores.get(place, 0.0), 1), place))
    for number, place in enumerate(order):
        originals = (other for other in order[:number] if other not in found and _alike(logits[other], logits[place]))
        if (original := next(originals, None)) is not None:
            found[place] = original
    return found
