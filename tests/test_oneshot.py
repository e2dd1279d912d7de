from dataclasses import replace

import pytest
import torch
from problems import problem_of, same, trained

from fedmerge.oneshot import align_updates, merge_aligned, merge_updates
from fedmerge.settings import ConfigurationError
from fedmerge.state import MalformedState


def test_the_order_of_updates_does_not_matter() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    for merge in ("fedavg", "np:steps=20:lrs=0.01", "np-pairwise:steps=20:lrs=0.1", "best-client"):
        forward = merge_updates(problem, updates, align="auto", merge=merge, seed=3)
        backward = merge_updates(problem, updates[::-1], align="auto", merge=merge, seed=3)
        assert same(forward.merged.state, backward.merged.state)


def test_one_alignment_serves_many_merges_with_the_same_bits() -> None:
    problem, updates = problem_of("cnn@0.1"), trained("cnn@0.1")
    alignment = align_updates(problem, updates, align="activations", seed=1)
    finetune = "finetune:steps=20:lrs=0.01"
    merge_aligned(problem, alignment, merge="np:steps=20:lrs=0.01", seed=1)
    shared = merge_aligned(problem, alignment, merge=finetune, seed=1)
    alone = merge_updates(problem, updates, align="activations", merge=finetune, seed=1, screen="off")
    assert same(shared.merged.state, alone.merged.state)


def test_another_seed_gives_another_merge() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=20), trained("mlp@0.1")
    first, second = (
        merge_updates(problem, updates, align="identity", merge="np", seed=seed).merged.state for seed in (0, 1)
    )
    assert not same(first, second)


def test_what_the_server_used_is_counted_over_alignment_and_merge() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    plain = merge_updates(problem, updates, align="identity", merge="mean", seed=0).merged
    assert (plain.server_examples, plain.server_labels) == (0, False)
    aligned = merge_updates(problem, updates, align="activations", merge="mean", seed=0).merged
    assert (aligned.server_examples, aligned.server_labels) == (60, True)  # labels choose the reference
    few = problem_of("mlp@0.1", server_examples=20)
    unchosen = merge_updates(few, updates, align="activations", merge="mean", seed=0).merged
    assert (unchosen.server_examples, unchosen.server_labels) == (20, False)


def test_an_update_of_another_architecture_is_refused() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.2", 2)
    with pytest.raises(MalformedState, match=r"'1.weight' has shape \(26, 36\), expected \(13, 36\)"):
        merge_updates(problem, updates, align="identity", merge="mean", seed=0)


def test_nan_is_refused() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1", 2)
    broken = {name: tensor.clone() for name, tensor in updates[0].state.items()}
    broken["1.bias"][0] = torch.nan
    with pytest.raises(MalformedState, match="1 NaN or infinite"):
        merge_updates(problem, [replace(updates[0], state=broken), updates[1]], align="identity", merge="mean", seed=0)


@pytest.mark.parametrize(("align", "merge"), [("activation", "np"), ("identity", "fedavgg")])
def test_unknown_names_are_refused(align: str, merge: str) -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1", 2)
    with pytest.raises(ConfigurationError, match="did you mean"):
        merge_updates(problem, updates, align=align, merge=merge, seed=0)
