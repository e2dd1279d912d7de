"""Exported models: they give the same outputs, or there is no file."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

from fedmerge import export
from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.export import ExportError, export_model, find_model
from fedmerge.models import create
from fedmerge.runs import Run, RunError
from fedmerge.settings import ConfigurationError
from fedmerge.state import read_checkpoint

SHAPE = (1, 8, 8)

pytestmark = [  # of torch's own exporters, in some of its releases
    pytest.mark.filterwarnings("ignore:The given buffer is not writable"),
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec"),
]


def has_onnx() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript", "onnxruntime"))


SUFFIXES = [
    ".safetensors",
    ".pt2",
    pytest.param(".onnx", marks=pytest.mark.skipif(not has_onnx(), reason="needs pip install 'fedmerge[export]'")),
]


def network(name: str = "mlp@0.2", seed: int = 1) -> nn.Module:
    return create(name, shape=SHAPE, num_classes=10, seed=seed)


@pytest.mark.parametrize("name", ["mlp@0.2", "cnn@0.1"])
@pytest.mark.parametrize("suffix", SUFFIXES)
def test_an_exported_model_gives_the_same_outputs(tmp_path: Path, suffix: str, name: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_text("older")
    difference = export_model(network(name, 2), network(name).state_dict(), SHAPE, path)
    assert difference < 1e-5
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    images = torch.randn(7, *SHAPE, generator=torch.Generator().manual_seed(3))
    expected = network(name).eval()(images)
    if suffix == ".pt2":
        torch.testing.assert_close(torch.export.load(path).module()(images), expected)
    elif suffix == ".safetensors":
        found = network(name, 5)
        found.load_state_dict(read_checkpoint(path)[0])
        torch.testing.assert_close(found.eval()(images), expected)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_file_whose_outputs_differ_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str) -> None:
    write = export.SUFFIXES[suffix]

    def wrong(*arguments: object) -> Callable[[Tensor], Tensor]:
        reader = write(*arguments)  # type: ignore[arg-type]
        return lambda images: reader(images) + (1e-2 if len(images) == 5 else 0)

    monkeypatch.setattr(export, "SUFFIXES", {suffix: wrong})
    path = tmp_path / f"model{suffix}"
    path.write_text("older")
    with pytest.raises(ExportError, match=r"outputs differ by 0\.01 .* is not written"):
        export_model(network(), network().state_dict(), SHAPE, path)
    assert path.read_text() == "older"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]


class Branching(nn.Module):
    """Takes another way for other images, which no exported graph can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.layer(images.flatten(1))
        return output if float(images.sum()) > 0 else -output


def test_a_model_that_a_format_cannot_express_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\.pt2 cannot express this model: "):
        export_model(Branching(), Branching().state_dict(), SHAPE, tmp_path / "model.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_library_is_told_with_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Callable[[Tensor], Tensor]:
        raise ModuleNotFoundError("No module named 'onnxruntime'", name="onnxruntime")

    monkeypatch.setattr(export, "SUFFIXES", {".onnx": missing})
    with pytest.raises(ExportError, match=r"\.onnx needs 'onnxruntime': pip install 'fedmerge\[export\]'"):
        export_model(network(), network().state_dict(), SHAPE, tmp_path / "model.onnx")


def test_an_unknown_format_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"unknown suffix '\.pth'"):
        export_model(network(), network().state_dict(), SHAPE, tmp_path / "model.pth")


def stored(path: Path) -> Run:
    config = Config(clients=3, client_examples=150, model="mlp@0.2")
    run = Run.create(path, "compare", config, methods=["mean", "ensemble"], seeds=[3, 0])
    run.save_model(3, 1, "mean", (network(seed=1).state_dict(),))
    run.save_model(3, 10, "mean", (network(seed=2).state_dict(),))
    run.save_model(0, 1, "mean", (network(seed=3).state_dict(),))
    run.save_model(3, 1, "ensemble", tuple(network(seed=seed).state_dict() for seed in (1, 2)))
    return run


def test_the_model_of_a_run_is_that_of_its_first_seed_and_last_round(tmp_path: Path) -> None:
    run = stored(tmp_path / "run")
    assert find_model(run, "mean").parts[-3:] == ("seed-3", "round-10", "mean.safetensors")
    assert find_model(run, "mean", 0).parts[-3:] == ("seed-0", "round-1", "mean.safetensors")
    with pytest.raises(RunError, match="'ensemble' is an ensemble, no single model"):
        find_model(run, "ensemble")
    with pytest.raises(RunError, match=r"has no model of 'np', seed 0; it has: mean$"):
        find_model(run, "np", 0)


def test_the_command_writes_the_file_and_tells_what_it_takes(tmp_path: Path) -> None:
    run, path = stored(tmp_path / "run"), tmp_path / "model.safetensors"
    done = CliRunner().invoke(main, ["export", str(run.path), "mean", str(path), "--seed", "0", "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["shape"], len(told["classes"])) == ([1, 8, 8], 10)
    assert told["largest-difference"] < 1e-6
    state, header = read_checkpoint(path)
    assert all(torch.equal(tensor, network(seed=3).state_dict()[name]) for name, tensor in state.items())
    assert json.loads(header["model"])["model"] == "mlp@0.2"
    failed = CliRunner().invoke(main, ["export", str(run.path), "np", str(path)])
    assert failed.exit_code == 1
    assert "has no model of 'np'" in failed.output
