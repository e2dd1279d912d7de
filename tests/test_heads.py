"""The head of a network: found by what its rows do, averaged by label counts, scaled by a temperature."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import SHAPE, blobs, problem_of, same, trained
from torch import Tensor, nn
from torch.nn import functional

from fedmerge.merge.average import Average, mean_state
from fedmerge.merge.heads import best_scale, find_head, head_rows, scaled_logits
from fedmerge.merge.teacher import class_weights
from fedmerge.models import create
from fedmerge.problem import Problem
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate, predict


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


class LastIsFirst(nn.Module):
    """A classifier whose head is registered first, under a name that says nothing, and is a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.alpha = nn.Conv2d(3, 3, 1, bias=False)
        self.beta = nn.Conv2d(1, 3, 3, padding=1)
        self.gain = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.alpha(torch.tanh(self.beta(images)))
        return maps.relu().mean((2, 3)) * self.gain


class Mixed(nn.Module):
    """A network that mixes its outputs after the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Flatten(), nn.Linear(36, 3))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.inner(images)
        return logits.log_softmax(1)


@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "lenet5", "vgg11-bn@0.1", "resnet20@0.25"])
def test_the_head_is_the_last_layer(name: str) -> None:
    model = create(name, shape=SHAPE, num_classes=3, seed=0)
    *_, weight, bias = dict(model.named_parameters())
    weights = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert find_head(model, model.state_dict(), SHAPE) == (weight, bias)
    assert same(dict(model.state_dict()), weights)


def test_a_hidden_layer_of_as_many_units_as_classes_is_no_head() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    assert find_head(model, model.state_dict(), SHAPE) == ("5.weight", "5.bias")


def test_the_head_is_found_by_what_it_does_and_not_by_its_name_place_or_kind() -> None:
    model = LastIsFirst()
    assert set(find_head(model, model.state_dict(), SHAPE)) == {"alpha.weight", "gain"}


def test_dropout_and_a_dead_layer_do_not_hide_it() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.Dropout(0.9), nn.ReLU(), nn.Linear(3, 3)).train()
    state = model.state_dict()
    state["1.bias"][0] = -1e6  # one unit is dead
    assert find_head(model, state, SHAPE) == ("4.weight", "4.bias")
    assert model.training


def test_a_network_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"Mixed has no head: no weight's rows .* one of its 3 outputs"):
        find_head(Mixed(), Mixed().state_dict(), SHAPE)


def test_rows_are_weighted_by_the_counts_of_their_class() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    found = Average("examples", head="counts", smoothing=2.0)(problem, updates, generator=stream())
    weights = class_weights(torch.tensor([update.label_counts for update in updates], dtype=torch.float64), 2.0)
    body = mean_state([update.state for update in updates], [update.num_examples for update in updates])
    for name, tensor in found.state.items():
        if not name.startswith("5."):
            assert torch.equal(tensor, body[name])
            continue
        for row in range(3):
            expected = sum(weights[k, row].float() * update.state[name][row] for k, update in enumerate(updates))
            torch.testing.assert_close(tensor[row], expected)
    assert found.server_examples == 0
    assert found.server_labels is False


def test_equal_shares_give_the_mean_and_all_of_a_class_its_only_client() -> None:
    states = [update.state for update in trained("mlp@0.1", 2)]
    alike = head_rows(states, ["5.weight"], torch.full((2, 3), 0.5))
    torch.testing.assert_close(alike["5.weight"], mean_state(states)["5.weight"])
    one = head_rows(states, ["5.weight"], torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]]))
    torch.testing.assert_close(one["5.weight"][1], states[1]["5.weight"][1])
    assert torch.equal(one["5.weight"][0], states[0]["5.weight"][0])


def test_a_head_by_counts_needs_counts() -> None:
    problem, updates = problem_of("mlp@0.1"), [replace(item, label_counts=None) for item in trained("mlp@0.1")]
    with pytest.raises(ConfigurationError, match="a head weighted by counts needs every client's label counts"):
        Average(head="counts")(problem, updates, generator=stream())


def test_unknown_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="head must be 'body' or 'counts', got 'both'"):
        Average(head="both")
    with pytest.raises(ValueError, match="smoothing must be"):
        Average(smoothing=-1.0)


# Temperature.


def test_the_best_scale_is_where_the_loss_is_least() -> None:
    logits, labels = torch.randn(200, 4, generator=stream()), torch.randint(4, (200,), generator=stream())
    logits[torch.arange(200), labels] += 1.0
    found = best_scale(logits, labels)
    losses = {
        factor: float(functional.cross_entropy(found * factor * logits.double(), labels)) for factor in (0.97, 1, 1.03)
    }
    assert losses[1] < min(losses[0.97], losses[1.03])
    assert best_scale(logits / 7, labels) == pytest.approx(7 * found, rel=1e-6)


def test_a_temperature_changes_the_loss_and_no_prediction() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=200), trained("mlp@0.1")
    plain = Average()(problem, updates, generator=stream())
    warm = Average(temperature=True)(problem, updates, generator=stream())
    scale = 1 / warm.diagnostics["temperature"]
    before, after = (predict(problem.model, item.state, problem.data.images) for item in (plain, warm))
    torch.testing.assert_close(after, scale * before, rtol=1e-4, atol=1e-4)
    losses = [evaluate(problem.model, item.states, problem.validation).loss for item in (plain, warm)]
    assert losses[1] < losses[0]
    assert warm.server_labels is True
    few = replace(problem, data=problem.data[:20])
    assert same(Average(temperature=True)(few, updates, generator=stream()).state, plain.state)


def test_a_network_whose_logits_do_not_scale_with_its_head_has_no_temperature() -> None:
    model = LastIsFirst()  # twice the weight and twice the gain are four times the logits
    head = find_head(model, model.state_dict(), SHAPE)
    with pytest.raises(ConfigurationError, match="do not scale with its head"):
        scaled_logits(model, model.state_dict(), head, 2.0, blobs(5, seed=0).images)


def test_a_temperature_is_set_on_a_problem_with_batch_norm_after_its_statistics() -> None:
    updates = trained("resnet20@0.25", 2)
    problem = Problem(create("resnet20@0.25", shape=SHAPE, num_classes=3, seed=0), blobs(60, seed=7))
    found = Average(temperature=True)(problem, updates, generator=stream())
    calibrated = Average()(problem, updates, generator=stream())
    assert torch.equal(found.state["1.running_mean"], calibrated.state["1.running_mean"])
    assert found.diagnostics["temperature"] > 0
