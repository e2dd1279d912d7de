"""The gate, and the choice by the protocol that it shares with other aligners."""

from functools import partial
from typing import Any

import pytest
import torch
from problems import SHAPE, TwoLayers, problem_of, same, trained
from torch import Tensor, nn

from fedmerge.align.auto import Auto
from fedmerge.align.cca import CCA
from fedmerge.align.choice import Unusable, choose
from fedmerge.align.comparison import Comparison
from fedmerge.align.identity import Identity
from fedmerge.align.zipit import ZipIt
from fedmerge.calibrate import calibrate
from fedmerge.catalogue import ALIGNERS
from fedmerge.covariances import Joint
from fedmerge.features import joint_moments
from fedmerge.merge.average import mean_state
from fedmerge.methods import resolve
from fedmerge.problem import Aligned, Examples, Problem
from fedmerge.spaces import UnsupportedOperation
from fedmerge.train import evaluate


def auto(problem: Problem, states: list[dict[str, Tensor]]) -> Aligned:
    return Auto()(problem, states, 0, generator=torch.Generator().manual_seed(5))


def models(name: str, count: int = 3, *, shared: bool = False) -> list[dict[str, Tensor]]:
    return [dict(update.state) for update in trained(name, count, shared=shared)]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("examples", [100, 500])
def test_it_is_never_worse_than_no_alignment_on_validation_data(shared: bool, examples: int) -> None:
    problem, states = problem_of("mlp@0.2", server_examples=examples), models("mlp@0.2", shared=shared)
    found = auto(problem, states)
    losses = found.diagnostics["validation-losses"]
    chosen = losses[found.diagnostics["chosen"]]
    assert chosen == min(losses.values()) <= losses["identity"]
    assert found.diagnostics["failed"] == {}
    plain = [
        evaluate(problem.model, [calibrate(problem.model, mean_state(states), learn.images)], validation).loss
        for learn, validation in problem.folds
    ]
    assert losses["identity"] == pytest.approx(sum(plain) / len(plain))
    if examples == 500:
        kept = evaluate(problem.model, [mean_state(found.states)], problem.validation).loss
        assert kept == pytest.approx(chosen)


def test_every_name_that_is_tried_is_an_aligner_with_its_options() -> None:
    losses = auto(problem_of("mlp@0.1"), models("mlp@0.1")).diagnostics["validation-losses"]
    assert {"identity", "activations", "weights", "universe"} < set(losses)
    assert sum(name.startswith("cca:") for name in losses) == len(CCA().ridges)
    for name in losses:
        resolve("aligner", name, ALIGNERS)


def test_zipit_is_tried_where_it_is_asked_for() -> None:
    problem, states = problem_of("mlp@0.1", server_examples=500), models("mlp@0.1", 2)
    found = Auto(zipit=True)(problem, states, 0, generator=torch.Generator().manual_seed(5))
    losses = found.diagnostics["validation-losses"]
    without = auto(problem, states).diagnostics["validation-losses"]
    assert set(losses) - set(without) == set(ZipIt().candidates(Comparison(problem, states, 0)))
    assert all(losses[name] == loss for name, loss in without.items())
    assert losses[found.diagnostics["chosen"]] == min(losses.values())


