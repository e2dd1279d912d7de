"""Figures: they show the numbers, for few and many, and leave matplotlib alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest
from made_runs import CLASSES, RESULTS, failed, result
from matplotlib import pyplot
from matplotlib.figure import Figure

from fedmerge.figures import accuracy_figure, classes_figure, labels_figure, rounds_figure, to_png, to_svg
from fedmerge.summary import Row, summarize


def texts(figure: Figure) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", to_svg(figure).decode())


def some_rows() -> list[Row]:
    return summarize(RESULTS)


def partition_of(clients: int, classes: int) -> dict[str, Any]:
    counts = np.random.default_rng(0).integers(0, 50, (clients, classes))
    return {"label_counts": counts.tolist(), "classes": [f"class {index}" for index in range(classes)]}


def test_the_accuracy_figure_names_every_method_and_its_number() -> None:
    found = texts(accuracy_figure(some_rows()))
    for text in ("fedavg", "41.0 ± 1.0", "activations+np", "62.0 ± 2.0", "server-only", "failed", "2 of 3 seeds"):
        assert text in found


def test_the_accuracy_figure_names_every_one_of_many_methods() -> None:
    found = texts(accuracy_figure(summarize([result(f"method-{number}", 0, 0.5) for number in range(60)])))
    assert all(f"method-{number}" in found for number in range(60))


def test_the_accuracy_figure_draws_means_and_seeds_where_they_are() -> None:
    (axes,) = accuracy_figure(summarize([result("a", 0, 0.5), result("a", 1, 0.75), result("b", 0, 0.25)])).axes
    drawn = [tuple(np.asarray(line.get_xdata()).tolist()) for line in axes.lines]
    assert {(50.0, 75.0), (62.5,), (25.0,)} <= set(drawn)


def test_bubbles_have_areas_in_proportion_to_the_counts() -> None:
    figure = labels_figure({"label_counts": [[10, 0], [5, 20]], "classes": ["a", "b"]})
    (bubbles,) = figure.axes[1].collections
    sizes = bubbles.get_sizes()  # type: ignore[attr-defined]
    assert np.asarray(bubbles.get_offsets()).tolist() == [[0, 0], [1, 0], [1, 1]]
    assert sizes / sizes.max() == pytest.approx([0.5, 0.25, 1.0])


@pytest.mark.parametrize(("clients", "classes"), [(1, 1), (2, 2), (30, 10), (31, 10), (100, 10), (5, 200)])
def test_label_figures_can_be_drawn_for_few_and_many_clients(clients: int, classes: int) -> None:
    figure = labels_figure(partition_of(clients, classes))
    assert to_png(figure).startswith(b"\x89PNG")
    assert max(figure.get_size_inches()) < 12


def test_a_partition_without_images_can_be_drawn() -> None:
    to_svg(labels_figure({"label_counts": [[0, 0], [0, 0]], "classes": ["a", "b"]}))
    to_svg(labels_figure({"label_counts": [[0] * 40] * 2, "classes": ["a"] * 40}))


def test_the_class_figure_writes_the_numbers_of_few_classes_and_a_scale_for_many() -> None:
    rows = summarize([result("np", per_class_accuracy=[0.25, None, 1.0])])
    found = texts(classes_figure(rows, ["a", "b", "c"]))
    assert {"25", "–", "100"} <= set(found)
    many = summarize([result("np", per_class_accuracy=[0.123] * 60)])
    found = texts(classes_figure(many, [f"class {index}" for index in range(60)]))
    assert "12" not in found
    assert "accuracy, %" in found


def test_the_round_figure_draws_each_method_over_its_rounds() -> None:
    results = [result("np", seed, 0.2 * number, round=number) for seed in (0, 1) for number in (1, 2, 3)]
    results += [failed("mean", 0, round=1), result("fedavg", 0, 0.5, round=1)]
    (axes,) = rounds_figure(results).axes
    drawn = [np.asarray(line.get_xydata()) for line in axes.lines]
    assert len(drawn) == 2
    assert drawn[0] == pytest.approx(np.array([[1, 20], [2, 40], [3, 60]]))
    assert drawn[1] == pytest.approx(np.array([[1, 50]]))


def test_the_labels_of_equal_curves_do_not_overlap() -> None:
    results = [result(f"method {index}", 0, 0.5, round=number) for index in range(12) for number in (1, 2)]
    (axes,) = rounds_figure(results).axes
    heights = sorted(text.xyann[1] for text in axes.texts)  # type: ignore[attr-defined]
    assert len(heights) == 12
    assert min(np.diff(heights)) > 0.04


@pytest.fixture
def untouched_matplotlib() -> Iterator[None]:
    before = dict(mpl.rcParams)
    yield
    assert dict(mpl.rcParams) == before


@pytest.mark.usefixtures("untouched_matplotlib")
def test_figures_are_the_same_bytes_again_and_leave_matplotlib_as_it_was() -> None:
    for render in (to_png, to_svg):
        assert render(accuracy_figure(some_rows())) == render(accuracy_figure(some_rows()))
    assert pyplot.get_fignums() == []


def test_names_are_never_mathematics_or_markup_in_figures() -> None:
    svg = to_svg(classes_figure(some_rows(), CLASSES)).decode()
    for name in ("&lt;b&gt;bag&lt;/b&gt;", "$coat_$", "_dress"):
        assert f">{name}<" in svg
    assert "<script" not in svg
