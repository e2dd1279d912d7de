"""The `fedmerge` command: flags, files and output around the library."""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmerge import __version__
from fedmerge.catalogue import SCREENS
from fedmerge.config import INITIALISATIONS, SPLITS, UPLOAD_DTYPES, Config, read_toml
from fedmerge.errors import FedmergeError
from fedmerge.settings import ConfigurationError, flag, known

if TYPE_CHECKING:
    from fedmerge.console import Console

CHOICES = {"init": INITIALISATIONS, "split": SPLITS, "upload_dtype": UPLOAD_DTYPES, "screen": SCREENS}
Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """One-shot federated learning: align independently trained models, then learn how to merge them.

    Start with `fedmerge compare`: it trains clients on non-IID data and merges them by every method.
    """


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


def _output_options(command: Command) -> Command:
    for option in (
        click.option("--json", "as_json", is_flag=True, help="Print the results as one JSON object, and nothing else."),
        click.option("--quiet", is_flag=True, help="Print errors alone."),
    ):
        command = option(command)
    return command


def _scenario_options(*without: str) -> Callable[[Command], Command]:
    """Give a command a flag for each field of the configuration, and --config, --resume and the output's flags."""

    def decorate(command: Command) -> Command:
        command = _output_options(command)
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


@main.command()
@_scenario_options()
@click.pass_context
def simulate(context: click.Context, /, resume: bool, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Run one federation by one method, for one or more rounds, on Ray in this process."""
    with _session(quiet, as_json) as (console, stack):
        from fedmerge.preparation import prepare
        from fedmerge.simulation import simulate as simulate_on_ray

        console.hush_flower()
        config, run = prepare(context, "simulate", Config(**flags), resume, stack)
        simulate_on_ray(config, run, progress=console.progress, resume=resume)
        console.finish(run)


@main.command()
@click.option(
    "--methods", default="", help="ALIGNER+MERGER or MERGER, separated by commas.  [default: all controls and ours]"
)
@click.option(
    "--seeds", default="", help="Seeds, separated by commas; clients are trained once for each.  [default: --seed]"
)
@_scenario_options()
@click.pass_context
def compare(
    context: click.Context, /, methods: str, seeds: str, resume: bool, quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Train the clients of a federation once for each seed, and merge them by every method."""
    with _session(quiet, as_json) as (console, stack):
        if flags["rounds"] != 1:
            raise ConfigurationError("compare merges one round of training by many methods: use simulate for --rounds")
        settings = {"methods": _methods(methods, flags["models"]), "seeds": _seeds(seeds, flags["seed"])}
        from fedmerge import compare as comparison
        from fedmerge.preparation import prepare

        console.hush_flower()
        config, run = prepare(context, "compare", Config(**flags), resume, stack, **settings)
        stored = run.settings
        comparison.compare(config, run, stored["methods"], stored["seeds"], progress=console.progress)
        console.finish(run)


@main.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--methods", default="", help="ALIGNER+MERGER or MERGER, separated by commas.  [default: --align and --merge]"
)
@click.option(
    "--label-counts",
    type=click.Path(path_type=Path),
    help="JSON file of checkpoints' data: {FILE NAME: [images of class 0, of class 1, …], …}.",
)
@_scenario_options("label_counts", "resume")
@click.pass_context
def merge(
    context: click.Context,
    /,
    sources: tuple[Path, ...],
    methods: str,
    label_counts: Path | None,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Merge stored updates again, without training.

    SOURCES are run folders, or safetensors checkpoints (then --model and --data are needed, and --models if their
    architectures differ). The results of a run folder go into it, or into a new one with --out; those of checkpoints
    into a new one. A run's configuration counts; --server-labels alone may differ from it, and then the results go into
    a new folder.
    """
    with _session(quiet, as_json) as (console, stack):
        from fedmerge import checkpoints
        from fedmerge import compare as comparison
        from fedmerge.preparation import enter, new_run, relabelled
        from fedmerge.runs import Run

        console.hush_flower()
        names = _methods(methods) if methods else _methods(f"{flags['align']}+{flags['merge']}")
        folders = [path for path in sources if path.is_dir()]
        if folders and len(folders) < len(sources):
            raise ConfigurationError("give run folders, or safetensors files, not both")
        if not folders:
            counts = None if label_counts is None else checkpoints.read_label_counts(label_counts)
            given_clients = {"clients": len(sources), "min_completed": len(sources)}
            config = checkpoints.checkpoint_config(Config(**{**flags, **given_clients}), len(sources))
            updates = checkpoints.read_checkpoints(config, sources, counts)
            settings = {"methods": names, "sources": [str(path) for path in sources]}
            run = new_run("merge", config, stack, settings)
            comparison.merge_checkpoints(config, run, updates, names, progress=console.progress)
            console.finish(run)
            return
        given = context.get_parameter_source("server_labels") is not click.core.ParameterSource.DEFAULT
        labels = flags["server_labels"] if given else None
        configs = [relabelled(Run.open(folder), labels, apart=bool(flags["out"])) for folder in folders]
        for folder, config in zip(folders, configs, strict=True):
            run = Run.open(folder)
            target = run
            if flags["out"]:
                out = Path(flags["out"]) / folder.name if len(folders) > 1 else Path(flags["out"])
                settings = {
                    name: value for name, value in run.settings.items() if name not in ("command", "config", "versions")
                }
                target = Run.create(out, "merge", config, **settings | {"methods": names, "sources": [str(folder)]})
            enter(stack, target)
            comparison.merge_stored(run, target, names, progress=console.progress)
            console.finish(target)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@_output_options
def report(run: Path, quiet: bool, as_json: bool) -> None:
    """Print a run's table, and write its figures and one HTML page that holds everything."""
    with _session(quiet, as_json) as (console, _):
        from fedmerge.runs import Run

        console.finish(Run.open(run))


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("method")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--seed", type=int, help="Whose model it is to be.  [default: the run's first]")
@_output_options
def export(run: Path, method: str, file: Path, seed: int | None, quiet: bool, as_json: bool) -> None:
    """Write the merged model of METHOD in a run folder to FILE: .safetensors, .pt2 (torch.export) or .onnx.

    The file is kept only if it gives the model's outputs on random images. ONNX needs pip install 'fedmerge[export]'.
    """
    with _session(quiet, as_json):
        from fedmerge import export as exporting
        from fedmerge.runs import Run

        found = exporting.export_stored(Run.open(run), method, file, seed)
        if as_json:
            click.echo(json.dumps(found))
        elif not quiet:
            click.echo(f"{file}: images {found['shape']} to {len(found['classes'])} classes, outputs checked")


@main.command()
@click.option("--node-data", default="", help="The site's data: folder:PATH (PATH/CLASS/IMAGE), or PATH.npz.")
@click.option("--described", type=click.Path(path_type=Path), help="JSON file that --describe printed at the server.")
@click.option("--describe", is_flag=True, help="At the server: print, as JSON, what sites need to know of --data.")
@_scenario_options("resume")
def check_client(
    node_data: str, described: Path | None, describe: bool, quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Say whether a site's data, model and versions fit the federation, before it joins. Nothing is sent."""
    with _session(quiet, as_json):
        from fedmerge import sitecheck

        config = Config(**flags)
        found = sitecheck.describe(config) if describe else sitecheck.check(config, node_data, described)
        if not quiet:
            click.echo(json.dumps(found) if as_json or describe else sitecheck.report(found))


@main.command(name="list")
def show() -> None:
    """List data sets, models, partitions, aligners and mergers."""
    from fedmerge.catalogue import ALIGNERS, MERGERS
    from fedmerge.names import DATASETS, MODELS, PARTITIONS

    sections: dict[str, dict[str, str]] = {
        "data sets (--data)": dict(DATASETS),
        "models (--model)": dict(MODELS),
        "partitions (--partition)": dict(PARTITIONS),
        "aligners (--align)": {name: entry.summary for name, entry in ALIGNERS.items()},
        "mergers (--merge)": {name: entry.summary for name, entry in MERGERS.items()},
    }
    for title, entries in sections.items():
        click.secho(title, bold=True)
        for name, text in entries.items():
            click.echo(f"  {name:<24}{text}")


class _session:
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


def _methods(text: str, models: str = "") -> list[str]:
    from fedmerge.catalogue import METHODS, MIXED_METHODS, method_name, parse_method

    default = MIXED_METHODS if models else METHODS
    given: Sequence[str] = [name.strip() for name in text.split(",") if name.strip()] if text else default
    return list(dict.fromkeys(method_name(*parse_method(name)) for name in given))


def _seeds(text: str, seed: int) -> list[int]:
    if not text:
        return [seed]
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigurationError(f"--seeds must be whole numbers separated by commas, got {text!r}") from None