@pytest.mark.parametrize("count", [2, 3])
def test_the_models_are_compared_once_for_all_aligners(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    calls: list[int] = []

    def counted(*arguments: Any, **options: Any) -> list[Joint]:
        calls.append(1)
        return joint_moments(*arguments, **options)

    monkeypatch.setattr("fedmerge.align.comparison.joint_moments", counted)
    Auto(zipit=True)(
        problem_of("mlp@0.1", server_examples=500), models("mlp@0.1", count), 0, generator=torch.Generator()
    )
    assert calls == [1]


def test_a_candidate_is_calibrated_on_at_most_1024_images_from_all_of_the_part() -> None:
    problem, states = problem_of("vgg11-bn@0.05", server_examples=1400), models("vgg11-bn@0.05", 2)
    found = choose(problem, lambda _: {name: lambda: Aligned(tuple(states)) for name in ("one", "other")})
    ((learn, validation),) = problem.folds
    assert len(learn) == 1120
    mean = calibrate(problem.model, mean_state(states), learn.images[::2])
    assert found.losses["one"] == evaluate(problem.model, [mean], validation).loss


@pytest.mark.parametrize("examples", [60, 600])
def test_what_is_chosen_is_what_its_name_gives(examples: int) -> None:
    problem, states = problem_of("mlp@0.2", server_examples=examples), models("mlp@0.2")
    found = auto(problem, states)
    by_name = resolve("aligner", found.diagnostics["chosen"], ALIGNERS)
    assert found.diagnostics["chosen"] != "identity"
    expected = by_name(problem, states, 0, generator=torch.Generator().manual_seed(5))
    assert all(map(same, found.states, expected.states))


def test_below_fifty_examples_activations_are_matched() -> None:
    found = auto(problem_of("mlp@0.1", server_examples=49), models("mlp@0.1"))
    assert (found.diagnostics["chosen"], found.diagnostics["validation-losses"]) == ("activations", {})
    assert not found.server_labels


class Unfollowed(TwoLayers):
    def forward(self, images: Tensor) -> Tensor:
        hidden: Tensor = super().forward(images)  # type: ignore[no-untyped-call]
        return hidden if hidden.sum() > -1e9 else -hidden


@pytest.mark.parametrize("examples", [20, 60, 600])
def test_what_cannot_follow_a_model_is_left_out_by_name(examples: int) -> None:
    data = Examples(torch.randn(examples, *SHAPE), torch.arange(examples) % 3)
    problem = Problem(Unfollowed().eval(), data)
    states = [dict(Unfollowed().state_dict()) for _ in range(2)]
    found = auto(problem, states)
    assert found.diagnostics["chosen"] == "identity"
    assert all(map(same, found.states, states))
    assert "torch.fx cannot trace Unfollowed" in found.diagnostics["failed"]["activations"]
    if examples >= 50:
        assert set(found.diagnostics["validation-losses"]) == {"identity"}


def refused() -> Aligned:
    raise UnsupportedOperation("it cannot be done")


def test_a_choice_in_which_all_fail_raises_the_failure() -> None:
    with pytest.raises(UnsupportedOperation, match="it cannot be done"):
        choose(problem_of("mlp@0.1"), lambda _: {"first": refused, "second": refused})


def test_a_loss_that_is_not_finite_leaves_a_candidate_out() -> None:
    problem, (first, second) = problem_of("mlp@0.1"), models("mlp@0.1", 2)
    broken = {name: tensor * 1e30 for name, tensor in second.items()}
    alignments = {"broken": Aligned((broken, broken)), "whole": Aligned((first, second))}
    found = choose(problem, lambda _: {name: partial(dict.__getitem__, alignments, name) for name in alignments})
    assert found.name == "whole"
    assert set(found.losses) == {"whole"}
    assert "validation loss is" in found.failed["broken"]
    with pytest.raises(Unusable):
        choose(problem, lambda _: {name: lambda: Aligned((broken, broken)) for name in ("first", "second")})


def test_a_fault_of_ours_is_not_taken_for_a_candidate_that_fails() -> None:
    def faulty() -> Aligned:
        raise KeyError("1.weight")

    with pytest.raises(KeyError):
        choose(problem_of("mlp@0.1"), lambda _: {"faulty": faulty, "other": refused})


def test_candidates_are_fitted_on_what_they_are_not_judged_on() -> None:
    problem, states = problem_of("mlp@0.1", server_examples=60), models("mlp@0.1", 2)
    seen: list[int] = []

    def candidates(part: Problem) -> dict[str, object]:
        seen.append(len(part.learn))
        whole = Identity()(part, states, 0, generator=torch.Generator())
        return {"one": lambda: whole, "other": lambda: whole}

    choose(problem, candidates)  # type: ignore[arg-type]
    assert seen == [60, 40, 40, 40]


def test_a_restricted_problem_keeps_its_spaces() -> None:
    problem = problem_of("mlp@0.1")
    assert "spaces" not in vars(problem.restricted(problem.data[:10]))
    spaces = problem.spaces
    part = problem.restricted(problem.data[:10])
    assert part.spaces is spaces
    assert len(part.data) == 10
    assert isinstance(part.model, nn.Module)
