"""The server knows the classes of a part of its images: who learns from what, and what is told before clients train."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from grids import in_process
from problems import SHAPE, hiding, problem_of, same, trained
from torch import Tensor

from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.merge.objective import Objective
from fedmerge.models import create
from fedmerge.oneshot import check_needs, lesson, merge_updates, teach
from fedmerge.problem import UNKNOWN, Examples, Update
from fedmerge.runs import Run
from fedmerge.server import collect, serve
from fedmerge.settings import ConfigurationError
from fedmerge.strategy import OneShotMerge
from fedmerge.train import evaluate

QUICK = "lrs=0.01:steps=20"


def every(number: int, of: int) -> Tensor:
    return torch.arange(number) % of > 0


# The protocol.


@pytest.mark.parametrize(("labelled", "folds"), [(0, 0), (49, 0), (50, 3), (499, 3), (500, 1)])
def test_known_classes_alone_judge_and_other_images_are_in_every_part_to_learn_on(labelled: int, folds: int) -> None:
    problem = problem_of("mlp@0.1", server_examples=700)
    part = hiding(problem, torch.randperm(700, generator=torch.Generator().manual_seed(1)) >= labelled)
    assert len(part.folds) == folds
    assert part.may_choose is (folds > 0)
    assert len(part.labelled) == labelled
    for learn, validation in part.folds:
        assert validation.labelled
        assert len(learn) + len(validation) == 700
        assert int((~learn.known).sum()) == 700 - labelled
    assert len(part.validation) == (100 if folds == 1 else labelled)


def test_the_folds_of_the_known_are_those_of_a_server_that_has_nothing_else() -> None:
    part = hiding(problem_of("mlp@0.1", server_examples=200), every(200, 2))
    alone = part.restricted(part.labelled)
    for (_, validation), (_, other) in zip(part.folds, alone.folds, strict=True):
        assert torch.equal(validation.images, other.images)


def test_an_evaluation_counts_known_classes_alone() -> None:
    problem, (update, *_) = problem_of("mlp@0.1"), trained("mlp@0.1")
    part = hiding(problem, every(60, 3))
    states = [update.state]
    every_image, known = (evaluate(problem.model, states, data) for data in (part.data, part.labelled))
    assert every_image.accuracy == known.accuracy
    assert every_image.per_class_accuracy == known.per_class_accuracy
    assert every_image.loss == pytest.approx(known.loss)
    targets = torch.full((60, 3), 1 / 3)
    nothing = Examples(problem.data.images, torch.full((60,), UNKNOWN), targets)
    found = evaluate(problem.model, states, nothing)
    assert found.accuracy != found.accuracy
    assert found.loss > 0
    assert found.per_class_accuracy == (None,) * 3


# Who learns from what.


@pytest.mark.parametrize(
    "method", [f"activations+np:{QUICK}", f"finetune:{QUICK}", f"np-pairwise:{QUICK}", "best-client"]
)
def test_a_method_of_labels_has_the_labelled_images_and_no_other(method: str) -> None:
    part, updates = hiding(problem_of("mlp@0.1", server_examples=180), every(180, 3)), trained("mlp@0.1")
    align, plus, merge = method.partition("+")
    align, merge = (align, merge) if plus else ("identity", method)
    first, second = (
        merge_updates(side, updates, align=align, merge=merge, seed=0)
        for side in (part, part.restricted(part.labelled))
    )
    assert same(first.merged.state, second.merged.state)
    assert first.diagnostics == second.diagnostics
    assert (first.merged.server_examples, first.merged.server_labels) == (60, True)


BLIND = [f"activations+np-distill:{QUICK}", f"finetune-distill:{QUICK}", "fedavg", "mean-head", "ensemble-geometric"]


@pytest.mark.parametrize("method", BLIND)
def test_garbage_in_place_of_labels_or_fewer_labels_change_no_bit_of_a_method_without_labels(method: str) -> None:
    model = "mlp@0.1" if "distill" in method else "resnet20@0.25"  # which has BatchNorm statistics to estimate
    problem, updates = problem_of(model, server_examples=120), trained(model, 2)
    labels = (problem.data.labels + torch.arange(120)) % 3
    garbage = replace(problem, data=Examples(problem.data.images, labels))
    align, plus, merge = method.partition("+")
    align, merge = (align, merge) if plus else ("identity", method)
    sides = [problem, hiding(problem, every(120, 2)), hiding(garbage, every(120, 2)), hiding(problem, every(120, 12))]
    first, *others = (merge_updates(side, updates, align=align, merge=merge, seed=0) for side in sides)
    assert not first.merged.server_labels
    for other in others:
        assert all(map(same, first.merged.states, other.merged.states))
        assert other.diagnostics == first.diagnostics
        assert (other.merged.server_examples, other.merged.server_labels) == (first.merged.server_examples, False)


def test_an_alignment_on_few_labels_is_that_on_none() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=120), trained("mlp@0.1")
    few, none = (
        merge_updates(hiding(problem, hidden), updates, align="auto", merge="mean", seed=0).merged
        for hidden in (every(120, 12), torch.ones(120, dtype=torch.bool))
    )
    assert same(few.state, none.state)
    assert (few.server_examples, few.server_labels) == (120, False)


def test_mergers_share_what_is_prepared_alike() -> None:
    whole = problem_of("mlp@0.1")
    part = hiding(whole, every(60, 2))
    assert lesson(whole, "np") == lesson(whole, "mean") == lesson(whole, "finetune") is None
    assert lesson(part, "np") == lesson(part, "finetune") != lesson(part, "mean")
    assert lesson(whole, "np-distill") == lesson(whole, "finetune-distill") != lesson(whole, "np-semi")


# Labels and a teacher.


def test_completed_targets_are_the_class_where_it_is_known_and_the_teachers_elsewhere() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=100), trained("mlp@0.1")
    part = hiding(problem, torch.arange(100) >= 60)
    hard = Objective("hard", "counts-geometric").teach(part, updates).data.labels
    found = Objective("completed", "counts-geometric").teach(part, updates)
    assert found.data.targets is not None
    assert found.data.targets.sum(1).eq(1).all()
    assert torch.equal(found.data.targets.argmax(1)[:60], problem.data.labels[:60])
    assert torch.equal(found.data.targets.argmax(1)[60:], hard[60:])
    assert found.data.known.tolist() == [True] * 60 + [False] * 40, "known classes judge"
    assert all(validation.labelled for _, validation in found.folds)
    assert (found.taught, found.blind) == (True, False)
    assert Objective("completed").teach(found, updates) is found


def test_too_few_labels_to_judge_by_are_completed_to_do_so() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=100), trained("mlp@0.1")
    found = Objective("completed").teach(hiding(problem, torch.arange(100) >= 40), updates)
    assert found.data.labelled
    assert found.may_choose
    assert torch.equal(found.data.labels[:40], problem.data.labels[:40])


@pytest.mark.parametrize("name", ["np", "finetune"])
def test_the_ends_of_completed_targets_are_labels_and_a_teachers(name: str) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    nothing = hiding(problem, torch.ones(60, dtype=torch.bool))
    for side, end in ((problem, name), (nothing, f"{name}:targets=hard")):
        semi, other = (
            merge_updates(side, updates, align="activations", merge=f"{merge}:{QUICK}", seed=0).merged
            for merge in (f"{name}:targets=completed", end)
        )
        assert same(semi.state, other.state)
        assert semi.server_labels is other.server_labels is (side is problem)


def test_mixed_targets_have_labels_where_they_are_known() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=100), trained("mlp@0.1")
    mixed = Objective("mixed", "counts-geometric", label_share=0.3)
    whole = mixed.teach(problem, updates).data.targets
    soft = Objective("soft", "counts-geometric").teach(problem, updates).data.targets
    found = mixed.teach(hiding(problem, torch.arange(100) >= 60), updates)
    assert found.data.targets is not None
    assert whole is not None
    assert soft is not None
    torch.testing.assert_close(found.data.targets, torch.cat([whole[:60], soft[60:]]))
    assert int(found.data.known.sum()) == 60


def test_semi_supervised_learning_uses_all_images_and_is_chosen_no_worse_than_its_start() -> None:
    part = hiding(problem_of("mlp@0.1", server_examples=150), every(150, 2))
    found = merge_updates(part, trained("mlp@0.1"), align="activations", merge=f"np-semi:{QUICK}", seed=0)
    assert (found.merged.server_examples, found.merged.server_labels) == (150, True)
    told = found.diagnostics["merge"]
    assert (told["targets"], told["teacher"]) == ("mixed", "propagated")
    assert told["validation-loss"] <= told["start-loss"]


# Before clients train.


@pytest.mark.parametrize("merge", ["np", "finetune", "np-distill:teacher=stacked", "np-semi", "ensemble-stacked"])
def test_a_method_that_needs_labels_is_refused_without_them(merge: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"--merge {merge} needs the classes .*none is known.*np-distill"):
        check_needs(merge, labels=False)
    check_needs(merge)


@pytest.mark.parametrize("merge", ["np-distill", "np-semi", "mean-head", "ensemble-counts", "np:start=counts"])
def test_a_method_that_needs_label_counts_is_refused_without_them(merge: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"--merge {merge} needs every client's label counts.*teacher=mean"):
        check_needs(merge, label_counts=False)
    check_needs(merge)


@pytest.mark.parametrize("merge", ["mean", "fedavg", "best-client", "ensemble", "np-distill:teacher=mean"])
def test_a_method_that_needs_nothing_is_taken_without_anything(merge: str) -> None:
    check_needs(merge, labels=False, label_counts=False)


def test_a_strategy_without_labels_merges_by_a_teacher_and_refuses_what_needs_labels() -> None:
    problem = problem_of("mlp@0.1")
    model, images = create("mlp@0.1", shape=SHAPE, num_classes=3, seed=0), problem.data.images
    assert not OneShotMerge(model, images, merge="np-distill").problem.data.known.any()
    for labels in (None, torch.full((60,), UNKNOWN)):
        with pytest.raises(ConfigurationError, match="--merge np needs the classes of the server's images"):
            OneShotMerge(model, images, labels)
    some = problem.data.labels.where(torch.arange(60) < 9, UNKNOWN)
    assert int(OneShotMerge(model, images, some).problem.data.known.sum()) == 9


CONFIG = Config(
    clients=2, local_epochs="1", client_examples=100, model="mlp@0.2", server_examples=60, align="identity", threads=1
)


def test_a_federation_whose_server_has_no_label_is_served_and_one_that_needs_some_stops_first(tmp_path: Path) -> None:
    config = CONFIG.replace(server_labels=0, merge=f"np-distill:{QUICK}")
    run = Run.create(tmp_path / "run", "simulate", config)
    with in_process(config) as grid:
        serve(grid, config, run, pause=0)
    [line] = run.results()
    assert (line["server_examples"], line["server_labels"]) == (60, False)
    assert json.loads((run.path / "partitions" / "seed-0.json").read_text())["server_labelled"] == []
    for changes, message in (
        ({"merge": "np"}, "needs the classes"),
        ({"label_counts": False}, "needs every client's label counts"),
    ):
        wrong = config.replace(**changes)
        with in_process(wrong) as grid, pytest.raises(ConfigurationError, match=message):
            serve(grid, wrong, run, pause=0)
        assert not grid.sent


def test_training_alone_needs_no_label(tmp_path: Path) -> None:
    config = CONFIG.replace(server_labels=0, merge="np")
    with in_process(config) as grid:
        assert len(collect(grid, config, Run.create(tmp_path / "run", "compare", config), pause=0)) == 2


# The command.


def run_command(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


def stored_run(path: Path, **changes: Any) -> Run:
    config = CONFIG.replace(server_examples=80, **changes)
    run = Run.create(path, "compare", config, methods=["mean"], seeds=[0])
    for client in range(2):
        model = create(config.model, shape=(1, 8, 8), num_classes=10, seed=client)
        run.save_update(0, 1, Update(model.state_dict(), 50 + client, client, (5,) * 10, num_bytes=10))
    return run


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--server-labels", "0", "--merge", "np"), "--merge np needs the classes of the server's images"),
        (("--no-label-counts", "--merge", "np-distill"), "--merge np-distill needs every client's label counts"),
        (("--server-labels", "101"), "--server-labels is 101, but the server owns only 100 images"),
        (("--merge", "ensemble-stacked"), "--merge ensemble-stacked ends in several models"),
    ],
)
def test_simulate_refuses_a_method_that_cannot_work_before_it_writes(
    words: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    result = run_command("simulate", "--out", tmp_path / "run", *words)
    assert result.exit_code == 1
    assert message in result.output
    assert not (tmp_path / "run").exists()


def test_one_training_serves_several_budgets_of_labels_each_in_its_folder(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    methods = ("--methods", f"best-client,np:{QUICK},np-distill:{QUICK}")
    refused = run_command("merge", run.path, "--server-labels", "60", *methods)
    assert refused.exit_code == 1
    assert "--server-labels is 60, but the run in" in refused.output
    assert "give the --out of a new folder" in refused.output
    assert not run.results()
    used = {}
    for labels in (60, 0):
        out = tmp_path / f"labels-{labels}"
        result = run_command("merge", run.path, "--server-labels", str(labels), "--out", out, *methods)
        assert result.exit_code == (0 if labels else 1), result.output
        again = Run.open(out)
        assert again.config == run.config.replace(server_labels=labels)
        used[labels] = {line["method"].partition(":")[0]: line for line in again.results()}
    assert [used[60][name]["server_examples"] for name in ("best-client", "np", "np-distill")] == [60, 60, 80]
    assert used[0]["np"]["status"] == "failed"
    assert "needs the classes of the server's images" in used[0]["np"]["error"]
    assert used[0]["np-distill"]["accuracy"] == used[60]["np-distill"]["accuracy"]
    same_labels = run_command("merge", run.path, "--server-labels", "80", "--methods", "mean")
    assert same_labels.exit_code == 0, same_labels.output
    assert [line["method"] for line in run.results()] == ["mean"]


def test_a_run_is_merged_again_in_little_memory(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    words = "merge", run.path, "--low-memory", "--methods", f"np:{QUICK}"
    assert "--low-memory is True, but the run in" in run_command(*words).output
    result = run_command(*words, "--out", tmp_path / "small")
    assert result.exit_code == 0, result.output
    again = Run.open(tmp_path / "small")
    assert again.config == run.config.replace(low_memory=True)
    assert [line["status"] for line in again.results()] == ["ok"]


def test_one_training_serves_several_budgets_of_images(tmp_path: Path) -> None:
    run = stored_run(tmp_path / "run")
    methods = ("--methods", f"mean,np:{QUICK},np-distill:{QUICK}")
    refused = run_command("merge", run.path, "--server-limit", "60", "--server-labels", "9", *methods)
    assert "--server-labels is 9 and --server-limit is 60, but the run in" in refused.output
    assert "has -1, -1: give the --out of a new folder" in refused.output
    lines = {}
    for limit in (60, 80):
        budget = ("--server-limit", str(limit), "--server-labels", "55")
        out = tmp_path / f"limit-{limit}"
        result = run_command("merge", run.path, *budget, "--out", out, *methods)
        assert result.exit_code == 0, result.output
        lines[limit] = {line["method"].partition(":")[0]: line for line in Run.open(out).results()}
    assert [lines[60][name]["server_examples"] for name in ("np", "np-distill")] == [55, 60]
    assert [lines[80][name]["server_examples"] for name in ("np", "np-distill")] == [55, 80]
    assert lines[60]["np"]["accuracy"] == lines[80]["np"]["accuracy"], "the labelled images are the same"
    assert lines[60]["mean"]["accuracy"] == lines[80]["mean"]["accuracy"], "the clients are the same"


def test_a_problem_is_taught_once() -> None:
    part, updates = hiding(problem_of("mlp@0.1"), every(60, 2)), trained("mlp@0.1")
    for merge in ("np", "np-distill", "np-semi", "np:targets=hard:teacher=stacked"):
        once = teach(part, updates, merge=merge)
        assert teach(once, updates, merge=merge) is once
    assert teach(part, updates, merge="mean") is part
