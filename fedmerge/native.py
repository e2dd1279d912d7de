"""C++ compiled where the machine has a compiler: one pass over memory instead of one for each operation.

The source is in Python files, since a Flower app carries no others. It is compiled once for a machine, in one to two
seconds, and kept in the user's cache. Where there is no compiler, callers do the same in PyTorch; which way was taken
is in the log. `FEDMERGE_COMPILE=0` forbids it.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

FLAGS = (
    *("-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"),
    *("-fopenmp-simd", "-fno-math-errno", "-fno-trapping-math"),  # for vector instructions; no result is approximated
)

TYPES = {torch.float32: "float", torch.float64: "double"}


def function(source: str, name: str, like: Tensor) -> Callable[..., Any] | None:
    """Return a compiled function for tensors of a kind; None where there is none.

    Args:
        source: of functions with C linkage, for numbers of type T.
        name: of one of them.
        like: a tensor of that kind.
    """
    if like.dtype not in TYPES or like.device.type != "cpu":
        return None
    found = library(f"using T = {TYPES[like.dtype]};\n{source}")
    return None if found is None else getattr(found, name)


def pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    """Return where a tensor begins; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


@functools.cache
def library(source: str) -> ctypes.CDLL | None:
    """Return a C++ source, compiled and loaded; None where that is not possible.

    Args:
        source: of functions with C linkage.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if os.environ.get("FEDMERGE_COMPILE") == "0" or compiler is None:
        logger.info("no C++ compiler is used: merges take PyTorch's operations")
        return None
    try:
        return ctypes.CDLL(str(_compiled(source, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.warning("C++ could not be compiled, merges take PyTorch's operations: %s", error)
        return None


def _compiled(source: str, compiler: str) -> Path:
    """Return the compiled file: of this source, by this compiler, for this kind of processor."""
    version = subprocess.run([compiler, "--version"], check=True, capture_output=True).stdout
    key = hashlib.sha256(repr((source, FLAGS, compiler, version, _processor())).encode()).hexdigest()[:20]
    path = _cache() / f"{key}.so"
    if not path.exists():
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            text, made = Path(folder) / "source.cpp", Path(folder) / "made.so"
            text.write_text(source, encoding="utf-8")
            subprocess.run([compiler, *FLAGS, str(text), "-o", str(made)], check=True, capture_output=True, timeout=120)
            made.replace(path)
        logger.info("compiled %s in %.1f s", path, time.perf_counter() - started)
    return path


def _cache() -> Path:
    """Return a folder of this user's own to keep compiled files in."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    path = Path(base) / "fedmerge"
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fedmerge-"))
    return path


def _processor() -> str:
    """Return what a program compiled for this processor alone depends on."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text(encoding="utf-8").splitlines() if about.exists() else []
    return "\n".join([platform.machine(), *(line for line in lines if line.startswith(("flags", "Features")))][:2])
