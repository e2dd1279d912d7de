"""The command as a user meets it: in this process where nothing is trained, and with Ray where something is."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.models import create
from fedmerge.problem import Update
from fedmerge.runs import Run
from fedmerge.settings import flag

QUICK = ("--local-epochs", "1", "--client-examples", "150", "--clients", "3", "--model", "mlp@0.2")


def run_command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def stored_run(path: Path, **changes: Any) -> Run:
    """A finished `compare` whose clients were made, not trained."""
    config = Config(clients=3, client_examples=150, model="mlp@0.2", **changes)
    run = Run.create(path, "compare", config, methods=["mean"], seeds=[0])
    for client in range(3):
        model = create(config.model, shape=(1, 8, 8), num_classes=10, seed=client)
        run.save_update(0, 1, Update(model.state_dict(), 50 + client, client, num_bytes=10))
    return run


def checkpoints(folder: Path, count: int = 2) -> list[Path]:
    paths = []
    for client in range(count):
        model = create("mlp@0.2", shape=(1, 8, 8), num_classes=10, seed=client)
        paths.append(folder / f"site-{client}.safetensors")
        save_file(model.state_dict(), paths[-1])
    return paths


def test_help_names_every_setting_with_its_text() -> None:
    for command in ("simulate", "compare", "merge"):
        text = run_command(command, "--help").output
        assert all(flag(name.replace("-", "_")) in text for name in Config().to_mapping())


def test_list_names_what_there_is() -> None:
    text = run_command("list").output
    for name in (
        "digits",
        "fashion-mnist",
        "folder:PATH",
        "resnet20",
        "dirichlet",
        "80-20",
        "activations",
        "np-pairwise",
    ):
        assert name in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--data", "fashon-mnist"), "unknown data set 'fashon-mnist'; did you mean 'fashion-mnist'?"),
        (("--model", "lenet"), "unknown model 'lenet'; did you mean 'lenet5'?"),
        (("--partition", "dirichlett"), "unknown partition 'dirichlett'; did you mean 'dirichlet'?"),
        (("--methods", "meen"), "unknown merger 'meen'; did you mean 'mean'?"),
        (("--methods", "activation+np"), "unknown aligner 'activation'"),
        (("--methods", "np:group=channel"), "unknown option of merger 'np' 'group'; did you mean 'groups'?"),
        (("--align", "wights"), "unknown aligner 'wights'"),
        (("--alpha", "0"), "--alpha must be greater than 0 and finite, got 0.0"),
        (("--alpha", "-1"), "--alpha must be greater than 0 and finite, got -1.0"),
        (("--clients", "2000"), "2000"),
        (("--server-examples", "5000"), "5000"),
        (("--server-examples", "1000", "--client-examples", "1000"), "--server-examples"),
        (("--server-examples", "0"), "--server-examples must be at least 1"),
        (("--rounds", "2"), "use simulate"),
        (("--seeds", "0,one"), "--seeds must be whole numbers"),
        (("--min-completed", "9"), "--min-completed is 9"),
        (("--config", "missing.toml"), "cannot read the configuration"),
        (("--methods", "mean,ties"), "ties: needs the weights that all clients started from, give --init shared"),
        (("--client-statistics", "fisher/hessian"), "unknown --client-statistics 'hessian'"),
        (("--resume",), "--resume needs --out"),
    ],
)
def test_bad_settings_get_one_clear_error(words: tuple[str, ...], message: str, tmp_path: Path) -> None:
    result = run_command("compare", *(() if words == ("--resume",) else ("--out", tmp_path / "run")), *words)
    assert result.exit_code != 0
    assert message in result.output
    assert "Traceback" not in result.output
    assert result.output.count("Error:") == 1
    assert not (tmp_path / "run").exists(), "the corrected command can use the folder"


def test_an_ensemble_cannot_be_simulated(tmp_path: Path) -> None:
    result = run_command("simulate", "--merge", "ensemble", "--out", tmp_path / "run")
    assert result.exit_code == 1
    assert "use compare" in result.output


def test_an_output_folder_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("precious")
    result = run_command("compare", "--out", tmp_path / "full")
    assert result.exit_code == 1
    assert "is not empty: give another --out, or --resume" in result.output
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("")
    result = run_command("compare", "--out", tmp_path / "file" / "run")
    assert result.exit_code == 1
    assert "cannot write the run folder" in result.output


def test_a_config_file_gives_the_same_keys_and_flags_go_before_it(tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text('clients = 4\nmodel = "mlp@0.2"\nlabel-counts = false\nseeds = [0, 1]\n')
    run = stored_run(tmp_path / "run")
    settings = tmp_path / "merge.toml"
    settings.write_text('methods = ["mean", "fedavg"]\nthreads = 1\n')
    result = run_command("merge", run.path, "--config", settings, "--json")
    assert result.exit_code == 0, result.output
    assert [line["method"] for line in json.loads(result.output)["results"]] == ["mean", "fedavg"]
    result = run_command("compare", "--config", tmp_path / "run.toml", "--clients", "3000", "--out", tmp_path / "new")
    assert "3000" in result.output
    (tmp_path / "wrong.toml").write_text("client = 4\n")
    result = run_command("compare", "--config", tmp_path / "wrong.toml", "--out", tmp_path / "new")
    assert "did you mean 'clients'?" in result.output


def test_merging_a_run_again_needs_no_training_and_stores_the_results(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    result = run_command("merge", run.path, "--methods", "mean,fedavg,activations+np:steps=20,ensemble")
    assert result.exit_code == 0, result.output
    assert "activations+np:steps=20" in result.output
    found = {line["method"]: line for line in run.results()}
    assert {"mean", "fedavg", "activations+np:steps=20", "ensemble"} == set(found)
    assert found["mean"]["bytes_up"] == 30
    assert found["mean"]["server_examples"] == 0
    assert found["ensemble"]["models"] == 3
    assert (run.path / "report.html").exists()
    merged = load_file(run.path / "models" / "seed-0" / "round-1" / "mean.safetensors")
    states = [update.state for update in run.load_updates(0)]
    torch.testing.assert_close(merged["1.weight"], torch.stack([state["1.weight"] for state in states]).mean(0))


def test_a_merge_into_a_new_folder_leaves_the_run_alone(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    result = run_command("merge", run.path, "--methods", "mean", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    assert not run.results()
    assert [line["method"] for line in Run.open(tmp_path / "new").results()] == ["mean"]


def test_checkpoints_trained_elsewhere_are_merged(tmp_path: Path) -> None:
    paths = checkpoints(tmp_path)
    counts = tmp_path / "counts.json"
    counts.write_text(json.dumps({path.name: [index + 1] * 10 for index, path in enumerate(paths)}))
    words = ("--model", "mlp@0.2", "--methods", "fedavg,mean", "--label-counts", counts, "--json")
    result = run_command("merge", *paths, *words, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    first, second = (load_file(path)["1.weight"] for path in paths)
    merged = load_file(tmp_path / "run" / "models" / "seed-0" / "round-1" / "fedavg.safetensors")["1.weight"]
    torch.testing.assert_close(merged, (first + 2 * second) / 3)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("architecture", "expected (26,); is --model the architecture"),
        ("missing", "missing '1.bias'"),
        ("nan", "1 NaN or infinite numbers"),
        ("text", "is not a readable safetensors file"),
        ("counts", "expected 10 counts for 'site-1.safetensors'"),
        ("mixed", "not both"),
    ],
)
def test_checkpoints_that_do_not_fit_are_named(damage: str, message: str, tmp_path: Path) -> None:
    paths = checkpoints(tmp_path)
    state = load_file(paths[1])
    words: list[str | Path] = ["--model", "mlp@0.2", "--methods", "mean", "--out", tmp_path / "run"]
    if damage == "architecture":
        state = create("mlp@0.3", shape=(1, 8, 8), num_classes=10, seed=0).state_dict()
    elif damage == "missing":
        del state["1.bias"]
    elif damage == "nan":
        state["1.bias"][0] = torch.nan
    elif damage == "counts":
        (tmp_path / "counts.json").write_text(json.dumps({paths[0].name: [1] * 10}))
        words += ["--label-counts", tmp_path / "counts.json"]
    elif damage == "mixed":
        (tmp_path / "folder").mkdir()
        paths.append(tmp_path / "folder")
    save_file(state, paths[1])
    if damage == "text":
        paths[1].write_text("not tensors")
    result = run_command("merge", *paths, *words)
    assert result.exit_code == 1
    assert message in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def test_a_failing_method_fails_the_command_but_not_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    run = stored_run(tmp_path / "run")
    monkeypatch.setattr("fedmerge.merge.ensemble.Ensemble.__call__", explode)
    result = run_command("merge", run.path, "--methods", "mean,ensemble,fedavg")
    assert result.exit_code == 1
    assert "out of memory" in result.output
    assert {line["method"]: line["status"] for line in run.results()} == {
        "mean": "ok",
        "ensemble": "failed",
        "fedavg": "ok",
    }


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    result = run_command("report", tmp_path)
    assert result.exit_code == 1
    assert "is not a run folder and holds none (no config.json, here or below)" in " ".join(result.output.split())


def test_an_error_is_told_once_and_logged(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    for path in (run.path / "updates").rglob("*.safetensors"):
        path.unlink()
    command = [sys.executable, "-m", "fedmerge", "merge", str(run.path), "--methods", "mean"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("has 0 updates of seed 0, and needs 2") == 1
    assert result.stdout == ""
    assert "has 0 updates of seed 0" in (run.path / "log.txt").read_text()


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    result = run_command("merge", run.path, "--methods", "mean", "--quiet")
    assert (result.exit_code, result.output) == (0, "")


def spawn(*words: str | Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedmerge", *map(str, words)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=os.environ
    )


def bits(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.slow
def test_a_run_killed_while_training_resumes_to_the_same_model_and_trains_no_client_twice(tmp_path: Path) -> None:
    federation = "--clients 6 --client-cpus 2 --local-epochs 40 --alpha 1 --min-client-examples 20"
    words = shlex.split(f"simulate {federation} --align activations --merge np:steps=20")
    whole = spawn(*words, "--out", tmp_path / "whole")
    output, _ = whole.communicate(timeout=300)
    assert whole.returncode == 0, output
    killed = spawn(*words, "--out", tmp_path / "killed")
    updates = tmp_path / "killed" / "updates" / "seed-0" / "round-1"
    give_up = time.monotonic() + 200
    while len(list(updates.glob("*.safetensors"))) < 2 and killed.poll() is None and time.monotonic() < give_up:
        time.sleep(0.01)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert killed.stdout is not None
    killed.stdout.close()
    trained = {path: path.stat().st_mtime_ns for path in updates.glob("*.safetensors")}
    assert 2 <= len(trained) < 6, "it was to be killed in the middle"
    assert not list((tmp_path / "killed").glob("models/**/*.safetensors"))
    resumed = spawn("simulate", "--resume", "--out", tmp_path / "killed")
    output, _ = resumed.communicate(timeout=300)
    assert resumed.returncode == 0, output
    assert {path: path.stat().st_mtime_ns for path in trained} == trained
    states = [
        {name: load_file(tmp_path / which / name) for name in bits(tmp_path / which)} for which in ("whole", "killed")
    ]
    assert states[0].keys() == states[1].keys()
    for name, state in states[0].items():
        assert all(torch.equal(tensor, states[1][name][key]) for key, tensor in state.items()), name
    results = (tmp_path / "killed" / "results.jsonl").read_bytes()
    finished = spawn("simulate", "--resume", "--out", tmp_path / "killed")
    output, _ = finished.communicate(timeout=100)
    assert finished.returncode == 0, output
    assert (tmp_path / "killed" / "results.jsonl").read_bytes() == results, "nothing was left to do"
    again = spawn("simulate", "--resume", "--clients", "7", "--out", tmp_path / "killed")
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 1
    assert "--clients is 7, but the run in" in output


@pytest.mark.slow
def test_compare_gives_what_simulate_gives_and_resumes_without_training(tmp_path: Path) -> None:
    words = (*QUICK, "--align", "activations", "--merge", "np:steps=20")
    one = spawn("simulate", *words, "--out", tmp_path / "one")
    output, _ = one.communicate(timeout=300)
    assert one.returncode == 0, output
    methods = "mean,activations+np:steps=20"
    many = spawn("compare", *QUICK, "--methods", methods, "--out", tmp_path / "many")
    output, _ = many.communicate(timeout=300)
    assert many.returncode == 0, output
    name = Path("models") / "seed-0" / "round-1" / "activations+np_steps=20.safetensors"
    first, second = (load_file(tmp_path / which / name) for which in ("one", "many"))
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())
    before = bits(tmp_path / "many")
    lines = (tmp_path / "many" / "results.jsonl").read_text()
    again = spawn("compare", "--resume", "--out", tmp_path / "many", "--json")
    output, _ = again.communicate(timeout=100)
    assert again.returncode == 0, output
    assert bits(tmp_path / "many") == before
    assert (tmp_path / "many" / "results.jsonl").read_text() == lines
