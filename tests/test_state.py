"""State dicts: what is refused, what is converted, and what a file keeps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fedmerge.errors import FedmergeError
from fedmerge.state import MalformedState, check_state, conform, num_bytes, read_checkpoint, serialize


def model_state() -> dict[str, Tensor]:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def complex_state(number: complex) -> dict[str, Tensor]:
    return {"w": torch.tensor([0.0, number], dtype=torch.complex64)}


Spoil = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def without(*names: str) -> Spoil:
    return lambda state: {name: tensor for name, tensor in state.items() if name not in names}


def put(name: str, tensor: Tensor) -> Spoil:
    return lambda state: state | {name: tensor}


MALFORMED: dict[str, tuple[Spoil, str]] = {
    "a missing key": (without("0.bias"), "the keys differ from the model's 7: missing '0.bias'"),
    "an unknown key": (put("2.bias", torch.zeros(1)), "the keys differ from the model's 7: unknown '2.bias'"),
    "a renamed key": (
        lambda state: {name.replace("0.bias", "bias"): tensor for name, tensor in state.items()},
        "the keys differ from the model's 7: missing '0.bias'; unknown 'bias'",
    ),
    "no key": (
        without(*model_state()),
        "the keys differ from the model's 7: missing '0.weight', '0.bias', '1.weight' and 4 more",
    ),
    "another shape": (put("0.weight", torch.zeros(4, 2)), "tensor '0.weight' has shape (4, 2), expected (4, 3)"),
    "another number of dimensions": (
        put("0.bias", torch.zeros(4, 1)),
        "tensor '0.bias' has shape (4, 1), expected (4,)",
    ),
    "a scalar with a dimension": (
        put("1.num_batches_tracked", torch.zeros(1, dtype=torch.int64)),
        "tensor '1.num_batches_tracked' has shape (1,), expected ()",
    ),
    "integers for numbers": (
        put("0.bias", torch.zeros(4, dtype=torch.int64)),
        "tensor '0.bias' has dtype torch.int64, expected torch.float32",
    ),
    "numbers for an integer": (
        put("1.num_batches_tracked", torch.tensor(1.0)),
        "tensor '1.num_batches_tracked' has dtype torch.float32, expected torch.int64",
    ),
    "complex numbers for real ones": (
        put("0.bias", torch.zeros(4, dtype=torch.complex64)),
        "tensor '0.bias' has dtype torch.complex64, expected torch.float32",
    ),
    "NaN and infinite numbers": (
        put("0.bias", torch.tensor([0.0, float("nan"), float("inf"), 1.0])),
        "tensor '0.bias' has 2 NaN or infinite numbers of 4",
    ),
    "a float16 infinity": (
        put("0.bias", torch.tensor([0.0, 1.0, 2.0, -1e9]).half()),
        "tensor '0.bias' has 1 NaN or infinite numbers of 4",
    ),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_state_that_does_not_fit_is_refused_with_what_was_expected(name: str) -> None:
    spoil, message = MALFORMED[name]
    expected = model_state()
    state = spoil(expected)
    for refuse in (check_state, conform):
        with pytest.raises(MalformedState) as error:
            refuse(state, expected)
        assert str(error.value) == message


def test_a_malformed_state_is_an_error_that_the_command_prints_and_a_value_error() -> None:
    assert issubclass(MalformedState, FedmergeError)
    assert issubclass(MalformedState, ValueError)


@pytest.mark.parametrize("number", [complex("nan"), complex("1+infj")])
def test_complex_numbers_must_be_finite_too(number: complex) -> None:
    check_state(complex_state(1j), complex_state(0))
    with pytest.raises(MalformedState, match="tensor 'w' has 1 NaN or infinite numbers of 2"):
        check_state(complex_state(number), complex_state(0))


def test_what_is_expected_may_be_on_the_meta_device() -> None:
    state = model_state()
    expected = {name: tensor.to("meta") for name, tensor in state.items()}
    check_state(state, expected)
    with pytest.raises(MalformedState, match="NaN"):
        check_state(state | {"0.bias": torch.full((4,), float("nan"))}, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_conform_gives_the_models_dtypes_and_order(dtype: torch.dtype) -> None:
    expected = model_state()
    sent = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in expected.items()}
    backwards = dict(reversed(sent.items()))
    found = conform(backwards, expected)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor, sent[name].to(expected[name].dtype))


def test_conform_refuses_numbers_that_the_models_dtype_cannot_hold() -> None:
    with pytest.raises(MalformedState, match="tensor 'w' has 1 NaN or infinite numbers of 2"):
        conform({"w": torch.tensor([1.0, 1e5])}, {"w": torch.zeros(2, dtype=torch.float16)})


def test_conform_leaves_what_came_as_it_was() -> None:
    state = {"b": torch.ones(2).half(), "a": torch.zeros(2)}
    before = copy.deepcopy(state)
    found = conform(state, {"a": torch.zeros(2), "b": torch.zeros(2)})
    assert found is not state
    assert list(state) == ["b", "a"]
    assert all(
        tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]) for name, tensor in state.items()
    )


DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
)


def stored(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_file_keeps_every_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {f"{shape}": torch.randint(0, 2, shape).to(dtype) for shape in ((), (0,), (3,), (2, 3), (2, 1, 4))}
    found, metadata = read_checkpoint(stored(tmp_path, serialize(state, {"about": 'ü "quoted"\n', "": ""})))
    assert metadata == {"about": 'ü "quoted"\n', "": ""}
    assert found.keys() == state.keys()
    for name, tensor in found.items():
        assert tensor.dtype == dtype
        assert tensor.shape == state[name].shape
        assert torch.equal(tensor, state[name])


def test_a_file_without_metadata_has_none(tmp_path: Path) -> None:
    assert read_checkpoint(stored(tmp_path, serialize({"w": torch.ones(1)})))[1] == {}


def test_tensors_of_any_memory_layout_are_stored_by_value(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    state = {
        "transposed": whole.T,
        "every second": whole[:, ::2],
        "expanded": whole[:1].expand(5, 4),
        "channels last": torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "tied": whole,
        "tied too": whole,
        "parameter": nn.Parameter(whole),
    }
    found, _ = read_checkpoint(stored(tmp_path, serialize(state)))
    assert found.keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    assert all(tensor.is_contiguous() for tensor in found.values())
    assert not state["transposed"].is_contiguous()


def test_numbers_that_are_not_finite_are_stored_as_they_are(tmp_path: Path) -> None:
    state = {"w": torch.tensor([float("nan"), float("inf"), -0.0])}
    found, _ = read_checkpoint(stored(tmp_path, serialize(state)))
    assert torch.equal(found["w"].view(torch.int32), state["w"].view(torch.int32))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: content[:0],
        lambda content: content[:4],
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: b"PK\x03\x04" + content,
    ],
    ids=["empty", "half a length", "half a header", "truncated", "too long", "another format"],
)
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    path = stored(tmp_path, spoil(serialize(model_state())))
    with pytest.raises(MalformedState, match=r"model\.safetensors is not a readable safetensors file: "):
        read_checkpoint(path)


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path: Path) -> None:
    for path in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(MalformedState, match=f"{path.name} is not a readable safetensors file: "):
            read_checkpoint(path)


def test_num_bytes_counts_the_contents_of_the_tensors() -> None:
    state = {"w": torch.zeros(3, 2), "half": torch.zeros(5).half(), "count": torch.tensor(1), "none": torch.zeros(0)}
    assert num_bytes(state) == 3 * 2 * 4 + 5 * 2 + 8
    assert num_bytes({}) == 0
