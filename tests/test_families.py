"""Families of architectures: who belongs together, and what they become."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from problems import SHAPE, problem_of, same, trained

from fedmerge.families import families_of
from fedmerge.models import create
from fedmerge.problem import Problem, Update
from fedmerge.train import predict


def problem_with(server: str, *others: str) -> Problem:
    models = {name: create(name, shape=SHAPE, num_classes=3, seed=1) for name in others}
    return problem_of(server).changed(others=models)


def clients(*names: str) -> list[Update]:
    """Clients of architectures by name, the empty name that of `mlp@0.1`."""
    found = []
    for place, name in enumerate(names):
        state = create(name or "mlp@0.1", shape=SHAPE, num_classes=3, seed=place).state_dict()
        found.append(Update(dict(state), 10 + place, place, (1, 2, place), model=name))
    return found


def test_the_servers_architecture_is_the_target_of_all_that_can_become_it_even_where_no_client_has_it() -> None:
    problem = problem_with("mlp@0.1", "mlp@0.2", "mlp@0.05", "lenet5@0.5")
    families = families_of(problem, clients("mlp@0.2", "lenet5@0.5", "mlp@0.05"))
    assert [(family.target, family.clients) for family in families] == [("", (0, 2)), ("lenet5@0.5", (1,))]
    assert families[0].relations == {"mlp@0.2": "width", "mlp@0.05": "width"}


def test_other_families_become_the_architecture_into_which_most_clients_can_go_and_of_these_the_largest() -> None:
    problem = problem_with("lenet5@0.5", "mlp@0.1", "mlp@0.2", "resnet20@0.25", "resnet32@0.25")
    updates = clients("mlp@0.1", "mlp@0.2", "resnet32@0.25", "resnet20@0.25", "mlp@0.1")
    families = families_of(problem, updates)
    assert [(family.target, family.clients) for family in families] == [
        ("mlp@0.2", (0, 1, 4)),
        ("resnet32@0.25", (2, 3)),
    ]
    assert families[1].relations == {"resnet32@0.25": "same", "resnet20@0.25": "depth"}


def test_what_cannot_become_the_servers_shallower_architecture_is_a_family_of_its_own() -> None:
    problem = problem_with("resnet20@0.25", "resnet32@0.25")
    families = families_of(problem, clients("resnet32@0.25"))
    assert [family.target for family in families] == ["resnet32@0.25"]


def test_equal_families_come_in_the_order_of_their_clients_the_servers_first() -> None:
    problem = problem_with("mlp@0.1", "lenet5@0.5", "cnn@0.1")
    families = families_of(problem, clients("lenet5@0.5", "cnn@0.1", ""))
    assert [family.target for family in families] == ["", "lenet5@0.5", "cnn@0.1"]


@pytest.mark.parametrize("name", ["mlp@0.2", "lenet5@0.5"])
def test_adapted_models_have_the_targets_shapes_and_wider_ones_the_same_function(name: str) -> None:
    target = {"mlp@0.2": "mlp@0.4", "lenet5@0.5": "lenet5"}[name]
    problem = problem_with(target, name)
    (update,) = [replace(trained(name, 1)[0], model=name)]
    (family,) = families_of(problem, [update])
    (found,) = family.adapted(problem)
    assert found.model == ""
    images = problem.data.images
    assert torch.allclose(
        predict(problem.model, found.state, images),
        predict(problem.architecture(name), update.state, images),
        atol=1e-4,
    )
    assert same(dict(update.state), dict(trained(name, 1)[0].state)), "what came is left as it is"


def test_narrowed_models_have_batchnorm_statistics_of_the_servers_images() -> None:
    problem = problem_with("resnet20@0.125", "resnet20@0.25")
    update = replace(trained("resnet20@0.25", 1)[0], model="resnet20@0.25")
    (family,) = families_of(problem, [update])
    (found,) = family.adapted(problem)
    images, state = problem.data.images, dict(found.state)
    model = create("resnet20@0.125", shape=SHAPE, num_classes=3, seed=0)
    model.load_state_dict(state)
    first = model[0](images)  # type: ignore[index]
    assert torch.allclose(state["1.running_mean"], first.mean((0, 2, 3)), atol=1e-4)


def test_counts_of_a_family_are_its_members_together_and_unknown_where_one_is() -> None:
    problem = problem_with("mlp@0.1")
    updates = clients("", "", "")
    (family,) = families_of(problem, updates)
    assert family.label_counts == (3, 6, 3)
    (secret,) = families_of(problem, [updates[0], replace(updates[1], label_counts=None)])
    assert secret.label_counts is None
