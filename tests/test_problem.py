"""The protocol of every choice, and the types that join the mathematics."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmerge.problem import Examples, Merged, Problem, silent
from fedmerge.seeds import generator
from fedmerge.spaces import UnsupportedOperation


def problem(size: int, seed: int = 0, classes: int = 4) -> Problem:
    """A server whose images are their own numbers and whose classes have very different sizes."""
    labels = torch.multinomial(
        0.5 ** torch.arange(classes), size, replacement=True, generator=generator(size, "labels")
    )
    return Problem(nn.Linear(1, classes), Examples(torch.arange(float(size))[:, None], labels), seed=seed)


def numbers(examples: Examples) -> list[int]:
    return [int(image) for image in examples.images[:, 0]]


def counts(examples: Examples, classes: int = 4) -> Tensor:
    return examples.labels.bincount(minlength=classes)


@pytest.mark.parametrize(
    ("size", "folds", "may_choose", "refits"),
    [(1, 0, False, True), (49, 0, False, True), (50, 3, True, True), (499, 3, True, True), (500, 1, True, False)],
)
def test_the_number_of_examples_decides_how_choices_are_made(
    size: int, folds: int, may_choose: bool, refits: bool
) -> None:
    found = problem(size)
    assert len(found.folds) == folds
    assert found.may_choose is may_choose
    assert found.refits is refits


@given(st.integers(50, 700), st.integers(0, 3), st.integers(1, 12))
def test_each_fold_holds_every_example_once_and_every_class_by_its_share(size: int, seed: int, classes: int) -> None:
    found, parts = problem(size, seed, classes), 3 if size < 500 else 5
    for learn, validation in found.folds:
        assert sorted(numbers(learn) + numbers(validation)) == list(range(size))
        assert abs(len(validation) - size / parts) < 1
        assert ((counts(validation, classes) - counts(found.data, classes) / parts).abs() <= 1).all()
        for part in (learn, validation):
            assert torch.equal(part.labels, found.data.labels[numbers(part)])
            assert numbers(part) == sorted(numbers(part))


@pytest.mark.parametrize("size", [50, 53, 499])
def test_the_validation_parts_share_the_examples_out(size: int) -> None:
    found = problem(size)
    assert sorted(number for _, validation in found.folds for number in numbers(validation)) == list(range(size))


def test_with_500_examples_a_fifth_validates() -> None:
    ((learn, validation),) = problem(500).folds
    assert (len(learn), len(validation)) == (400, 100)


@pytest.mark.parametrize("size", [60, 600])
def test_the_seed_alone_decides_the_folds(size: int) -> None:
    torch.manual_seed(1)
    first = [numbers(validation) for _, validation in problem(size, seed=3).folds]
    torch.manual_seed(2)
    assert [numbers(validation) for _, validation in problem(size, seed=3).folds] == first
    assert [numbers(validation) for _, validation in problem(size, seed=4).folds] != first


def test_finished_models_learn_and_are_judged_on_the_fixed_parts_or_on_all() -> None:
    small, large = problem(499), problem(500)
    assert small.learn is small.data
    assert small.validation is small.data
    assert (large.learn, large.validation) == large.folds[0]
    assert problem(10).validation.labels.shape == (10,)


def test_a_server_without_examples_cannot_merge() -> None:
    with pytest.raises(ValueError, match=r"the server owns no examples: .*at least one \(--server-examples\)"):
        Problem(nn.Linear(1, 2), problem(1).data[:0])


def test_spaces_are_those_of_the_architecture_and_found_when_they_are_needed() -> None:
    data = Examples(torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64))
    found = Problem(nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3)), data)
    assert [space.size for space in found.spaces] == [5, 4]
    unsupported = Problem(nn.Sequential(nn.Linear(2, 5), nn.Softsign(), nn.LSTM(5, 3)), data)
    with pytest.raises(UnsupportedOperation):
        _ = unsupported.spaces


def test_a_merged_model_is_one_state_and_an_ensemble_is_not() -> None:
    state = {"w": torch.zeros(1)}
    assert Merged((state,)).state is state
    with pytest.raises(ValueError, match="an ensemble of 2 models is not one model"):
        _ = Merged((state, state)).state


@pytest.mark.parametrize(("images", "labels"), [((3, 2), (2,)), ((3, 2), (3, 1)), ((0, 2), (1,)), ((1,), ())])
def test_images_and_labels_go_together(images: tuple[int, ...], labels: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected one label for each image, got images") as error:
        Examples(torch.zeros(images), torch.zeros(labels, dtype=torch.int64))
    assert f"{images} and labels {labels}" in str(error.value)


@pytest.mark.parametrize("index", [torch.tensor([2, 0]), slice(1, None), torch.tensor([True, False, True])], ids=str)
def test_a_choice_of_examples_keeps_images_and_labels_together(index: Tensor | slice) -> None:
    examples = Examples(torch.arange(3.0)[:, None], torch.tensor([5, 6, 7]))
    found = examples[index]
    assert len(found) == 2
    assert torch.equal(found.images[:, 0].long() + 5, found.labels)


def test_examples_move_together() -> None:
    moved = Examples(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)).to("meta")
    assert (moved.images.device.type, moved.labels.device.type, len(moved)) == ("meta", "meta", 2)


def test_silence_takes_any_progress() -> None:
    silent("merging", 1, 2)
    assert problem(1).progress is silent


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("index", [torch.tensor([2, 0, 2]), torch.tensor([], dtype=torch.long), slice(1, 3), "mask"])
def test_what_is_taken_of_examples_is_what_indexing_gives_in_the_same_layout(
    memory_format: torch.memory_format, channels: int, index: torch.Tensor | slice | str
) -> None:
    images = torch.empty(4, channels, 5, 6, memory_format=memory_format).normal_()
    chosen = torch.tensor([True, False, True, True]) if isinstance(index, str) else index
    examples = Examples(images, torch.arange(4), torch.rand(4, 2))
    found = examples[chosen]
    assert found.targets is not None
    assert examples.targets is not None
    for ours, whole in zip((found.images, found.labels, found.targets), vars(examples).values(), strict=True):
        assert torch.equal(ours, whole[chosen])
        assert ours.stride() == whole[chosen].stride() or not len(ours)
