"""The probe: a teacher of labelled images that also sees what the clients' last hidden layers see.

Clients that know few classes name the others wrongly, all of them where no two have one in common; but the units before
their last layers tell apart what the classes do not. A linear classifier of these units (Alain, Bengio: Understanding
Intermediate Layers Using Linear Classifier Probes, 2016, arXiv 1610.01644) is learned together with the stacker's
weights (`fedmerge.merge.stacking`), with a penalty of its own:

    log s(c|x) = log r(c|x) + Σ_k v_k(c) log p_k(c|x) + Σ_k u_k(c) · h_k(x) + b(c) − log Z(x)

The protocol chooses the penalties, of opinions and units, of units alone, or of opinions alone; these start from the
prior r by label counts, the others from none. h_k are client k's units, centred, in units of their mean length on the
server's images.

It is for 50 to 499 known classes, where cross-validation chooses. Where there are enough images to spread classes over
(`fedmerge.merge.propagation`), the probe's classes may be spread in place of the prior's, and the units be seen by what
learns them: what names more of the labels rightly while they are hidden, is taken.

The probe answers a question of NP Merge's too: coefficients of the last layer's channels are the stacker's weights v, a
client's say in a class; coefficients of its parameters are weights of the units, u.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedmerge.merge.heads import find_head
from fedmerge.merge.pool import Hear, Pool
from fedmerge.merge.propagation import FEWEST, NEIGHBOURS, PENALTY, nearest, spread_and_scaled, views
from fedmerge.merge.stacking import Stacker, stack, uninformed
from fedmerge.merge.teacher import Teacher, teacher_of
from fedmerge.problem import UNKNOWN, Combination, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.train import EVALUATION_BATCH, LEAST_LOG_PROBABILITY, evaluating

PENALTIES = (math.inf, 100.0, 10.0)
"""Of the opinions' weights, to choose from."""
UNIT_PENALTIES = (3.0, 0.3, 0.1, 0.03)
"""Of the hidden units' weights, to choose from."""
LEAST_GAIN = 0.02
"""Of validation loss by the hidden units, in nats, from which on a merge is told that it wants them."""
WANTS_UNITS = "wants-units"
"""In the diagnostics: whether the hidden units' weights tell more than the opinions'."""
SPREAD_UNIT_PENALTY = 1.0
"""Of the hidden units' weights where propagated classes are learned; not chosen."""


def probed(problem: Problem, updates: Sequence[Update], smoothing: float) -> Pool | None:
    """Return the pool that learns from the known classes, and from all of the server's images.

    Args:
        problem: the server's side, not taught.
        updates: at least one, with label counts.
        smoothing: examples added to each label count.

    Returns:
        None where fewer than 50 classes are known, or 500 and more, where a client's model has no last layer that is
        fully connected, or where memory is short.
    """
    few = problem.may_choose and problem.refits
    layers = last_layers(problem, updates) if few and not problem.low_memory else None
    if layers is None:
        return None
    hear, own = listening(problem, updates, layers)
    opinions, units = (heard.cpu() for heard in own)
    labels, known = problem.data.labels.cpu(), problem.data.known.cpu()
    prior = teacher_of("counts-geometric", updates, smoothing)
    settings: list[tuple[Combination, float, float]] = [
        *((base, penalty, math.inf) for base in (prior, uninformed) for penalty in PENALTIES),
        *((uninformed, penalty, of_units) for penalty in PENALTIES for of_units in UNIT_PENALTIES),
    ]

    def fit(number: int, learn: Tensor) -> Stacker:
        learn = learn[known[learn]]
        base, penalty, of_units = settings[number]
        return stack(base, opinions[:, learn], labels[learn], penalty, units[learn], of_units)

    losses = torch.zeros(len(settings))
    for learn, judges in problem.splits:
        for number in range(len(settings)):
            says = fit(number, learn)(opinions[:, judges], units[judges]).clamp(min=LEAST_LOG_PROBABILITY)
            losses[number] -= says.gather(1, labels[judges, None]).mean() / len(problem.splits)
    best = int(losses.argmin())
    base, penalty, of_units = settings[best]
    gain = float(losses[: 2 * len(PENALTIES)].min() - losses[best])
    diagnostics = {
        "prior": prior.rule if base is prior else None,
        "penalty": penalty if penalty < math.inf else None,
        "unit-penalty": of_units if of_units < math.inf else None,
        "validation-loss": float(losses[best]),
        WANTS_UNITS: gain > LEAST_GAIN,
    }
    learned = [torch.arange(len(labels)), *(learn for learn, _ in problem.splits)]
    probes = [fit(best, learn) for learn in learned]
    if len(labels) >= FEWEST:
        probes, diagnostics["spread"] = _spread(problem, prior, probes, learned, opinions, units)
    return Pool(probes[0], hear, len(labels), True, diagnostics, own, tuple(probes[1:]))


