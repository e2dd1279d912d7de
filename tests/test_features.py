from typing import Any

import pytest
import torch
from problems import SHAPE, blobs, problem_of, trained
from torch import Tensor, fx
from torch.func import functional_call

from fedmerge.features import joint_moments, moments, observer
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
        assert with_first.count == len(ours)
        for expected, got in (
            (joint[:size, size:], with_first.cross),
            (joint[:size, :size], with_first.reference),
            (joint[size:, size:], with_first.other),
            (joint[:size, :size], with_itself.cross),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_the_observer_leaves_out_what_no_site_needs() -> None:
    problem = problem_of("cnn@0.1")
    module = observer(problem.model, problem.spaces)
    names = {name for name, _ in module.named_parameters()}
    assert "9.weight" in dict(problem.model.named_parameters())
    assert "9.weight" not in names


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
    found, _ = moments(model, spaces, [first, second], 1, images)
    for space, compared in zip(spaces, found, strict=True):
        ours, theirs = (features(name, state, images, space).mean(0) for state in (second, first))
        torch.testing.assert_close(compared.reference_mean, ours, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(compared.other_mean, theirs, rtol=1e-5, atol=1e-6)


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
            got = vars(every[0].between(reference, other))
            assert all(
                torch.equal(torch.as_tensor(got[key]), torch.as_tensor(value))
                for key, value in vars(of_model[0]).items()
            )
            for joint, expected in zip(every[1:], of_model[1:], strict=True):
                assert torch.equal(joint.covariance(other, other), expected.other)
                assert torch.equal(joint.means[other], expected.other_mean)
    assert all(set(joint.covariances) == {(0, 0), (1, 1), (2, 2)} for joint in every[1:])


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
