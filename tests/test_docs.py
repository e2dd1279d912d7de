"""The documentation says what is so: its tables are the experiments', its names and flags exist."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import click
import pytest

from fedmerge.catalogue import ALIGNERS, MERGERS
from fedmerge.cli import main
from fedmerge.methods import parse_method

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
METHODS = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
BENCHMARK = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
ARCHITECTURES = (ROOT / "docs" / "architectures.md").read_text(encoding="utf-8")
COMMANDS = [
    line.split("  #")[0]
    for line in (README + BENCHMARK).replace("\\\n", "").splitlines()
    if line.startswith("fedmerge ")
]
EXPECTED = ROOT / "experiments" / "expected"
IN_OTHER_PAGES = {"alignment", "architectures", "devices", "hostile", "methods", "one_round", "privacy"}


def test_the_readmes_table_is_the_experiments() -> None:
    expected = json.loads((ROOT / "experiments" / "expected" / "one_round.json").read_text(encoding="utf-8"))
    assert "\n".join(expected["table"]) in README
    assert expected["command"] in README


@pytest.mark.parametrize("name", ["alignment", "hostile", "methods"])
def test_the_tables_of_methods_are_the_experiments(name: str) -> None:
    expected = json.loads((ROOT / "experiments" / "expected" / f"{name}.json").read_text(encoding="utf-8"))
    assert "\n".join(expected["table"]) in METHODS
    assert f"experiments/{name}.py" in METHODS


def test_the_tables_of_architectures_and_devices_are_the_experiments() -> None:
    folder = ROOT / "experiments" / "expected"
    architectures = json.loads((folder / "architectures.json").read_text(encoding="utf-8"))
    for name, command in architectures["commands"].items():
        assert command in ARCHITECTURES
        assert "\n".join(architectures["tables"][name]) in ARCHITECTURES
    devices = json.loads((folder / "devices.json").read_text(encoding="utf-8"))
    assert "\n".join(devices["table"]) in ARCHITECTURES
    assert all(f"experiments/{name}.py" in ARCHITECTURES for name in ("architectures", "devices"))


def marked_tables(page: str) -> dict[str, list[str]]:
    """The lines of the table after each marker: `<!-- table: NAME -->`, or NAME.KEY for one of several."""
    found = re.findall(r"^<!-- table: ([\w.-]+) -->\n((?:\|.*\n?)*)", page, re.MULTILINE)
    return {name: table.splitlines() for name, table in found}


def test_a_marked_table_ends_where_its_lines_end() -> None:
    page = "text\n<!-- table: a -->\n| x |\n| 1 |\n\n| other |\n<!-- table: b.c -->\n| y |"
    assert marked_tables(page) == {"a": ["| x |", "| 1 |"], "b.c": ["| y |"]}


def test_the_tables_of_the_benchmark_are_the_experiments() -> None:
    tables: dict[str, list[str]] = {}
    for path in EXPECTED.glob("*.json"):
        if path.stem not in IN_OTHER_PAGES:
            content = json.loads(path.read_text(encoding="utf-8"))
            tables |= {path.stem: content["table"]} if "table" in content else {}
            tables |= {f"{path.stem}.{key}": table for key, table in content.get("tables", {}).items()}
    assert marked_tables(BENCHMARK) == tables
    for name in tables:
        assert f"experiments/{name.partition('.')[0]}.py" in BENCHMARK


def test_the_tables_of_privacy_are_the_experiments() -> None:
    expected = json.loads((ROOT / "experiments" / "expected" / "privacy.json").read_text(encoding="utf-8"))
    page = (ROOT / "docs" / "privacy.md").read_text(encoding="utf-8")
    assert "\n".join(expected["table"]) in page
    assert "\n".join(expected["anchors"]) in page
    assert "experiments/privacy.py" in page


def test_every_merger_is_measured_or_needs_other_clients() -> None:
    cells = [json.loads((EXPECTED / f"{name}.json").read_text(encoding="utf-8")) for name in ("methods", "published")]
    measured = {parse_method(name)[1] for content in cells for cell in content["accuracy"].values() for name in cell}
    assert set(MERGERS) - measured == {"flower-bulyan"}, "Bulyan needs more than five clients to guard against one"


@pytest.mark.parametrize("name", [*ALIGNERS, *MERGERS])
def test_every_method_is_documented(name: str) -> None:
    rows = [line.split("|")[1] for line in METHODS.splitlines() if line.startswith("| `")]
    assert any(f"`{name}`" in row for row in rows)


@pytest.mark.parametrize("line", COMMANDS)
def test_the_readmes_commands_have_flags_and_methods_that_exist(line: str) -> None:
    _, name, *words = shlex.split(line)
    command = main.commands[name]
    if isinstance(command, click.Group):
        command, words = command.commands[words[0]], words[1:]
    flags = {flag for parameter in command.params if isinstance(parameter, click.Option) for flag in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= flags
    for methods in re.findall(r"--methods (\S+)", line):
        for method in methods.split(","):
            parse_method(method)


def test_links_lead_somewhere() -> None:
    for page in (
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *ROOT.glob("*/README.md"),
        ROOT / "CONTRIBUTING.md",
        ROOT / "SECURITY.md",
    ):
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 5
