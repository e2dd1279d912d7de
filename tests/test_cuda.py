"""What a GPU must keep: the CPU's numbers in float64, the same bits for the same seed, memory by its own meter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gpus import DEVICE, NEEDS_GPU, assert_close, in_doubles, moved, on_gpu
from problems import SHAPE, blobs, doubles, problem_of, same, trained, with_statistics
from test_batched import chain, convolutional, trainings
from test_streamed import BOUNDS, FORMS, doubles_with_edges, stacked, start_of, streamed
from torch import Tensor, nn

from fedmerge.basis import BasisChange, Linear, Permutation
from fedmerge.batched import Training, fit_many
from fedmerge.calibrate import calibrate
from fedmerge.catalogue import ALIGNERS, MERGERS, STATISTICS
from fedmerge.examples import Part
from fedmerge.features import joint_moments, with_reference
from fedmerge.machine import reproducible
from fedmerge.merge import kernels
from fedmerge.merge.coordinates import Coordinates
from fedmerge.merge.descent import Candidate, Schedule, descend
from fedmerge.merge.mixture import GROUPS
from fedmerge.merge.pair import SigmoidPair
from fedmerge.methods import resolve
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem
from fedmerge.sgd import LocalTraining
from fedmerge.train import evaluate, fit, log_probabilities
from fedmerge.updatefiles import read_update, update_to_bytes

pytestmark = NEEDS_GPU


def budget(name: str) -> str:
    """Few steps for what takes steps."""
    target = MERGERS[name].target.partition(":")[2]
    return ":steps=20:lrs=0.01" if target in ("NPMerge", "PairwiseNPMerge", "FineTune", "AdaMerging") else ""


MERGES = [name + budget(name) for name in MERGERS]


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


# Training.


@pytest.mark.parametrize("name", ["mlp@0.1", "lenet5", "cnn@0.1", "resnet20@0.25", "vgg11@0.05"])
def test_training_gives_the_same_bits_again_and_the_numbers_of_the_cpu(name: str) -> None:
    recipe = LocalTraining(epochs=2, batch_size=16, lr=0.02, weight_decay=1e-3, proximal_mu=0.1)
    model = create(name, shape=SHAPE, num_classes=3, seed=0).double()
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    examples = Examples(blobs(70, seed=1).images.double(), blobs(70, seed=1).labels)
    with reproducible():
        expected, loss = fit(model, start, examples, recipe, generator=stream())
        model.to(DEVICE)
        found, mean_loss = fit(model, moved(start), examples.to(DEVICE), recipe, generator=stream())
        assert_close(found, expected)
        assert mean_loss == pytest.approx(loss, rel=1e-5)
        model.float()
        single = {key: tensor.float() if tensor.is_floating_point() else tensor for key, tensor in moved(start).items()}
        own = Examples(examples.images.float().to(DEVICE), examples.labels.to(DEVICE))
        first, again = (fit(model, single, own, recipe, generator=stream())[0] for _ in range(2))
    assert same(first, again)


def test_dropout_follows_the_seed_on_the_gpu_too() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 3)).to(DEVICE)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    first, again, other = (
        fit(
            model,
            start,
            blobs(40, seed=1).to(DEVICE),
            LocalTraining(epochs=2),
            generator=torch.Generator().manual_seed(seed),
        )[0]
        for seed in (1, 1, 2)
    )
    assert same(first, again)
    assert not same(first, other)


def on_the_gpu(training: Training) -> Training:
    return replace(training, start=moved(training.start), part=Part.of_all(training.part.whole.to(DEVICE)))


@pytest.mark.parametrize("kind", ["chain", "convolutional"])
def test_clients_train_together_as_alone(kind: str) -> None:
    model, shape = (chain(), (1, 2, 2)) if kind == "chain" else (convolutional(), (1, 8, 8))
    sizes, recipe = (3, 40, 9, 13), LocalTraining(2, 4, 0.1, 0.9, 1e-3, 0.1)
    apart, *together = (trainings(model, sizes, recipe, shape) for _ in range(3))
    expected = [fit(model, one.start, one.part.copied(), one.recipe, generator=one.generator)[0] for one in apart]
    model.to(DEVICE)
    with reproducible():
        first, again = (fit_many(model, [on_the_gpu(one) for one in group]) for group in together)
    for one, other, wanted in zip(first, again, expected, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert_close(one, wanted)
        assert same(one, other)


# Merges.


@pytest.mark.parametrize("merge", MERGES)
def test_every_merge_is_that_of_the_cpu(merge: str) -> None:
    problem, updates = in_doubles("mlp@0.1", shared=True)
    kinds = [kind for kind in STATISTICS if kind in MERGERS[merge.partition(":")[0]].needs]
    updates = with_statistics(problem, updates, kinds) if kinds else updates
    expected = merge_updates(problem, updates, align="identity", merge=merge, seed=0)
    found = merge_updates(on_gpu(problem), updates, align="identity", merge=merge, seed=0)
    for ours, theirs in zip(found.merged.states, expected.merged.states, strict=True):
        assert_close(ours, theirs)
    assert found.merged.diagnostics.keys() == expected.merged.diagnostics.keys()


@pytest.mark.parametrize("name", ["cnn@0.1", "resnet20@0.25"])
@pytest.mark.parametrize(
    "merge",
    [
        *("mean", "pleas:ridges=0.01", "np-pairwise:steps=20:lrs=0.1", "ensemble-propagated", "mean-head"),
        *(
            "np:steps=20:lrs=0.01:groups=channel",
            "np:steps=20:lrs=0.01:groups=parameter",
            "finetune:steps=20:lrs=0.001",
        ),
        *(
            "np:steps=20:lrs=0.01:augment=both:average=true",
            "np-distill:steps=20:lrs=0.01",
            "np-semi:steps=20:lrs=0.01",
        ),
        *("np:steps=20:lrs=0.01:groups=in-out", "np:steps=20:lrs=0.01:groups=coarse-to-fine"),
    ],
)
def test_convolutions_and_batch_norms_are_merged_as_on_the_cpu(name: str, merge: str) -> None:
    problem, updates = in_doubles(name, 220)
    expected = merge_updates(problem, updates, align="activations", merge=merge, seed=0)
    found = merge_updates(on_gpu(problem), updates, align="activations", merge=merge, seed=0)
    for ours, theirs in zip(found.merged.states, expected.merged.states, strict=True):
        assert_close(ours, theirs, rtol=1e-8, atol=1e-9)


def descended(problem: Problem, made: Coordinates, schedule: Schedule) -> list[dict[str, Tensor]]:
    candidate = Candidate({}, 0.05, lambda: made)
    return list(descend(problem, candidate, {}, problem.data, [0, 7, 40], seed=3, schedule=schedule))


@pytest.fixture(params=["operations", "Triton"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a test by PyTorch's operations and by Triton's kernels."""
    monkeypatch.setenv(kernels.SWITCH, str(int(request.param == "Triton")))


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("form", FORMS)
def test_every_mixture_takes_the_steps_of_the_slow_one_on_the_cpu(form: str, groups: str, count: int) -> None:
    states, start = doubles_with_edges(count), start_of(groups, count)
    if form in BOUNDS:
        start = start.within(*BOUNDS[form]) if count > 2 or form == "simplex" else start_of("model", count)
    schedule = Schedule(decay=0.5, average=True) if count == 4 else Schedule()
    problem, _ = doubles(1)
    fast = streamed([moved(state) for state in states], form, groups, start)
    expected = descended(problem, stacked(states, form, groups, start), schedule)
    for ours, theirs in zip(descended(on_gpu(problem), fast, schedule), expected, strict=True):
        assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("way")
