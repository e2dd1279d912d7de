"""What the subcommands of `fedmerge` share: flags for the settings and the output, and how errors are told."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmerge.config import Config, read_toml
from fedmerge.configcheck import CHOICES
from fedmerge.errors import FedmergeError
from fedmerge.settings import ConfigurationError, flag, known

if TYPE_CHECKING:
    from fedmerge.console import Console

Command = Callable[..., None]


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        names = [parameter.name or "" for parameter in context.command.params]
        try:
            settings = {name.replace("-", "_"): value for name, value in read_toml(path).items()}
            for name in settings:
                known(f"setting of {path}", name, names)
        except ConfigurationError as error:
            raise click.ClickException(str(error)) from error
        context.default_map = {
            name: ",".join(map(str, value)) if isinstance(value, list) else value for name, value in settings.items()
        }


def output_options(command: Command) -> Command:
    """Give a command --json and --quiet."""
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object, and nothing else."),
        click.option("--quiet", is_flag=True, help="Print errors alone."),
    ):
        command = option(command)
    return command


def scenario_options(*without: str) -> Callable[[Command], Command]:
    """Give a command a flag for each field of the configuration, and --config, --resume and the output's flags."""

    def decorate(command: Command) -> Command:
        command = output_options(command)
        if "resume" not in without:
            text = "Go on with the run in --out, with its settings; nothing is trained twice."
            command = click.option("--resume", is_flag=True, help=text)(command)
        for item in reversed([item for item in dataclasses.fields(Config) if item.name not in without]):
            command = _setting(item)(command)
        return click.option(
            "--config",
            type=click.Path(path_type=Path),
            callback=_read_config,
            is_eager=True,
            expose_value=False,
            help="TOML file with the same keys as these flags, without the dashes in front; flags go before it.",
        )(command)

    return decorate


def _setting(item: dataclasses.Field[Any]) -> Callable[[Command], Command]:
    text = str(item.metadata["help"])
    if isinstance(item.default, bool):
        return click.option(f"{flag(item.name)}/--no-{flag(item.name)[2:]}", default=item.default, help=text)
    kind = click.Choice(CHOICES[item.name]) if item.name in CHOICES else type(item.default)
    return click.option(flag(item.name), type=kind, default=item.default, show_default=bool(item.default), help=text)


class session:
    """Sets the output up, and turns errors that tell the user what to do into one line and an exit code of 1."""

    def __init__(self, quiet: bool, as_json: bool) -> None:
        self.quiet, self.as_json = quiet, as_json

    def __enter__(self) -> tuple[Console, ExitStack]:
        from fedmerge.console import Console

        self.stack = ExitStack()
        self.console = self.stack.enter_context(Console(quiet=self.quiet, as_json=self.as_json))
        return self.console, self.stack

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, FedmergeError):
            logging.getLogger("fedmerge").error("%s", error)  # into the run's log, while it is open
        self.stack.close()
        if isinstance(error, FedmergeError):
            raise click.ClickException(str(error)) from error
        if error is None and self.console.failed:
            sys.exit(1)
