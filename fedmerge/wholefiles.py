"""Files that are there whole or not at all, whatever ends the process or fills the disk while they are written."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from fedmerge.errors import FedmergeError

TEMPORARY = ".part"
"""Ends the name of a file that is being written; a killed process leaves it behind."""


class NotWritten(FedmergeError):
    """A file that could not be written; what was there before is whole."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(
            f"cannot write {path}: {error.strerror}; what was there before is whole: make room, or give the right to "
            "write, and go on with --resume"
        )


def write_whole(path: Path, content: bytes) -> None:
    """Write a file beside its place and move it there, once it is on the disk; its folders are made.

    Args:
        path: of the file; one that is there is replaced.
        content: all of it.

    Raises:
        NotWritten: if the disk is full, or the place is not to be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=TEMPORARY)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            Path(temporary).replace(path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise NotWritten(path, error) from error


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file; it is on the disk when this returns. A torn line before it is ended first.

    Args:
        path: of the file, which need not exist.
        line: without its end.

    Raises:
        NotWritten: if the disk is full, or the place is not to be written; the lines before are as they were.
    """
    try:
        with path.open("a+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            torn = size > 0 and file.read(1) != b"\n"
            content = (b"\n" if torn else b"") + line + b"\n"
            try:
                if file.write(content) != len(content):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(size)
                raise
    except OSError as error:
        raise NotWritten(path, error) from error
