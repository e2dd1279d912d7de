import pytest
import torch
from problems import SHAPE, blobs, problem_of, trained
from torch import Tensor, fx
from torch.func import functional_call

from fedmerge.features import moments, observer
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
def test_moments_are_the_covariances_over_all_samples(name: str) -> None:
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
