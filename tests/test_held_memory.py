"""Memory that a process holds when it is freed, measured in processes of their own, since it stays so."""

import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked")

FAULTS = """
import resource, sys
import torch
from fedmerge.memory import hold_memory
if sys.argv[1] == "held":
    hold_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for count in range(1, 16):  # 2 to 30 MB, each more than what was freed: glibc by itself maps each anew
    torch.ones(500_000 * count)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_held_memory_is_used_again_without_asking_the_system_for_it() -> None:
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], check=True, capture_output=True).stdout)
        for way in ("held", "given back")
    }
    assert 2 * faults["held"] < faults["given back"]


GROWTH = """
import torch
from fedmerge.memory import Peak, hold_memory
def some():  # 80 MB
    return [torch.ones(2_000_000) for _ in range(10)]
hold_memory()
some()
with Peak() as peak:
    some()
print(peak.bytes)
"""


def test_held_memory_is_not_taken_for_memory_in_use() -> None:
    grown = int(subprocess.run([sys.executable, "-c", GROWTH], check=True, capture_output=True).stdout)
    assert 70e6 < grown < 120e6
