"""The `fedmerge` command: flags, files and output around the library."""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmerge import __version__
from fedmerge.config import INITIALISATIONS, SPLITS, UPLOAD_DTYPES, Config, ConfigurationError, flag, known, read_toml
from fedmerge.errors import FedmergeError

if TYPE_CHECKING:
    from fedmerge.console import Console
    from fedmerge.runs import Run

CHOICES = {"init": INITIALISATIONS, "split": SPLITS, "upload_dtype": UPLOAD_DTYPES}
MACHINE = ("out", "ray_address", "client_cpus", "client_gpus", "timeout")
"""Settings that change where a run happens and not what it computes: `--resume` may change them."""

Command = Callable[..., None]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """One-shot federated learning: align independently trained models, then learn how to merge them.

    Start with `fedmerge compare`: it trains clients on non-IID data and merges them by every method.
    """


def _read_config(context: click.Context, _: click.Parameter, path: Path | None) -> None:
    if path is not None:
        settings = {name.replace("-", "_"): value for name, value in read_toml(path).items()}
        names = [parameter.name or "" for parameter in context.command.params]
        for name in settings:
            known(f"setting of {path}", name, names)
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


def _scenario_options(command: Command) -> Command:
    """Give a command a flag for each field of the configuration, and --config, --resume and the output's flags."""
    command = _output_options(command)
    command = click.option(
        "--resume", is_flag=True, help="Go on with the run in --out, with its settings; nothing is trained twice."
    )(command)
    for item in reversed(dataclasses.fields(Config)):
        text = str(item.metadata["help"])
        if isinstance(item.default, bool):
            option = click.option(f"{flag(item.name)}/--no-{flag(item.name)[2:]}", default=item.default, help=text)
        else:
            kind = click.Choice(CHOICES[item.name]) if item.name in CHOICES else type(item.default)
            option = click.option(
                flag(item.name), type=kind, default=item.default, show_default=bool(item.default), help=text
            )
        command = option(command)
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        callback=_read_config,
        is_eager=True,
        expose_value=False,
        help="TOML file with the same keys as these flags, without the dashes in front; flags go before it.",
    )(command)


