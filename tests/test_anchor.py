"""Clients that fit their units to a public anchor before they send: nothing is lost, and a mean is of more use."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from grids import in_process
from problems import doubles
from torch import Tensor

from fedmerge import federation, models
from fedmerge.anchor import anchored, trained_anchor
from fedmerge.basis import Permutation, rebase
from fedmerge.client import train_client
from fedmerge.compare import Bench
from fedmerge.config import Config
from fedmerge.federation_models import of_server
from fedmerge.merge.average import mean_state
from fedmerge.problem import Examples
from fedmerge.runs import Run
from fedmerge.server import collect, serve
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate

CONFIG = Config(split="development", align="identity", merge="mean", screen="off", threads=1)


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_a_renamed_model_is_fitted_back_to_its_original() -> None:
    problem, (state,) = doubles(1)
    order = torch.randperm(5, generator=stream())
    renamed = rebase(state, problem.spaces, [Permutation(order)])
    assert not same(renamed, state)
    assert same(anchored(problem.model, renamed, state, problem.data.images[:2], generator=stream()), state)


@pytest.mark.parametrize("name", ["mlp@0.2", "lenet5", "resnet20@0.25"])
def test_the_function_of_a_model_is_unchanged(name: str) -> None:
    model, other = (models.create(name, shape=(1, 16, 16), num_classes=4, seed=seed).double() for seed in (0, 1))
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    images = torch.randn(8, 1, 16, 16, generator=stream(), dtype=torch.float64)
    before = model(images)
    found = anchored(model, state, other.state_dict(), images[:2], generator=stream())
    assert not same(found, state)
    assert same(state, model.state_dict())
    model.load_state_dict(found)
    assert torch.allclose(model(images), before, atol=1e-12)


def test_a_mean_of_anchored_models_is_far_above_that_of_the_same_models_as_they_came(tmp_path: Path) -> None:
    """At the clients: what a server that sees their sum alone can do."""
    accuracies, updates = {}, {}
    for anchor in (False, True):
        config = CONFIG.replace(anchor=anchor)
        run = Run.create(tmp_path / str(anchor), "simulate", config)
        with in_process(config) as grid:
            serve(grid, config, run, pause=0)
        [result] = run.results()
        assert (result["bytes_down"] > 0) is anchor
        accuracies[anchor], updates[anchor] = result["accuracy"], run.load_updates(0)
    for plain, fitted in zip(updates[False], updates[True], strict=True):
        assert not same(dict(plain.state), dict(fitted.state))
        assert fitted.metrics["accuracy"] == plain.metrics["accuracy"]
    assert accuracies[True] > accuracies[False] + 0.1


def test_a_client_sends_its_own_training_fitted_to_what_it_was_sent_and_needs_that() -> None:
    examples = federation.load(CONFIG)
    anchor = trained_anchor(of_server(CONFIG, examples), examples.server, seed=0)
    config = CONFIG.replace(anchor=True, local_epochs="1")
    update = train_client(config, examples, 1, 1, anchor)
    plain = train_client(CONFIG.replace(local_epochs="1"), examples, 1, 1, None)
    model = of_server(CONFIG, examples)
    assert not same(dict(update.state), dict(plain.state))
    outputs = [evaluate(model, [of.state], examples.client(1)).loss for of in (update, plain)]
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-5)
    with pytest.raises(ValueError, match="the server sent no anchor in round 1"):
        train_client(config, examples, 1, 1, None)


def test_the_anchor_is_trained_on_the_servers_labelled_images_alone() -> None:
    examples = federation.load(CONFIG)
    model = of_server(CONFIG, examples)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    known = torch.arange(len(examples.server)) < 60
    partly = Examples(examples.server.images, examples.server.labels.where(known, -1))
    anchor = trained_anchor(model, partly, seed=0)
    assert same(anchor, trained_anchor(model, examples.server[:60], seed=0))
    assert not same(anchor, trained_anchor(model, examples.server[:60], seed=1))
    assert same(before, model.state_dict())
    assert evaluate(model, [anchor], examples.server[:60]).accuracy > 0.9
    with pytest.raises(ConfigurationError, match="--anchor needs the classes of some of the server's images"):
        trained_anchor(model, Examples.unlabelled(examples.server.images), seed=0)


def test_an_anchor_is_no_start_that_task_vectors_could_be_taken_from(tmp_path: Path) -> None:
    config = CONFIG.replace(anchor=True, local_epochs="1", merge="ties")
    run = Run.create(tmp_path / "run", "simulate", config)
    with in_process(config) as grid, pytest.raises(ConfigurationError, match="init shared"):
        serve(grid, config, run, pause=0)


def test_a_comparison_has_anchored_clients_too_and_counts_what_was_sent(tmp_path: Path) -> None:
    config = CONFIG.replace(anchor=True, local_epochs="1", clients=2)
    run = Run.create(tmp_path / "run", "compare", config)
    with in_process(config) as grid:
        updates = collect(grid, config, run, pause=0)
    examples = federation.load(config)
    anchor = trained_anchor(of_server(config, examples), examples.server, seed=0)
    assert same(dict(updates[1].state), dict(train_client(config, examples, 1, 1, anchor).state))
    bench = Bench(config.to_mapping(), examples, updates)
    [(line, states, _)] = bench.answer("mean")
    assert line["bytes_down"] == sum(update.num_bytes for update in updates)
    assert same(dict(states[0]), mean_state([update.state for update in updates]))


@pytest.mark.parametrize("settings", [{"models": "mlp:3,cnn:2"}, {"devices": "layers=1:1", "init": "shared"}])
def test_parts_of_models_and_models_of_other_architectures_have_no_anchor(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match="--anchor renames the units of whole models of one architecture"):
        replace(CONFIG, anchor=True, **settings)
