"""A run in words: what it did, what came out, and the command that repeats it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fedmerge.catalogue import METHODS, MIXED_METHODS
from fedmerge.config import Config
from fedmerge.summary import BASELINE, Difference, Row, best_single_model, paired_differences
from fedmerge.tables import clean, percent, signed

CHECKPOINT = ".safetensors"


def repeat_command(settings: Mapping[str, Any]) -> str:
    """Return the command that repeats a run.

    Args:
        settings: the content of its config.json.

    Example:
        >>> repeat_command({"command": "compare", "config": {"clients": 3, "label-counts": False}, "seeds": [0, 1]})
        'fedmerge compare --clients 3 --no-label-counts --seeds 0,1'
    """
    options: dict[str, Any] = dict(Config.from_mapping(settings["config"]).to_mapping(changed_only=True))
    lists = {name: settings[name] for name in ("methods", "seeds") if settings.get(name)}
    if lists.get("methods") == list(MIXED_METHODS if options.get("models") else METHODS):
        del lists["methods"]
    deployed = settings["command"] == "flwr run"
    words = ["fedmerge", *(("deploy", "run", "--superlink", "HOST:PORT") if deployed else (settings["command"],))]
    if settings["command"] == "merge":
        words += (sources := settings.get("sources", []))
        lists.pop("seeds", None)
        if not any(source.endswith(CHECKPOINT) for source in sources):  # run folders, whose configuration counts
            options = {name: value for name, value in options.items() if name in ("server-labels", "server-limit")}
    for name, value in {**options, **lists}.items():
        if name == "out" or (name == "seed" and "seeds" in lists):
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        else:
            words += [f"--{name}", ",".join(map(str, value)) if name in lists else str(value)]
    return shlex.join(words)


def title(config: Config) -> str:
    """Return a run's title."""
    rounds = "one round" if config.rounds == 1 else f"{config.rounds} rounds"
    return f"{clean(config.data)}: {config.clients} {_plural('client', config.clients)}, {rounds}"


def scenario(config: Config, seeds: Sequence[int], partition: Mapping[str, Any] | None = None) -> str:
    """Return what a run did, in a few sentences.

    Args:
        config: the federation.
        seeds: of the run.
        partition: one of its partitions; None for models that were trained elsewhere.
    """
    images = _images(config)
    over = f"with seed {seeds[0]}" if len(seeds) == 1 else f"over {len(seeds)} seeds"
    judged = f"{config.split} images of {config.data}"
    if partition is None:
        return clean(f"Models of {_models(config)}. The server {images}. Accuracies are on {judged}, {over}.")
    counts = partition["label_counts"]
    how = f"{config.partition} (alpha {config.alpha:g})" if "dirichlet" in config.partition else config.partition
    low, high = config.epochs_range
    epochs = f"{low if low == high else f'{low} to {high}'} {_plural('epoch', high)}"
    start = {"independent": "independent initialisations", "shared": "one shared initialisation"}[config.init]
    weak = f" The first clients' devices are weak: {config.devices}." if config.devices else ""
    return clean(
        f"{len(counts)} {_plural('client', len(counts))} hold {sum(map(sum, counts)):,} training images of "
        f"{len(partition['classes'])} classes, divided by {how}, and train {_models(config)} for {epochs} from "
        f"{start}.{weak} The server {images} that no client has. Accuracies are on "
        f"{len(partition['evaluation']):,} {judged} that neither has seen, {over}."
    )


