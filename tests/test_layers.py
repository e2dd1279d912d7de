"""Who may import whom: mathematics below plumbing below the command; Flower and Ray in few places.

The files are read, not run, so imports inside functions count too.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedmerge.catalogue import ALIGNERS, MERGERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fedmerge"

LAYERS: dict[str, frozenset[str]] = {
    "mathematics": frozenset(
        [
            "errors",
            "names",
            "settings",
            "catalogue",
            "methods",
            "seeds",
            "state",
            "spaces",
            "units",
            "labels",
            "graph",
            "grouping",
            "trace",
            "symmetry",
            "rules",
            "rules.arguments",
            "rules.attention",
            "rules.elements",
            "rules.layers",
            "rules.movement",
            "basis",
            "features",
            "native",
            "covariances",
            "covariancesource",
            "layers",
            "statistics",
            "folding",
            "memory",
            "spilled",
            "problem",
            "examples",
            "augment",
            "conforming",
            "screening",
            "updatefiles",
            "sgd",
            "replay",
            "parts",
            "reordered",
            "train",
            "batched",
            "chain",
            "calibrate",
            "oneshot",
            "outcomes",
            "families",
            "distillation",
            "mixed",
            "partial",
            "adapt",
            "adapt.depths",
            "adapt.families",
            "adapt.joining",
            "adapt.widths",
            "align",
            "anchor",
            "align.activations",
            "align.auto",
            "align.cca",
            "align.choice",
            "align.comparison",
            "align.identity",
            "align.matching",
            "align.ot",
            "align.running_mean",
            "align.universe",
            "align.weights",
            "align.zipit",
            "merge",
            "merge.adam",
            "merge.adamerging",
            "merge.arithmetic",
            "merge.average",
            "merge.best",
            "merge.box",
            "merge.choice",
            "merge.coordinates",
            "merge.descent",
            "merge.directions",
            "merge.ensemble",
            "merge.fedfisher",
            "merge.finetune",
            "merge.fisher",
            "merge.heads",
            "merge.kernels",
            "merge.learning",
            "merge.mixture",
            "merge.nonuniform",
            "merge.objective",
            "merge.pair",
            "merge.pleas",
            "merge.regmean",
            "merge.pool",
            "merge.probing",
            "merge.propagation",
            "merge.shares",
            "merge.source",
            "merge.tiled",
            "merge.tiles",
            "merge.stacking",
            "merge.starts",
            "merge.streamed",
            "merge.taskvectors",
            "merge.teacher",
            "merge.ties",
        ]
    ),
    "plumbing": frozenset(
        [
            "config",
            "configcheck",
            "devices",
            "data",
            "datafiles",
            "fileformats",
            "partition",
            "federation",
            "architectures",
            "models",
            "arrays",
            "wire",
            "metrics",
            "nodes",
            "rounds",
            "sampling",
            "flower",
            "flower_strategies",
            "machine",
            "workspaces",
            "orders",
            "client",
            "privacy",
            "together",
            "strategy",
            "server",
            "recording",
            "resuming",
            "deploy",
            "fetch",
            "cluster",
            "actors",
            "actorside",
            "raygrid",
            "simulation",
            "runs",
            "wholefiles",
            "export",
            "sitedata",
            "sitecheck",
            "results",
            "checkpoints",
            "compare",
            "federation_models",
            "goingon",
            "summary",
            "tables",
            "words",
            "figures",
            "report",
            "pages",
            "benchmark",
            "benchmark.collecting",
            "benchmark.contests",
            "benchmark.curves",
            "benchmark.drawings",
            "benchmark.maps",
            "benchmark.page",
            "benchmark.rounds",
        ]
    ),
    "command": frozenset(["__init__", "__main__", "cli", "console", "deploycli", "options", "preparation"]),
}
ORDER = list(LAYERS)

LIGHT = ("catalogue", "config", "configcheck", "devices", "errors", "methods", "names", "settings")

OF_MATHEMATICS = {"torch", "numpy", "scipy", "safetensors", "jaxtyping", "triton"}
ONLY_IN = {
    "flwr": {
        "arrays",
        "wire",
        "metrics",
        "rounds",
        "sampling",
        "flower",
        "flower_strategies",
        "resuming",
        "client",
        "together",
        "strategy",
        "goingon",
        "server",
        "recording",
        "raygrid",
        "simulation",
    },
    "ray": {"cluster", "actors"},
    "flwr_datasets": {"partition"},
    "torchvision": {"data", "datafiles", "fileformats", "models"},
    "PIL": {"fileformats"},
    "sklearn": {"data"},
    "matplotlib": {"figures", "pages", "benchmark.drawings"},
    "jinja2": {"pages"},
    "rich": {"console", "tables"},
    "click": {"cli", "deploycli", "options", "preparation"},
    "filelock": {"datafiles", "runs"},
    "opacus": {"privacy"},
    "triton": {"merge.tiled", "merge.tiles"},
}
BROUGHT = {
    "ray": "flwr",
    "PIL": "torchvision",
    "datasets": "flwr-datasets",
    "markupsafe": "jinja2",
    "triton": "torch",
}
"""Packages that no requirement names, and the declared dependency whose interface they are a part of."""

HEAVY = "torch numpy scipy ray flwr flwr_datasets torchvision sklearn matplotlib safetensors jinja2"

APPS = sorted(path for folder in ("clients", "server") for path in (ROOT / folder).rglob("*.py"))


def modules() -> dict[str, Path]:
    """The package's modules by their name below it."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return found


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Every module that a file imports anywhere, absolute, `from package import name` as package.name."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (item.name for item in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            yield from (f"{node.module}.{item.name}" for item in node.names)


