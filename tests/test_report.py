"""The page: it holds all of a run, loads nothing, and nothing in the data becomes part of it."""

from __future__ import annotations

import math
import re
import shutil
from pathlib import Path

import pytest
from made_runs import HOSTILE, RESULTS, failed, make_run, result
from pages_read import Page

from fedmerge.config import Config
from fedmerge.report import write_report
from fedmerge.runs import Run, RunError
from fedmerge.summary import summarize
from fedmerge.words import repeat_command

DIAGNOSTICS = {"choice": {"lr": 0.03, "kept": [True, False]}, "losses": list(range(50)), "<i>": [{"space": "conv1"}]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    results = [dict(item) for item in RESULTS]
    results[6]["diagnostics"] = DIAGNOSTICS
    return make_run(tmp_path_factory.mktemp("run") / "run", results, methods=["fedavg", HOSTILE], seeds=[0, 1, 2])


@pytest.fixture(scope="module")
def page(run: Run) -> Page:
    path = write_report(run)
    assert path == run.path / "report.html"
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_shows_scenario_headline_command_and_failures(run: Run, page: Page) -> None:
    text = " ".join(page.text.split())
    assert "3 clients hold 75 training images of 4 classes" in text
    assert "activations+np is the best single model." in text
    assert repeat_command(run.settings) in text
    assert "2 of 3 seeds" in text
    assert "ValueError: <img src=x onerror=alert(2)> \ufffd[31mline two" in text
    assert run.settings["versions"]["torch"] in text


def test_the_page_shows_diagnostics_by_seed(page: Page) -> None:
    text = " ".join(page.text.split())
    assert "choice / lr 0.03" in text
    assert "choice / kept yes, no" in text
    assert "losses 0, 1, 2, 3, 4, 5, 6, 7, … (50 values)" in text
    assert "<i> 0 / space conv1" in text


def test_nothing_in_the_data_becomes_an_element(page: Page) -> None:
    assert len(page.all("script")) == 1
    for tag in ("b", "i", "img", "iframe", "link"):
        assert page.all(tag) == []
    assert HOSTILE in page.text


def test_the_page_asks_for_nothing(page: Page) -> None:
    for _, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("src", "href", "xlink:href", "action", "data"):
                assert value is not None
                assert re.fullmatch(r"#.+|data:.+|[\w./-]+", value), value
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))
    assert any(meta.get("name") == "viewport" for meta in page.all("meta"))


def test_links_of_the_page_lead_to_files_of_the_run(run: Run, page: Page) -> None:
    links = {link["href"] for link in page.all("a")}
    assert {"results.jsonl", "config.json", "figures/accuracy.png", "figures/labels.svg"} <= links
    for link in links:
        assert link is not None
        assert (run.path / link).is_file()


def test_ids_are_unique_and_all_references_within_the_page_have_a_target(run: Run, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (run.path / "report.html").read_text(encoding="utf-8")
    targets = re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)
    assert targets
    assert set(targets) <= set(ids)


def test_columns_can_be_sorted_by_buttons_that_say_so(page: Page) -> None:
    headings = [attributes for attributes in page.all("th") if "aria-sort" in attributes]
    assert len(headings) == len(page.all("button")) == 8
    assert {heading["aria-sort"] for heading in headings} == {"none"}
    keys = [cell["data-sort"] for cell in page.all("td") if "data-sort" in cell]
    assert len(keys) == 7 * len(summarize(RESULTS))
    for key in keys:
        assert key == "" or math.isfinite(float(key or ""))


def test_figures_follow_the_colours_of_the_page_and_are_described(page: Page) -> None:
    drawings = page.all("svg")
    assert len(drawings) == 3
    for drawing in drawings:
        assert drawing["role"] == "img"
        assert drawing["aria-label"]
        assert "width" not in drawing
    styles = " ".join(attributes.get("style") or "" for _, attributes in page.elements)
    assert "var(--ink)" in styles
    assert "#1f2328" not in styles


def test_the_same_run_gives_the_same_bytes(run: Run, page: Page, tmp_path: Path) -> None:
    copy = Run.open(
        Path(shutil.copytree(run.path, tmp_path / "copy", ignore=shutil.ignore_patterns("*.html", "*.svg")))
    )
    write_report(copy)
    names = ["report.html", *(f"figures/{name}.{kind}" for name in ("accuracy", "classes") for kind in ("svg", "png"))]
    for name in names:
        assert (copy.path / name).read_bytes() == (run.path / name).read_bytes()
    assert page.elements


def test_a_run_without_results_is_refused_with_the_command_to_repeat(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [])
    with pytest.raises(RunError, match="no results: finish the run, or repeat it with `fedmerge compare --clients 3"):
        write_report(run)


def test_a_run_that_failed_everywhere_has_an_honest_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [failed("fedavg"), failed("activations+np", error="")], seeds=[0])
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "No method finished" in page.text
    assert "it broke" in page.text
    assert "no message" in page.text
    assert [path.name for path in sorted((run.path / "figures").iterdir())] == ["labels.png", "labels.svg"]


def test_models_that_were_trained_elsewhere_have_a_page_without_a_partition(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", [result("mean"), result("np", accuracy=0.9)], partition=False)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Models of mlp." in page.text
    assert not (run.path / "figures" / "labels.png").exists()


def test_a_run_of_rounds_has_a_figure_of_them(tmp_path: Path) -> None:
    results = [result("activations+np", 0, 0.2 * number, round=number) for number in (1, 2, 3)]
    run = make_run(tmp_path / "run", results)
    page = Page(write_report(run).read_text(encoding="utf-8"))
    assert "Accuracy by round" in page.text
    assert "Accuracy by method" not in page.text
    assert (run.path / "figures" / "rounds.svg").is_file()


def test_very_long_diagnostics_are_cut_and_say_so(tmp_path: Path) -> None:
    many = {f"entry {index}": index for index in range(500)}
    run = make_run(tmp_path / "run", [result("np", diagnostics=many), result("mean")], partition=False)
    text = write_report(run).read_text(encoding="utf-8")
    assert "entry 199" in text
    assert "entry 200" not in text
    assert "and 300 more in results.jsonl" in text


def test_a_configuration_that_is_no_unicode_can_be_reported(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "compare", Config(data="folder:\udcff"))
    run.append(result("np"))
    assert "folder:\ufffd" in write_report(run).read_text(encoding="utf-8")


def test_the_page_tells_who_was_left_out_and_why(tmp_path: Path) -> None:
    reason = "its weights' norm is 99 times the <b>median</b> client's"
    screened = {"screen": {"judge": "labels", "left-out": {"5": reason}, "scores": {}}}
    results = [
        result("fedavg"),
        result("np", diagnostics=screened),
        result("activations+np", diagnostics={"refused": ["client 2 (node 9): tensor 'w' is odd"], **screened}),
    ]
    page = Page(write_report(make_run(tmp_path / "run", results)).read_text(encoding="utf-8"))
    assert "Left out" in page.text
    assert f"seed 0, round 1, client 5 {reason} np, activations+np" in " ".join(page.text.split())
    assert "seed 0, round 1 client 2 (node 9): tensor 'w' is odd activations+np" in " ".join(page.text.split())
    assert "Left out" not in Page(write_report(make_run(tmp_path / "none", results[:1])).read_text("utf-8")).text
