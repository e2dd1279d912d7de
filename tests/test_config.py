"""The configuration: what every way of setting it has in common, and what it refuses."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedmerge.catalogue import AUGMENTATIONS, SCREENS
from fedmerge.config import Config, read_toml
from fedmerge.configcheck import INITIALISATIONS, SCHEDULES, SPLITS, UPLOAD_DTYPES
from fedmerge.errors import FedmergeError
from fedmerge.settings import ConfigurationError, Value, convert, flag, key, known

FIELDS = dataclasses.fields(Config)
TYPES = get_type_hints(Config)

COUNTS = st.integers(1, 10**6)
POSITIVE = st.floats(1e-6, 1e6)
STRATEGIES: dict[str, st.SearchStrategy[Any]] = {
    "init": st.sampled_from(INITIALISATIONS),
    "screen": st.sampled_from(SCREENS),
    "split": st.sampled_from(SPLITS),
    "upload_dtype": st.sampled_from(UPLOAD_DTYPES),
    "lr_schedule": st.sampled_from(SCHEDULES),
    "augment": st.sampled_from(AUGMENTATIONS),
    "warmup": st.floats(0, 1, exclude_max=True),
    "client_statistics": st.sampled_from(["", "fisher", "gram", "fisher/gram"]),
    "local_epochs": COUNTS.map(str) | st.tuples(COUNTS, COUNTS).map(lambda pair: f"{min(pair)}..{max(pair)}"),
    "clients": st.integers(100, 10**4),
    "clients_per_round": st.sampled_from([0, 100]),
    "min_completed": st.integers(1, 100),
    "momentum": st.floats(0, 1, exclude_max=True),
    "dp_delta": st.floats(0, 1, exclude_max=True),
    "dp_noise": st.just(0.0),
    "models": st.just(""),
    "devices": st.sampled_from(["", "epochs=1:2,float16:3", "epochs=2+float16:100"]),
    "seed": st.integers(),
    "server_labels": st.integers(-1, 1),
    "server_limit": st.sampled_from([-1, 1]),
}
BY_TYPE: dict[type, st.SearchStrategy[Any]] = {bool: st.booleans(), int: COUNTS, float: POSITIVE, str: st.text()}
FIELD_STRATEGIES = {name: STRATEGIES.get(name, BY_TYPE[kind]) for name, kind in TYPES.items()}
CONFIGS = st.builds(Config, **FIELD_STRATEGIES) | st.builds(
    Config,
    **{**FIELD_STRATEGIES, "dp_noise": POSITIVE, "client_statistics": st.just("")},  # which exclude each other
)


def test_every_field_has_a_help_text_and_a_default_of_its_declared_type() -> None:
    for item in FIELDS:
        assert len(item.metadata["help"]) > 10, item.name
        assert type(item.default) is TYPES[item.name], item.name


def test_every_field_has_a_key_of_its_own_that_leads_back_to_it() -> None:
    keys = [key(item.name) for item in FIELDS]
    assert len(set(keys)) == len(keys)
    assert [name.replace("-", "_") for name in keys] == [item.name for item in FIELDS]
    assert not any("_" in name for name in keys)
    assert list(Config().to_mapping()) == keys


@given(CONFIGS)
def test_a_mapping_and_back_is_the_same_configuration(config: Config) -> None:
    assert Config.from_mapping(config.to_mapping()) == config


@given(CONFIGS)
def test_what_has_changed_is_enough_to_make_the_configuration_again(config: Config) -> None:
    changed = config.to_mapping(changed_only=True)
    assert Config.from_mapping(changed) == config
    defaults = Config().to_mapping()
    assert all(defaults[name] != value for name, value in changed.items())


@given(CONFIGS)
def test_every_value_may_come_as_a_string_as_from_flowers_command_line(config: Config) -> None:
    assert Config.from_mapping({name: str(value) for name, value in config.to_mapping().items()}) == config


def test_a_configuration_of_defaults_has_nothing_changed() -> None:
    assert Config().to_mapping(changed_only=True) == {}


def test_keys_may_be_written_with_underscores() -> None:
    assert Config.from_mapping({"local_epochs": "2", "batch-size": 7}) == Config(local_epochs="2", batch_size=7)


def test_a_whole_number_of_epochs_may_come_as_a_number() -> None:
    assert Config.from_mapping({"local-epochs": 3}).epochs_range == (3, 3)


def test_a_configuration_is_replaced_and_never_changed() -> None:
    config = Config()
    assert config.replace(clients=7).clients == 7
    assert config == Config()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.clients = 7  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="--clients"):
        config.replace(clients=0)


REFUSED: dict[str, tuple[Any, ...]] = {
    "clients": (0, -1),
    "client_examples": (-1,),
    "min_client_examples": (-1,),
    "alpha": (0.0, -1.0, math.inf, math.nan),
    "init": ("share", ""),
    "split": ("train",),
    "upload_dtype": ("float64",),
    "local_epochs": ("0", "0..3", "3..2", "", "a", "1..", "..2", "1...3", "1-3", "-1", "2.5"),
    "batch_size": (0,),
    "lr": (0.0, -0.1, math.inf, math.nan),
    "lr_schedule": ("step", ""),
    "augment": ("cutout", ""),
    "warmup": (-0.1, 1.0, math.nan),
    "momentum": (1.0, -0.1, math.nan),
    "weight_decay": (-0.1, math.inf, math.nan),
    "rounds": (0,),
    "server_examples": (-1,),
    "server_labels": (-2, 101),
    "server_limit": (-2, 0, 101),
    "min_completed": (0,),
    "timeout": (0.0, -1.0, math.inf, math.nan),
    "client_cpus": (0.0, -1.0, math.inf, math.nan),
    "client_gpus": (-0.5, math.inf, math.nan),
    "threads": (-1,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_range_is_refused_by_flag_and_value(name: str, value: Value) -> None:
    with pytest.raises(ConfigurationError) as error:
        Config(**{name: value})  # type: ignore[arg-type]
    assert flag(name) in str(error.value)
    assert repr(value) in str(error.value)


BOUNDARIES: dict[str, tuple[Any, ...]] = {
    "clients": (2,),  # no fewer than --min-completed
    "client_examples": (0,),
    "min_client_examples": (0,),
    "warmup": (0.0, 0.999),
    "momentum": (0.0, 0.999),
    "weight_decay": (0.0,),
    "server_examples": (0,),
    "server_labels": (-1, 0, 100),
    "server_limit": (-1, 1, 100),
    "client_gpus": (0.0, 0.25),
    "batch_size": (1,),
    "min_completed": (1, 5),
    "seed": (-1,),
    "threads": (0,),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BOUNDARIES.items() for value in values])
def test_a_value_at_the_end_of_its_range_is_taken(name: str, value: Value) -> None:
    assert getattr(Config(**{name: value}), name) == value  # type: ignore[arg-type]


def test_no_more_classes_than_images_can_be_known() -> None:
    message = r"--server-labels is 61, but the server owns only 60 images \(--server-examples\)"
    with pytest.raises(ConfigurationError, match=message):
        Config(server_examples=60, server_labels=61)
    with pytest.raises(ConfigurationError, match=r"is 21, but the server uses only 20 images \(--server-limit\)"):
        Config(server_limit=20, server_labels=21)
    for labels in (-1, 20):
        assert Config(server_limit=20, server_labels=labels).num_server_labels == 20


def test_more_updates_than_clients_cannot_be_demanded() -> None:
    with pytest.raises(ConfigurationError, match=r"--min-completed is 4, but there are only 3 clients \(--clients\)"):
        Config(clients=3, min_completed=4)


@pytest.mark.parametrize(
    ("text", "expected"), [("30", (30, 30)), ("1..5", (1, 5)), ("4..4", (4, 4)), (" 2 .. 10 ", (2, 10))]
)
def test_local_epochs_are_a_number_or_a_range(text: str, expected: tuple[int, int]) -> None:
    assert Config(local_epochs=text).epochs_range == expected


def test_a_misspelt_setting_is_answered_with_the_nearest() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting 'client'; did you mean 'clients'\? Known: data, "):
        Config.from_mapping({"client": 3})
    with pytest.raises(ConfigurationError, match=r"unknown --init 'share'; did you mean 'shared'\? Known: indep"):
        Config(init="share")


def test_a_name_like_no_other_is_answered_with_all_that_exist() -> None:
    with pytest.raises(ConfigurationError) as error:
        known("data set", "xyz", iter(["digits", "mnist"]))
    assert str(error.value) == "unknown data set 'xyz'; Known: digits, mnist"


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("clients", "many", "a whole number"),
        ("clients", 2.5, "a whole number"),
        ("clients", "2.5", "a whole number"),
        ("clients", "nan", "a whole number"),
        ("clients", math.inf, "a whole number"),
        ("clients", True, "a whole number"),
        ("clients", [3], "a whole number"),
        ("lr", "fast", "a finite number"),
        ("lr", "inf", "a finite number"),
        ("lr", math.nan, "a finite number"),
        ("lr", 10**400, "a finite number"),
        ("lr", False, "a finite number"),
        ("lr", "", "a finite number"),
        ("label-counts", 1, "true or false"),
        ("label-counts", "yes", "true or false"),
        ("model", 2.5, "a string"),
        ("model", True, "a string"),
        ("model", ["mlp"], "a string"),
    ],
)
def test_a_value_of_the_wrong_type_is_refused_by_flag_and_value(name: str, value: object, expected: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        Config.from_mapping({name: value})
    assert str(error.value) == f"--{name} must be {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("value", "kind", "expected"),
    [
        (3.0, int, 3),
        ("3", int, 3),
        (" 3 ", int, 3),
        ("1e3", int, 1000),
        ("3.0", int, 3),
        ("-4", int, -4),
        (3, float, 3.0),
        ("1e-3", float, 0.001),
        ("True", bool, True),
        ("false", bool, False),
        (7, str, "7"),
        ("", str, ""),
    ],
)
def test_values_are_converted_to_their_declared_type(value: object, kind: type, expected: Value) -> None:
    found = convert("--x", value, kind)
    assert found == expected
    assert type(found) is kind


@given(st.integers(-(10**300), 10**300))
def test_whole_numbers_keep_all_their_digits(number: int) -> None:
    assert convert("--seed", number, int) == number
    assert convert("--seed", str(number), int) == number


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_all_their_digits(number: float) -> None:
    assert convert("--lr", repr(number), float) == number


def test_a_toml_file_gives_settings(tmp_path: Path) -> None:
    path = tmp_path / "federation.toml"
    path.write_text(
        'clients = 3\nlr = 1e-2\nlocal-epochs = "1..5"\nlabel-counts = false\ndata = "folder:/data/é"\n', "utf-8"
    )
    assert Config.from_mapping(read_toml(path)) == Config(
        clients=3, lr=0.01, local_epochs="1..5", label_counts=False, data="folder:/data/é"
    )


@pytest.mark.parametrize("content", [b"clients = ", b"clients 3", b"data = 'caf\xe9'", b"\xff\xfe"])
def test_a_file_that_is_not_toml_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "federation.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"federation\.toml is not TOML: "):
        read_toml(path)


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"cannot read the configuration .*none\.toml: No such file"):
        read_toml(tmp_path / "none.toml")
    with pytest.raises(ConfigurationError, match="cannot read the configuration"):
        read_toml(tmp_path)


def test_the_error_is_one_that_the_command_prints_and_a_value_error() -> None:
    assert issubclass(ConfigurationError, FedmergeError)
    assert issubclass(ConfigurationError, ValueError)