def own(path: Path) -> set[str]:
    """The package's modules that a file imports."""
    found = set()
    for name in imports(path):
        if name.split(".")[0] == "fedmerge":
            below = name.split(".")[1:]
            while below and ".".join(below) not in MODULES:
                below.pop()
            found.add(".".join(below) or "__init__")
    return found


def foreign(path: Path) -> set[str]:
    """The third-party packages that a file imports."""
    return {name.split(".")[0] for name in imports(path)} - set(sys.stdlib_module_names) - {"fedmerge"}


def layer(name: str) -> str:
    (found,) = (layer for layer, names in LAYERS.items() if name in names)
    return found


def test_the_reader_sees_imports_of_every_form(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "import os, ray.util as r\nfrom fedmerge import config, __version__\nfrom fedmerge.merge import best\n"
        "from fedmerge.state import StateDict\n\ndef late():\n    from torch.nn import functional\n"
    )
    assert foreign(path) == {"ray", "torch"}
    assert own(path) == {"config", "__init__", "merge.best", "state"}


def test_every_module_is_in_exactly_one_layer() -> None:
    assert sorted(name for names in LAYERS.values() for name in names) == sorted(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_imports_from_its_own_layer_and_those_below(name: str) -> None:
    above = {
        other
        for other in own(MODULES[name])
        if ORDER.index(layer(other)) > ORDER.index(layer(name))
        # the command's version stands in the package's contents page
        and not (other == "__init__" and name == "cli")
    }
    assert not above, f"fedmerge.{name} ({layer(name)}) must not import {sorted(above)}"


@pytest.mark.parametrize("name", sorted(LAYERS["mathematics"]))
def test_mathematics_imports_numerical_libraries_alone(name: str) -> None:
    assert foreign(MODULES[name]) <= OF_MATHEMATICS


def test_names_and_settings_are_known_without_any_library() -> None:
    for name in LIGHT:
        assert own(MODULES[name]) <= set(LIGHT)
        assert foreign(MODULES[name]) <= {"tomli"}


def test_the_catalogue_names_mathematics_and_flowers_strategies_alone() -> None:
    for method, entry in (*ALIGNERS.items(), *MERGERS.items()):
        package, _, name = entry.target.partition(":")[0].partition(".")
        assert package == "fedmerge"
        assert layer(name) == "mathematics" or (name == "flower_strategies" and method.startswith("flower-"))


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_imported_where_it_belongs_alone(library: str) -> None:
    assert {name for name, path in MODULES.items() if library in foreign(path)} <= ONLY_IN[library]


def test_no_module_of_the_package_imports_the_flower_app() -> None:
    for name, path in MODULES.items():
        assert not {"clients", "server", "experiments", "benchmarks", "tests"} & foreign(path), name


def test_the_flower_app_imports_the_package_and_flower_alone() -> None:
    assert len(APPS) == 4
    for path in APPS:
        assert foreign(path) <= {"flwr"}, path


def test_the_libraries_that_are_imported_are_the_declared_dependencies() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project: dict[str, Any] = tomllib.load(file)["project"]
    requirements = [*project["dependencies"], *project["optional-dependencies"]["privacy"]]
    names = {text.split(";")[0].split("[")[0].split(">")[0].split("<")[0].strip() for text in requirements}
    assert set(BROUGHT.values()) <= names
    declared = {{"scikit-learn": "sklearn"}.get(name, name).replace("-", "_") for name in names}
    used = set().union(*(foreign(path) for path in (*MODULES.values(), *APPS)))
    assert used == declared | set(BROUGHT)


@pytest.mark.parametrize(
    "code", ["import fedmerge", "import fedmerge.cli", "import fedmerge.config, fedmerge.catalogue"]
)
def test_the_command_starts_without_heavy_libraries(code: str) -> None:
    code += f"; import sys; print(*sorted(set('{HEAVY}'.split()) & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60, cwd=ROOT
    )
    assert done.stdout.split() == []


@pytest.mark.parametrize(("words", "told"), [("'compare', '--help'", "--server-examples"), ("'list'", "zipit")])
def test_importing_the_command_prints_nothing_and_help_and_lists_need_no_heavy_library(words: str, told: str) -> None:
    code = (
        f"import sys; from fedmerge.cli import main; main([{words}], standalone_mode=False); "
        f"assert not set('{HEAVY}'.split()) & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")
    assert told in done.stdout
