"""What the command does before anything is computed: settings checked, the run folder made or opened, and locked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from fedmerge.catalogue import STATISTICS
from fedmerge.config import Config
from fedmerge.methods import needs
from fedmerge.runs import Run
from fedmerge.settings import ConfigurationError, flag, known

MACHINE = ("out", "ray_address", "client_cpus", "client_gpus", "timeout")
"""Settings that change where a run happens and not what it computes: `--resume` may change them."""
BUDGETS = ("server_labels", "server_limit", "low_memory")
"""Settings of what the server uses, images and memory: `fedmerge merge` may change them; no client depends on them."""


def prepare(
    context: click.Context, command: str, config: Config, resume: bool, stack: ExitStack, **settings: Any
) -> tuple[Config, Run]:
    """Make the run folder once the settings are known to work, or open the one to go on with; lock it."""
    if resume:
        if not config.out:
            raise ConfigurationError("--resume needs --out, the run folder to go on with")
        run = Run.open(Path(config.out))
        enter(stack, run)
        return _resumed(context, run, command, config, settings), run
    from fedmerge.mixed import may_end_elsewhere
    from fedmerge.oneshot import check_needs

    methods = settings.get("methods", [f"{config.align}+{config.merge}"])
    _check(config.replace(seed=settings.get("seeds", [config.seed])[0]), methods)
    asked = {*config.statistics, *needs(methods)}
    config = config.replace(client_statistics="/".join(kind for kind in STATISTICS if kind in asked))
    if command == "simulate":
        name = config.merge.partition(":")[0]
        if name.startswith("ensemble"):
            raise ConfigurationError(
                f"--merge {name} ends in several models, which no round can start from: use compare"
            )
        if config.other_models and may_end_elsewhere(config.align, config.merge):
            raise ConfigurationError(
                f"--merge {name} may end in another architecture than the server's (--models), which no round can "
                "start from: use compare, or a method that learns, as np"
            )
        check_needs(config.merge, labels=config.num_server_labels > 0, label_counts=config.label_counts)
    return config, new_run(command, config, stack, settings)


def new_run(command: str, config: Config, stack: ExitStack, settings: dict[str, Any]) -> Run:
    """Make the run folder that was asked for, or one of a new name, and keep it locked until the stack ends."""
    data = config.data.partition(":")[0]
    out = Path(config.out or f"runs/{command}-{data}-{datetime.now():%Y%m%d-%H%M%S}")
    run = Run.create(out, command, config, **settings)
    enter(stack, run)
    return run


def rebudgeted(run: Run, budgets: Mapping[str, int], *, apart: bool) -> Config:
    """Return the configuration to merge a run again with, of which what the server uses alone may differ.

    Args:
        run: the run whose updates are merged.
        budgets: the fields of `BUDGETS` that were given.
        apart: whether the results go into a folder of their own, which they must if the server uses others.

    Raises:
        ConfigurationError: if results of different budgets of the server would lie in one folder.
    """
    config = run.config
    wanted = config.replace(**budgets)
    numbers = [(each.num_server_images, each.num_server_labels, each.low_memory) for each in (config, wanted)]
    if numbers[0] == numbers[1]:
        return config
    if not apart:
        given = " and ".join(f"{flag(name)} is {value}" for name, value in budgets.items())
        raise ConfigurationError(
            f"{given}, but the run in {run.path} has {', '.join(str(getattr(config, name)) for name in budgets)}: give "
            "the --out of a new folder, which keeps their results apart"
        )
    return wanted


def _check(config: Config, methods: Sequence[str]) -> None:
    """Find out what is wrong before anything is written: names, then data, partition and model."""
    from fedmerge import federation, models
    from fedmerge.methods import parse_method
    from fedmerge.names import DATASETS, PARTITIONS
    from fedmerge.privacy import check_model

    if not config.data.startswith("folder:"):
        known("data set", config.data, [name for name in DATASETS if ":" not in name])
    known("partition", config.partition, PARTITIONS)
    parse_method(f"{config.align}+{config.merge}")
    if config.init != "shared" and (of_start := [method for method in methods if "start" in needs([method])]):
        raise ConfigurationError(
            f"{', '.join(of_start)}: needs the weights that all clients started from, give --init shared"
        )
    examples = federation.load(config)
    if len(examples.server) == 0:
        raise ConfigurationError(
            "--server-examples must be at least 1: merging is learned on images that the server owns"
        )
    for name in (config.model, *config.other_models):
        model = models.create(name, shape=examples.dataset.shape, num_classes=len(examples.classes), seed=0)
        if config.dp_clip:
            check_model(name, model)
    if config.other_models:
        _check_mixed(config, methods)


def _check_mixed(config: Config, methods: Sequence[str]) -> None:
    """Find out whether methods can be used where the clients' architectures differ."""
    from fedmerge.methods import parse_method
    from fedmerge.mixed import check_mixed

    if config.client_statistics:
        raise ConfigurationError(
            "--client-statistics: statistics of clients of different architectures (--models) cannot be put together"
        )
    for method in methods:
        check_mixed(*parse_method(method))


def _resumed(context: click.Context, run: Run, command: str, config: Config, settings: dict[str, object]) -> Config:
    """Return the stored configuration with this call's machine settings; other settings must not differ."""
    stored = run.settings
    if stored["command"] != command:
        raise ConfigurationError(f"{run.path} was made by 'fedmerge {stored['command']}', not by 'fedmerge {command}'")
    given = {
        name
        for name in context.params
        if context.get_parameter_source(name) not in (click.core.ParameterSource.DEFAULT, None)
    }
    result = run.config
    for item in dataclasses.fields(Config):
        ours, theirs = getattr(config, item.name), getattr(result, item.name)
        if item.name in given and ours != theirs:
            if item.name not in MACHINE:
                raise ConfigurationError(
                    f"{flag(item.name)} is {ours!r}, but the run in {run.path} has {theirs!r}: leave it out to go on, "
                    "or give another --out"
                )
            result = result.replace(**{item.name: ours})
    for name, value in settings.items():
        if name in given and value != stored.get(name):
            raise ConfigurationError(f"--{name} differs from the run's in {run.path}: leave it out to go on")
    return result


def enter(stack: ExitStack, run: Run) -> None:
    """Lock a run folder, and log into it, until the stack ends."""
    stack.enter_context(run.locked())
    stack.enter_context(run.logging())
