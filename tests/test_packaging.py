"""What `pip install` brings: the library and the command, and nothing by another name."""

from __future__ import annotations

import importlib
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

import fedmerge

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]


def project() -> dict[str, Any]:
    with (ROOT / "pyproject.toml").open("rb") as file:
        settings: dict[str, Any] = tomllib.load(file)
    return settings


def test_the_package_and_the_project_have_one_version() -> None:
    assert fedmerge.__version__ == project()["project"]["version"]


def test_the_command_of_the_project_exists() -> None:
    for target in project()["project"]["scripts"].values():
        module, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(module), function))


def test_every_public_name_exists_and_others_do_not() -> None:
    for name in fedmerge.__all__:
        assert getattr(fedmerge, name).__name__ == name
    assert len(set(fedmerge.__all__)) == len(fedmerge.__all__)
    with pytest.raises(AttributeError, match="module 'fedmerge' has no attribute 'nothing'"):
        _ = fedmerge.nothing
    with pytest.raises(ImportError):
        exec("from fedmerge import nothing")


def test_the_flower_app_brings_every_module_and_no_test() -> None:
    app = project()["tool"]["flwr"]["app"]
    brought = {path for pattern in app["fab-include"] for path in ROOT.glob(pattern)}
    assert brought == {path for folder in ("fedmerge", "clients", "server") for path in (ROOT / folder).rglob("*.py")}
    for component in app["components"].values():
        module = component.partition(":")[0].replace(".", "/")
        assert ROOT / f"{module}.py" in brought


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project's wheel, built with the build tool that is installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (path,) = folder.iterdir()
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_package_alone_and_all_of_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    version = project()["project"]["version"]
    assert wheel.name == f"fedmerge-{version}-py3-none-any.whl"
    assert {name.split("/")[0] for name in names} == {"fedmerge", f"fedmerge-{version}.dist-info"}
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fedmerge").rglob("*") if path.is_file()}
    expected = {name for name in files if "__pycache__" not in name}
    assert {name for name in names if name.startswith("fedmerge/")} == expected
    assert {"fedmerge/py.typed", "fedmerge/report.html.jinja"} <= expected


@pytest.mark.slow
def test_an_installed_command_runs_its_own_code_whatever_lies_in_the_working_directory(
    wheel: Path, tmp_path: Path
) -> None:
    site, here = tmp_path / "site", tmp_path / "here"
    with zipfile.ZipFile(wheel) as file:
        file.extractall(site)
    for name in ("fedmerge", "clients", "server"):
        (here / name).mkdir(parents=True)
        (here / name / "__init__.py").write_text("raise SystemExit('the code of the working directory ran')")
    script = tmp_path / "bin" / "fedmerge"
    script.parent.mkdir()
    script.write_text("from fedmerge.cli import main\n\nmain()\n")  # as pip's
    done = subprocess.run(
        [sys.executable, str(script), "list"],
        cwd=here,
        env={"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "resnet20" in done.stdout
