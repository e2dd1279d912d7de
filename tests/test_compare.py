"""Comparisons: methods are compared on the same clients, and what lacks a client says so."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest

from fedmerge import compare, federation
from fedmerge.client import train_client
from fedmerge.config import Config
from fedmerge.problem import Update
from fedmerge.runs import Run
from fedmerge.summary import refused, summarize
from fedmerge.tables import remarks

CONFIG = Config(clients=3, model="mlp@0.1", client_examples=90, local_epochs="1", partition="iid", server_examples=60)
METHODS = ("mean", "activations+mean")


@pytest.fixture(scope="module")
def updates() -> list[Update]:
    examples = federation.load(CONFIG)
    return [train_client(CONFIG, examples, client, 1, None) for client in range(CONFIG.clients)]


def compared(path: Path, monkeypatch: pytest.MonkeyPatch, trained: Sequence[Update], methods: Sequence[str]) -> Run:
    """Go on with a comparison in which these updates arrive."""
    monkeypatch.setattr(compare, "simulation", lambda _: nullcontext())
    monkeypatch.setattr(compare, "train_clients", lambda *_, **__: list(trained))
    run = Run.open(path) if path.exists() else Run.create(path, "compare", CONFIG, methods=list(METHODS), seeds=[0])
    compare.compare(CONFIG, run, methods, [0])
    return run


def test_what_was_merged_without_a_client_says_so_and_is_merged_again_with_it(
    updates: list[Update], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compared(tmp_path / "run", monkeypatch, [updates[0], updates[2]], METHODS[:1])
    [lacking] = run.results()
    assert refused(lacking) == [compare.MISSING]
    [row] = summarize([lacking])
    assert row.missing == {0: 1}
    assert "1 update missing on seed 0" in remarks(row, None)

    compared(tmp_path / "run", monkeypatch, updates, METHODS)
    whole = compared(tmp_path / "whole", monkeypatch, updates, METHODS)
    assert [line["accuracy"] for line in run.results()] == [line["accuracy"] for line in whole.results()]
    assert [line["loss"] for line in run.results()] == [line["loss"] for line in whole.results()]
    assert lacking["loss"] != run.results()[0]["loss"]
    assert not any(row.missing for row in summarize(run.results()))


def test_what_is_whole_is_not_done_again(
    updates: list[Update], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = compared(tmp_path / "run", monkeypatch, updates, METHODS)
    before = (run.path / "results.jsonl").read_bytes()
    compared(tmp_path / "run", monkeypatch, [], METHODS)
    assert (run.path / "results.jsonl").read_bytes() == before
