"""A run folder, brought home from the server: over ssh or on this machine, each file checked by its SHA-256.

Flower itself does not fetch what a run has written. `ssh`, `sh`, `find`, `sha256sum` and `tar` are all that is needed.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from fedmerge.errors import FedmergeError
from fedmerge.problem import Progress, silent
from fedmerge.settings import ConfigurationError
from fedmerge.wholefiles import write_whole

SUM = re.compile(r"([0-9a-f]{64})  \./([^/].*)")


class FetchError(FedmergeError):
    """A run folder that cannot be copied, with the reason."""


def fetch(source: str, target: Path, *, updates: bool = False, progress: Progress = silent) -> int:
    """Copy a run folder home, and return its number of bytes.

    Args:
        source: [USER@]HOST:PATH, copied over ssh, or a path of this machine.
        target: a folder that does not exist yet, or is empty.
        updates: whether the clients' updates come too; without them the run cannot be merged again.
        progress: told how many files have come.

    Raises:
        FetchError: if the folder cannot be read, is no run folder, or a file has changed on its way.
    """
    host, path = _place(source)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FetchError(f"{target} is not empty: give another --out")
    chosen = "" if updates else " ! -path './updates/*'"
    at = f"cd {shlex.quote(path)}"
    listed = _shell(
        host, f"{at} && find . -type f ! -name '*.part' ! -name .lock{chosen} -exec sha256sum {{}} +", source
    )
    sums = {}
    for line in listed.decode(errors="replace").splitlines():
        found = SUM.fullmatch(line)
        if found is None or ".." in PurePosixPath(found[2]).parts:
            raise FetchError(f"{source}: expected names of a run folder's files, got {line[:100]!r}")
        sums[found[2]] = found[1]
    if "config.json" not in sums:
        raise FetchError(f"{source} is not a run folder: it has no config.json")
    order = sorted(sums, key=lambda name: (name == "config.json", name))  # last: without it, it is no run folder
    done = size = 0
    for name, content in _files(host, f"{at} && tar -cf - --no-recursion -T -", order, source):
        if hashlib.sha256(content).hexdigest() != sums.get(name):
            raise FetchError(f"{name} has changed on its way from {source}: fetch again when the run has ended")
        write_whole(target / name, content)
        done, size = done + 1, size + len(content)
        progress("files fetched", done, len(order))
    if done != len(order):
        raise FetchError(f"{done} of {len(order)} files came from {source}: fetch again")
    return size


def _place(source: str) -> tuple[str | None, str]:
    """Return the host, None for this machine, and the path of a source."""
    host, colon, path = source.partition(":")
    if not colon or "/" in host:
        return None, str(Path(source).absolute())
    if not re.fullmatch(r"[A-Za-z0-9_.][A-Za-z0-9_.@-]*", host) or not path:
        raise ConfigurationError(f"expected [USER@]HOST:PATH or a path, got '{source}'")
    return host, path


def _over(host: str | None, command: str) -> list[str]:
    return ["sh", "-c", command] if host is None else ["ssh", host, command]


def _shell(host: str | None, command: str, source: str) -> bytes:
    done = subprocess.run(_over(host, command), stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise FetchError(f"cannot read {source}: {done.stderr.decode(errors='replace').strip()[-500:]}")
    return done.stdout


def _files(host: str | None, command: str, names: list[str], source: str) -> Iterator[tuple[str, bytes]]:
    """Yield the names and contents of the files in the archive that `command` writes, given their names."""
    with tempfile.TemporaryFile() as asked, tempfile.TemporaryFile() as errors:
        asked.write("".join(f"./{name}\n" for name in names).encode())
        asked.seek(0)
        process = subprocess.Popen(_over(host, command), stdin=asked, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    content = archive.extractfile(member) if member.isfile() else None
                    if content is None:
                        raise FetchError(f"{source}: expected a file, got {member.name!r}")
                    yield member.name.removeprefix("./"), content.read()
        except tarfile.TarError as error:
            errors.seek(0)
            said = errors.read().decode(errors="replace").strip()[-500:]
            raise FetchError(f"the copy from {source} broke off: {said or error}") from error
        finally:
            process.stdout.close()
            process.kill()
            process.wait()
