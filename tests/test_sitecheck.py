"""The dry run of a site: what it says where everything fits, and one error where something does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from fedmerge import data
from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.sitecheck import describe


def check_client(*words: str | Path) -> Result:
    return CliRunner().invoke(main, ["check-client", *map(str, words)])


def site(folder: Path, labels: Any, size: int = 8) -> Path:
    path = folder / "site.npz"
    images = np.random.default_rng(0).integers(0, 17, (len(labels), size, size), dtype=np.uint8)
    np.savez(path, images=images, labels=np.array(labels))
    return path


@pytest.fixture
def described(tmp_path: Path) -> Path:
    """What the server's `--describe` prints, in a file."""
    path = tmp_path / "federation.json"
    path.write_text(json.dumps(describe(Config())))
    return path


def test_a_site_that_fits_is_told_so_in_a_few_lines(described: Path, tmp_path: Path) -> None:
    result = check_client("--node-data", site(tmp_path, ["7"] * 3 + ["1"] * 40), "--described", described)
    assert result.exit_code == 0, result.output
    lines = result.output.splitlines()
    assert len(lines) == 6
    assert "43 images of 1x8x8" in lines[0]
    assert lines[1] == "classes 1 40, 7 3; none of 0, 2, 3, 4, 5, 6, 8, 9"
    assert "mlp: loss" in lines[2]
    assert "nats after a step on 32 images" in lines[2]
    assert lines[3] == "upload 104.5 kB a round"
    assert lines[4].endswith("flwr is the server's")
    assert lines[5] == "This site fits the federation. Nothing was sent."


def test_a_site_with_the_federations_data_set_needs_no_description_and_json_tells_the_same(tmp_path: Path) -> None:
    path = site(tmp_path, [0, 1, 2])
    result = check_client("--node-data", path, "--json", "--model", "mlp@0.2", "--upload-dtype", "float16")
    assert result.exit_code == 0, result.output
    found = json.loads(result.output)
    assert (found["images"], found["batch"], found["versions_compared"]) == (3, 3, False)
    assert found["label_counts"] == {str(digit): int(digit < 3) for digit in range(10)}
    full = json.loads(check_client("--node-data", path, "--json", "--model", "mlp@0.2").output)
    assert full["bytes_up"] == 2 * found["bytes_up"]


def test_the_server_describes_its_data_set(described: Path) -> None:
    result = check_client("--describe")
    assert result.exit_code == 0
    told = json.loads(result.output)
    assert told == json.loads(described.read_text())
    assert told["image-mean"] == list(data.load("digits").mean)
    assert set(told["versions"]) == {"flwr", "fedmerge", "torch"}


def test_whatever_does_not_fit_is_one_clear_error(described: Path, tmp_path: Path) -> None:
    good = site(tmp_path, [0, 1])
    (tmp_path / "other").mkdir()
    large = site(tmp_path / "other", [0, 1], size=9)
    told = json.loads(described.read_text())
    for name, content in (
        ("old", json.dumps(told | {"versions": {"flwr": "1.2.3"}})),
        ("list", "[]"),
        ("empty", "{}"),
        ("cut", '{"image-shape": [1'),
        ("versions", json.dumps(told | {"versions": 3})),
    ):
        (tmp_path / f"{name}.json").write_text(content)
    for words, message in (
        (("--node-data", large, "--described", described), "expected images of 1x8x8"),
        (("--described", described), "a site's data must be folder:PATH or PATH.npz, got ''"),
        (("--node-data", good, "--described", tmp_path / "none.json"), "cannot read"),
        (("--node-data", good, "--described", tmp_path / "old.json"), "the server's version of flwr, 1.2.3, got"),
        (("--node-data", good, "--described", tmp_path / "list.json"), "--describe printed, got list"),
        (("--node-data", good, "--described", tmp_path / "empty.json"), "tells no format of images"),
        (("--node-data", good, "--described", tmp_path / "cut.json"), "is not JSON"),
        (("--node-data", good, "--described", tmp_path / "versions.json"), "versions"),
        (("--node-data", good, "--described", described, "--model", "mpl"), "did you mean 'mlp'?"),
        (("--node-data", good, "--described", described, "--lr", "1e30"), "lower --lr"),
        (("--node-data", good, "--described", described, "--model", "alexnet"), "--model alexnet cannot"),
        (("--node-data", good, "--data", "nothing"), "unknown data set 'nothing'"),
    ):
        result = check_client(*words)
        assert result.exit_code == 1, (words, result.output)
        assert message in result.output
        assert result.output.count("Error:") == 1
