"""A merged model as a file for other programs: safetensors, `torch.export` (.pt2) or ONNX.

Whatever is written is read back first and run on random images, in batches of several sizes: only a file that gives the
model's own outputs is kept.
"""

from __future__ import annotations

import importlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedmerge import federation, models
from fedmerge.errors import FedmergeError
from fedmerge.runs import ARCHITECTURE, Run, RunError, file_name
from fedmerge.settings import known
from fedmerge.state import StateDict, conform, read_checkpoint, serialize
from fedmerge.train import predict

BATCHES = (1, 2, 5)
TOLERANCE = 1e-4
"""Greatest difference of outputs, relative to the largest: other programs sum float32 numbers in other orders."""

Reader = Callable[[Tensor], Tensor]
"""Runs the exported model on images."""


class ExportError(FedmergeError):
    """A model that cannot be exported as asked, with what to do."""


def find_model(run: Run, method: str, seed: int | None = None) -> Path:
    """Return the file of a run's merged model, that of the last round.

    Args:
        run: the run folder.
        method: as in its table.
        seed: None for the run's first.

    Raises:
        RunError: if there is none, or it is an ensemble, which is no single model.
    """
    seed = (run.settings.get("seeds") or [run.config.seed])[0] if seed is None else seed
    folder = run.path / "models" / f"seed-{seed}"
    rounds = sorted(folder.glob("round-*"), key=lambda path: int(path.name.removeprefix("round-")))
    name = file_name(method)
    found = [path for path in (place / f"{name}.safetensors" for place in reversed(rounds)) if path.is_file()]
    if found:
        return found[0]
    if any(list(place.glob(f"{name}-*-of-*.safetensors")) for place in rounds):
        raise RunError(f"'{method}' is an ensemble, no single model: choose a merge that gives one")
    names = sorted({path.stem for place in rounds for path in place.glob("*.safetensors")})
    raise RunError(f"{run.path} has no model of '{method}', seed {seed}; it has: {', '.join(names) or 'none'}")


def export_stored(run: Run, method: str, path: Path, seed: int | None = None) -> dict[str, Any]:
    """Write a run's merged model to a file, and return what is to be known of it, in JSON's types.

    Args:
        run: the run folder.
        method: as in its table.
        path: to write, see `export_model`.
        seed: None for the run's first.
    """
    stored = find_model(run, method, seed)
    examples = federation.load(run.config)
    shape, classes = examples.dataset.shape, examples.classes
    state, header = read_checkpoint(stored)
    name = header.get(ARCHITECTURE, run.config.model)
    known("model", name, [run.config.model, *run.config.other_models])  # before anything is built by a file's word
    model = models.create(name, shape=shape, num_classes=len(classes), seed=0)
    about = {"model": name, "method": method, "shape": list(shape), "classes": list(classes)}
    difference = export_model(model, state, shape, path, about=about)
    return {**about, "file": str(path), "largest-difference": difference}


def export_model(
    model: nn.Module, state: StateDict, shape: Sequence[int], path: Path, *, about: dict[str, Any] | None = None
) -> float:
    """Write a model in the format of the path's suffix, and check that what was written gives the same outputs.

    The file takes images (examples, *shape), normalised as for training, and gives logits (examples, classes), for
    any number of examples. An existing file is replaced, once the new one is checked.

    Args:
        model: the architecture.
        state: its weights.
        shape: of an image.
        path: to write: .safetensors, .pt2 (`torch.export`) or .onnx.
        about: what is told with the weights of a safetensors file, in JSON's types.

    Returns:
        The largest difference of outputs that was found.

    Raises:
        ExportError: if the format cannot express the model, a library is missing, or outputs differ.
    """
    known("suffix", path.suffix, SUFFIXES)
    model = model.cpu().eval()
    model.load_state_dict(conform(state, model.state_dict()))
    stream = torch.Generator().manual_seed(0)
    images = [torch.randn(size, *shape, generator=stream) for size in BATCHES]
    expected = [predict(model, model.state_dict(), batch) for batch in images]
    with tempfile.TemporaryDirectory(dir=path.absolute().parent, prefix=".export-") as folder:
        written = Path(folder) / path.name
        try:
            reader = SUFFIXES[path.suffix](model, images[1], written, about or {})
            found = [reader(batch) for batch in images]
        except ModuleNotFoundError as error:
            raise ExportError(f"{path.suffix} needs '{error.name}': pip install 'fedmerge[export]'") from error
        except OSError:
            raise
        except Exception as error:  # exporters raise what they like for a model that they cannot follow
            raise ExportError(f"{path.suffix} cannot express this model: {type(error).__name__}: {error}") from error
        scale = max(1.0, *(float(output.abs().max()) for output in expected))
        difference = max(_difference(got, output) for got, output in zip(found, expected, strict=True))
        if not difference <= TOLERANCE * scale:
            raise ExportError(
                f"the exported model's outputs differ by {difference:.3g} from the model's (up to {scale:.3g}): "
                f"{path} is not written; choose another format ({', '.join(SUFFIXES)})"
            )
        written.replace(path)
    return difference


def _difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max()) if found.shape == expected.shape else math.inf


def _write_safetensors(model: nn.Module, _example: Tensor, path: Path, about: dict[str, Any]) -> Reader:
    path.write_bytes(serialize(model.state_dict(), {"model": json.dumps(about)}))
    state, _ = read_checkpoint(path)
    return lambda images: predict(model, state, images)


def _exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(model, (example,), dynamic_shapes=dynamic)


def _write_torch(model: nn.Module, example: Tensor, path: Path, _about: dict[str, Any]) -> Reader:
    torch.export.save(_exported(model, example), path)
    module = torch.export.load(path).module()

    def reader(images: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = module(images)
        return output

    return reader


def _write_onnx(model: nn.Module, example: Tensor, path: Path, _about: dict[str, Any]) -> Reader:
    runtime = importlib.import_module("onnxruntime")
    program = torch.onnx.export(
        _exported(model, example),
        (example,),
        dynamo=True,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
    )
    if program is None:
        raise ExportError("torch.onnx gave no program")
    program.save(str(path), external_data=False)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


SUFFIXES: Mapping[str, Callable[[nn.Module, Tensor, Path, dict[str, Any]], Reader]] = {
    ".safetensors": _write_safetensors,
    ".pt2": _write_torch,
    ".onnx": _write_onnx,
}
"""What writes a format, by the suffix of its files."""
