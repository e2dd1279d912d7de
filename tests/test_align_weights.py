"""Weight matching: its ascent, and what it counts."""

import itertools

import pytest
import torch
from problems import problem_of, shuffled, trained
from torch import Tensor, nn

from fedmerge.align.weights import Weights, match_weights
from fedmerge.basis import Permutation, rebase
from fedmerge.problem import Examples, Problem
from fedmerge.symmetry import symmetry


def stream(seed: int = 5) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_state(model: nn.Module, seed: int) -> dict[str, Tensor]:
    return {
        name: torch.randn(tensor.shape, generator=stream(seed), dtype=torch.float64)
        for name, tensor in model.state_dict().items()
    }


def product(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return sum(float((tensor * second[name]).sum()) for name, tensor in first.items())


def test_one_space_gets_the_best_of_all_permutations() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()
    spaces = symmetry(model, torch.zeros(1, 3))
    first, second = random_state(model, 1), random_state(model, 2)
    (found,), similarity = match_weights(first, second, spaces, rounds=10, generator=stream())
    best = max(
        itertools.permutations(range(5)),
        key=lambda index: product(first, rebase(second, spaces, [Permutation(torch.tensor(index))])),
    )
    assert found.index.tolist() == list(best)
    matched = rebase(second, spaces, [found])
    touched = [name for name in first if name != "2.bias"]
    ours, theirs = (torch.cat([state[name].flatten() for name in touched]) for state in (first, matched))
    assert similarity == pytest.approx(float(torch.cosine_similarity(ours, theirs, 0)))


@pytest.mark.parametrize("seed", range(3))
def test_no_single_space_can_be_matched_better_afterwards(seed: int) -> None:
    model = nn.Sequential(*itertools.chain(*((nn.Linear(4, 4), nn.Tanh()) for _ in range(4))), nn.Linear(4, 2)).double()
    spaces = symmetry(model, torch.zeros(1, 4))
    first, second = random_state(model, 1), random_state(model, 2)
    found, _ = match_weights(first, second, spaces, rounds=100, generator=stream(seed))
    reached = product(first, rebase(second, spaces, found))
    assert reached > product(first, second)
    for number in range(len(spaces)):
        for index in itertools.permutations(range(4)):
            others = [Permutation(torch.tensor(index)) if n == number else change for n, change in enumerate(found)]
            assert product(first, rebase(second, spaces, others)) <= reached + 1e-9


class Recurrent(nn.Module):
    """A weight that one space both writes and reads."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.within, self.out = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = torch.tanh(self.into(inputs))
        found: Tensor = self.out(hidden + torch.tanh(self.within(hidden)))
        return found


def test_a_weight_that_a_space_writes_and_reads_does_not_make_it_run_in_circles() -> None:
    model = Recurrent().double()
    problem = Problem(model.eval(), Examples(torch.randn(5, 3, dtype=torch.float64), torch.zeros(5, dtype=torch.int64)))
    assert any(
        {axis.name for axis in space.writers} & {axis.name for axis in space.readers} for space in problem.spaces
    )
    for seed in range(20):
        first, second = random_state(model, seed), random_state(model, seed + 100)
        found, _ = match_weights(first, second, problem.spaces, rounds=10_000, generator=stream(seed))
        assert product(first, rebase(second, problem.spaces, found)) >= product(first, second)


def test_running_statistics_move_along_and_do_not_count() -> None:
    problem = problem_of("resnet20@0.25")
    (update,) = trained("resnet20@0.25", 1)
    other = dict(shuffled(problem, update, 3).state)
    for name in other:
        if name.endswith("running_var"):
            other[name] = other[name].flip(0) * 100
    found = Weights()(problem, [update.state, other], 0, generator=stream()).states[1]
    for name, tensor in update.state.items():
        if "running_var" not in name:
            torch.testing.assert_close(found[name], tensor)


def test_models_of_zeros_are_taken() -> None:
    problem = problem_of("mlp@0.1")
    (update,) = trained("mlp@0.1", 1)
    zeros = {name: torch.zeros_like(tensor) for name, tensor in update.state.items()}
    found = Weights()(problem, [update.state, zeros], 0, generator=stream())
    assert found.diagnostics["cosine-similarities"] == [0.0]


def test_it_needs_data_only_for_its_start() -> None:
    problem, states = problem_of("mlp@0.1"), [update.state for update in trained("mlp@0.1")]
    assert Weights()(problem, states, 0, generator=stream()).server_examples == 0
    assert Weights(start="activations")(problem, states, 0, generator=stream()).server_examples == 60


def test_unknown_starts_and_rounds_are_refused() -> None:
    with pytest.raises(ValueError, match="start must be one of none, activations, got 'cca'"):
        Weights(start="cca")
    with pytest.raises(ValueError, match="rounds must be at least 1, got 0"):
        Weights(rounds=0)
