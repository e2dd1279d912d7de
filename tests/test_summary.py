"""The summary of a run: means over what was finished, failures in sight, methods compared seed by seed."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import failed, result
from scipy.stats import ttest_rel

from fedmerge.settings import ConfigurationError
from fedmerge.summary import best_single_model, paired_differences, summarize


def test_a_row_has_the_mean_and_sample_deviation_of_its_seeds() -> None:
    accuracies = [0.81, 0.84, 0.78, 0.9]
    (row,) = summarize([result("np", seed, accuracy) for seed, accuracy in enumerate(accuracies)])
    assert row.mean == pytest.approx(np.mean(accuracies))
    assert row.deviation == pytest.approx(np.std(accuracies, ddof=1))
    assert row.loss == pytest.approx(1 - np.mean(accuracies))
    assert row.complete


def test_one_seed_has_no_deviation() -> None:
    (row,) = summarize([result("np", 7, 0.5)])
    assert (row.mean, row.deviation, row.seeds) == (0.5, None, (7,))


def test_rows_keep_the_order_of_the_results() -> None:
    methods = ["mean", "activations+np", "fedavg"]
    assert [row.method for row in summarize([result(method, seed) for seed in (1, 0) for method in methods])] == methods


def test_a_failed_seed_is_no_part_of_the_mean_and_is_named() -> None:
    (row,) = summarize([result("np", 0, 0.8), failed("np", 1, "no memory"), result("np", 2, 0.6)])
    assert row.mean == pytest.approx(0.7)
    assert row.errors == {1: "no memory"}
    assert not row.complete
    assert row.coverage == "2 of 3 seeds"


def test_a_seed_without_a_result_makes_a_row_incomplete() -> None:
    rows = summarize([result("np", 0), result("np", 1), result("mean", 0)])
    assert [row.coverage for row in rows] == ["2 of 2 seeds", "1 of 2 seeds"]
    assert [row.complete for row in summarize([result("np", 0)], seeds=[0, 1, 2])] == [False]


def test_the_last_round_counts_and_earlier_rounds_cost() -> None:
    results = [result("np", seed, 0.1 * number, round=number) for seed in (0, 1) for number in (3, 1, 2)]
    (row,) = summarize(results)
    assert row.mean == pytest.approx(0.3)
    assert (row.seconds, row.bytes_up, row.bytes_down) == (6.0, 9000, 3000)


def test_a_seed_that_stopped_in_an_earlier_round_is_not_averaged_with_the_others() -> None:
    results = [result("np", 0, 0.5, round=1), result("np", 0, 0.9, round=2), result("np", 1, 0.5, round=1)]
    (row,) = summarize(results)
    assert (row.mean, row.coverage) == (0.9, "1 of 2 seeds")


def test_a_last_round_that_failed_fails_its_seed() -> None:
    (row,) = summarize([result("np", 0, 0.5, round=1), failed("np", 0, "late", round=2)])
    assert (row.mean, row.errors) == (None, {0: "late"})


def test_classes_without_images_are_left_out_seed_by_seed() -> None:
    results = [
        result("np", 0, per_class_accuracy=[0.2, None, None]),
        result("np", 1, per_class_accuracy=[0.4, 0.6, None]),
    ]
    (row,) = summarize(results)
    assert row.class_accuracies == pytest.approx((0.3, 0.6, None))


def test_numbers_that_a_seed_lacks_are_not_averaged_over_the_others() -> None:
    (row,) = summarize([result("np", 0, bytes_up=None, per_class_accuracy=None), result("np", 1)])
    assert row.bytes_up is None
    assert row.bytes_down == 1000
    assert row.class_accuracies == ()


def test_differences_are_those_of_a_paired_t_test() -> None:
    first, second = [0.5, 0.52, 0.58, 0.49], [0.6, 0.66, 0.65, 0.62]
    results = [result("fedavg", seed, accuracy) for seed, accuracy in enumerate(first)]
    results += [result("np", seed, accuracy) for seed, accuracy in enumerate(second)]
    difference = paired_differences(summarize(results))["np"]
    interval = ttest_rel(second, first).confidence_interval(0.95)
    assert difference.half_width is not None
    assert difference.mean - difference.half_width == pytest.approx(interval.low)
    assert difference.mean + difference.half_width == pytest.approx(interval.high)


@given(st.lists(st.floats(-0.3, 0.3), min_size=3, max_size=3))
def test_what_a_seed_does_to_both_methods_is_no_difference(shifts: list[float]) -> None:
    pairs = [(0.4, 0.5), (0.41, 0.53), (0.38, 0.5)]
    results = [
        result(method, seed, pair[index] + shift)
        for seed, (pair, shift) in enumerate(zip(pairs, shifts, strict=True))
        for index, method in enumerate(("fedavg", "np"))
    ]
    difference = paired_differences(summarize(results))["np"]
    assert difference.mean == pytest.approx(np.mean([0.1, 0.12, 0.12]))
    assert difference.half_width == pytest.approx(4.302653 * np.std([0.1, 0.12, 0.12], ddof=1) / math.sqrt(3))


def test_differences_use_the_seeds_that_both_finished() -> None:
    results = [result("fedavg", 0, 0.1), result("fedavg", 1, 0.2), result("np", 1, 0.5), result("mean", 2, 0.5)]
    differences = paired_differences(summarize(results))
    assert list(differences) == ["np"]
    assert differences["np"].mean == pytest.approx(0.3)
    assert (differences["np"].half_width, differences["np"].seeds) == (None, 1)


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="unknown baseline 'fedavgg'; did you mean 'fedavg'"):
        paired_differences(summarize([result("fedavg")]), "fedavgg")


def test_the_best_single_model_is_neither_an_ensemble_nor_unfinished() -> None:
    results = [result("mean", seed, 0.5) for seed in (0, 1)]
    results += [result("np", seed, 0.6) for seed in (0, 1)]
    results += [result("ensemble", seed, 0.9, models=2) for seed in (0, 1)]
    results += [result("lucky", 0, 0.99), failed("lucky", 1)]
    best = best_single_model(summarize(results))
    assert best is not None
    assert best.method == "np"


def test_of_one_method_none_is_the_best() -> None:
    assert best_single_model(summarize([result("np")])) is None
