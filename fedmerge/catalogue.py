"""The aligners and mergers by name: what `fedmerge list`, `--align`, `--merge` and `--methods` know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

STATISTICS = ("fisher", "gram")
"""What a client may tell of its model and its data beside the weights (`fedmerge.statistics`)."""


@dataclass(frozen=True)
class Entry:
    """A named algorithm, imported when it is used.

    Attributes:
        summary: one line for `fedmerge list`.
        target: module:class of its frozen dataclass.
        options: the fields that the name sets.
        needs: what it needs beside the clients' models: "start" (the weights that all clients started from), or one of
            `STATISTICS`.
    """

    summary: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()


ALIGNERS: Mapping[str, Entry] = {
    "auto": Entry("the aligner with the lowest validation loss, no alignment included", "fedmerge.align.auto:Auto"),
    "identity": Entry("no alignment", "fedmerge.align.identity:Identity"),
    "activations": Entry(
        "permute units by the correlation of their activations", "fedmerge.align.activations:Activations"
    ),
    "weights": Entry(
        "permute units by the similarity of their weights (Git Re-Basin)", "fedmerge.align.weights:Weights"
    ),
    "universe": Entry(
        "permute the units of all models to fit all others, cycle-consistently", "fedmerge.align.universe:Universe"
    ),
    "cca": Entry("mix units by canonical correlation analysis (CCA Merge)", "fedmerge.align.cca:CCA"),
    "zipit": Entry("merge units across and within models, most alike first (ZipIt)", "fedmerge.align.zipit:ZipIt"),
    "ot": Entry("assign units softly by optimal transport (OTFusion)", "fedmerge.align.ot:OptimalTransport"),
}

_FLOWER = "fedmerge.flower_strategies:"
_FINETUNE = "fedmerge.merge.finetune:FineTune"

MERGERS: Mapping[str, Entry] = {
    "fedavg": Entry(
        "mean weighted by the clients' examples", "fedmerge.merge.average:Average", {"weights": "examples"}
    ),
    "mean": Entry("uniform mean", "fedmerge.merge.average:Average"),
    "np": Entry("NP Merge, all models jointly, coefficients that sum to 1", "fedmerge.merge.nonuniform:NPMerge"),
    "np-pairwise": Entry(
        "NP Merge as in its paper: sigmoid coefficients, successive pairs", "fedmerge.merge.nonuniform:PairwiseNPMerge"
    ),
    "finetune": Entry("fine-tune the uniform mean on the server's examples", _FINETUNE),
    "head-finetune": Entry("fine-tune the last layer of the uniform mean alone", _FINETUNE, {"layers": "head"}),
    "best-client": Entry("the client with the lowest loss on the server's examples", "fedmerge.merge.best:BestClient"),
    "best-client-finetune": Entry("fine-tune the best client on the server's examples", _FINETUNE, {"start": "best"}),
    "server-only": Entry("train a new model on the server's examples alone", _FINETUNE, {"start": "fresh"}),
    "ensemble": Entry("mean of the clients' probabilities; K models at inference", "fedmerge.merge.ensemble:Ensemble"),
    "mean-head": Entry(
        "uniform mean, the last layer's rows weighted by the clients' label counts",
        "fedmerge.merge.average:Average",
        {"head": "counts"},
    ),
    "ensemble-counts": Entry(
        "the clients' probabilities weighted by their label counts",
        "fedmerge.merge.ensemble:Ensemble",
        {"rule": "counts"},
    ),
    "ensemble-geometric": Entry(
        "the clients' log-probabilities weighted by their label counts",
        "fedmerge.merge.ensemble:Ensemble",
        {"rule": "counts-geometric"},
    ),
    "ensemble-propagated": Entry(
        "the clients' log-probabilities, their weights learned on the server's images, without labels",
        "fedmerge.merge.ensemble:Ensemble",
        {"rule": "propagated"},
    ),
    "ensemble-stacked": Entry(
        "the clients' log-probabilities, their weights learned on the server's labelled images",
        "fedmerge.merge.ensemble:Ensemble",
        {"rule": "stacked"},
    ),
    "np-distill": Entry(
        "NP Merge on what the clients together tell of the server's images; no server label is used",
        "fedmerge.merge.nonuniform:NPMerge",
        {"targets": "soft"},
    ),
    "finetune-distill": Entry("fine-tune the uniform mean on the same", _FINETUNE, {"targets": "soft"}),
    "best-client-distill": Entry(
        "fine-tune the client with the lowest loss on the same", _FINETUNE, {"start": "best", "targets": "soft"}
    ),
    "fresh-distill": Entry(
        "train a new model on the same: the control of the distilled methods",
        _FINETUNE,
        {"start": "fresh", "targets": "soft"},
    ),
    "feddf": Entry(
        "fine-tune the uniform mean on the ensemble's mean probabilities (FedDF); no server label is used",
        _FINETUNE,
        {"targets": "soft", "teacher": "mean", "mixtures": 0},
    ),
    "np-semi": Entry(
        "NP Merge on labels where they are known, and everywhere on what the clients together tell",
        "fedmerge.merge.nonuniform:NPMerge",
        {"targets": "mixed"},
    ),
    "finetune-semi": Entry("fine-tune the uniform mean on the same", _FINETUNE, {"targets": "mixed"}),
    "best-client-semi": Entry(
        "fine-tune the client with the lowest loss on the same", _FINETUNE, {"start": "best", "targets": "mixed"}
    ),
    "fresh-semi": Entry(
        "train a new model on the same: the control of these methods",
        _FINETUNE,
        {"start": "fresh", "targets": "mixed"},
    ),
    "task-arithmetic": Entry(
        "the clients' start plus the scaled sum of what each has learned from there",
        "fedmerge.merge.arithmetic:TaskArithmetic",
        needs=("start",),
    ),
    "ties": Entry(
        "task arithmetic with small changes trimmed and signs elected", "fedmerge.merge.ties:TIES", needs=("start",)
    ),
    "adamerging": Entry(
        "learned coefficients of task vectors, one for each client and tensor",
        "fedmerge.merge.adamerging:AdaMerging",
        needs=("start",),
    ),
    "adamerging-entropy": Entry(
        "the same by the entropy of the predictions; no server label is used",
        "fedmerge.merge.adamerging:AdaMerging",
        {"entropy": True},
        ("start",),
    ),
    "pleas": Entry(
        "least squares of each linear layer on the server's images, after a permutation (PLeaS)",
        "fedmerge.merge.pleas:PLeaS",
    ),
    "fisher": Entry(
        "mean weighted by the diagonal Fisher information that clients send",
        "fedmerge.merge.fisher:FisherMerge",
        needs=("fisher",),
    ),
    "fedfisher": Entry(
        "from the mean towards that mean, stopped by validation (FedFisher, diagonal)",
        "fedmerge.merge.fedfisher:FedFisher",
        needs=("fisher",),
    ),
    "regmean": Entry(
        "least squares of each linear layer, by the Gram matrices that clients send",
        "fedmerge.merge.regmean:RegMean",
        needs=("gram",),
    ),
    "flower-fedadam": Entry(
        "a step of Adam from the clients' start (Flower's FedAdam)",
        _FLOWER + "Adaptive",
        {"strategy": "FedAdam"},
        ("start",),
    ),
    "flower-fedyogi": Entry(
        "a step of Yogi from the clients' start (Flower's FedYogi)",
        _FLOWER + "Adaptive",
        {"strategy": "FedYogi"},
        ("start",),
    ),
    "flower-fedadagrad": Entry(
        "a step of Adagrad from the clients' start (Flower's FedAdagrad)",
        _FLOWER + "Adaptive",
        {"strategy": "FedAdagrad"},
        ("start",),
    ),
    "flower-fedavgm": Entry(
        "a scaled step from the clients' start to their mean (Flower's FedAvgM)",
        _FLOWER + "Momentum",
        {"strategy": "FedAvgM"},
        ("start",),
    ),
    "flower-median": Entry(
        "the clients' median of each number (Flower's FedMedian)", _FLOWER + "Robust", {"strategy": "FedMedian"}
    ),
    "flower-trimmed-mean": Entry(
        "the mean of each number without the extremes (Flower's FedTrimmedAvg)",
        _FLOWER + "Robust",
        {"strategy": "FedTrimmedAvg"},
    ),
    "flower-krum": Entry(
        "the client that is nearest to the others (Flower's Krum)", _FLOWER + "Robust", {"strategy": "Krum"}
    ),
    "flower-multikrum": Entry(
        "mean of the clients that are nearest to the others (Flower's MultiKrum)",
        _FLOWER + "Robust",
        {"strategy": "MultiKrum"},
    ),
    "flower-bulyan": Entry(
        "trimmed mean of the clients that are nearest to the others (Flower's Bulyan)",
        _FLOWER + "Robust",
        {"strategy": "Bulyan"},
    ),
}


SCREENS = ("auto", "off")
"""Whether clients whose models are of no use are left out (`fedmerge.screening`)."""

AUGMENTATIONS = ("none", "shifts", "flips", "both")
"""What may be done to the images of a step, the clients' or the server's (`fedmerge.augment`)."""

METHODS = (
    *("fedavg", "mean", "best-client", "ensemble", "server-only", "finetune", "best-client-finetune"),
    *("activations+mean", "activations+finetune", "np", "activations+np-pairwise", "activations+np"),
)
"""The methods that are compared by default: the controls, then ours."""

MIXED_METHODS = (
    *("fedavg", "best-client", "ensemble", "server-only", "best-client-finetune"),
    *("activations+mean", "activations+finetune", "activations+np"),
)
"""Those where the clients' architectures differ."""
