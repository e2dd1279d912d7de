"""Aligners and mergers by name: every one can be made, its options are typed, and what is misspelt is refused."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

from fedmerge.catalogue import ALIGNERS, MERGERS, Entry
from fedmerge.methods import method_name, parse_method, resolve
from fedmerge.problem import Aligner, Merger
from fedmerge.settings import ConfigurationError

KINDS = {"aligner": (ALIGNERS, Aligner), "merger": (MERGERS, Merger)}
ENTRIES = [(kind, name) for kind, (entries, _) in KINDS.items() for name in entries]


def made(kind: str, text: str) -> Any:
    return resolve(kind, text, KINDS[kind][0])


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_name_makes_a_frozen_algorithm_of_its_protocol(kind: str, name: str) -> None:
    entries, protocol = KINDS[kind]
    algorithm = made(kind, name)
    assert f"{type(algorithm).__module__}:{type(algorithm).__name__}" == entries[name].target
    assert type(algorithm).__dataclass_params__.frozen
    assert list(inspect.signature(algorithm).parameters) == list(inspect.signature(protocol.__call__).parameters)[1:]
    assert algorithm == made(kind, name)
    assert {option: getattr(algorithm, option) for option in entries[name].options} == entries[name].options


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_entry_is_described_in_one_line(kind: str, name: str) -> None:
    summary = KINDS[kind][0][name].summary
    assert 10 < len(summary) < 100
    assert "\n" not in summary


@pytest.mark.parametrize("kind", KINDS)
def test_no_two_names_make_the_same_algorithm(kind: str) -> None:
    algorithms = [made(kind, name) for name in KINDS[kind][0]]
    assert all(first != second for index, first in enumerate(algorithms) for second in algorithms[:index])


@pytest.mark.parametrize(("kind", "name"), ENTRIES)
def test_every_default_may_be_given_as_an_option(kind: str, name: str) -> None:
    algorithm = made(kind, name)
    texts = [name]
    stands_for = {**ALIGNERS, **MERGERS}[name].options
    for item in [item for item in dataclasses.fields(algorithm) if item.name not in stands_for]:
        value = getattr(algorithm, item.name)
        text = "/".join(map(str, value)) if isinstance(value, tuple) else str(value)
        texts.append(f"{item.name}={text}")
    assert made(kind, ":".join(texts)) == algorithm


def test_an_option_that_a_name_stands_for_cannot_be_given() -> None:
    with pytest.raises(ConfigurationError, match="unknown option of merger 'server-only' 'start'"):
        made("merger", "server-only:start=mean")


@pytest.mark.parametrize("text", ["np:steps=0", "np:steps=-5", "finetune:lrs=-1", "np-pairwise:lrs=0/0.1"])
def test_budgets_that_make_no_sense_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="must be"):
        made("merger", text)


@pytest.mark.parametrize(
    ("text", "changes"),
    [
        ("np:steps=7", {"steps": 7}),
        ("np:groups=channel:steps=7", {"groups": "channel", "steps": 7}),
        ("np:lrs=0.01/3e-3", {"lrs": (0.01, 0.003)}),
        ("np:lrs=1", {"lrs": (1.0,)}),
        ("fedavg:calibrate=false", {"calibrate": False}),
        ("np:steps=5:steps=9", {"steps": 9}),
    ],
)
def test_options_are_converted_to_the_types_of_their_fields(text: str, changes: dict[str, object]) -> None:
    algorithm = made("merger", text)
    assert algorithm == dataclasses.replace(made("merger", text.partition(":")[0]), **changes)
    for name, value in changes.items():
        assert type(getattr(algorithm, name)) is type(value)


def test_an_option_may_be_written_with_dashes() -> None:
    entries = {"schedule": Entry("how long a descent goes on", "fedmerge.merge.descent:Schedule")}
    assert resolve("merger", "schedule:check-every=5", entries).check_every == 5


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("merger", "finetun", "unknown merger 'finetun'; did you mean 'finetune'? Known: fedavg, mean, np, "),
        ("merger", "xyz", "unknown merger 'xyz'; Known: fedavg, mean, np, "),
        ("merger", "", "unknown merger ''; Known: fedavg"),
        ("aligner", "activation", "unknown aligner 'activation'; did you mean 'activations'? Known: auto, identity"),
        ("aligner", "np", "unknown aligner 'np'; "),
        (
            "merger",
            "np:gruops=model",
            "unknown option of merger 'np' 'gruops'; did you mean 'groups'? Known: groups, lrs",
        ),
        ("aligner", "identity:steps=1", "unknown option of aligner 'identity' 'steps'; Known: "),
        ("merger", "np:groups", "merger 'np:groups': expected KEY=VALUE after ':', got 'groups'"),
        ("merger", "np:", "merger 'np:': expected KEY=VALUE after ':', got ''"),
        ("merger", "np:steps=many", "merger 'np', option steps, must be a whole number, got 'many'"),
        ("merger", "np:steps=", "merger 'np', option steps, must be a whole number, got ''"),
        ("merger", "np:steps=1.5", "merger 'np', option steps, must be a whole number, got '1.5'"),
        ("merger", "np:lrs=0.1/x", "merger 'np', option lrs, must be a finite number, got 'x'"),
        ("merger", "np:lrs=0.1/", "merger 'np', option lrs, must be a finite number, got ''"),
        ("merger", "np:lrs=nan", "merger 'np', option lrs, must be a finite number, got 'nan'"),
        ("merger", "fedavg:calibrate=yes", "merger 'fedavg', option calibrate, must be true or false, got 'yes'"),
        ("merger", "np:groups=layer", "merger 'np:groups=layer': groups must be auto or one of model, tensor"),
        ("merger", "mean:weights=size", "merger 'mean:weights=size': weights must be 'examples' or 'uniform'"),
        ("merger", "finetune:start=zero", "merger 'finetune:start=zero': start must be one of mean, best, fresh"),
    ],
)
def test_what_cannot_be_made_is_refused_with_what_can(kind: str, text: str, message: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        made(kind, text)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("align", sorted(set(ALIGNERS) - {"zipit"}))
@pytest.mark.parametrize("merge", [*MERGERS, "np:groups=channel:lrs=0.1/0.2"])
def test_a_methods_name_leads_back_to_its_aligner_and_merger(align: str, merge: str) -> None:
    assert parse_method(method_name(align, merge)) == (align, merge)
    assert parse_method(f"{align}+{merge}") == (align, merge)


@pytest.mark.parametrize("merge", ["mean", "np", "finetune", "server-only", "np-distill", "head-finetune"])
def test_parts_of_a_mean_are_for_what_starts_at_it(merge: str) -> None:
    assert parse_method(f"zipit+{merge}") == ("zipit", merge)


def test_a_merger_alone_is_without_alignment() -> None:
    assert parse_method("mean") == ("identity", "mean")
    assert method_name("identity", "mean") == "mean"
    assert method_name(*parse_method("identity+mean")) == "mean"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("activation+np", "unknown aligner 'activation'; did you mean"),
        ("activations+np-pair", "unknown merger 'np-pair'; did you mean 'np-pairwise'"),
        ("activations", "unknown merger 'activations'"),
        ("activations+np+np", r"unknown merger 'np\+np'"),
        ("+np", "unknown aligner ''"),
        ("auto+", "unknown merger ''"),
        ("", "unknown merger ''"),
        ("zipit+best-client", "no models of single clients"),
        ("zipit+np:start=best", "no models of single clients"),
        ("auto:zipit=true+fedavg", "no models of single clients"),
    ],
)
def test_a_method_is_checked_on_both_sides(text: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        parse_method(text)
