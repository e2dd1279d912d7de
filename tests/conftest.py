"""Every test computes with one thread: what is tested must not depend on the machine, and tests run side by side."""

import gc
import os

import pytest
import torch

torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """What a slow test left unclosed, Ray's files or Flower's, is found at its end, where its own filters hold."""
    if item.get_closest_marker("slow"):
        gc.collect()
