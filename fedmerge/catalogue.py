"""The aligners and mergers by name: what `fedmerge list`, `--align`, `--merge` and `--methods` know.

A name may be followed by options of its dataclass: `np:groups=channel:steps=200`; several values of one option are
separated by slashes, `np:lrs=0.01/0.003`. A method is `ALIGNER+MERGER`, or `MERGER` alone for no alignment.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args, get_origin, get_type_hints

from fedmerge.settings import ConfigurationError, convert, known


@dataclass(frozen=True)
class Entry:
    """A named algorithm, imported when it is used.

    Attributes:
        summary: one line for `fedmerge list`.
        target: module:class of its frozen dataclass.
        options: the fields that the name sets.
    """

    summary: str
    target: str
    options: Mapping[str, Any] = field(default_factory=dict)


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
    "ensemble-stacked": Entry(
        "the clients' log-probabilities, their weights learned on the server's labelled images",
        "fedmerge.merge.ensemble:Ensemble",
        {"rule": "stacked"},
    ),
    "np-distill": Entry(
        "NP Merge on the classes that the ensemble by label counts tells; no server label is used",
        "fedmerge.merge.nonuniform:NPMerge",
        {"targets": "hard"},
    ),
    "finetune-distill": Entry("fine-tune the uniform mean on the same classes", _FINETUNE, {"targets": "hard"}),
    "best-client-distill": Entry(
        "fine-tune the client with the lowest loss on the same classes", _FINETUNE, {"start": "best", "targets": "hard"}
    ),
    "fresh-distill": Entry(
        "train a new model on the same classes: the control of the distilled methods",
        _FINETUNE,
        {"start": "fresh", "targets": "hard"},
    ),
    "np-semi": Entry(
        "NP Merge on labels where they are known, elsewhere on the classes that the ensemble tells",
        "fedmerge.merge.nonuniform:NPMerge",
        {"targets": "completed"},
    ),
    "finetune-semi": Entry(
        "fine-tune the uniform mean on the same labels and classes", _FINETUNE, {"targets": "completed"}
    ),
}


METHODS = (
    *("fedavg", "mean", "best-client", "ensemble", "server-only", "finetune", "best-client-finetune"),
    *("activations+mean", "activations+finetune", "np", "activations+np-pairwise", "activations+np"),
)
"""The methods that are compared by default: the controls, then ours."""


def resolve(kind: str, text: str, entries: Mapping[str, Entry]) -> Any:
    """Return the algorithm that a name with options stands for.

    Args:
        kind: "aligner" or "merger", for the errors.
        text: NAME or NAME:KEY=VALUE:….
        entries: `ALIGNERS` or `MERGERS`.

    Raises:
        ConfigurationError: names what exists.

    Example:
        >>> resolve("merger", "np:groups=channel", MERGERS).groups
        'channel'
    """
    name, *settings = text.split(":")
    known(kind, name, entries)
    entry = entries[name]
    module, _, attribute = entry.target.partition(":")
    algorithm = getattr(importlib.import_module(module), attribute)
    types = get_type_hints(algorithm)
    names = [item.name for item in dataclasses.fields(algorithm)]
    names.sort(key=lambda name: name not in vars(algorithm).get("__annotations__", {}))  # its own, then those inherited
    options = dict(entry.options)
    for setting in settings:
        option, equals, value = setting.partition("=")
        option = option.replace("-", "_")
        if not equals:
            raise ConfigurationError(f"{kind} '{text}': expected KEY=VALUE after ':', got '{setting}'")
        known(f"option of {kind} '{name}'", option, [item for item in names if item not in entry.options])
        options[option] = _value(f"{kind} '{name}', option {option},", value, types[option])
    try:
        return algorithm(**options)
    except ValueError as error:
        raise ConfigurationError(f"{kind} '{text}': {error}") from error


def parse_method(text: str) -> tuple[str, str]:
    """Return the aligner's and the merger's text of a method, both checked.

    Example:
        >>> parse_method("activations+np"), parse_method("mean")
        (('activations', 'np'), ('identity', 'mean'))
    """
    align, plus, merge = text.partition("+")
    if not plus:
        align, merge = "identity", text
    resolve("aligner", align, ALIGNERS)
    resolve("merger", merge, MERGERS)
    return align, merge


def method_name(align: str, merge: str) -> str:
    """Return the name of a method.

    Example:
        >>> method_name("activations", "np"), method_name("identity", "mean")
        ('activations+np', 'mean')
    """
    return merge if align == "identity" else f"{align}+{merge}"


def _value(what: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(convert(what, item, get_args(kind)[0]) for item in text.split("/"))
    return convert(what, text, kind)
