"""A folder of runs: brought together by settings, compared seed by seed, lost settings named."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
from made_benchmarks import METHODS, OURS, add_run, breaking, line
from scipy.stats import ttest_rel

from fedmerge.benchmark.collecting import DIVISION, IMAGES, LABELS, ROUNDS, Benchmark, collect
from fedmerge.benchmark.contests import best_control, conclusions, contest, drawn, is_ours, phrase, strengths
from fedmerge.benchmark.rounds import courses, rounds_needed
from fedmerge.config import Config
from fedmerge.runs import RunError


def alphas(folder: Path, *values: float, **changes: object) -> Benchmark:
    for alpha in values:
        add_run(folder, f"alpha-{alpha}", alpha=alpha, **changes)  # type: ignore[arg-type]
    return collect(folder)


def test_runs_at_any_depth_are_brought_together_by_what_they_differ_in(tmp_path: Path) -> None:
    add_run(tmp_path, "a", alpha=0.1)
    add_run(tmp_path, "deep/er/b", alpha=0.5, threads=3, device="cpu")
    add_run(tmp_path, "deep/c", alpha=0.1, methods=["mean"], seeds=[0, 7], out="elsewhere", min_completed=1)
    found = collect(tmp_path)
    assert [run.name for run in found.runs] == ["a", "deep/c", "deep/er/b"]
    assert found.varying == (DIVISION,)
    first, second = found.settings
    assert [run.name for run in first.runs] == ["a", "deep/c"]
    assert [row.method for row in first.rows] == [*METHODS, "mean"]
    assert first.row("mean") is not None
    assert {row.method: row.coverage for row in first.rows}["mean"] == "2 of 4 seeds"
    assert (second.values[DIVISION], found.seeds, found.common["init"]) == ("α = 0.5", (0, 1, 2, 7), "independent")


def test_settings_come_from_the_most_different_clients_to_the_most_alike(tmp_path: Path) -> None:
    for number, partition in enumerate(("iid", "80-20", "dirichlet", "shards", "disjoint", "quantity", "same")):
        add_run(tmp_path, str(number), partition=partition, methods=["fedavg"], seeds=[0])
    add_run(tmp_path, "more", alpha=0.05, methods=["fedavg"], seeds=[0])
    places = [setting.values[DIVISION] for setting in collect(tmp_path).settings]
    assert places == ["disjoint", "shards", "80-20", "α = 0.05", "α = 0.3", "quantity α = 0.3", "iid", "same"]


def test_alpha_is_no_setting_of_a_partition_that_does_without(tmp_path: Path) -> None:
    for alpha in (0.1, 0.5):
        add_run(tmp_path, str(alpha), partition="iid", alpha=alpha, methods=["fedavg"], seeds=[0])
    (setting,) = collect(tmp_path).settings
    assert len(setting.runs) == 2


def test_budgets_of_the_server_are_settings_by_their_numbers(tmp_path: Path) -> None:
    add_run(tmp_path, "all", methods=["fedavg"])
    add_run(tmp_path, "same", methods=["mean"], server_limit=100, server_labels=100)
    add_run(tmp_path, "few", methods=["fedavg"], server_limit=20)
    found = collect(tmp_path)
    assert found.varying == (IMAGES,), "labels are as many as images"
    assert [setting.values[IMAGES] for setting in found.settings] == [20, 100]
    add_run(tmp_path, "none", methods=["fedavg"], server_labels=0)
    assert collect(tmp_path).varying == (LABELS, IMAGES)


def test_what_was_to_be_there_and_is_not_is_named_and_no_part_of_a_mean(tmp_path: Path) -> None:
    run = add_run(tmp_path, "unfinished")
    kept = [
        item for item in run.results() if item["method"] == "fedavg" or (item["method"] == OURS and item["seed"] == 0)
    ]
    (run.path / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in kept))
    stopped = add_run(tmp_path, "rounds", methods=["mean"], seeds=[0], rounds=3)
    items = [item for item in stopped.results() if item["round"] < 3]
    (stopped.path / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    once, several = collect(tmp_path).settings
    assert once.missing["finetune"] == ("seed 0 not run", "seed 1 not run", "seed 2 not run")
    assert once.missing[OURS] == ("seed 1 not run", "seed 2 not run")
    assert "fedavg" not in once.missing
    assert {row.method: row.mean is None for row in once.rows} == {
        "fedavg": False,
        OURS: False,
        "ensemble": True,
        "finetune": True,
    }
    assert several.missing == {"mean": ("seed 0 stopped after round 2 of 3",)}
    assert [(row.method, row.mean) for row in several.rows] == [("mean", None)]
    assert len(several.results) == 2


def test_what_one_run_lacks_another_of_the_same_settings_may_have(tmp_path: Path) -> None:
    first = add_run(tmp_path, "first", breaking)
    (first.path / "results.jsonl").write_text("".join(json.dumps(item) + "\n" for item in first.results()[2:]))
    add_run(tmp_path, "second", seeds=[0])
    (setting,) = collect(tmp_path).settings
    rows = {row.method: row for row in setting.rows}
    assert rows["finetune"].accuracies.keys() == {0}
    assert rows["finetune"].errors.keys() == {1, 2}
    assert setting.missing == {"fedavg": ("seed 1 not run",)}


def test_two_results_of_one_cell_that_differ_are_told_and_the_first_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_run(tmp_path, "a", methods=["fedavg"], seeds=[0])
    add_run(tmp_path, "b", lambda *_: 0.9, methods=["fedavg"], seeds=[0])
    (setting,) = collect(tmp_path).settings
    assert setting.rows[0].mean == pytest.approx(0.3)
    assert "runs of equal settings (a, b) have two results of fedavg, seed 0: the first counts" in caplog.text


def test_a_folder_without_runs_or_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"is not a run folder and holds none .*fedmerge compare --out"):
        collect(tmp_path)
    run = add_run(tmp_path, "empty")
    (run.path / "results.jsonl").unlink()
    with pytest.raises(RunError, match=r"none of the 1 runs in .* has a result: finish them with --resume"):
        collect(tmp_path)
    (run.path / "config.json").write_text("{}")
    with pytest.raises(RunError, match=r"empty/config.json is damaged"):
        collect(tmp_path)


# Who is ahead of whom.


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        *((name, True) for name in ("np", "activations+np:steps=9", "auto+np-distill", "np-pairwise")),
        *((name, False) for name in ("finetune", "activations+mean", "ensemble", "np > families:cnn")),
    ],
)
def test_ours_are_the_forms_of_np_merge(method: str, expected: bool) -> None:
    assert is_ours(method) is expected


def test_a_contest_is_a_paired_interval_over_all_settings(tmp_path: Path) -> None:
    settings = alphas(tmp_path, 0.1, 0.5, 1.0).settings
    found = contest(settings, OURS, "finetune")
    assert found is not None
    by_setting = [(0.3 - 0.2), (0.3 - 0.15 - 0.2), (0.3 - 0.15 - 0.2)]
    assert [difference for _, difference in found.differences] == pytest.approx(by_setting)
    assert found.difference.mean == pytest.approx(statistics.fmean(by_setting))
    assert (found.won, [setting.config.alpha for setting, _ in found.lost]) == (1, [0.5, 1.0])


def test_its_interval_is_the_t_tests_over_the_seeds_that_most_settings_have(tmp_path: Path) -> None:
    def noisy(config: Config, method: str, seed: int, _: int) -> float:
        return 0.5 + 0.01 * ((7 * seed + 3 * len(method) + int(10 * config.alpha)) % 5)

    for alpha, seeds in ((0.1, (0, 1, 2, 3)), (0.5, (0, 1, 2, 3)), (1.0, (0, 1))):
        add_run(tmp_path, str(alpha), noisy, alpha=alpha, seeds=seeds, methods=["mean", OURS])
    found = contest(collect(tmp_path).settings, OURS, "mean", "the mean")
    assert found is not None
    means = [
        [statistics.fmean(noisy(Config(alpha=alpha), method, seed, 1) for alpha in (0.1, 0.5)) for seed in range(4)]
        for method in (OURS, "mean")
    ]
    low, high = ttest_rel(means[0], means[1]).confidence_interval()
    assert (found.other, found.complete, len(found.differences), found.difference.seeds) == ("the mean", 2, 3, 4)
    assert found.difference.half_width == pytest.approx((high - low) / 2)
    assert found.difference.mean == pytest.approx((high + low) / 2)
    assert contest(collect(tmp_path).settings, OURS, "fedavg") is None


def test_conclusions_say_where_ours_loses(tmp_path: Path) -> None:
    found = conclusions(alphas(tmp_path, 0.1, 0.5))
    assert found[0] == f"{OURS}, the strongest form of NP Merge here, reaches 63.5 % on average over 2 settings."
    interval = "(95 % interval +27.5 to +27.5, 3 seeds)"
    assert found[1] == f"+27.5 points {interval} against fedavg; ahead in 2 of 2 settings."
    assert found[2] == (
        "+2.5 points (95 % interval +2.5 to +2.5, 3 seeds) against finetune, the strongest control that is one model; "
        "ahead in 1 of 2 settings. Behind in: α = 0.5 (−5.0)."
    )
    assert "each setting's best control that is one model" in found[3]
    assert "ensemble, the strongest ensemble" in found[4]


def test_without_ours_there_is_nothing_to_conclude(tmp_path: Path) -> None:
    add_run(tmp_path, "only", methods=["fedavg", "mean"])
    assert conclusions(collect(tmp_path)) == [
        "No form of NP Merge has results in half of its settings: there is nothing to conclude about it."
    ]


def test_settings_in_which_clients_are_only_trained_do_not_count(tmp_path: Path) -> None:
    add_run(tmp_path, "merged")
    for limit in (20, 40, 60):
        add_run(tmp_path, f"trained-{limit}", methods=["fedavg", "mean"], server_limit=limit)
    first, *_ = conclusions(collect(tmp_path))
    assert first == f"{OURS}, the strongest form of NP Merge here, reaches 66.0 % on average over 1 setting."


def test_what_varies_with_another_setting_is_not_named_beside_it(tmp_path: Path) -> None:
    def behind(_: Config, method: str, *__: object) -> float:
        return 0.9 if method == "ensemble" else 0.5

    for name, model, rate in (("small", "mlp", 0.05), ("large", "cnn", 0.02)):
        add_run(tmp_path, name, behind, model=model, lr=rate)
    found = conclusions(collect(tmp_path))[-1]
    assert found.endswith("Behind in: cnn (−40.0); mlp (−40.0).")
    assert collect(tmp_path).varying == ("model", "lr")


def test_a_figure_shows_ours_fedavg_the_best_ensemble_and_the_strongest_controls(tmp_path: Path) -> None:
    order = [f"activations+np:steps={steps}" for steps in range(1, 6)]
    order += [
        "ensemble",
        "finetune",
        "ensemble-counts",
        *(f"finetune:steps={steps}" for steps in range(1, 9)),
        "fedavg",
    ]

    def ranking(_: Config, method: str, *__: int) -> float:
        return 0.9 - 0.02 * order.index(method)

    add_run(tmp_path, "run", ranking, methods=order[::-1], seeds=[0])
    settings = collect(tmp_path).settings
    assert drawn(settings) == [*order[:3], "ensemble", "finetune", "finetune:steps=1", "finetune:steps=2", "fedavg"]
    assert drawn(settings, most=2) == order[:2]


def test_a_method_of_few_settings_is_not_drawn_among_many(tmp_path: Path) -> None:
    alphas(tmp_path, 0.1, 0.5, 1.0)
    add_run(tmp_path, "more", alpha=0.1, methods=["mean"])
    settings = collect(tmp_path).settings
    assert "mean" not in strengths(settings)
    assert "mean" in strengths(settings, [[settings[0]], settings[1:]])


def test_the_best_control_is_one_model_that_finished(tmp_path: Path) -> None:
    (setting,) = alphas(tmp_path, 0.1).settings
    assert best_control(setting) == "finetune"
    add_run(tmp_path, "b", breaking, alpha=0.5)
    assert best_control(collect(tmp_path).settings[1]) == "fedavg"


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("clients", 1, "1 client"),
        (ROUNDS, 30, "30 rounds"),
        (IMAGES, 5000, "5,000 server images"),
        (LABELS, 1, "1 label"),
        ("init", "shared", "shared init"),
        ("proximal-mu", 0.01, "proximal-mu 0.01"),
        ("local-epochs", "1..3", "local-epochs 1..3"),
    ],
)
def test_settings_in_words(name: str, value: int | float | str, text: str) -> None:
    assert phrase(name, value) == text


# Rounds.


def test_rounds_are_compared_with_methods_of_one_round_on_the_same_clients(tmp_path: Path) -> None:
    add_run(tmp_path, "once", alpha=0.1, local_epochs="3")
    add_run(tmp_path, "other", alpha=0.5, local_epochs="3")
    for seed in (0, 1):
        add_run(tmp_path, f"fedavg-{seed}", methods=["fedavg"], seeds=[seed], alpha=0.1, local_epochs="3", rounds=5)
    add_run(tmp_path, "prox", methods=["fedavg"], seeds=[0], alpha=0.1, local_epochs="3", rounds=2, proximal_mu=0.1)
    found = courses(collect(tmp_path))
    assert list(found) == ["α = 0.1"]
    lines = found["α = 0.1"]
    assert set(lines) == {"fedavg", "fedavg, proximal-mu 0.1", OURS, "finetune", "ensemble"}
    assert [point.round for point in lines["fedavg"].points] == [1, 2, 3, 4, 5]
    assert lines["fedavg"].points[2].found.mean == pytest.approx(statistics.fmean([0.5, 0.51])), "by the formula"
    assert [point.num_bytes for point in lines["fedavg"].points] == [4500 * number for number in range(1, 6)]
    assert len(lines[OURS].points) == 1
    (sentence,) = rounds_needed(collect(tmp_path))
    assert sentence == (
        f"One round of {OURS} reaches 66.0 % with 4.5 kB sent (α = 0.1); "
        "fedavg reaches that in round 5, after 22.5 kB; fedavg, proximal-mu 0.1 is at 40.0 % after 2 rounds and 9.0 kB."
    )


def test_bytes_that_are_not_known_are_none(tmp_path: Path) -> None:
    run = add_run(tmp_path, "run", methods=["mean"], seeds=[0], rounds=2)
    config = run.config
    run.append(line(config, "mean", 0, 2, 0.5) | {"bytes_down": None})
    (lines,) = courses(collect(tmp_path)).values()
    assert [point.num_bytes for point in lines["mean"].points] == [4500, None]


def test_runs_of_one_round_have_no_courses(tmp_path: Path) -> None:
    assert courses(alphas(tmp_path, 0.1)) == {}
