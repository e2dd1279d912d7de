"""The propagated teacher: what the clients say of all of the server's images together, without a label.

A teacher by label counts judges each image by itself, and clients that have not seen its class mislead it. But images
of one class look alike to the clients, also to those that name it wrongly. So the teacher's classes are

1. spread over the graph that joins each image to those that the clients see most like it, which mends classes that the
   neighbours contradict (Zhou, Bousquet, Lal, Weston, Schölkopf: Learning with Local and Global Consistency,
   NIPS 2003);
2. scaled, class by class, until their shares are those of all clients' images together, which label counts tell (Zhu,
   Ghahramani, Lafferty: Semi-Supervised Learning Using Gaussian Fields and Harmonic Functions, ICML 2003, scale once;
   here it is repeated: Darroch, Ratcliff: Generalized Iterative Scaling for Log-Linear Models, 1972);
3. taught to a stacker (`fedmerge.merge.stacking`), which so learns from images, and no label, how far each client is to
   be believed in each class. It is the teacher, on these images and on any other.

An image is seen as the clients' logits, centred, each client's in units of their mean length; alike is what has a
small angle. The first and third step are what the method adds to its source; the second expects that the server's
images are drawn like the clients' together.
"""

from __future__ import annotations

import torch
from jaxtyping import Float64, Int
from scipy.sparse import coo_array, diags_array
from torch import Tensor
from torch.nn import functional

from fedmerge.merge.stacking import Stacker, bare, stack
from fedmerge.merge.teacher import Teacher
from fedmerge.problem import UNKNOWN

FEWEST = 200
"""Images below which nothing is spread: their neighbours are too far, and their shares too much of chance."""
NEIGHBOURS = 10
SPREAD = 0.8
"""How much of an image's classes its neighbours decide."""
PENALTY = 100.0
"""The stacker's, which here is not chosen."""

BLOCK = 1000
LEAST_MASS = 1e-6
TOLERANCE = 1e-6
MOST_STEPS = 1000


def propagated(
    prior: Teacher,
    log_probabilities: Float64[Tensor, "clients examples classes"],
    labels: Int[Tensor, " examples"] | None = None,
) -> Stacker:
    """Return the teacher that a prior becomes on the server's images; below `FEWEST` it stays what it is.

    Args:
        prior: by label counts.
        log_probabilities: of each client's model, on the CPU.
        labels: as for `propagated_classes`.
    """
    if log_probabilities.shape[1] < FEWEST:
        return bare(prior, log_probabilities)
    classes = propagated_classes(prior, log_probabilities, labels)
    return stack(prior, log_probabilities, classes, PENALTY)


def propagated_classes(
    prior: Teacher,
    log_probabilities: Float64[Tensor, "clients examples classes"],
    labels: Int[Tensor, " examples"] | None = None,
) -> Int[Tensor, " examples"]:
    """Return the classes that a prior tells, spread and scaled.

    Args:
        prior: by label counts.
        log_probabilities: of each client's model, on the CPU; of more images than `NEIGHBOURS`.
        labels: classes, -1 where one is not known; those that are known stand. None: none is.
    """
    counts = torch.tensor(prior.label_counts, dtype=torch.float64).sum(0)
    labels = torch.full(log_probabilities.shape[1:2], UNKNOWN) if labels is None else labels
    neighbours = nearest(views(log_probabilities), NEIGHBOURS)
    return spread_and_scaled(neighbours, prior(log_probabilities).argmax(1), counts, labels)


def spread_and_scaled(
    neighbours: Int[Tensor, "examples neighbours"],
    classes: Int[Tensor, " examples"],
    counts: Float64[Tensor, " classes"],
    labels: Int[Tensor, " examples"],
) -> Int[Tensor, " examples"]:
    """Return the classes, spread over the neighbours and scaled to the classes' shares.

    Args:
        neighbours: from `nearest`.
        classes: of each image, to begin with.
        counts: of the images of each class at all clients together.
        labels: classes, -1 where one is not known; those that are known stand.
    """
    known, seen = labels != UNKNOWN, counts > 0
    masses = spread(neighbours, labels.where(known, classes), len(counts))
    scores = masses[:, seen].clamp(min=LEAST_MASS).log()
    found = scaled(scores, counts[seen] / counts.sum()).argmax(1)
    return labels.where(known, seen.nonzero()[found, 0])


def views(
    log_probabilities: Float64[Tensor, "clients examples classes"],
) -> Float64[Tensor, "examples views"]:
    """Return the images as the clients see them, in rows of length 1.

    Args:
        log_probabilities: of each client's model.
    """
    centred = log_probabilities - log_probabilities.mean(2, keepdim=True)
    lengths = centred.norm(dim=2, keepdim=True).mean(1, keepdim=True)
    joined = (centred / lengths.clamp(min=torch.finfo(torch.float64).tiny)).movedim(0, 1).flatten(1)
    return functional.normalize(joined, dim=1)


def nearest(rows: Float64[Tensor, "examples views"], count: int) -> Int[Tensor, "examples neighbours"]:
    """Return for each row the indices of those with the greatest scalar products, itself left out.

    Args:
        rows: more than `count`.
        count: neighbours of each.
    """
    found = []
    for start in range(0, len(rows), BLOCK):
        products = rows[start : start + BLOCK] @ rows.T
        products.diagonal(start).fill_(-torch.inf)
        found.append(products.topk(count, dim=1).indices)
    return torch.cat(found)


def spread(
    neighbours: Int[Tensor, "examples neighbours"], classes: Int[Tensor, " examples"], num_classes: int
) -> Float64[Tensor, "examples classes"]:
    """Return Q = (1 − a) (1 − a S)⁻¹ P, of the one-hot classes P and S = D^-1/2 W D^-1/2.

    W counts how often two images are neighbours (once or, of each other, twice), D is its row sums, a is `SPREAD`.

    Args:
        neighbours: indices.
        classes: of each image.
        num_classes: of all classes.
    """
    size, count = neighbours.shape
    rows = torch.arange(size).repeat_interleave(count)
    directed = coo_array(
        (torch.ones(size * count, dtype=torch.float64).numpy(), (rows, neighbours.flatten())), (size, size)
    )
    weights = (directed + directed.T).tocsr()
    scale = diags_array(weights.sum(axis=1) ** -0.5)
    graph = (scale @ weights @ scale).tocsr()
    start = functional.one_hot(classes, num_classes).double().numpy()
    found, change = start, 1.0
    while change > TOLERANCE:  # each step leaves `SPREAD` of the last one's change
        following = (1 - SPREAD) * start + SPREAD * (graph @ found)
        change = float(abs(following - found).max())
        found = following
    return torch.from_numpy(found)


def scaled(
    scores: Float64[Tensor, "examples classes"], shares: Float64[Tensor, " classes"]
) -> Float64[Tensor, "examples classes"]:
    """Return the scores, a number added to each class such that the mean of their softmax is `shares`.

    Args:
        scores: finite.
        shares: greater than 0, with sum 1.

    Example:
        >>> scaled(torch.zeros(3, 2, dtype=torch.float64), torch.tensor([0.25, 0.75])).softmax(1)[0]
        tensor([0.2500, 0.7500], dtype=torch.float64)
    """
    for _ in range(MOST_STEPS):
        missing = shares.log() - scores.softmax(1).mean(0).log()
        scores = scores + missing
        if float(missing.abs().max()) < TOLERANCE:
            break
    return scores
