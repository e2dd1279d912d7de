"""What a process computes with, set inside a block and put back after it."""

from __future__ import annotations

import os
from contextlib import suppress

import pytest
import torch

from fedmerge.machine import WORKSPACE, num_cores, reproducible


@pytest.mark.parametrize("before", [False, True])
def test_where_there_is_a_gpu_algorithms_are_deterministic_inside_and_as_before_after(
    monkeypatch: pytest.MonkeyPatch, before: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # so that it is put back
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    torch.use_deterministic_algorithms(before)
    try:
        with suppress(KeyError), reproducible(2):
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled()
            assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
            assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == WORKSPACE
            assert torch.get_num_threads() == 2
            raise KeyError
        assert torch.are_deterministic_algorithms_enabled() is before
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        assert torch.get_num_threads() == 1
    finally:
        torch.use_deterministic_algorithms(False)


def test_on_cpus_algorithms_are_as_they_were() -> None:
    with reproducible():
        assert torch.are_deterministic_algorithms_enabled() is False


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="processes are bound to cores on Linux alone")
def test_of_the_cores_those_count_that_the_process_may_use() -> None:
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, before)
    assert num_cores() == len(before)
