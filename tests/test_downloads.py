import http.server
import socket
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torchvision.datasets
from written_files import CIFAR, digest, pack_cifar, write_cifar, write_idx, write_svhn

from fedmerge import datafiles
from fedmerge.datafiles import FILES, MissingData, read

Serve = Callable[[Path, str], str]


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test read this machine's data sets."""
    monkeypatch.setenv("FEDMERGE_DATA", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(datafiles, "SYSTEM", tmp_path / "system")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Serve a folder over HTTP: whole, cut in the middle, or without an answer."""
    running = []

    def start(folder: Path, fault: str) -> str:
        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args: Any) -> None:
                super().__init__(*args, directory=str(folder))

            def copyfile(self, source: Any, outputfile: Any) -> None:
                content = source.read()
                time.sleep(0.5 if fault == "silent" else 0)
                outputfile.write(content[: len(content) // 2] if fault == "cut" else content)

            def log_message(self, *_: object) -> None:
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}/"

    yield start
    for server, thread in running:
        server.shutdown()
        thread.join()
        server.server_close()


def publish(name: str, folder: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch, fault: str = "") -> None:
    """Write a small data set and let torchvision's downloads find it."""
    url = serve(folder, fault)
    if name == "mnist":
        write_idx(folder, suffix=".gz")
        monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [url])
        resources = [(path.name, digest(path)) for path in folder.glob("*.gz")]
        monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    elif name == "svhn":
        write_svhn(folder, monkeypatch)
        split_list = torchvision.datasets.SVHN.split_list
        local = {split: [url + file, file, checksum] for split, (_, file, checksum) in split_list.items()}
        monkeypatch.setattr(torchvision.datasets.SVHN, "split_list", local)
    else:
        write_cifar(folder, name, monkeypatch)
        archive = pack_cifar(folder, name, monkeypatch)
        monkeypatch.setattr(CIFAR[name], "url", url + archive.name)


def left_in(cache: Path) -> list[Path]:
    """What is in the cache, apart from the locks."""
    return [path for path in cache.rglob("*") if path.suffix != ".lock"]


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "svhn"])
def test_a_download_is_stored_once_and_read_from_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "published").mkdir()
    publish(name, tmp_path / "published", serve, monkeypatch)
    downloaded = read(name)
    assert capfd.readouterr().out == ""
    stored = {path.name for path in left_in(tmp_path / "cache") if path.is_file()}
    assert stored == set(FILES[name].names)
    monkeypatch.setattr(urllib.request, "urlopen", None)
    again = read(name)
    assert again.train.labels.tolist() == downloaded.train.labels.tolist()
    assert again.classes == downloaded.classes


def test_what_another_process_has_stored_meanwhile_is_not_downloaded_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(urllib.request, "urlopen", None)
    write_idx(tmp_path / "cache" / "mnist")
    assert set(datafiles._store("mnist")) == set(FILES["mnist"].names)


@pytest.mark.parametrize("fault", ["cut", "silent"])
@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_a_download_that_breaks_off_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, serve: Serve, name: str, fault: str
) -> None:
    monkeypatch.setattr(datafiles, "DOWNLOAD_TIMEOUT", 0.1 if fault == "silent" else 5.0)
    (tmp_path / "published").mkdir()
    publish(name, tmp_path / "published", serve, monkeypatch, fault)
    with pytest.raises(MissingData, match="timed out" if fault == "silent" else "corrupted"):
        read(name)
    assert left_in(tmp_path / "cache") == []
    assert socket.getdefaulttimeout() is None


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_one_message_with_each_place_and_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    own = tmp_path / "own"
    own.mkdir()
    (own / FILES[name].names[0]).touch()
    with pytest.raises(MissingData) as caught:
        read(name, str(own))
    message = str(caught.value)
    assert f"{own}: {', '.join(FILES[name].names[1:])} missing" in message
    for place in (tmp_path / "cache", tmp_path / "system" / name):
        assert f"{place}: no such folder" in message
    assert "no network" in message
    assert FILES[name].advice in message
    assert capfd.readouterr().out == ""
    assert left_in(tmp_path / "cache") == []
