"""AdaMerging against autograd through the merge, in float64, with labels and by entropy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from problems import TwoLayers, blobs, problem_of, same, trained
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fedmerge.merge.adamerging import AdaMerging
from fedmerge.merge.average import mean_state
from fedmerge.problem import Examples, Problem, Update
from fedmerge.seeds import fork
from fedmerge.settings import ConfigurationError
from fedmerge.train import batches

Loss = Callable[[Tensor, Tensor], Tensor]


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def entropy(logits: Tensor, _: Tensor) -> Tensor:
    shares = logits.softmax(1)
    return -(shares * shares.log()).sum(1).mean()


def doubles(count: int) -> tuple[Problem, list[Update]]:
    model, chance = TwoLayers().double().eval(), torch.Generator().manual_seed(11)
    states = [
        {
            name: 0.4 * torch.randn(tensor.shape, generator=chance).double()
            for name, tensor in model.state_dict().items()
        }
        for _ in range(count + 1)
    ]
    examples = blobs(30, seed=9)  # too few to choose on: the first learning rate, all steps
    problem = Problem(model, Examples(examples.images.double(), examples.labels), batch_size=8, start=states[0])
    return problem, [Update(state, 1, client) for client, state in enumerate(states[1:])]


@pytest.mark.parametrize(
    ("method", "loss"),
    [
        (AdaMerging(average=False, lrs=(0.02,), steps=25), functional.cross_entropy),
        (AdaMerging(average=False, lrs=(0.02,), steps=25, entropy=True), entropy),
    ],
    ids=["labels", "entropy"],
)
def test_it_is_autograd_through_the_merge(method: AdaMerging, loss: Loss) -> None:
    problem, updates = doubles(3)
    start = problem.start
    assert start is not None
    coefficients = {name: torch.full((3,), 1 / 3, dtype=torch.float64, requires_grad=True) for name in start}

    def merged() -> dict[str, Tensor]:
        return {
            name: tensor
            + sum(
                share * (update.state[name] - tensor) for share, update in zip(coefficients[name], updates, strict=True)
            )
            for name, tensor in start.items()
        }

    optimizer = torch.optim.Adam(coefficients.values(), lr=0.02)
    chance = torch.Generator().manual_seed(fork(stream()))
    order = [index for _ in range(10) for index in batches(30, 8, chance)][:25]
    for index in order:
        optimizer.zero_grad()
        loss(
            functional_call(problem.model, merged(), (problem.data.images[index],)), problem.data.labels[index]
        ).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    found = method(problem, updates, generator=stream()).state
    for name, tensor in merged().items():
        torch.testing.assert_close(found[name], tensor.detach(), rtol=1e-9, atol=1e-11)


def test_it_starts_at_the_mean() -> None:
    problem, updates = doubles(3)
    found = AdaMerging(lrs=(1e-300,), steps=1, entropy=True)(problem, updates, generator=stream()).state
    for name, tensor in mean_state([update.state for update in updates]).items():
        torch.testing.assert_close(found[name], tensor)


def test_entropy_needs_no_label_and_falls() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=200), trained("mlp@0.1", shared=True)
    method = AdaMerging(entropy=True)
    found = method(problem, updates, generator=stream())
    assert (found.server_labels, found.server_examples) == (False, 200)
    unlabelled = replace(problem, data=Examples.unlabelled(problem.data.images))
    assert same(found.state, method(unlabelled, updates, generator=stream()).state)
    images = problem.data.images
    before, after = (
        float(entropy(functional_call(problem.model, state, (images,)), images))
        for state in (mean_state([update.state for update in updates]), found.state)
    )
    assert after < before


def test_it_needs_the_start_and_one_objective() -> None:
    problem = replace(problem_of("mlp@0.1"), start=None)
    with pytest.raises(ConfigurationError, match="AdaMerging needs the weights that all clients started from"):
        AdaMerging()(problem, trained("mlp@0.1"), generator=stream())
    with pytest.raises(ValueError, match="entropy has no targets, got targets=hard"):
        AdaMerging(entropy=True, targets="hard")
