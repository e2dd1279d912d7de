"""The merge of clients whose architectures differ: what it has in common with the merge of one, and what it adds."""

from __future__ import annotations

import functools
import logging
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from problems import SHAPE, blobs, problem_of, same, trained

from fedmerge import oneshot
from fedmerge.families import families_of
from fedmerge.merge.teacher import Teacher
from fedmerge.mixed import check_mixed, is_mixed, may_end_elsewhere, merge_by_families, merge_federation, starts_after
from fedmerge.models import create
from fedmerge.outcomes import Outcome
from fedmerge.problem import Examples, Problem, Update
from fedmerge.settings import ConfigurationError
from fedmerge.train import evaluate, log_probabilities

SERVER, WIDE, NARROW, OTHER = "mlp@0.1", "mlp@0.2", "mlp@0.05", "lenet5@0.5"
QUICK = "np:steps=20:lrs=0.01"
"""What is learned of a federation: it has no test of its own here, so it may be short."""


@functools.cache
def problem(server_examples: int = 40) -> Problem:
    others = {name: create(name, shape=SHAPE, num_classes=3, seed=98) for name in (WIDE, NARROW, OTHER)}
    return problem_of(SERVER, server_examples).changed(others=others, start=None)


def clients(*names: str) -> list[Update]:
    """Trained clients of these architectures, the server's by its name."""
    updates = [trained(name, place + 1)[place] for place, name in enumerate(names)]
    return [replace(update, model="" if name == SERVER else name) for update, name in zip(updates, names, strict=True)]


def merged(of: Problem, updates: Sequence[Update], merge: str = QUICK, align: str = "activations") -> Outcome:
    return merge_federation(of, updates, align=align, merge=merge, seed=5, screen="off")


def without_classes(of: Problem) -> Problem:
    return of.restricted(Examples.unlabelled(of.data.images))


@pytest.mark.parametrize(
    ("method", "screen"),
    [(f"activations+{QUICK}", "auto"), ("activations+mean", "off"), ("np-distill:steps=20:lrs=0.01", "auto")],
)
def test_clients_of_one_architecture_are_merged_to_the_same_bits_as_without_families(method: str, screen: str) -> None:
    align, _, merge = method.rpartition("+")
    settings = {"align": align or "identity", "merge": merge, "screen": screen}
    updates = clients(SERVER, SERVER, SERVER)
    usual = oneshot.merge_updates(problem(), updates, seed=3, **settings)
    found = merge_by_families(problem(), updates, seed=3, **settings)
    assert same(found.merged.state, usual.merged.state)
    assert found.merged.server_labels == usual.merged.server_labels
    assert found.diagnostics["merge"] == usual.diagnostics["merge"]
    assert found.diagnostics.get("screen") == usual.diagnostics.get("screen")
    assert not found.steps


def test_one_family_of_several_widths_is_the_usual_merge_of_its_adapted_models() -> None:
    updates = clients(SERVER, WIDE, SERVER, NARROW)
    family, *others = families_of(problem(), updates)
    assert not others
    usual = oneshot.merge_updates(
        problem(), family.adapted(problem()), align="activations", merge=QUICK, seed=5, screen="off"
    )
    found = merged(problem(), updates)
    assert same(found.merged.state, usual.merged.state)
    assert found.diagnostics["families"][0]["relations"] == {"": "same", WIDE: "width", NARROW: "width"}
    assert not found.steps
    assert not any(found.merged.models)


@pytest.mark.parametrize("method", [QUICK, "fedavg", "ensemble-counts", "best-client"])
def test_the_order_of_the_clients_does_not_matter(method: str) -> None:
    updates = clients(SERVER, WIDE, OTHER, SERVER)
    align = "activations" if method == QUICK else "identity"
    first, second = (merged(problem(), order, method, align) for order in (updates, updates[::-1]))
    assert all(same(one, other) for one, other in zip(first.merged.states, second.merged.states, strict=True))
    assert [step.clients for step in first.steps] == [step.clients for step in second.steps]


@pytest.mark.parametrize(
    ("merge", "screen"), [("np-distill:steps=20:lrs=0.01", "auto"), ("feddf:steps=20:lrs=0.01", "off")]
)
def test_without_labels_garbage_in_their_place_gives_the_same_bits(merge: str, screen: str) -> None:
    updates, of = clients(SERVER, WIDE, OTHER, SERVER), problem(60)
    garbage = of.restricted(Examples(of.data.images, of.data.labels.flip(0)))
    outcomes = [
        merge_federation(one, updates, align="activations", merge=merge, seed=1, screen=screen)
        for one in (of, garbage, without_classes(of))
    ]
    for found in outcomes[1:]:
        assert same(found.merged.state, outcomes[0].merged.state)
        assert [step.outcome.diagnostics for step in found.steps] == [
            step.outcome.diagnostics for step in outcomes[0].steps
        ]
    assert not outcomes[0].merged.server_labels
    assert not any(step.outcome.merged.server_labels for step in outcomes[0].steps)