def _spread(
    problem: Problem,
    prior: Teacher,
    probes: Sequence[Stacker],
    learned: Sequence[Tensor],
    opinions: Tensor,
    units: Tensor,
) -> tuple[list[Stacker], str]:
    """Return what learns the propagated classes, from the images of each sequence, and what the classes began with."""
    labels = problem.data.labels.cpu()
    neighbours = nearest(views(opinions), NEIGHBOURS)
    counts = torch.tensor(prior.label_counts, dtype=torch.float64).sum(0)
    shown = [torch.full_like(labels, UNKNOWN).index_copy(0, learn, labels[learn]) for learn in learned]
    starts = {"prior": [prior(opinions)] * len(learned), "probe": [probe(opinions, units) for probe in probes]}
    found = {
        name: [
            spread_and_scaled(neighbours, says.argmax(1), counts, known)
            for says, known in zip(of_start, shown, strict=True)
        ]
        for name, of_start in starts.items()
    }
    right = {
        name: sum(
            float((classes[judges] == labels[judges]).double().mean())
            for classes, (_, judges) in zip(of_start[-len(problem.splits) :], problem.splits, strict=True)
        )
        for name, of_start in found.items()
    }
    if right["probe"] > right["prior"]:
        return [
            stack(uninformed, opinions, classes, PENALTY, units, SPREAD_UNIT_PENALTY) for classes in found["probe"]
        ], "probe"
    return [stack(prior, opinions, classes, PENALTY) for classes in found["prior"]], "prior"


def last_layers(problem: Problem, updates: Sequence[Update]) -> list[str] | None:
    """Return the name of each client's last layer; None where one is not fully connected, or not called as a module.

    Args:
        problem: has the architectures, and an image.
        updates: at least one, on the images' device.
    """
    names = []
    for update in updates:
        model = problem.architecture(update.model)
        try:
            head = find_head(model, update.state, problem.data.images.shape[1:])
        except ConfigurationError:
            return None
        [name, *others] = {name.rpartition(".")[0] for name in head}
        layer = model.get_submodule(name)
        if others or not isinstance(layer, nn.Linear):
            return None
        if [read.shape for read in _heard(model, update, name, problem.data.images[:1])[1]] != [(1, layer.in_features)]:
            return None
        names.append(name)
    return names


def listening(problem: Problem, updates: Sequence[Update], layers: Sequence[str]) -> tuple[Hear, tuple[Tensor, Tensor]]:
    """Return what hears the clients' models and the units before their last layers, and what it hears of the server's.

    It gives log-probabilities (clients, images, classes) and units (images, units), of which the last is always 1.

    Args:
        problem: has the architectures, and the images by which the units are centred and scaled.
        updates: at least one, on the images' device.
        layers: from `last_layers`.
    """
    models = [problem.architecture(update.model) for update in updates]

    def heard(images: Tensor) -> list[tuple[Tensor, Tensor]]:
        found = [_heard(*of_client, images) for of_client in zip(models, updates, layers, strict=True)]
        return [(torch.cat(logits).double().log_softmax(1), torch.cat(units).double()) for logits, units in found]

    def joined(found: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        scaled = [(units - mean) / length for (_, units), mean, length in zip(found, means, lengths, strict=True)]
        return torch.stack([opinions for opinions, _ in found]), torch.cat(
            [*scaled, torch.ones_like(scaled[0][:, :1])], 1
        )

    own = heard(problem.data.images)
    means = [units.mean(0) for _, units in own]
    lengths = [
        (units - mean).norm(dim=1).mean().clamp(min=torch.finfo(units.dtype).tiny)
        for (_, units), mean in zip(own, means, strict=True)
    ]
    return lambda images: joined(heard(images)), joined(own)


@torch.no_grad()
def _heard(model: nn.Module, update: Update, layer: str, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return a model's outputs, and what its last layer reads, batch by batch."""
    read: list[Tensor] = []
    handle = model.get_submodule(layer).register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    try:
        with evaluating(model):
            parts = torch.split(images, EVALUATION_BATCH)
            return [functional_call(model, dict(update.state), (part,)) for part in parts], read
    finally:
        handle.remove()
