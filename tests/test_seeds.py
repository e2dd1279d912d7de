"""Streams of random numbers: by seed and path alone."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from fedmerge.seeds import default_generator, derive, fork, generator

PATHS = st.lists(st.text() | st.integers(), max_size=4).map(tuple)


def draw(stream: torch.Generator) -> list[float]:
    return torch.rand(4, generator=stream).tolist()


def test_a_seed_and_a_path_name_the_same_stream_for_ever() -> None:
    assert (
        derive(0, "client", 3, "shuffle") == 5125876692654749702
    )  # another number here changes every result of every run


@given(st.integers(), PATHS)
def test_a_derived_seed_is_one_that_torch_takes(seed: int, path: tuple[str | int, ...]) -> None:
    assert 0 <= derive(seed, *path) < 2**63


@given(st.tuples(st.integers(), PATHS), st.tuples(st.integers(), PATHS))
def test_different_seeds_or_paths_give_different_streams(
    first: tuple[int, tuple[str | int, ...]], second: tuple[int, tuple[str | int, ...]]
) -> None:
    assert (derive(first[0], *first[1]) == derive(second[0], *second[1])) == (first == second)


def test_paths_are_more_than_their_letters() -> None:
    paths: list[tuple[str | int, ...]] = [
        (),
        ("",),
        ("a", "b"),
        ("ab",),
        ("b", "a"),
        ("a", 1),
        ("a", "1"),
        ("a1",),
        (1,),
    ]
    seeds = [derive(seed, *path) for seed, path in itertools.product((0, 1, -1), paths)]
    assert len(set(seeds)) == len(seeds)


def test_a_stream_depends_neither_on_the_order_of_calls_nor_on_torchs_own_state() -> None:
    torch.manual_seed(1)
    first = {path: draw(generator(7, "client", path)) for path in range(5)}
    torch.manual_seed(2)
    torch.rand(3)
    second = {path: draw(generator(7, "client", path)) for path in reversed(range(5))}
    assert first == second
    assert len({tuple(numbers) for numbers in first.values()}) == 5


def test_making_a_stream_draws_nothing_from_torchs_own() -> None:
    before = torch.get_rng_state()
    draw(generator(0, "x"))
    assert torch.equal(torch.get_rng_state(), before)


def test_forks_of_one_stream_differ_and_can_be_repeated() -> None:
    forks = [[fork(stream) for _ in range(20)] for stream in (generator(0, "x"), generator(0, "x"), generator(1, "x"))]
    assert forks[0] == forks[1]
    assert len(set(forks[0] + forks[2])) == 40
    torch.Generator().manual_seed(max(forks[0]))


def test_the_default_generator_is_seeded_inside_and_put_back_after() -> None:
    torch.manual_seed(5)
    expected = torch.rand(6).tolist()
    torch.manual_seed(5)
    found = torch.rand(3).tolist()
    with default_generator(11):
        inside = torch.rand(3)
    found += torch.rand(3).tolist()
    assert found == expected
    assert torch.equal(inside, torch.rand(3, generator=torch.Generator().manual_seed(11)))


def test_the_default_generator_is_put_back_after_an_error_too() -> None:
    before = torch.get_rng_state()
    with pytest.raises(RuntimeError), default_generator(0):
        torch.rand(3) @ torch.rand(4)
    assert torch.equal(torch.get_rng_state(), before)


def test_blocks_may_be_nested() -> None:
    with default_generator(3):
        expected = torch.rand(4)
    with default_generator(3):
        found = [torch.rand(2)]
        with default_generator(4):
            torch.rand(5)
        found.append(torch.rand(2))
    assert torch.equal(torch.cat(found), expected)


def test_dropout_and_initialisation_follow_the_default_generator() -> None:
    def dropped(seed: int) -> list[float]:
        with default_generator(seed):
            found: list[float] = functional.dropout(torch.ones(64)).tolist()
        return found

    def initialised(seed: int) -> list[float]:
        with default_generator(seed):
            found: list[float] = nn.Linear(4, 4).weight.flatten().tolist()
        return found

    for make in (dropped, initialised):
        assert make(0) == make(0)
        assert make(0) != make(1)


def test_a_block_on_the_cpu_leaves_the_gpus_generators_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded.append)
    with default_generator(3):
        torch.rand(1)
    assert seeded == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_block_on_a_gpu_seeds_it_and_puts_it_back() -> None:
    before = torch.cuda.get_rng_state()
    drawn = []
    for _ in range(2):
        with default_generator(3, "cuda"):
            drawn.append(torch.rand(4, device="cuda"))
    assert torch.equal(*drawn)
    assert torch.equal(torch.cuda.get_rng_state(), before)