@pytest.mark.parametrize("merge", [QUICK, "np-distill:steps=20:lrs=0.01", "np-semi:steps=20:lrs=0.01"])
@pytest.mark.parametrize("counts", [True, False])
def test_what_comes_out_is_a_model_of_the_servers_architecture(merge: str, counts: bool) -> None:
    updates = clients(WIDE, OTHER, OTHER)
    if not counts:
        updates = [replace(update, label_counts=None) for update in updates]
        merge += ":teacher=mean"
    found = merged(problem(), updates, merge).merged
    assert {name: tensor.shape for name, tensor in found.state.items()} == {
        name: tensor.shape for name, tensor in problem().model.state_dict().items()
    }
    assert all(bool(tensor.isfinite().all()) for tensor in found.state.values())
    assert evaluate(problem().model, [found.state], blobs(300, seed=50)).accuracy > 0.45, "a guess has a third"


def test_every_step_is_told_and_has_its_clients_and_architecture() -> None:
    found = merged(problem(), clients(OTHER, SERVER, WIDE, SERVER))
    assert [(step.kind, step.model, step.clients) for step in found.steps] == [
        ("largest-family", "", (1, 2, 3)),
        ("family", OTHER, (0,)),
        ("families-ensemble", None, (0, 1, 2, 3)),
    ]
    assert {"families", "distillation", "findings"} <= found.diagnostics.keys()
    assert found.diagnostics["distillation"]["teacher"] == "families"
    assert found.steps[2].outcome.merged.models == (OTHER, ""), "by their first clients"


def test_a_family_of_one_client_has_that_clients_model() -> None:
    updates = clients(SERVER, SERVER, OTHER)
    alone = merged(problem(), updates).steps[1].outcome.merged
    assert alone.models == (OTHER,)
    assert same(alone.state, dict(updates[2].state))


def test_the_families_ensemble_weighs_their_models_by_the_clients_counts_together() -> None:
    updates = clients(SERVER, SERVER, OTHER)
    *alone, together = merged(problem(), updates, "np-distill:steps=20:lrs=0.01").steps
    members = together.outcome.merged
    images = blobs(20, seed=8).images
    models = [problem().architecture(name) for name in members.models]
    said = log_probabilities(models, members.states, images)
    counts = [
        tuple(sum(update.label_counts[label] for update in updates[:2] if update.label_counts) for label in range(3)),
        updates[2].label_counts or (),
    ]
    assert members.combine is not None
    torch.testing.assert_close(members.combine(said), Teacher("counts-geometric", tuple(counts))(said))
    assert [same(step.outcome.merged.state, state) for step, state in zip(alone, members.states, strict=True)]


def test_no_model_of_the_servers_architecture_is_needed() -> None:
    found = merged(problem(), clients(OTHER, OTHER))
    assert [(step.kind, step.model) for step in found.steps] == [("family", OTHER)]
    assert found.diagnostics["distillation"]["start"] == "fresh"


def test_the_student_is_not_worse_on_validation_than_the_servers_own_family() -> None:
    of = problem(600)
    found = merged(of, clients(SERVER, SERVER, OTHER, OTHER))
    model, start = of.model, found.steps[0].outcome.merged
    assert start.models == ()
    assert (
        evaluate(model, [found.merged.state], of.validation).loss <= evaluate(model, [start.state], of.validation).loss
    )
    chosen = found.diagnostics["distillation"]
    losses = chosen["teachers' validation-losses"]
    assert losses.keys() == {"families", "families, alike", "clients", "families and clients"}
    assert chosen["teacher"] == min(losses, key=lambda name: losses[name])


@pytest.mark.parametrize("merge", ["fedavg", "mean", "mean-head"])
def test_a_plain_average_is_of_the_largest_group_of_one_architecture(merge: str) -> None:
    updates = clients(WIDE, SERVER, SERVER, WIDE, OTHER)
    found = merged(problem(), updates, merge, "identity")
    usual = oneshot.merge_updates(problem(), updates[1:3], align="identity", merge=merge, seed=5)
    assert same(found.merged.state, usual.merged.state), "of equal groups, that of the server's architecture"
    assert found.note == "of clients 1, 2 alone"
    others = merged(problem(), [update for update in updates if update.model], merge, "identity")
    assert others.merged.models == (WIDE,)
    assert may_end_elsewhere("identity", merge)


def test_an_average_of_models_that_all_differ_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="'fedavg' averages models of one architecture, and no two clients"):
        merged(problem(), clients(SERVER, WIDE, OTHER), "fedavg", "identity")


def test_ensembles_and_the_best_client_take_models_of_any_architecture() -> None:
    updates = clients(SERVER, OTHER, WIDE)
    images = blobs(30, seed=3)
    ensemble = merged(problem(), updates, "ensemble", "identity").merged
    models = [problem().architecture(update.model) for update in updates]
    assert ensemble.models == ("", OTHER, WIDE)
    assert all(same(state, dict(update.state)) for state, update in zip(ensemble.states, updates, strict=True))
    losses = [
        evaluate(model, [update.state], problem().data).loss for model, update in zip(models, updates, strict=True)
    ]
    best = merged(problem(60), updates, "best-client", "identity")
    chosen = updates[losses.index(min(losses))]
    assert same(best.merged.state, dict(chosen.state))
    assert best.merged.models == ((chosen.model,) if chosen.model else ())
    assert evaluate(models, ensemble.states, images).accuracy > 0.5


