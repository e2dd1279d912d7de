from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedmerge import metrics
from fedmerge.flower import fill
from fedmerge.metrics import average_metrics, finite_scalars
from fedmerge.problem import Update
from fedmerge.state import num_bytes
from fedmerge.wire import (
    MalformedUpdate,
    arrays_from_state,
    num_array_bytes,
    state_from_arrays,
    update_from_records,
    update_to_records,
)

CLASSES = 3


def make_state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "weight": torch.randn(4, 3, generator=generator),
        "bias": torch.randn(4, generator=generator),
        "num_batches_tracked": torch.tensor(7),
    }


def make_update(**changes: Any) -> Update:
    fields: dict[str, Any] = {
        "state": make_state(),
        "num_examples": 6,
        "partition_id": 2,
        "label_counts": (1, 2, 3),
        "metrics": {"loss": 0.5, "accuracy": 0.75, "seconds": 1.25},
    }
    return Update(**(fields | changes))


def records() -> RecordDict:
    return update_to_records(make_update(), upload_dtype="float32")


def read(content: RecordDict) -> Update:
    return update_from_records(content, make_state(), fallback_id=99, num_classes=CLASSES)


def test_an_update_survives_the_way_through_float32_records_exactly() -> None:
    sent = make_update()
    got = read(update_to_records(sent, upload_dtype="float32"))
    assert all(torch.equal(got.state[name], tensor) for name, tensor in sent.state.items())
    assert [tensor.dtype for tensor in got.state.values()] == [tensor.dtype for tensor in sent.state.values()]
    assert (got.num_examples, got.partition_id, got.label_counts) == (6, 2, (1, 2, 3))
    assert got.metrics == sent.metrics
    assert got.num_bytes == num_bytes(sent.state)


def test_float16_halves_the_bytes_of_floating_point_numbers_and_leaves_integers_exact() -> None:
    got = read(update_to_records(make_update(), upload_dtype="float16"))
    assert got.num_bytes - 8 == (num_bytes(make_state()) - 8) / 2
    for name, tensor in make_state().items():
        rounded = tensor.half().float() if tensor.is_floating_point() else tensor
        assert torch.equal(got.state[name], rounded)


def test_the_size_of_the_arrays_is_known_without_reading_them() -> None:
    assert num_array_bytes(records()) == num_bytes(make_state())
    assert num_array_bytes(RecordDict()) == 0


def test_label_counts_that_a_client_keeps_to_itself_are_not_sent() -> None:
    content = update_to_records(make_update(label_counts=None), upload_dtype="float32")
    assert "label-counts" not in content["metrics"]
    assert read(content).label_counts is None


def test_a_reply_of_another_flower_app_needs_only_arrays_and_num_examples() -> None:
    content = RecordDict({"model": ArrayRecord(make_state()), "train": MetricRecord({"num-examples": 5.0, "auc": 0.5})})
    got = read(content)
    assert (got.partition_id, got.num_examples, got.label_counts, got.metrics) == (99, 5, None, {})


def told() -> Update:
    state = make_state()
    return make_update(statistics={"fisher": {"weight": state["weight"] ** 2}, "gram": {"weight": torch.eye(4)}})


def test_statistics_travel_in_records_of_their_own_and_in_full_precision() -> None:
    sent = told()
    content = update_to_records(sent, upload_dtype="float16")
    assert sorted(content.array_records) == ["arrays", "fisher", "gram"]
    got = read(content)
    assert got.num_bytes < num_bytes(sent.state)
    for kind, tensors in sent.statistics.items():
        assert got.statistics[kind].keys() == tensors.keys()
        assert all(torch.equal(got.statistics[kind][name], tensor) for name, tensor in tensors.items())
    assert read(records()).statistics == {}


@pytest.mark.parametrize(
    ("kind", "name", "tensor", "reason"),
    [
        ("fisher", "odd", torch.zeros(3), "'fisher' tells of 'odd', which the model has no weights of"),
        ("fisher", "num_batches_tracked", torch.zeros(()), "'fisher' tells of 'num_batches_tracked'"),
        ("gram", "bias", torch.zeros(4, 4), "'gram' tells of 'bias'"),
        ("gram", "weight", torch.zeros(9, 9), r"shape \(9, 9\) in its header, expected \(4, 4\)"),
        ("fisher", "weight", torch.zeros(4, 3, dtype=torch.int64), "'fisher' of 'weight' is not of finite"),
        ("fisher", "weight", torch.full((4, 3), float("nan")), "'fisher' of 'weight' is not of finite"),
    ],
)
def test_statistics_that_do_not_fit_the_model_are_refused(kind: str, name: str, tensor: Tensor, reason: str) -> None:
    content = update_to_records(make_update(statistics={kind: {name: tensor}}), upload_dtype="float32")
    with pytest.raises(MalformedUpdate, match=reason):
        read(content)