def test_a_pair_takes_the_steps_of_the_cpu() -> None:
    states, (problem, _) = doubles_with_edges(2), doubles(1)
    expected = descended(problem, SigmoidPair(*states), Schedule())
    found = descended(on_gpu(problem), SigmoidPair(*map(moved, states)), Schedule())
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("merge", ["np:groups=parameter", "np:groups=channel:form=box", "finetune", "fedavg"])
def test_a_merge_gives_the_same_bits_again(merge: str) -> None:
    problem, updates = problem_of("resnet20@0.25", 20), trained("resnet20@0.25")
    text = merge if merge == "fedavg" else f"{merge}:steps=10:lrs=0.01" if ":" in merge else f"{merge}:steps=10"
    with reproducible():
        first, again = (
            merge_updates(on_gpu(problem), updates, align="activations", merge=text, seed=0).merged.state
            for _ in range(2)
        )
    assert same(first, again)


def test_updates_from_files_are_merged_to_the_same_bits(tmp_path: Path) -> None:
    problem, updates = problem_of("mlp@0.5"), trained("mlp@0.5")
    for update in updates:
        (tmp_path / f"{update.partition_id}").write_bytes(update_to_bytes(update))
    mapped = [read_update(tmp_path / f"{update.partition_id}") for update in updates]
    with reproducible():
        one, other = (
            merge_updates(on_gpu(problem), side, align="activations", merge="np:lrs=0.01:steps=20", seed=0).merged.state
            for side in (updates, mapped)
        )
    assert same(one, other)


