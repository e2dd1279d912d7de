from typing import Any

import pytest
import torch
from problems import SHAPE, blobs, problem_of, trained
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.nn.functional import relu

from fedmerge.features import joint_moments, moments, observer, with_reference
from fedmerge.models import create
from fedmerge.rules import RULES
from fedmerge.spaces import Space
from fedmerge.symmetry import symmetry
from fedmerge.trace import traced


def features(name: str, state: dict[str, Tensor], images: Tensor, space: Space) -> Tensor:
    """Run the whole traced model and look at one node: (samples, units)."""
    model = create(name, shape=SHAPE, num_classes=3, seed=0)
    model.load_state_dict(state)
    graph = traced(model, RULES)
    interpreter = fx.Interpreter(graph, garbage_collect_values=False)
    with torch.no_grad():
        interpreter.run(images)
    (node,) = (node for node in graph.graph.nodes if node.name == space.site.node)
    value = interpreter.env[node].movedim(space.site.dim, -1)
    rows: Tensor = value.reshape(-1, value.shape[-1])[:, list(space.site.index)]
    return rows.double()


@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "resnet20@0.25"])
def test_moments_are_the_covariances_over_all_samples(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.covariances.TILE", 7)  # no divisor of the widths
    monkeypatch.setattr("fedmerge.covariances.LATEST", 100)  # less than there are samples, more than in a batch of some
    first, second = (dict(update.state) for update in trained(name, 2))
    images = blobs(150, seed=3).images + 4.0  # a mean that must not cancel the digits
    model = create(name, shape=SHAPE, num_classes=3, seed=0)
    spaces = symmetry(model, images[:2])
    found = moments(model, spaces, [first, second], 1, images)
    for space, with_first, with_itself in zip(spaces, *found, strict=True):
        ours, theirs = features(name, second, images, space), features(name, first, images, space)
        joint = torch.cov(torch.cat([ours, theirs], 1).T, correction=0)
        size = space.size
        assert with_first.joint.count == len(ours)
        for expected, got in (
            (joint[:size, size:], with_first.cross),
            (joint[:size, :size], with_first.own[0]),
            (joint[size:, size:], with_first.own[1]),
            (joint.diagonal()[:size], with_first.variances[0]),
            (joint.diagonal()[size:], with_first.variances[1]),
            (joint[:size, :size], with_itself.cross),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_observer_leaves_out_what_no_site_needs() -> None:
    problem = problem_of("cnn@0.1")
    module = observer(problem.model, problem.spaces)
    names = {name for name, _ in module.named_parameters()}
    assert "9.weight" in dict(problem.model.named_parameters())
    assert "9.weight" not in names


class Preactivated(nn.Module):
    """A ReLU of what a sum still needs, one of what nothing else does, and one of the images themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(5, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, images: Tensor) -> Tensor:
        inside = self.first(relu(images))
        found: Tensor = self.last(relu(input=inside + self.second(torch.relu(inside))))
        return found


def test_a_relu_writes_over_nothing_that_is_needed() -> None:
    model, images = Preactivated(), torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    before = images.clone()
    spaces = symmetry(model, images)
    module = observer(model, spaces)
    written_over = [node.args[0] for node in module.graph.nodes if node.target is torch.relu_]
    assert [str(node) for node in written_over] == ["add"]
    found = module(images)
    assert torch.equal(images, before)
    (expected,) = (relu(inside + model.second(relu(inside))) for inside in [model.first(relu(images))])
    assert any(torch.equal(value, expected) for value in found)
    assert len(spaces) == 1


def test_observing_leaves_the_model_as_it_was() -> None:
    problem = problem_of("resnet20@0.25")
    problem.model.train()
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    moments(problem.model, problem.spaces, [before, before], 0, problem.data.images)
    assert problem.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.model.state_dict().items())
    functional_call(problem.model, before, (problem.data.images,))


@pytest.mark.parametrize("name", ["mlp@0.1", "resnet20@0.25"])
def test_means_are_those_over_all_samples(name: str) -> None:
    first, second = (dict(update.state) for update in trained(name, 2))
    images = blobs(150, seed=3).images + 4.0
    model = create(name, shape=SHAPE, num_classes=3, seed=0)
    spaces = symmetry(model, images[:2])
    for space, joint in zip(spaces, joint_moments(model, spaces, [first, second], images, pairs=()), strict=True):
        for found, state in zip(joint.means, (first, second), strict=True):
            torch.testing.assert_close(found, features(name, state, images, space).mean(0), rtol=1e-5, atol=1e-6)


def test_one_pass_over_all_pairs_gives_the_moments_of_each() -> None:
    problem = problem_of("cnn@0.1", server_examples=200)
    states = [update.state for update in trained("cnn@0.1")]
    images = problem.data.images
    every = joint_moments(
        problem.model, problem.spaces[:1], states, images, pairs={(0, 1), (0, 2), (1, 2)}, alone=problem.spaces[1:]
    )
    for reference in range(3):
        compared = moments(problem.model, problem.spaces, states, reference, images)
        for other, of_model in enumerate(compared):
            got, expected = every[0].between(reference, other), of_model[0]
            assert torch.equal(got.cross, expected.cross)
            for name in ("own", "variances"):
                assert all(map(torch.equal, getattr(got, name), getattr(expected, name)))
            for joint, found in zip(every, of_model, strict=True):
                assert torch.equal(joint.covariance(other, other), found.own[1])
                assert torch.equal(joint.means[other], found.joint.means[other])
    assert all(set(joint.covariances) == {(0, 0), (1, 1), (2, 2)} for joint in every[1:])


def test_without_the_models_own_covariances_the_rest_is_the_same() -> None:
    problem = problem_of("cnn@0.1", server_examples=200)
    states = [update.state for update in trained("cnn@0.1")]
    given = problem.model, problem.spaces[1:], states, problem.data.images
    pairs, last = with_reference(3, 1), problem.spaces[:1]
    whole, rest = (joint_moments(*given, pairs=pairs, alone=last, own=own) for own in (True, False))
    for ours, theirs in zip(rest, whole, strict=True):
        assert all(torch.equal(covariance, theirs.covariances[pair]) for pair, covariance in ours.covariances.items())
        assert all(map(torch.equal, (*ours.means, *ours.variances), (*theirs.means, *theirs.variances)))
    assert all(set(joint.covariances) == pairs for joint in rest[:-1])
    assert set(rest[-1].covariances) == {(0, 0), (1, 1), (2, 2)}


def test_each_model_runs_once_over_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[2][0]))
        return functional_call(*arguments)

    monkeypatch.setattr("fedmerge.features.functional_call", counted)
    problem = problem_of("mlp@0.1", server_examples=200)
    states = [update.state for update in trained("mlp@0.1")]
    joint_moments(problem.model, problem.spaces, states, problem.data.images, pairs={(0, 1), (0, 2), (1, 2)})
    assert sorted(calls) == [72] * 3 + [128] * 3