def array(values: np.ndarray[Any, Any], **changes: Any) -> Array:
    made = Array(values)
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def saved(value: object, *, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.asarray(value), allow_pickle=allow_pickle)
    return stream.getvalue()


def zipped() -> bytes:
    stream = io.BytesIO()
    np.savez(stream, weight=np.zeros((4, 3), np.float32))
    return stream.getvalue()


class Touch:
    """Unpickling this would be noticed."""

    touched = False

    def __reduce__(self) -> tuple[Callable[[], None], tuple[()]]:
        return touch, ()


def touch() -> None:
    Touch.touched = True


ZEROS = np.zeros((4, 3), np.float32)
HUGE = saved(ZEROS).replace(b"'shape': (4, 3)", b"'shape': (4, 9)")
NOT_PICKLED = "array 'weight' has dtype |O"
ARRAY_CASES: dict[str, tuple[Array, str]] = {
    "NaN": (array(ZEROS * np.nan), "tensor 'weight' has 12 NaN or infinite numbers"),
    "infinite": (array(ZEROS + np.inf), "tensor 'weight' has 12 NaN or infinite numbers"),
    "infinite as float32": (array(np.full((4, 3), 1e300)), "tensor 'weight' has 12 NaN or infinite numbers"),
    "transposed": (array(ZEROS.T.copy()), "tensor 'weight' has shape (3, 4)"),
    "integers": (array(ZEROS.astype(np.int64)), "tensor 'weight' has dtype torch.int64, expected torch.float32"),
    "complex": (array(ZEROS.astype(np.complex64)), "tensor 'weight' has dtype torch.complex64"),
    "text": (array(ZEROS.astype("U1")), "array 'weight' has dtype <U1"),
    "other byte order": (array(ZEROS.astype(">f4")), "array 'weight' has dtype >f4"),
    "long double": (array(ZEROS.astype(np.longdouble)), "array 'weight' has dtype <f16"),
    "truncated": (array(ZEROS, data=saved(ZEROS)[:-4]), "array 'weight' holds 44 bytes, expected 48"),
    "trailing bytes": (array(ZEROS, data=saved(ZEROS) + b"x"), "array 'weight' holds 49 bytes, expected 48"),
    "no bytes": (array(ZEROS, data=b""), "array 'weight' is not in numpy's format"),
    "no header": (array(ZEROS, data=saved(ZEROS)[:20]), "array 'weight' is not in numpy's format"),
    "a lie in the record": (array(ZEROS, shape=(4, 9)), "tensor 'weight' has shape (4, 9) in its record"),
    "a lie in the header": (array(ZEROS, data=HUGE), "tensor 'weight' has shape (4, 9) in its header"),
    "a shape of words": (array(ZEROS, data=HUGE.replace(b"4, 9", b"4  9")), "array 'weight' is not in numpy's format"),
    "a pickle": (array(ZEROS, data=pickle.dumps(Touch())), "array 'weight' is not in numpy's format"),
    "a pickle in the format": (
        array(ZEROS, data=saved(np.full((4, 3), Touch(), dtype=object), allow_pickle=True)),
        NOT_PICKLED,
    ),
    "a zip": (array(ZEROS, data=zipped()), "array 'weight' is not in numpy's format"),
    "another serialisation": (array(ZEROS, stype="pickle"), "array 'weight' is serialised as 'pickle'"),
}


@pytest.mark.parametrize("case", ARRAY_CASES)
def test_a_malformed_array_is_refused_with_the_reason(case: str) -> None:
    content = records()
    content.array_records["arrays"]["weight"], reason = ARRAY_CASES[case]
    with pytest.raises(MalformedUpdate) as caught:
        read(content)
    assert reason in str(caught.value)
    assert not Touch.touched


def without(record: str, key: str) -> RecordDict:
    content = records()
    del content[record][key]
    return content


def changed(**metrics: Any) -> RecordDict:
    content = records()
    for name, value in metrics.items():
        content.metric_records["metrics"][name.replace("_", "-")] = value
    return content


def with_extra_array() -> RecordDict:
    content = records()
    content.array_records["arrays"]["more"] = Array(np.zeros(2))
    return content


def only(record: str) -> RecordDict:
    return RecordDict({record: records()[record]})


