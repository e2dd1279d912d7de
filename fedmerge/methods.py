"""What the name of a method stands for.

A method is `ALIGNER+MERGER`, or `MERGER` alone for no alignment. Each may be followed by options of its dataclass:
`np:groups=channel:steps=200`; several values of one option are separated by slashes, `np:lrs=0.01/0.003`.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, get_args, get_origin, get_type_hints

from fedmerge.catalogue import ALIGNERS, MERGERS, Entry
from fedmerge.settings import ConfigurationError, convert, known


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
    types = get_type_hints(algorithm) if settings else {}
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
    """Return the aligner's and the merger's text of a method, checked.

    Raises:
        ConfigurationError: for an unknown name, or a merger that needs models after an aligner that makes none.

    Example:
        >>> parse_method("activations+np"), parse_method("mean")
        (('activations', 'np'), ('identity', 'mean'))
    """
    align, merge = _parts(text)
    aligner, merger = resolve("aligner", align, ALIGNERS), resolve("merger", merge, MERGERS)
    if getattr(aligner, "parts", False) and not getattr(merger, "takes_parts", False):
        raise ConfigurationError(
            f"method '{text}': {align} makes parts of a mean, which are no models of single clients, and {merge} "
            "looks at these: use mean, np or finetune"
        )
    return align, merge


def needs(methods: Iterable[str]) -> frozenset[str]:
    """Return what methods need beside the clients' models (see `Entry`); they are not checked.

    Example:
        >>> sorted(needs(["mean", "ties:keeps=0.5"]))
        ['start']
    """
    names = [_parts(method)[1].partition(":")[0] for method in methods]
    return frozenset(need for name in names if name in MERGERS for need in MERGERS[name].needs)


def method_name(align: str, merge: str) -> str:
    """Return the name of a method.

    Example:
        >>> method_name("activations", "np"), method_name("identity", "mean")
        ('activations+np', 'mean')
    """
    return merge if align == "identity" else f"{align}+{merge}"


def _parts(method: str) -> tuple[str, str]:
    align, plus, merge = method.partition("+")
    return (align, merge) if plus else ("identity", method)


def _value(what: str, text: str, kind: Any) -> Any:
    if get_origin(kind) is tuple:
        return tuple(convert(what, item, get_args(kind)[0]) for item in text.split("/"))
    return convert(what, text, kind)
