from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedmerge.actorside import tensor_from_shared_memory
from fedmerge.cluster import Resources, room, shorten
from fedmerge.settings import ConfigurationError


def machines(*resources: dict[str, float]) -> list[dict[str, Any]]:
    return [{"Alive": True, "Resources": item} for item in resources]


def test_room_is_counted_machine_by_machine() -> None:
    assert room(Resources(cpus=2), machines({"CPU": 3}, {"CPU": 3})) == 2
    assert room(Resources(cpus=0.1), machines({"CPU": 1})) == 10
    assert room(Resources(cpus=1, gpus=0.3), machines({"CPU": 8, "GPU": 1}, {"CPU": 8})) == 3
    dead = {"Alive": False, "Resources": {"CPU": 8}}
    assert room(Resources(cpus=1), [dead, *machines({"CPU": 2})]) == 2
    with pytest.raises(
        ConfigurationError, match=r"--client-cpus 4 and --client-gpus 0 fit on none of the Ray cluster's 2"
    ):
        room(Resources(cpus=4), machines({"CPU": 3}, {"CPU": 3}))


def test_more_than_one_gpu_or_cpu_comes_in_whole_ones() -> None:
    with pytest.raises(
        ConfigurationError, match=r"--client-gpus must be a whole number where it is more than 1, got 1.5"
    ):
        Resources(gpus=1.5)
    with pytest.raises(ConfigurationError, match=r"--client-cpus must be a whole number"):
        Resources(cpus=2.5)


def test_rays_errors_become_one_line() -> None:
    assert shorten("a\n\tb  c") == "a b c"
    assert len(shorten("word " * 1000)) == 600


def test_shared_memory_is_read_in_place_and_without_a_warning() -> None:
    array = np.arange(3.0)
    array.flags.writeable = False
    tensor = tensor_from_shared_memory(array)
    assert tensor.data_ptr() == array.ctypes.data