RECORD_CASES: dict[str, tuple[RecordDict, str]] = {
    "empty": (RecordDict(), "expected exactly one ArrayRecord in the reply, got 0"),
    "no metrics": (only("arrays"), "expected exactly one MetricRecord in the reply, got 0"),
    "no arrays": (only("metrics"), "expected exactly one ArrayRecord in the reply, got 0"),
    "two models": (
        RecordDict({**records(), "again": records()["arrays"]}),
        "exactly one ArrayRecord in the reply, got 2",
    ),
    "missing key": (without("arrays", "bias"), "missing 'bias'"),
    "unknown key": (with_extra_array(), "unknown 'more'"),
    "no num-examples": (without("metrics", "num-examples"), "num-examples is None"),
    "no example": (changed(num_examples=0), "num-examples is 0, expected a whole number from 1"),
    "negative examples": (changed(num_examples=-5), "num-examples is -5"),
    "half an example": (changed(num_examples=1.5), "num-examples is 1.5"),
    "NaN examples": (changed(num_examples=math.nan), "num-examples is nan"),
    "infinite examples": (changed(num_examples=math.inf), "num-examples is inf"),
    "a list of examples": (changed(num_examples=[1]), "num-examples is [1]"),
    "negative partition": (changed(partition_id=-1), "partition-id is -1"),
    "a partition beyond all node ids": (changed(partition_id=2**64), "partition-id is 18446744073709551616"),
    "fractional partition": (changed(partition_id=1.5), "partition-id is 1.5"),
    "a number of labels": (changed(label_counts=3), "label-counts is 3"),
    "negative labels": (changed(label_counts=[1, -1, 2]), "label-counts is [1, -1, 2]"),
    "fractional labels": (changed(label_counts=[1.5, 1.0, 2.0]), "label-counts is [1.5, 1.0, 2.0]"),
    "too few classes": (changed(label_counts=[1, 2]), "label-counts has 2 classes, expected 3"),
    "no labels at all": (changed(label_counts=[0, 0, 0]), "label-counts is 0 for every class"),
    "more examples than a float holds": (changed(num_examples=10**400), "num-examples is 1000"),
    "labels of other examples": (
        changed(label_counts=[1, 2, 4]),
        "label-counts add up to 7, but the client has 6 examples",
    ),
    "a loss that no float holds": (changed(loss=10**400), "metric 'loss' is 1000"),
    "NaN loss": (changed(loss=math.nan), "metric 'loss' is nan, expected a finite number"),
    "a list of accuracies": (changed(accuracy=[0.5]), "metric 'accuracy' is [0.5]"),
}


@pytest.mark.parametrize("case", RECORD_CASES)
def test_a_malformed_record_is_refused_with_the_reason(case: str) -> None:
    content, reason = RECORD_CASES[case]
    with pytest.raises(MalformedUpdate) as caught:
        read(content)
    assert reason in str(caught.value)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 0), (2, 3, 4)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "int32", "int64", "float16", "float32", "float64"])
