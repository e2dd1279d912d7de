"""The `fedmerge` command: flags, files and output around the library."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

from fedmerge import __version__
from fedmerge.config import Config
from fedmerge.deploycli import deploy
from fedmerge.options import output_options, scenario_options, session
from fedmerge.settings import ConfigurationError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__)
def main() -> None:
    """One-shot federated learning: align independently trained models, then learn how to merge them.

    Start with `fedmerge compare`: it trains clients on non-IID data and merges them by every method.
    """


@main.command()
@scenario_options()
@click.pass_context
def simulate(context: click.Context, /, resume: bool, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Run one federation by one method, for one or more rounds, on Ray in this process."""
    with session(quiet, as_json) as (console, stack):
        from fedmerge.preparation import prepare
        from fedmerge.simulation import simulate as simulate_on_ray

        console.hush_flower()
        config, run = prepare(context, "simulate", Config(**flags), resume, stack)
        if not run.has_last_round:
            simulate_on_ray(config, run, progress=console.progress, resume=resume)
        console.finish(run)


@main.command()
@click.option(
    "--methods", default="", help="ALIGNER+MERGER or MERGER, separated by commas.  [default: all controls and ours]"
)
@click.option(
    "--seeds", default="", help="Seeds, separated by commas; clients are trained once for each.  [default: --seed]"
)
@scenario_options()
@click.pass_context
def compare(
    context: click.Context, /, methods: str, seeds: str, resume: bool, quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Train the clients of a federation once for each seed, and merge them by every method."""
    with session(quiet, as_json) as (console, stack):
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
@scenario_options("label_counts", "resume")
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
    into a new one. A run's configuration counts; --server-labels, --server-limit and --low-memory alone may differ from
    it, and then the results go into a new folder.
    """
    with session(quiet, as_json) as (console, stack):
        from fedmerge import checkpoints
        from fedmerge import compare as comparison
        from fedmerge.preparation import BUDGETS, enter, new_run, rebudgeted
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
        default = click.core.ParameterSource.DEFAULT
        budgets = {name: flags[name] for name in BUDGETS if context.get_parameter_source(name) is not default}
        configs = [rebudgeted(Run.open(folder), budgets, apart=bool(flags["out"])) for folder in folders]
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
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--baseline", default="fedavg", show_default=True, help="The method that the others are compared with.")
@output_options
def report(folder: Path, baseline: str, quiet: bool, as_json: bool) -> None:
    """Write figures and one HTML page of a run, and print its table; or of all runs in a folder, at any depth."""
    with session(quiet, as_json) as (console, _):
        from fedmerge.runs import Run

        if (folder / "config.json").exists():
            console.finish(Run.open(folder), baseline)
        else:
            console.finish_benchmark(folder, baseline)


@main.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.argument("method")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--seed", type=int, help="Whose model it is to be.  [default: the run's first]")
@output_options
def export(run: Path, method: str, file: Path, seed: int | None, quiet: bool, as_json: bool) -> None:
    """Write the merged model of METHOD in a run folder to FILE: .safetensors, .pt2 (torch.export) or .onnx.

    The file is kept only if it gives the model's outputs on random images. ONNX needs pip install 'fedmerge[export]'.
    """
    with session(quiet, as_json):
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
@scenario_options("resume")
def check_client(
    node_data: str, described: Path | None, describe: bool, quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Say whether a site's data, model and versions fit the federation, before it joins. Nothing is sent."""
    with session(quiet, as_json):
        from fedmerge import sitecheck

        config = Config(**flags)
        found = sitecheck.describe(config) if describe else sitecheck.check(config, node_data, described)
        if not quiet:
            click.echo(json.dumps(found) if as_json or describe else sitecheck.report(found))


main.add_command(deploy)


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


def _methods(text: str, models: str = "") -> list[str]:
    from fedmerge.catalogue import METHODS, MIXED_METHODS
    from fedmerge.methods import method_name, parse_method

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
