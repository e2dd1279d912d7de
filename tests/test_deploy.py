"""`fedmerge deploy` with a `flwr` that this file writes: what it is told, what it answers, and what comes of it."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from made_runs import make_run, result

from fedmerge import deploy
from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.deploy import DeployError, SuperLink
from fedmerge.fetch import FetchError, fetch
from fedmerge.runs import Run
from fedmerge.settings import ConfigurationError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FLWR = """
import json, os, pathlib, sys
folder = pathlib.Path(sys.argv[1])
words = sys.argv[2:]
with (folder / "calls.jsonl").open("a") as file:
    home = pathlib.Path(os.environ["FLWR_HOME"])
    path = words[words.index("--run-config") + 1] if "--run-config" in words else None
    told = {name: value for name, value in os.environ.items() if name.startswith(("FLWR", "PYTHONPATH", "PATH"))}
    toml = pathlib.Path(path).read_text() if path else ""
    config = (home / "config.toml").read_text()
    call = {"words": words, "environment": told, "config": config, "run": toml, "cwd": os.getcwd()}
    file.write(json.dumps(call) + "\\n")
answers = folder / words[0]
lines = answers.read_text().splitlines()
if len(lines) > 1:
    answers.write_text("\\n".join(lines[1:]))
print(lines[0].replace("|", "\\n"))
sys.exit(0 if "error-message" not in lines[0] else 1)
"""

Answer = Callable[..., None]


@pytest.fixture
def flwr(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a file by the name of each subcommand has its answers, a line each, the last one repeated."""
    folder = tmp_path / "flwr"
    folder.mkdir()
    script = tmp_path / "flwr.py"
    script.write_text(FLWR)
    monkeypatch.setattr(deploy, "_command", lambda *words: [sys.executable, "-S", str(script), str(folder), *words])
    monkeypatch.setattr(deploy, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    return folder


def says(folder: Path, **answers: Any) -> None:
    for name, answer in answers.items():
        lines = answer if isinstance(answer, list) else [answer]
        text = [line if isinstance(line, str) else json.dumps({"success": True, **line}) for line in lines]
        (folder / name).write_text("\n".join(text))


def status(name: str, details: str = "") -> dict[str, Any]:
    return {"runs": [{"run-id": "7", "status": name, "status-details": details}]}


def calls(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]


def submit(*words: str) -> Any:
    common = ["deploy", "run", "--superlink", "fl.example.org:8000", "--insecure", "--app", str(ROOT)]
    return CliRunner().invoke(main, [*common, *words])


def test_a_run_is_submitted_with_what_was_asked_for_and_followed_to_its_end(flwr: Path) -> None:
    says(
        flwr,
        run={"run-id": "7"},
        ls=[status("pending"), status("running"), status("finished:completed")],
        log="INFO : run folder: /runs/a b|INFO : ready",
    )
    done = submit("--clients", "3", "--data", 'folder:/a "b"', "--no-label-counts", "--out", "/runs/a b")
    assert done.exit_code == 0, done.output
    assert "INFO : ready" in done.output
    assert "fedmerge deploy fetch fl.example.org:/runs/a b --out FOLDER" in done.output
    run = next(call for call in calls(flwr) if call["words"][0] == "run")
    assert run["words"][1:3] == [str(ROOT), "fedmerge"]
    told = {"clients": 3, "data": 'folder:/a "b"', "label-counts": False, "out": "/runs/a b"}
    assert tomllib.loads(run["run"]) == told


def test_flowers_command_has_a_home_of_its_own_and_nothing_of_the_users(flwr: Path, tmp_path: Path) -> None:
    certificate = tmp_path / "ca.crt"
    certificate.touch()
    says(flwr, ls=status("running"))
    assert SuperLink("10.0.0.1:8000", certificate).runs(7)[0]["status"] == "running"
    [call] = calls(flwr)
    assert call["words"] == ["ls", "fedmerge", "--run-id", "7", "--format", "json"]
    home = call["environment"]["FLWR_HOME"]
    assert call["cwd"] == home
    assert not Path(home).exists()
    assert "PYTHONPATH" not in call["environment"]
    assert call["environment"]["PATH"].startswith(str(Path(sys.executable).parent))
    connection = tomllib.loads(call["config"])["superlink"]
    assert connection["default"] == "fedmerge"
    assert connection["fedmerge"] == {"address": "10.0.0.1:8000", "root-certificates": str(certificate)}


@pytest.mark.parametrize("ending", ["finished:failed", "finished:stopped"])
def test_a_run_that_does_not_complete_is_an_error(flwr: Path, ending: str) -> None:
    says(flwr, run={"run-id": "7"}, ls=[status("running"), status(ending, "no disk")], log="run folder: /runs/x")
    done = submit()
    assert done.exit_code == 1
    assert f"run 7 ended as {ending}: no disk; what arrived is in /runs/x at the server" in done.output


def test_a_run_that_does_not_start_is_said_to_wait(flwr: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "SECONDS_TO_START", 0.0)
    says(flwr, ls=[status("pending"), status("pending"), status("finished:completed")], log="nothing")
    heard: list[str] = []
    assert SuperLink("a:1", None).follow(7, heard=heard.append) is None
    assert heard.count("run 7 is still pending: is a SuperExec running beside the SuperLink?") == 1


def test_what_flower_refuses_is_told_and_fails(flwr: Path) -> None:
    says(flwr, run='{"success": false, "error-message": "no such node"}')
    done = submit()
    assert (done.exit_code, done.output) == (1, "Error: flwr run at fl.example.org:8000: no such node\n")
    says(flwr, ls="not JSON")
    with pytest.raises(DeployError, match="flwr ls at a:1: not JSON"):
        SuperLink("a:1", None).runs()


def test_a_superlink_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "sleeps.py"
    script.write_text("import time; time.sleep(60)")
    monkeypatch.setattr(deploy, "_command", lambda *_: [sys.executable, "-S", str(script)])
    monkeypatch.setattr(deploy, "SECONDS_TO_ANSWER", 0.2)
    began = time.monotonic()
    with pytest.raises(DeployError, match="no answer from a:1 within 0 s"):
        SuperLink("a:1", None).nodes()
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "runs/x"], "--out runs/x must be absolute"),
        (["--merge", "npp"], "did you mean 'np'"),
        (["--merge", "np", "--server-labels", "0"], "label"),
        (["--app", "/nowhere"], "cannot read /nowhere/pyproject.toml"),
        (["--root-certificates", "ca.crt"], "give --root-certificates ca.crt, or --insecure"),
        (["--superlink", "http://x"], "--superlink must be HOST:PORT"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_sent(flwr: Path, words: list[str], message: str) -> None:
    done = submit(*words)
    assert done.exit_code == 1
    assert message in done.output
    assert not (flwr / "calls.jsonl").exists()


def test_the_app_must_be_ours_and_of_this_version(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[project]")
    with pytest.raises(ConfigurationError, match="is no Flower app of ours"):
        SuperLink("a:1", None).submit(tmp_path, Config())
    (tmp_path / "pyproject.toml").write_text("[tool.flwr.app.config]\nclients = 5")
    with pytest.raises(ConfigurationError, match="has no setting lr: is it of this version"):
        SuperLink("a:1", None).submit(tmp_path, Config(lr=0.1))
    with pytest.raises(ConfigurationError, match="there is no file"):
        SuperLink("a:1", tmp_path / "none.crt")


def test_status_tells_of_runs_and_nodes_and_fails_with_its_run(flwr: Path) -> None:
    says(flwr, ls=status("finished:failed", "no disk"), supernode={"nodes": [{"node-id": "5", "status": "online"}]})
    common = ["deploy", "status", "--superlink", "a:1", "--insecure"]
    every = CliRunner().invoke(main, common)
    assert every.exit_code == 0
    assert (
        "run   7                     finished:failed       no disk\nnode  5                     online" in every.output
    )
    one = CliRunner().invoke(main, [*common, "7", "--json"])
    assert one.exit_code == 1
    assert json.loads(one.output.splitlines()[0])["nodes"][0]["node-id"] == "5"


def test_sites_are_registered_by_their_public_keys(flwr: Path, tmp_path: Path) -> None:
    says(flwr, supernode=[{"node-id": "5"}, {"node-id": "6"}])
    keys = [str(tmp_path / "a.pub"), str(tmp_path / "b.pub")]
    done = CliRunner().invoke(main, ["deploy", "register", "--superlink", "a:1", "--insecure", *keys])
    assert done.exit_code == 0, done.output
    assert done.output == f"{keys[0]}: node 5\n{keys[1]}: node 6\n"


@pytest.fixture
def stored(tmp_path: Path) -> Run:
    run = make_run(tmp_path / "a run's folder", [result("mean")])
    run.write("updates/seed-0/round-1/client-00000.safetensors", b"u" * 70_000)
    run.write("models/seed-0/round-1/mean.safetensors", b"m" * 90_000)
    (run.path / "models" / "half.part").touch()
    return run


def names(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


KEPT = {"config.json", "partitions/seed-0.json", "results.jsonl", "models/seed-0/round-1/mean.safetensors"}


def test_a_run_comes_home_without_or_with_the_clients_models(stored: Run, tmp_path: Path) -> None:
    heard: list[tuple[str, int, int]] = []
    size = fetch(str(stored.path), tmp_path / "home", progress=lambda *what: heard.append(what))
    assert names(tmp_path / "home") == KEPT
    assert size == sum((stored.path / name).stat().st_size for name in KEPT)
    assert heard[-1] == ("files fetched", 4, 4)
    fetch(str(stored.path), tmp_path / "all", updates=True)
    assert names(tmp_path / "all") == KEPT | {"updates/seed-0/round-1/client-00000.safetensors"}
    for name in names(tmp_path / "all"):
        assert (tmp_path / "all" / name).read_bytes() == (stored.path / name).read_bytes()


@pytest.fixture
def ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of tools, with an `ssh` that does what sshd does: hand the command to a shell."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "ssh").write_text('#!/bin/sh\necho "$1" >> "${0%/*}/hosts"\nexec sh -c "$2"\n')
    (tools / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    return tools


def test_a_run_comes_home_over_ssh_and_its_report_is_written(stored: Run, ssh: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    done = CliRunner().invoke(main, ["deploy", "fetch", f"me@server:{stored.path}", "--out", str(home)])
    assert done.exit_code == 0, done.output
    assert (ssh / "hosts").read_text().split() == ["me@server", "me@server"]
    assert names(home) >= KEPT | {"report.html"}


def test_a_file_that_changes_on_its_way_is_refused(stored: Run, ssh: Path, tmp_path: Path) -> None:
    spoil = f'echo x >> "{stored.path}/results.jsonl"'
    (ssh / "ssh").write_text(f'#!/bin/sh\ncase "$2" in *tar*) {spoil} ;; esac\nexec sh -c "$2"\n')
    with pytest.raises(FetchError, match=r"results\.jsonl has changed on its way .* when the run has ended"):
        fetch(f"server:{stored.path}", tmp_path / "home")
    with pytest.raises(Exception, match="is not a run folder"):
        Run.open(tmp_path / "home")  # config.json comes last


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo no such host >&2; exit 255", "cannot read server:/x: no such host"),
        ('case "$2" in *tar*) exit 1 ;; *) cd /; exec sh -c "$2" ;; esac', "broke off|of 4 files came"),
        (f"echo '{'a' * 64}  ./../evil'", "expected names of a run folder's files"),
        (f"echo '{'a' * 64}  .//etc/passwd'", "expected names of a run folder's files"),
        (f"echo '{'a' * 64}  /etc/passwd'", "expected names of a run folder's files"),
        (f"echo '{'a' * 64}  ./passwd'", "is not a run folder: it has no config.json"),
    ],
)
def test_a_server_that_lies_or_breaks_off_writes_nothing(
    stored: Run, ssh: Path, tmp_path: Path, script: str, message: str
) -> None:
    (ssh / "ssh").write_text(f"#!/bin/sh\n{script}\n")
    source = "server:/x" if "exec" not in script else f"server:{stored.path}"
    with pytest.raises(FetchError, match=message):
        fetch(source, tmp_path / "home")
    assert not (tmp_path / "home" / "config.json").exists()


def test_an_archive_with_links_or_other_names_is_refused(stored: Run, ssh: Path, tmp_path: Path) -> None:
    shutil.copytree(stored.path, tmp_path / "evil")
    (tmp_path / "evil" / "results.jsonl").unlink()
    (tmp_path / "evil" / "results.jsonl").symlink_to("/etc/passwd")
    evil = f'cd "{tmp_path}/evil" && tar -cf - ./results.jsonl'
    (ssh / "ssh").write_text(f'#!/bin/sh\ncase "$2" in *tar*) {evil} ;; *) exec sh -c "$2" ;; esac\n')
    with pytest.raises(FetchError, match="expected a file, got"):
        fetch(f"server:{stored.path}", tmp_path / "home")


def test_a_place_is_a_path_or_a_host_and_a_path(stored: Run, tmp_path: Path) -> None:
    for source in ("-oProxyCommand=x:/y", "server:", "a b:/x"):
        with pytest.raises(ConfigurationError, match=r"expected \[USER@\]HOST:PATH"):
            fetch(source, tmp_path / "home")
    with pytest.raises(FetchError, match=r"is not empty: give another --out"):
        fetch(str(stored.path), stored.path)