def privacy(config: Config, results: Iterable[Mapping[str, Any]]) -> list[str]:
    """Return what a run's clients were promised by differential privacy, in sentences; none where it was not used.

    Args:
        config: the federation's configuration.
        results: the run's, of which the largest ε and δ count.
    """
    told: dict[str, float] = {}
    for result in results:
        for name, value in result.get("privacy", {}).items():
            told[name] = max(value, told.get(name, 0.0))
    found = []
    if "epsilon" in told:
        whose = "each client" if told["clients"] >= config.clients else f"{told['clients']:.0f} of {config.clients}"
        found.append(
            f"Models are differentially private for each image of {whose}, over all rounds: ε ≤ {told['epsilon']:.3g}, "
            f"δ = {told['delta']:.2g} by their word. Merging is post-processing: no merge changes that"
        )
    if "label-count-epsilon" in told:
        found.append(f"Label counts have noise: ε = {told['label-count-epsilon']:.3g}, to be added")
    elif found and config.label_counts:
        found.append("Label counts are exact, and not covered")
    elif found:
        found.append("Label counts are kept back")
    if found:
        found.append("Numbers of images are exact")
    if config.dp_clip and not config.dp_noise:
        found.append("Gradients are clipped without noise (--dp-noise): that alone is no privacy")
    return [f"{clean(sentence)}." for sentence in found]


def headline(rows: Sequence[Row], baseline: str = BASELINE) -> list[str]:
    """Return what came out, in sentences: the best single model, and what it is to be compared with.

    Args:
        rows: of one run.
        baseline: a method to compare with, if the run has it.
    """
    best = best_single_model(rows)
    if best is None:
        if all(row.mean is None for row in rows):
            return ["No method finished: there is nothing to compare."]
        if len(rows) == 1:
            return [f"{clean(rows[0].method)} is the only method of this run."]
        return ["No single model finished every seed: there is nothing to compare."]
    others = [row for row in rows if row.aligned != best.aligned and row.method != baseline]
    role = ", a control," if not best.aligned and any(row.aligned for row in rows) else ""
    found = [f"{clean(best.method)}{role} is the best single model"]
    compared = {
        "": next((row for row in rows if row.method == baseline), None),
        "the best other control, " if best.aligned else "the best aligned merge, ": _best(
            row for row in others if row.models == 1
        ),
        "the best ensemble, ": _best(row for row in rows if row.models > 1),
    }
    for what, other in compared.items():
        if other is not None and other is not best and other.accuracies:
            difference = paired_differences(rows, other.method)[best.method]
            coverage = "" if other.complete else f" over {other.coverage}"
            found.append(f"{_interval(difference)} against {what}{clean(other.method)}: {percent(other)} %{coverage}")
    left_out = [clean(row.method) for row in rows if not row.complete]
    if left_out:
        found.append(f"Not in the running, for they did not finish every seed: {', '.join(left_out)}")
    return [f"{sentence}." for sentence in found]


def _best(rows: Iterable[Row]) -> Row | None:
    return max((row for row in rows if row.complete), key=lambda row: row.mean or 0.0, default=None)


def _interval(difference: Difference) -> str:
    if difference.half_width is None:
        return f"{signed(difference.mean)} points (one seed: no interval)"
    low, high = (signed(difference.mean + sign * difference.half_width) for sign in (-1, 1))
    return f"{signed(difference.mean)} points (95 % interval {low} to {high}, {difference.seeds} seeds)"


def _models(config: Config) -> str:
    """Return the clients' models, and how many have each where they differ."""
    if not config.models:
        return config.model
    numbers = Counter(config.client_models)
    return f"{', '.join(f'{name} ({number})' for name, number in numbers.items())}; the server's is {config.model}"


def _images(config: Config) -> str:
    """Return how many images the server owns or uses, and of how many it knows the classes."""
    number, labelled = config.num_server_images, config.num_server_labels
    known = {number: "labelled ", 0: "unlabelled "}.get(labelled, "")
    of_them = "" if known else f" ({labelled:,} labelled)"
    owned = "owns" if number == config.server_examples else f"owns {config.server_examples:,} images and uses"
    return f"{owned} {number:,} {known}{_plural('image', number)}{of_them}"


def _plural(word: str, number: int) -> str:
    return word if number == 1 else word + "s"
