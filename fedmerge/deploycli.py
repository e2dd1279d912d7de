"""`fedmerge deploy`: runs on a SuperLink across the network."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fedmerge.config import Config
from fedmerge.options import Command, output_options, scenario_options, session
from fedmerge.settings import ConfigurationError

if TYPE_CHECKING:
    from fedmerge.deploy import SuperLink


@click.group()
def deploy() -> None:
    """Run federations on a SuperLink and SuperNodes across machines, and bring the results home."""


def _superlink_options(command: Command) -> Command:
    for option in (
        click.option("--insecure", is_flag=True, help="No TLS: for a network that nobody else can reach."),
        click.option(
            "--root-certificates", type=click.Path(path_type=Path), help="PEM file of the server's authority."
        ),
        click.option("--superlink", required=True, help="HOST:PORT of the SuperLink."),
    ):
        command = option(command)
    return command


def _superlink(address: str, root_certificates: Path | None, insecure: bool) -> SuperLink:
    from fedmerge.deploy import SuperLink

    if insecure == (root_certificates is not None):
        raise ConfigurationError("give --root-certificates ca.crt, or --insecure for a connection without TLS")
    return SuperLink(address, root_certificates)


@deploy.command()
@_superlink_options
@click.option(
    "--app",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder of the Flower app: a clone of fedmerge's repository.  [default: .]",
)
@scenario_options("resume")
def run(
    superlink: str, root_certificates: Path | None, insecure: bool, app: Path, quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Submit a run, show its log until its end, and exit with 1 if it has failed. --out is a folder of the server."""
    with session(quiet, as_json):
        from fedmerge.oneshot import check_needs

        link, config = _superlink(superlink, root_certificates, insecure), Config(**flags)
        check_needs(config.merge, labels=config.num_server_labels > 0, label_counts=config.label_counts)
        run_id = link.submit(app, config)
        heard = _heard(quiet or as_json)
        heard(f"run {run_id} at {superlink}; it goes on if this command is stopped")
        folder = link.follow(run_id, heard=heard)
        if as_json:
            click.echo(json.dumps({"run_id": run_id, "folder": folder}))
        elif not quiet:
            host = superlink.rpartition(":")[0]
            click.echo(f"run {run_id} is completed. Its results: fedmerge deploy fetch {host}:{folder} --out FOLDER")


@deploy.command()
@_superlink_options
@click.argument("run_id", required=False, type=int)
@output_options
def status(
    superlink: str, root_certificates: Path | None, insecure: bool, run_id: int | None, quiet: bool, as_json: bool
) -> None:
    """Show the SuperLink's runs and SuperNodes; or RUN_ID alone: the exit code is 1 if it has failed."""
    with session(quiet, as_json):
        from fedmerge.deploy import COMPLETED, FINISHED, DeployError

        link = _superlink(superlink, root_certificates, insecure)
        runs, nodes = link.runs(run_id), link.nodes()
        if as_json:
            click.echo(json.dumps({"runs": runs, "nodes": nodes}))
        elif not quiet:
            for item in runs:
                click.echo(f"run   {item['run-id']:<22}{item['status']:<22}{item.get('status-details') or ''}".rstrip())
            for item in nodes:
                click.echo(f"node  {item['node-id']:<22}{item['status']}")
            if not nodes:
                click.echo("no node has registered")
        if run_id is not None and runs[0]["status"].startswith(FINISHED) and runs[0]["status"] != COMPLETED:
            raise DeployError(f"run {run_id} ended as {runs[0]['status']}: {runs[0].get('status-details')}")


@deploy.command()
@_superlink_options
@click.argument("public_keys", nargs=-1, required=True, type=click.Path(path_type=Path))
@output_options
def register(
    superlink: str,
    root_certificates: Path | None,
    insecure: bool,
    public_keys: tuple[Path, ...],
    quiet: bool,
    as_json: bool,
) -> None:
    """Let the sites with these PUBLIC_KEYS join: a SuperNode without a registered key is turned away."""
    with session(quiet, as_json):
        link = _superlink(superlink, root_certificates, insecure)
        found = {str(path): link.register(path) for path in public_keys}
        if as_json:
            click.echo(json.dumps(found))
        elif not quiet:
            for path, node_id in found.items():
                click.echo(f"{path}: node {node_id}")


@deploy.command()
@click.argument("source")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="New folder for the run.")
@click.option(
    "--updates", is_flag=True, help="The clients' models too: `fedmerge merge` can then merge them again here."
)
@output_options
def fetch(source: str, out: Path, updates: bool, quiet: bool, as_json: bool) -> None:
    """Copy a run folder from SOURCE, [USER@]HOST:PATH by ssh or a path here; check each file, and write the report."""
    with session(quiet, as_json) as (console, _):
        from fedmerge.fetch import fetch as copy
        from fedmerge.runs import Run

        copy(source, out, updates=updates, progress=console.progress)
        console.finish(Run.open(out))


def _heard(quiet: bool) -> Callable[[str], None]:
    return (lambda _: None) if quiet else (lambda line: click.echo(line, err=True))
