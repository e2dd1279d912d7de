"""The page of a benchmark: it holds every cell, loads nothing, and each figure has its data and commands."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from made_benchmarks import OURS, add_run, small
from pages_read import Page

from fedmerge.benchmark import drawings
from fedmerge.benchmark.collecting import Benchmark, collect
from fedmerge.benchmark.curves import curve_plates
from fedmerge.benchmark.maps import map_plates
from fedmerge.benchmark.page import write_benchmark_report
from fedmerge.cli import main
from fedmerge.summary import Difference


@pytest.fixture(scope="module")
def benchmark(tmp_path_factory: pytest.TempPathFactory) -> Benchmark:
    return collect(small(tmp_path_factory.mktemp("benchmark") / "bench"))


@pytest.fixture(scope="module")
def page(benchmark: Benchmark) -> Page:
    return Page(write_benchmark_report(benchmark).read_text(encoding="utf-8"))


def words(page: Page) -> str:
    return " ".join(page.text.split())


def test_the_page_says_what_was_compared_and_what_came_out(page: Page) -> None:
    text = words(page)
    assert "digits: 8 settings, 4 methods" in text
    assert "9 runs over 3 seeds (0, 1, 2). All have model mlp, 3 clients." in text
    assert "They differ in division, server labels, server images, init, rounds." in text
    assert f"{OURS}, the strongest form of NP Merge here" in text
    assert "Behind in: " in text


def test_the_table_has_every_cell_with_failures_and_what_is_missing(benchmark: Benchmark, page: Page) -> None:
    table = page.elements.index(("table", {"class": "results compact sortable", "id": "results"}))
    rows = [attributes for tag, attributes in page.elements[table:] if tag == "th" and attributes.get("data-sort")]
    assert len(rows) == sum(len(setting.rows) for setting in benchmark.settings) == 4 * 6 + 2 + 1
    text = words(page)
    assert "failed on seeds 0, 1, 2; seed 0: ValueError: <b>no</b> label" in text
    assert f"{OURS} best single model; seed 2 not run" in text or f"{OURS} seed 2 not run" in text
    assert f"labels/10 seed 2 not run {OURS}" in text


def test_columns_sort_by_numbers_or_words_and_rows_are_filtered(page: Page) -> None:
    headings = [attributes for attributes in page.all("th") if "aria-sort" in attributes]
    assert len(headings) == len(page.all("button")) == 3 + 5 + 4
    assert [heading.get("data-kind") for heading in headings].count("words") == 2, "methods and init"
    for cell in page.all("td"):
        key = cell.get("data-sort")
        assert key is None or key in ("", "shared", "independent") or math.isfinite(float(key))
    (search,) = page.all("input")
    assert search["aria-controls"] == "results"


def test_the_page_asks_for_nothing_and_nothing_in_the_data_becomes_an_element(benchmark: Benchmark, page: Page) -> None:
    for tag in ("b", "img", "link", "iframe"):
        assert page.all(tag) == []
    assert len(page.all("script")) == 1
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))
    for link in page.all("a"):
        assert (benchmark.path / str(link["href"])).is_file(), link
    text = (benchmark.path / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r"(?:src|href)=\"(?:https?:)?//", text)
    assert str(benchmark.path) not in text


def test_ids_are_unique_over_all_figures(benchmark: Benchmark, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    text = (benchmark.path / "report.html").read_text(encoding="utf-8")
    assert set(re.findall(r'href="#([^"]+)"', text) + re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_figures_are_there_where_runs_differ_each_with_its_data_and_commands(benchmark: Benchmark, page: Page) -> None:
    names = {path.stem for path in (benchmark.path / "figures").iterdir()}
    assert names == {
        "division",
        "server-labels",
        "server-images",
        "rounds",
        "bytes",
        "labels",
        "classes",
        "coefficients",
    }
    assert len(page.all("svg")) == len(names)
    text = words(page)
    for title in ("how different the clients are", "the server's labels", "the server's images", "rounds", "bytes"):
        assert f"Accuracy against {title}" in text
    assert "fedmerge compare --clients 3 --alpha 0.1 --init shared --server-labels 0 --methods " in text
    assert "fedmerge simulate --clients 3 --alpha 0.1 --init shared --rounds 4 --align identity --merge fedavg" in text


def test_a_figures_table_has_the_numbers_that_are_drawn(benchmark: Benchmark) -> None:
    plates = {plate.name: plate for plate in curve_plates(benchmark)}
    plate = plates["server-labels"]
    assert plate.headings[:2] == ["Method", "labelled images of the server"]
    found = {(name, labels): (accuracy, seeds) for name, labels, accuracy, _, seeds in plate.lines}
    assert found[OURS, "0"] == ("66.00", "3 of 3 seeds")
    assert found[OURS, "10"] == ("65.50", "2 of 3 seeds")
    assert found[OURS, "100"] == ("71.00", "3 of 3 seeds")
    assert ("finetune", "0") not in found, "it failed"
    assert sorted(plate.sources)[:2] == ["labels/0/results.jsonl", "labels/10/results.jsonl"]
    (axes,) = plate.figure.axes
    assert [text.get_text() for text in axes.get_xticklabels()] == ["0", "10", "100"]
    ticks = axes.get_xticks()
    assert ticks[1:] == pytest.approx([1, 2])
    assert ticks[0] == pytest.approx(math.log10(10 / 3))
    assert [axes.get_title(loc="left") for axes in plates["division"].figure.axes] == [
        "independent init",
        "shared init",
    ]


def test_a_setting_of_any_number_has_a_figure_and_of_words_is_a_panel(tmp_path: Path) -> None:
    for model in ("mlp", "lenet5"):
        for clients in (2, 3):
            add_run(tmp_path, f"{model}-{clients}", model=model, clients=clients, batch_size=8 * clients, seeds=[0])
    assert list(curve_plates(collect(tmp_path))) == [], "clients and batches differ together"
    for model in ("mlp", "lenet5"):
        add_run(tmp_path, f"{model}-batch", model=model, clients=3, batch_size=16, seeds=[0])
    plates = {plate.name: plate for plate in curve_plates(collect(tmp_path))}
    assert plates.keys() == {"clients", "batch-size"}
    assert [axes.get_title(loc="left") for axes in plates["batch-size"].figure.axes] == ["lenet5", "mlp"]


def test_coefficients_stand_beside_the_clients_shares_with_their_correlation(benchmark: Benchmark) -> None:
    plates = {plate.name: plate for plate in map_plates(benchmark)}
    plate = plates["coefficients"]
    counts = np.array([[20, 1, 0], [0, 30, 7], [3, 3, 3]]).T
    classes = [[0.8, 0.1, 0.1], [0.0, 0.9, 0.1], [0.2, 0.7, 0.1]]
    correlation = np.corrcoef(np.ravel(classes), (counts / counts.sum(1, keepdims=True)).ravel())[0, 1]
    assert f"{correlation:.2f} (α = 0.1, independent init)" in plate.caption
    assert plate.lines[0][0] == "conv1.weight"
    assert plate.lines[0][2:] == ["0.500, 0.300, 0.200", "90 %"]
    assert plates["labels"].lines[0] == ["0", "α = 0.1", "20, 1, 0", "21"]
    assert plates["classes"].headings == ["Method", "setting", "boot", "<b>bag</b>", "$coat_$"]


def test_models_that_were_trained_elsewhere_have_no_labels_and_no_names_of_classes(tmp_path: Path) -> None:
    add_run(tmp_path, "run", divided=False, seeds=[0])
    plates = {plate.name: plate for plate in map_plates(collect(tmp_path))}
    assert plates.keys() == {"coefficients"}
    assert "correlation" not in plates["coefficients"].caption
    assert "Accuracies are on the test files" in words(
        Page(write_benchmark_report(collect(tmp_path)).read_text(encoding="utf-8"))
    )


def test_curves_keep_their_look_in_every_figure_and_bars_leave_no_means_outside() -> None:
    curve = drawings.Curve("np", [(0.0, Difference(0.5, 0.4, 2)), (1.0, Difference(0.6, None, 1))], ours=True)
    other = drawings.Curve("mean", [(0.0, Difference(0.2, 0.01, 3))])
    colours = []
    for panels in ({"": [curve]}, {"a": [other, curve], "b": [curve], "c": [other]}):
        figure = drawings.curves_figure(panels, "x", order=["mean", "np"], ticks={0.0: "few", 1.0: "many"})
        axes = next(axes for axes in figure.axes if len(axes.lines))
        colours.append({line.get_color() for line in axes.lines if len(line.get_xdata()) == 2})  # type: ignore[arg-type]
        low, high = axes.get_ylim()
        assert low <= 20 or len(panels) == 1
        assert low < 50 < 60 < high < 90
    assert colours[0] <= colours[1]


def test_rounds_are_marked_at_whole_numbers() -> None:
    curve = drawings.Curve("np", [(float(place), Difference(place / 100, None, 1)) for place in range(1, 21)])
    (axes,) = drawings.curves_figure({"": [curve]}, "round").axes
    marks = [float(place) for place in axes.get_xticks()]
    assert len(marks) >= 3
    assert all(place.is_integer() for place in marks)


# The command.


def test_the_command_writes_the_page_and_prints_what_came_out(tmp_path: Path) -> None:
    add_run(tmp_path, "a", seeds=[0, 1])
    add_run(tmp_path, "b", seeds=[0], alpha=0.5, methods=["fedavg", OURS])
    done = CliRunner().invoke(main, ["report", str(tmp_path), "--json", "--baseline", "finetune"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.output)
    assert Path(told["report"]).is_file()
    assert told["findings"][0].startswith(f"{OURS}, the strongest form")
    assert told["unfinished"] == {}
    assert "vs finetune" in Path(told["report"]).read_text(encoding="utf-8")


@pytest.mark.usefixtures("page")
def test_the_same_folder_gives_the_same_bytes_and_failed_cells_fail_the_command(
    benchmark: Benchmark, tmp_path: Path
) -> None:
    copy = shutil.copytree(benchmark.path, tmp_path / "bench", ignore=shutil.ignore_patterns("figures"))
    done = CliRunner().invoke(main, ["report", str(copy)])
    assert done.exit_code == 1, "a method failed"
    assert "unfinished  labels/10: seed 2 not run" in done.output
    assert f"{OURS}, the strongest form of NP Merge here" in " ".join(done.output.split())
    for path in (benchmark.path / "report.html", *(benchmark.path / "figures").iterdir()):
        assert (copy / path.relative_to(benchmark.path)).read_bytes() == path.read_bytes()