# Alignment.


def as_numbers(change: BasisChange) -> list[Tensor]:
    """A change as what decides it."""
    if isinstance(change, Permutation):
        return [change.index]
    return [change.matrix] if isinstance(change, Linear) else list(vars(change).values())


@pytest.mark.parametrize(
    ("align", "name"),
    [
        *(
            (align, name)
            for align in (*ALIGNERS, "weights:start=activations", "activations:passes=2", "weights:passes=2")
            for name in ("mlp@0.1", "resnet20@0.25")
        ),
        ("cca:anchor=none", "mlp@0.1"),  # the narrow ResNet has dead units, on which the map is free
    ],
)
def test_every_alignment_is_that_of_the_cpu(align: str, name: str) -> None:
    problem, updates = in_doubles(name)
    states = [update.state for update in updates]
    aligner = resolve("aligner", align, ALIGNERS)
    expected = aligner(problem, states, 1, generator=stream())
    found = aligner(on_gpu(problem), [moved(state) for state in states], 1, generator=stream())
    for ours, theirs in zip(found.states, expected.states, strict=True):
        assert_close(ours, theirs, rtol=1e-7, atol=1e-8)
    assert (found.changes is None) == (expected.changes is None)
    for mine, others in zip(found.changes or (), expected.changes or (), strict=True):
        for one, other in zip(mine, others, strict=True):
            assert all(map(torch.equal, as_numbers(one), as_numbers(other))) or not isinstance(one, Permutation)


def test_statistics_are_those_of_the_cpu_in_either_precision() -> None:
    problem, updates = in_doubles("resnet20@0.25", 300)
    spaces, pairs = problem.spaces, with_reference(3, 1)
    expected = joint_moments(problem.model, spaces, [one.state for one in updates], problem.data.images, pairs=pairs)
    side = on_gpu(problem)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-2)):
        states = [
            {
                key: tensor.to(dtype) if tensor.is_floating_point() else tensor
                for key, tensor in moved(one.state).items()
            }
            for one in updates
        ]
        found = joint_moments(side.model.to(dtype), spaces, states, side.data.images.to(dtype), pairs=pairs)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.count == theirs.count
            for pair, covariance in theirs.covariances.items():
                largest = float(covariance.abs().max())
                torch.testing.assert_close(
                    ours.covariances[pair], covariance, rtol=0, atol=tolerance * max(largest, 1e-3)
                )


def test_predictions_evaluations_and_calibration_are_those_of_the_cpu() -> None:
    problem, updates = in_doubles("resnet20@0.25", 300)
    states, side = [update.state for update in updates], on_gpu(problem)
    there = [moved(state) for state in states]
    expected = log_probabilities(problem.model, states, problem.data.images)
    torch.testing.assert_close(
        log_probabilities(side.model, there, side.data.images).cpu(), expected, rtol=1e-10, atol=1e-10
    )
    ours, theirs = evaluate(side.model, there, side.data), evaluate(problem.model, states, problem.data)
    assert ours.accuracy == theirs.accuracy
    assert ours.per_class_accuracy == theirs.per_class_accuracy
    assert ours.loss == pytest.approx(theirs.loss, rel=1e-10)
    assert_close(
        calibrate(side.model, there[0], side.data.images), calibrate(problem.model, states[0], problem.data.images)
    )
