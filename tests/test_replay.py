"""Recorded steps: the same bits as steps that are called, whatever a step is."""

from __future__ import annotations

import logging

import pytest
import torch
from problems import SHAPE, blobs, doubles, same
from tapes import on_device, recording
from test_streamed import BOUNDS, FORMS, doubles_with_edges, start_of, streamed
from torch import Tensor, nn

from fedmerge.merge.coordinates import Coordinates, Weights
from fedmerge.merge.descent import Candidate, Schedule, descend
from fedmerge.merge.mixture import FreeMixture
from fedmerge.merge.pair import SigmoidPair
from fedmerge.models import create
from fedmerge.replay import SWITCH, WARM_UP, Replay, records, replay_of
from fedmerge.sgd import LocalTraining
from fedmerge.train import fit

RECIPE = LocalTraining(epochs=3, batch_size=8, lr=0.02, weight_decay=1e-3, proximal_mu=0.1)
CPU = torch.device("cpu")


def fitted(model: nn.Module, start: dict[str, Tensor], size: int, seed: int) -> tuple[dict[str, Tensor], float]:
    stream = torch.Generator().manual_seed(seed)
    return fit(model, start, blobs(size, seed=seed), RECIPE, generator=stream)


@pytest.mark.parametrize("name", ["mlp@0.1", "lenet5", "resnet20@0.25"])
def test_clients_of_a_workspace_share_a_recorded_step_and_train_to_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = create(name, shape=SHAPE, num_classes=3, seed=0)
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = [fitted(model, start, size, seed) for seed, size in enumerate((37, 50, 16))]
    with recording(monkeypatch) as tapes:
        found = [fitted(model, start, size, seed) for seed, size in enumerate((37, 50, 16))]
    assert len(tapes) == 1
    for (ours, loss), (theirs, wanted) in zip(found, expected, strict=True):
        assert same(ours, theirs)
        assert loss == wanted


@pytest.mark.parametrize("groups", ["model", "channel", "parameter"])
@pytest.mark.parametrize("form", FORMS)
def test_a_mixture_replays_its_steps(form: str, groups: str, monkeypatch: pytest.MonkeyPatch) -> None:
    states = doubles_with_edges(3)
    start = start_of("model" if form in BOUNDS else groups, 3)
    both(monkeypatch, lambda: streamed(states, form, groups, start))


def test_a_pair_fine_tuning_and_stacked_mixtures_replay_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = doubles_with_edges(2)
    both(monkeypatch, lambda: SigmoidPair(one, other))
    both(monkeypatch, lambda: Weights(one))
    models = {name: torch.stack([tensor, other[name]]) for name, tensor in one.items()}
    shares = {name: tensor.new_tensor([1.0, 0.0]).view(2, *[1] * tensor.ndim) for name, tensor in one.items()}
    both(monkeypatch, lambda: FreeMixture(one, models, "in-out", shares=shares))
    both(monkeypatch, lambda: FreeMixture(one, models, "coarse-to-fine", shares=shares, pace=5), recorded=0)


def both(monkeypatch: pytest.MonkeyPatch, made: object, recorded: int = 1) -> None:
    """Take steps that are called, and recorded ones."""
    problem, _ = doubles(1)

    def taken() -> list[dict[str, Tensor]]:
        candidate = Candidate({}, 0.05, made)  # type: ignore[arg-type]
        schedule = Schedule(decay=0.5, average=True)
        return list(descend(problem, candidate, {}, problem.data, [0, 7, 25], seed=3, schedule=schedule))

    with monkeypatch.context() as patch:
        on_device(patch)
        expected = taken()
    with recording(monkeypatch) as tapes:
        found = taken()
    assert len(tapes) >= recorded
    assert bool(tapes) == bool(recorded)
    assert all(same(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert not same(found[0], found[-1])


def test_counts_on_a_device_are_those_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def taken() -> dict[str, Tensor]:
        problem, _ = doubles(1)
        made: Coordinates = streamed(doubles_with_edges(3), "affine", "parameter", start_of("model", 3))
        *_, found = descend(problem, Candidate({}, 0.05, lambda: made), {}, problem.data, [0, 30], seed=3)
        return found

    expected = taken()
    on_device(monkeypatch)
    found = taken()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


def test_what_waits_for_a_result_is_called_in_every_step(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Waiting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(36, 3)

        def forward(self, images: Tensor) -> Tensor:
            found: Tensor = self.linear(images.flatten(1))
            return found if float(found.detach().sum()) > 0 else 2 * found

    model = Waiting()
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = fitted(model, start, 40, 1)
    with recording(monkeypatch) as tapes, caplog.at_level(logging.INFO):
        found = fitted(model, start, 40, 1)
    assert not tapes
    assert same(found[0], expected[0])
    assert "cannot be recorded: a result is waited for" in caplog.text


def test_a_model_that_drops_out_is_never_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    expected = fitted(model, start, 40, 1)
    with recording(monkeypatch) as tapes:
        assert same(fitted(model, start, 40, 1)[0], expected[0])
    assert not tapes


def test_a_recorded_step_belongs_to_tensors_and_settings_and_inputs_stay_as_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Linear(4, 2)
    with recording(monkeypatch) as tapes:
        replay = replay_of(model, CPU)
        assert replay_of(model, CPU) is replay
        given = [torch.full((3, 4), float(number)) for number in range(WARM_UP + 3)]
        found = [replay(lambda images: [images @ model.weight.T], images)[0] for images in given]
        assert len(tapes) == 1
        for number in range(WARM_UP):
            assert torch.equal(found[number], given[number] @ model.weight.T)  # type: ignore[arg-type]
        assert torch.equal(found[-1], given[-1] @ model.weight.T)  # type: ignore[arg-type]
        assert all(bool((images == number).all()) for number, images in enumerate(given))
        model.weight.data = model.weight.data.clone()
        assert replay_of(model, CPU) is not replay


def test_only_the_first_kinds_of_steps_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    with recording(monkeypatch) as tapes:
        replay = Replay(able=True)
        for _ in range(2 * WARM_UP):
            for size in (2, 3, 4):
                (total,) = replay(lambda images: [2 * images.sum()], torch.ones(size))
                assert total == 2 * size
    assert len(tapes) == 2


def test_steps_are_recorded_on_gpus_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gpu = nn.Linear(2, 2), torch.device("cuda")
    monkeypatch.delenv(SWITCH, raising=False)
    assert not records(model, gpu)
    monkeypatch.setenv(SWITCH, "1")
    assert records(model, gpu)
    assert not records(model, CPU)
    assert not records(nn.Dropout(0.5), gpu)
    assert records(nn.Dropout(0.5).eval(), gpu)