def test_the_best_client_that_is_fine_tuned_is_of_the_servers_architecture() -> None:
    updates = clients(OTHER, SERVER, SERVER)
    found = merged(problem(), updates, "best-client-finetune:steps=20:lrs=0.01", "identity").merged
    alone = merged(problem(), updates[1:], "best-client-finetune:steps=20:lrs=0.01", "identity").merged
    assert same(found.state, alone.state)
    with pytest.raises(ConfigurationError, match="no client has the server's model"):
        merged(problem(), clients(OTHER, WIDE), "best-client-finetune", "identity")


def test_a_useless_client_is_left_out_whatever_its_architecture() -> None:
    updates = clients(SERVER, SERVER, OTHER, OTHER)
    broken = replace(updates[3], state={name: torch.zeros_like(tensor) for name, tensor in updates[3].state.items()})
    found = merge_federation(problem(60), [*updates[:3], broken], align="activations", merge=QUICK, seed=5)
    assert list(found.diagnostics["screen"]["left-out"]) == ["3"]
    assert [step.clients for step in found.steps] == [(0, 1), (2,), (0, 1, 2)]
    assert found.merged.server_labels


def test_families_without_a_common_class_are_told_of(caplog: pytest.LogCaptureFixture) -> None:
    updates = clients(SERVER, SERVER, OTHER)
    counts = [(5, 5, 0), (5, 0, 0), (0, 0, 9)]
    apart = [replace(update, label_counts=count) for update, count in zip(updates, counts, strict=True)]
    with caplog.at_level(logging.WARNING, "fedmerge"):
        found = merged(problem(), apart)
    assert found.diagnostics["findings"] == [
        "the clients 0, 1 and the clients 2, of other architectures, have no class in common: each alone teaches its "
        "classes"
    ]
    assert "no class in common" in caplog.text
    assert merged(problem(), updates).diagnostics["findings"] == []


@pytest.mark.parametrize(
    ("align", "merge", "message"),
    [
        ("identity", "ties", "'ties' needs one start of all clients, and clients of different architectures"),
        ("identity", "fisher", "'fisher' needs the statistic 'fisher' of all clients"),
        (
            "activations",
            "ensemble",
            "'activations.ensemble': ensemble takes clients' models of any architectures as they",
        ),
        ("weights", "best-client-finetune", "nothing is aligned: use best-client-finetune alone"),
    ],
)
def test_what_cannot_be_used_says_why(align: str, merge: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        check_mixed(align, merge)
    with pytest.raises(ConfigurationError, match=message):
        merged(problem(), clients(SERVER, OTHER), merge, align)


def test_an_architecture_that_the_problem_does_not_have_is_named() -> None:
    updates = clients(SERVER, SERVER)
    with pytest.raises(ValueError, match=r"unknown model 'vgg11': beside the server's, clients may have 'mlp@0.2'"):
        merged(problem(), [updates[0], replace(updates[1], model="vgg11")])
    with pytest.raises(ValueError, match="clients may have no other"):
        problem_of(SERVER).architecture("vgg11")


def test_a_federation_is_mixed_if_any_client_differs_from_the_server() -> None:
    assert not is_mixed(clients(SERVER, SERVER))
    assert is_mixed(clients(SERVER, WIDE))


def test_clients_of_other_architectures_go_on_with_their_familys_model_in_their_own() -> None:
    updates = clients(SERVER, WIDE, OTHER, OTHER, NARROW)
    found = merged(problem(), updates)
    starts = starts_after(problem(), updates, found)
    assert starts.keys() == {1, 2, 3, 4}
    assert same(dict(starts[2]), found.steps[1].outcome.merged.state)
    assert starts[2] is starts[3], "one start is sent to both"
    family = found.steps[0].outcome.merged.state
    images = blobs(10, seed=2).images
    wide, server = (
        log_probabilities(of, [state], images)
        for of, state in ((problem().architecture(WIDE), starts[1]), (problem().model, family))
    )
    assert torch.allclose(wide, server, atol=1e-5), "wider, it is the same function"
    assert {name: t.shape for name, t in starts[4].items()} == {name: t.shape for name, t in updates[4].state.items()}


def test_clients_that_are_in_no_family_go_on_with_their_own_last_model() -> None:
    updates = clients(SERVER, SERVER, OTHER, OTHER)
    ensemble = merged(problem(), updates, "ensemble", "identity")
    starts = starts_after(problem(), updates, ensemble)
    assert all(same(dict(starts[client]), dict(updates[client].state)) for client in (2, 3))
    assert starts_after(problem(), updates[:2], ensemble) == {}