@main.command()
@_scenario_options
@click.pass_context
def simulate(context: click.Context, resume: bool, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Run one federation by one method, for one or more rounds, on Ray in this process."""
    with _session(quiet, as_json) as (console, stack):
        from fedmerge.simulation import simulate as simulate_on_ray

        console.hush_flower()
        config, run = _prepare(context, "simulate", flags, resume, stack)
        simulate_on_ray(config, run, progress=console.progress, resume=resume)
        console.finish(run)


@main.command()
@click.option(
    "--methods", default="", help="ALIGNER+MERGER or MERGER, separated by commas.  [default: all controls and ours]"
)
@click.option(
    "--seeds", default="", help="Seeds, separated by commas; clients are trained once for each.  [default: --seed]"
)
@_scenario_options
@click.pass_context
def compare(
    context: click.Context, methods: str, seeds: str, resume: bool, quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Train the clients of a federation once for each seed, and merge them by every method."""
    with _session(quiet, as_json) as (console, stack):
        if flags["rounds"] != 1:
            raise ConfigurationError("compare merges one round of training by many methods: use simulate for --rounds")
        settings = {"methods": _methods(methods), "seeds": _seeds(seeds, flags["seed"])}
        from fedmerge import compare as comparison

        console.hush_flower()
        config, run = _prepare(context, "compare", flags, resume, stack, **settings)
        stored = run.settings
        comparison.compare(config, run, stored["methods"], stored["seeds"], progress=console.progress)
        console.finish(run)


@main.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--methods", default="", help="ALIGNER+MERGER or MERGER, separated by commas.  [default: --align and --merge]"
)
@click.option(
    "--label-counts-file",
    "counts_file",
    type=click.Path(path_type=Path),
    help="JSON object: images of each class by checkpoint file name.",
)
@_scenario_options
@click.pass_context
def merge(
    context: click.Context,
    sources: tuple[Path, ...],
    methods: str,
    counts_file: Path | None,
    resume: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Merge stored updates again, without training.

    SOURCES are run folders, or safetensors checkpoints of one architecture (then --model and --data are needed). The
    results of a run folder go into it, or into a new one with --out; those of checkpoints into a new one.
    """
    with _session(quiet, as_json) as (console, stack):
        from fedmerge import compare as comparison
        from fedmerge.runs import Run

        console.hush_flower()
        names = _methods(methods) if methods else _methods(_method(flags["align"], flags["merge"]))
        folders = [path for path in sources if path.is_dir()]
        if folders and len(folders) < len(sources):
            raise ConfigurationError("give run folders, or safetensors files, not both")
        if not folders:
            config, run = _prepare(
                context, "merge", flags, resume, stack, methods=names, sources=[str(path) for path in sources]
            )
            counts = None if counts_file is None else comparison.read_label_counts(counts_file)
            comparison.merge_checkpoints(config, run, sources, names, label_counts=counts, progress=console.progress)
            console.finish(run)
            return
        for folder in folders:
            run = Run.open(folder)
            target = run
            if flags["out"]:
                out = Path(flags["out"]) / folder.name if len(folders) > 1 else Path(flags["out"])
                settings = {
                    name: value for name, value in run.settings.items() if name not in ("command", "config", "versions")
                }
                target = Run.create(out, "merge", run.config, **settings | {"methods": names, "sources": [str(folder)]})
            _enter(stack, target)
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


@main.command(name="list")
def show() -> None:
    """List data sets, models, partitions, aligners and mergers."""
    from fedmerge.catalogue import ALIGNERS, MERGERS
    from fedmerge.data import DATASETS
    from fedmerge.models import MODELS
    from fedmerge.partition import PARTITIONS

    sections: dict[str, dict[str, str]] = {
        "data sets (--data)": dict(DATASETS),
        "models (--model)": {name: entry.description for name, entry in MODELS.items()}
        | {"NAME@WIDTH": "any of these, its layers WIDTH times as wide"}
        | {"resnet18, …": "any classification model of torchvision, by its name there"}
        | {"package.module:function": "your own: function(shape, num_classes) returns a torch.nn.Module"},
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
        self.stack.close()
        if isinstance(error, FedmergeError):
            logging.getLogger("fedmerge").error("%s", error)
            raise click.ClickException(str(error)) from error
        if error is None and self.console.failed:
            sys.exit(1)


def _prepare(
    context: click.Context, command: str, flags: dict[str, Any], resume: bool, stack: ExitStack, **settings: object
) -> tuple[Config, Run]:
    """Make the run folder, or open the one to go on with, and lock it."""
    from fedmerge.runs import Run

    config = Config(**flags)
    if resume:
        if not config.out:
            raise ConfigurationError("--resume needs --out, the run folder to go on with")
        run = Run.open(Path(config.out))
        _enter(stack, run)
        return _resumed(context, run, command, config, settings), run
    _check_names(config)
    out = Path(config.out) if config.out else _new_folder(command, config)
    run = Run.create(out, command, config, **settings)
    _enter(stack, run)
    return config, run


def _check_names(config: Config) -> None:
    """Find unknown names before anything is written."""
    from fedmerge.catalogue import parse_method
    from fedmerge.data import DATASETS
    from fedmerge.partition import PARTITIONS

    if not config.data.startswith("folder:"):
        known("data set", config.data, [name for name in DATASETS if ":" not in name])
    known("partition", config.partition, PARTITIONS)
    parse_method(_method(config.align, config.merge))


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


def _enter(stack: ExitStack, run: Run) -> None:
    stack.enter_context(run.locked())
    stack.enter_context(run.logging())


def _new_folder(command: str, config: Config) -> Path:
    data = config.data.partition(":")[0]
    return Path("runs") / f"{command}-{data}-{datetime.now():%Y%m%d-%H%M%S}"


def _method(align: str, merge: str) -> str:
    return f"{align}+{merge}"


def _methods(text: str) -> list[str]:
    from fedmerge.catalogue import method_name, parse_method
    from fedmerge.compare import METHODS

    given: Sequence[str] = [name.strip() for name in text.split(",") if name.strip()] if text else METHODS
    return list(dict.fromkeys(method_name(*parse_method(name)) for name in given))


def _seeds(text: str, seed: int) -> list[int]:
    if not text:
        return [seed]
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise ConfigurationError(f"--seeds must be whole numbers separated by commas, got {text!r}") from None