@pytest.mark.parametrize("order", ["C", "F"])
def test_arrays_are_read_as_numpy_reads_them(shape: tuple[int, ...], dtype: str, order: Literal["C", "F"]) -> None:
    values = np.asarray(np.random.default_rng(0).integers(0, 2, shape).astype(dtype), order=order)
    expected = {"w": torch.from_numpy(np.ascontiguousarray(values).reshape(shape))}
    got = state_from_arrays(ArrayRecord({"w": Array(values)}), expected)["w"]
    assert got.dtype == expected["w"].dtype
    assert np.array_equal(got.numpy(), Array(values).numpy())


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float16, torch.float32, torch.float64])
def test_arrays_are_written_as_flower_writes_them(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    tensors = {"w": tensor, "again": tensor, "turned": tensor.permute(tuple(reversed(range(tensor.ndim))))}
    ours = arrays_from_state(tensors)
    flowers = ArrayRecord({name: tensor.contiguous() for name, tensor in tensors.items()})
    for name in tensors:
        told = [(array.dtype, array.shape, array.stype, array.data) for array in (ours[name], flowers[name])]
        assert told[0] == told[1]
    assert ours.object_id == flowers.object_id


@pytest.mark.parametrize("others", [torch.float32, torch.float16])
def test_what_is_not_finite_is_named_wherever_it_lies(others: torch.dtype) -> None:
    expected = {"a": torch.zeros(3), "n": torch.tensor(2), "b": torch.zeros(2, 2)}
    sent = {"a": torch.ones(3, dtype=others), "n": torch.tensor(5), "b": torch.ones(2, 2)}
    found = state_from_arrays(arrays_from_state(sent), expected)
    assert {name: tensor.dtype for name, tensor in found.items()} == {n: t.dtype for n, t in expected.items()}
    assert all(torch.equal(found[name], sent[name].to(expected[name].dtype)) for name in expected)
    for number in (math.nan, math.inf, -math.inf):
        broken = arrays_from_state({**sent, "b": torch.tensor([[1.0, number], [0.0, 2.0]])})
        with pytest.raises(MalformedUpdate, match="tensor 'b' has 1 NaN or infinite numbers of 4"):
            state_from_arrays(broken, expected)
    large = {**sent, "a": torch.full((3,), 3e38 if others == torch.float32 else 6e4, dtype=others)}  # their sum is not
    assert torch.equal(state_from_arrays(arrays_from_state(large), expected)["a"], large["a"].float())


@settings(max_examples=500, deadline=None)
@given(position=st.integers(0, 200), value=st.integers(0, 255), cut=st.integers(0, 200))
def test_whatever_bytes_arrive_they_are_an_array_or_refused(position: int, value: int, cut: int) -> None:
    data = bytearray(saved(ZEROS))
    if position < len(data):
        data[position] = value
    content = records()
    content.array_records["arrays"]["weight"] = array(ZEROS, data=bytes(data[: len(data) - (cut if cut % 2 else 0)]))
    try:
        got = read(content)
    except MalformedUpdate:
        return
    assert got.state["weight"].shape == (4, 3)


def test_bfloat16_is_refused_when_it_is_sent() -> None:
    with pytest.raises(ValueError, match=r"tensor 'w' is bfloat16, which Flower's arrays cannot carry"):
        arrays_from_state({"w": torch.zeros(2, dtype=torch.bfloat16)})


def test_a_bfloat16_model_can_be_uploaded_as_float32() -> None:
    state = {"w": torch.tensor([1.5, -2.0], dtype=torch.bfloat16)}
    content = update_to_records(make_update(state=state), upload_dtype="float32")
    got = update_from_records(content, state, fallback_id=0)
    assert torch.equal(got.state["w"], state["w"])


def test_a_number_that_float16_cannot_hold_is_refused_when_it_is_sent() -> None:
    with pytest.raises(
        ValueError, match=r"tensor 'w' has numbers that torch.float16 cannot hold; use --upload-dtype float32"
    ):
        update_to_records(make_update(state={"w": torch.tensor([1e6])}), upload_dtype="float16")


def test_a_broadcast_arrives_as_it_was_sent() -> None:
    state = make_state() | {"transposed": torch.arange(6.0).reshape(2, 3).T}
    got = state_from_arrays(arrays_from_state(state), state)
    assert all(torch.equal(got[name], tensor) for name, tensor in state.items())


def test_means_of_metrics_are_weighted_and_leave_out_what_is_no_metric() -> None:
    contents = [
        RecordDict(
            {"metrics": MetricRecord({"num-examples": 1, "partition-id": 4, "label-counts": [1, 0], "loss": 1.0})}
        ),
        RecordDict(
            {"metrics": MetricRecord({"num-examples": 3, "partition-id": 9, "label-counts": [3, 0], "loss": 2.0})}
        ),
        RecordDict({"metrics": MetricRecord({"num-examples": 5, "loss": math.nan, "auc": 0.25})}),
    ]
    assert dict(average_metrics(contents, "num-examples")) == {"auc": 0.25, "loss": 1.75}


def test_diagnostics_keep_only_what_a_metric_record_can_hold() -> None:
    found = finite_scalars({"a": {"b": 1, "c": math.inf, "d": "x", "e": True, "f": None, "g": [1]}, "h": 0.5})
    assert dict(MetricRecord({**found})) == {"a-b": 1, "h": 0.5}


@pytest.mark.parametrize("private", [True, False])
def test_a_filled_record_is_one_that_was_set_item_by_item(private: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    items: dict[str, int | float | list[int] | list[float]] = {"a": 1, "b": [1.5, 2.0]}
    filled, expected = MetricRecord(), MetricRecord(items)
    if not private:  # as if Flower kept its items elsewhere
        monkeypatch.setattr("fedmerge.flower.vars", lambda _: {}, raising=False)
    fill(filled, items)
    assert filled == expected
    assert filled.object_id == expected.object_id
    assert "_data" in vars(filled), "Flower has changed: fill is slow"


def test_records_are_those_of_flowers_views() -> None:
    content = RecordDict({"a": MetricRecord({"x": 1}), "b": ConfigRecord(), "c": MetricRecord()})
    assert metrics.records(content, ArrayRecord) == dict(content.array_records) == {}
    assert metrics.records(content, ConfigRecord) == dict(content.config_records)
    assert metrics.records(content, MetricRecord) == dict(content.metric_records)
