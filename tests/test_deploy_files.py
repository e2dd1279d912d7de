"""Units, containers and the recipe: they parse, are of the pinned Flower, and give it options that it has."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from certificates import main as certificates
from flwr.supercore.cli.flower_superexec import _parse_args as superexec_parser
from flwr.superlink.cli.flower_superlink import _parse_args_run_superlink as superlink_parser
from flwr.supernode.cli.flower_supernode import _parse_args_run_supernode as supernode_parser
from rehearse import SITES, read_recipe, read_unit

from fedmerge.cli import main

DEPLOY = Path(__file__).parents[1] / "deploy"
PARSERS: dict[str, Callable[[], argparse.ArgumentParser]] = {
    "superlink": superlink_parser,
    "supernode": supernode_parser,
    "superexec": superexec_parser,
}
HADOLINT = shutil.which("hadolint", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
UNITS = sorted(DEPLOY.glob("*.service"))


def services() -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
    return found


def stages() -> dict[str, list[list[str]]]:
    """The Dockerfile's instructions by stage."""
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    found: dict[str, list[list[str]]] = {}
    name = ""
    for line in text.splitlines():
        words = line.split()
        if words and not line.startswith("#"):
            name = words[3] if words[0] == "FROM" else name
            found.setdefault(name, []).append(words)
    return found


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_a_units_command_has_options_that_flower_has(unit: Path) -> None:
    settings = read_unit(unit)
    [command] = settings["ExecStart"]
    words = shlex.split(command)
    kind = Path(words[0]).name.removeprefix("flower-")
    PARSERS[kind]().parse_args(words[1:])
    assert settings["User"] == ["fedmerge"]
    assert settings["Restart"] == ["always"]
    assert "FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1" in settings["Environment"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.stem)
def test_systemd_takes_the_units(unit: Path, tmp_path: Path) -> None:
    there = unit.read_text().replace("ExecStart=/opt/fedmerge/bin/", "ExecStart=/bin/true #")
    (tmp_path / unit.name).write_text(re.sub("#flower-", "flower-", there))
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / unit.name)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", services())
def test_a_containers_command_has_options_that_flower_has(name: str) -> None:
    service = services()[name]
    words = [re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", word) for word in service["command"]]
    told = PARSERS[service["build"]["target"]]().parse_args(words)
    if service["build"]["target"] != "superexec":
        assert told.isolation == "process"  # its image has no app
    assert all(volume.endswith(":ro") for volume in service["volumes"] if "fedmerge:" in volume or "data:" in volume)


def test_a_superexec_is_beside_what_it_serves_and_they_share_a_secret_where_others_reach_the_port() -> None:
    found = services()
    for name, item in found.items():
        if item["build"]["target"] == "superexec":
            beside = item["network_mode"].removeprefix("service:")
            assert item["depends_on"] == [beside]
            assert item["profiles"] == found[beside]["profiles"]
            assert any(word.startswith("--runtime-api-address=127.0.0.1:") for word in item["command"]), name
    secret = "--superexec-auth-secret-file=/etc/fedmerge/superexec.secret"
    assert secret in found["superlink"]["command"]
    assert secret in found["server-superexec"]["command"]
    assert "--host=0.0.0.0" not in found["supernode"]["command"]


def test_flower_is_pinned_to_the_version_that_the_tests_run_with() -> None:
    version = metadata.version("flwr")
    dockerfile = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"FLWR_VERSION=([\d.]+)", dockerfile) == [version, version]
    assert f"'flwr[simulation]=={version}'" in read_recipe()["on every machine: install"]


def test_the_dockerfile_has_the_composed_targets_and_no_image_runs_as_root() -> None:
    found = stages()
    wanted = {service["build"]["target"] for service in services().values()}
    assert wanted <= set(found)
    for name in wanted:
        lineage, stage = list(found[name]), found[name][0][1]
        while stage in found:
            lineage, stage = [*found[stage], *lineage], found[stage][0][1]
        users = [words[1] for words in lineage if words[0] == "USER"]
        assert users == ["10001"], name
        assert lineage[-1] == ["ENTRYPOINT", json.dumps([f"flower-{name}"])]
        assert not [words for words in lineage if words[0] == "ADD"]
    for words in found["superexec"]:
        if words[0] == "COPY":
            assert all((DEPLOY.parent / source).exists() for source in words[1:-1])


@pytest.mark.skipif(HADOLINT is None, reason="needs hadolint")
def test_hadolint_has_nothing_to_say_of_the_dockerfile() -> None:
    done = subprocess.run([str(HADOLINT), str(DEPLOY / "Dockerfile")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def options(command: click.Command) -> set[str]:
    return {flag for item in command.params if isinstance(item, click.Option) for flag in item.opts}


def test_the_recipes_commands_have_flags_that_exist() -> None:
    text = "\n".join(read_recipe().values()).replace("\\\n", " ")
    checked = 0
    for line in text.splitlines():
        words = shlex.split(line) if line.startswith(("fedmerge ", "python deploy/")) else []
        if words[:1] == ["fedmerge"]:
            group = main.commands[words[1]]
            command = group.commands[words[2]] if isinstance(group, click.Group) else group
        elif words:
            command = certificates.commands[words[2]]
        else:
            continue
        assert {word for word in words if word.startswith("--")} <= options(command), line
        checked += 1
    assert checked >= 8


def test_the_recipe_is_for_as_many_sites_as_the_rehearsal_has() -> None:
    text = "\n".join(read_recipe().values())
    assert f"num-partitions={len(SITES)}" in text
    assert f"--clients {len(SITES)}" in text
