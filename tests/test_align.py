"""One contract for every aligner, and the laws of each."""

import json
from dataclasses import replace

import pytest
import torch
from problems import SHAPE, TwoLayers, blobs, problem_of, same, shuffled, trained
from torch import nn

from fedmerge.align.activations import Activations
from fedmerge.align.matching import correlation, match
from fedmerge.architectures import ResidualBlock
from fedmerge.calibrate import calibrate
from fedmerge.catalogue import ALIGNERS
from fedmerge.covariances import Joint
from fedmerge.merge.average import mean_state
from fedmerge.methods import resolve
from fedmerge.oneshot import align_updates
from fedmerge.problem import Aligner, Examples, Problem, Update
from fedmerge.seeds import default_generator
from fedmerge.train import evaluate

MATCHING = ["activations", "weights", "weights:start=activations", "universe"]
PERMUTING = ["identity", "activations", "weights", "universe"]
"""Their changes keep each model's function; a dense change keeps it only where the units are linear."""


TO_CHOOSE = {
    "cca": "cca:ridges=1/10",
    "ot": "ot:epsilons=0.01/0.05",
    "zipit": "zipit:within=0.5:decay=0.5:depth=1/0.5",
}
"""Two settings are enough for a choice."""

PARTS = ["zipit"]
"""Their models are the parts of a mean; the reference's is none other."""


def aligner(name: str) -> Aligner:
    found: Aligner = resolve("aligner", name, ALIGNERS)
    return found


def residual(seed: int) -> nn.Module:
    """A small net with all that a ResNet has: a stem, blocks with and without a projection, BatchNorm."""
    with default_generator(seed):
        blocks = ResidualBlock(4, 4, 1), ResidualBlock(4, 6, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), *blocks, nn.Linear(6, 3)).eval()


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", ALIGNERS)
class TestEveryAligner:
    def test_functions_and_dtypes_are_kept_and_inputs_untouched(self, name: str) -> None:
        problem = Problem(residual(9), blobs(60, seed=7))
        models = [residual(seed) for seed in range(3)]
        states = [calibrate(model, model.state_dict(), problem.data.images) for model in models]
        before = [{key: tensor.clone() for key, tensor in state.items()} for state in states]
        found = aligner(TO_CHOOSE.get(name, name))(problem, states, 1, generator=stream())
        assert len(found.states) == len(states)
        assert name in PARTS or same(found.states[1], before[1]), "the reference keeps its basis"
        for state, original, aligned in zip(states, before, found.states, strict=True):
            assert same(dict(state), original)
            assert all(aligned[key].dtype == tensor.dtype for key, tensor in state.items())
            assert aligned.keys() == original.keys()
            shared = {tensor.data_ptr() for tensor in state.values()} & {item.data_ptr() for item in aligned.values()}
            assert not shared or name == "identity"
            assert all(torch.isfinite(tensor).all() for tensor in aligned.values())
            if name in PERMUTING:
                ours, theirs = (evaluate(problem.model, [item], problem.data) for item in (original, aligned))
                assert abs(ours.loss - theirs.loss) < 1e-4

    def test_same_generator_same_bits(self, name: str) -> None:
        problem = problem_of("cnn@0.1")
        states = [update.state for update in trained("cnn@0.1")]
        first, second = (aligner(TO_CHOOSE.get(name, name))(problem, states, 0, generator=stream()) for _ in range(2))
        assert all(map(same, first.states, second.states))

    def test_the_order_of_clients_does_not_matter(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        updates = trained("mlp@0.1")
        forward = align_updates(problem, updates, align=TO_CHOOSE.get(name, name), seed=0)
        backward = align_updates(problem, updates[::-1], align=TO_CHOOSE.get(name, name), seed=0)
        assert all(same(dict(a.state), dict(b.state)) for a, b in zip(forward.updates, backward.updates, strict=True))

    @pytest.mark.parametrize("examples", [1, 2, 49, 50])
    def test_few_examples_do_not_break_it(self, name: str, examples: int) -> None:
        problem = problem_of("cnn@0.1", server_examples=examples)
        found = align_updates(problem, trained("cnn@0.1"), align=TO_CHOOSE.get(name, name), seed=0)
        assert all(torch.isfinite(tensor).all() for update in found.updates for tensor in update.state.values())

    def test_dead_and_duplicated_units_do_not_break_it(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        updates = trained("mlp@0.1", 2)
        for update in updates:
            update.state["1.weight"][:3] = 0.0
            update.state["1.bias"][:3] = -1.0
            update.state["1.weight"][5] = update.state["1.weight"][4]
            update.state["1.bias"][5] = update.state["1.bias"][4]
        found = align_updates(problem, updates, align=TO_CHOOSE.get(name, name), seed=0)
        for update, original in zip(found.updates, updates, strict=True):
            ours, theirs = (evaluate(problem.model, [item.state], problem.data).loss for item in (original, update))
            assert abs(ours - theirs) < (1e-4 if name in PERMUTING else 1.0)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_half_precision_checkpoints_are_taken(self, name: str, dtype: torch.dtype) -> None:
        problem = problem_of("mlp@0.1")
        halved = [
            Update({key: tensor.to(dtype) for key, tensor in update.state.items()}, 1, update.partition_id)
            for update in trained("mlp@0.1", 2)
        ]
        found = align_updates(problem, halved, align=TO_CHOOSE.get(name, name), seed=0)
        assert {tensor.dtype for update in found.updates for tensor in update.state.values()} == {torch.float32}

    def test_what_it_says_it_used_is_at_most_what_there_is(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        states = [update.state for update in trained("mlp@0.1")]
        found = aligner(TO_CHOOSE.get(name, name))(problem, states, 0, generator=stream())
        assert 0 <= found.server_examples <= len(problem.data)
        unlabelled = replace(problem, data=Examples(problem.data.images, torch.zeros_like(problem.data.labels)))
        blind = aligner(TO_CHOOSE.get(name, name))(unlabelled, states, 0, generator=stream())
        if not found.server_labels:
            assert all(map(same, found.states, blind.states))
        if found.server_examples == 0:
            elsewhere = aligner(TO_CHOOSE.get(name, name))(
                replace(problem, data=blobs(60, seed=1234)), states, 0, generator=stream()
            )
            assert all(map(same, found.states, elsewhere.states))

    def test_diagnostics_are_json(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        states = [update.state for update in trained("mlp@0.1")]
        diagnostics = aligner(TO_CHOOSE.get(name, name))(problem, states, 0, generator=stream()).diagnostics
        assert json.loads(json.dumps(diagnostics, allow_nan=False)) == diagnostics

    def test_one_model_is_its_own_alignment(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        (update,) = trained("mlp@0.1", 1)
        (found,) = align_updates(problem, [update], align=TO_CHOOSE.get(name, name), seed=0).updates
        assert same(dict(found.state), dict(update.state))


@pytest.mark.parametrize("align", MATCHING)
@pytest.mark.parametrize("name", ["mlp@0.1", "cnn@0.1", "vgg11@0.05", "resnet20@0.25"])
def test_a_shuffled_copy_is_aligned_back_exactly(align: str, name: str) -> None:
    problem = problem_of(name)
    (update,) = trained(name, 1)
    found = aligner(align)(problem, [update.state, shuffled(problem, update, 3).state], 0, generator=stream())
    merged = mean_state(found.states)
    ours, mean = (
        torch.func.functional_call(problem.model, dict(state), (problem.data.images,))
        for state in (update.state, merged)
    )
    torch.testing.assert_close(mean, ours)  # units that are dead on these images may be swapped; nothing else
    if name in ("mlp@0.1", "resnet20@0.25"):  # where none is dead
        for key, tensor in update.state.items():
            torch.testing.assert_close(merged[key], tensor)


def test_the_best_permutation_is_found_by_trying_all() -> None:
    import itertools

    scores = torch.rand(5, 5, generator=stream(), dtype=torch.float64)
    best = max(itertools.permutations(range(5)), key=lambda index: sum(scores[i, j] for i, j in enumerate(index)))
    assert match(scores).index.tolist() == list(best)


def test_correlations_are_pearsons_and_zero_for_dead_units() -> None:
    samples = torch.randn(50, 6, generator=stream(), dtype=torch.float64)
    samples[:, 0] = 2.0
    joint = torch.cov(samples.T, correction=0)
    means, variances = (tuple(part.reshape(2, 3)) for part in (samples.mean(0), joint.diagonal()))
    found = correlation(Joint(50, means, variances, {(0, 1): joint[:3, 3:]}).between(0, 1))
    expected = torch.corrcoef(samples[:, 1:].T)[:2, 2:]
    torch.testing.assert_close(found[1:], expected)
    assert found[0].tolist() == [0.0, 0.0, 0.0]


def test_alignment_brings_independent_models_together() -> None:
    """The reason for all of it: their mean is a better model afterwards."""
    problem = problem_of("mlp", server_examples=100)
    states = [update.state for update in trained("mlp")]
    test = blobs(300, seed=50)
    plain = evaluate(problem.model, [mean_state(states)], test)
    aligned = evaluate(problem.model, [mean_state(Activations()(problem, states, 0, generator=stream()).states)], test)
    assert aligned.loss < plain.loss


def test_a_reference_that_cannot_be_chosen_is_the_largest_client() -> None:
    problem = problem_of("mlp@0.1", server_examples=10)
    assert align_updates(problem, trained("mlp@0.1"), align="activations", seed=0).diagnostics["reference"] == 2


def test_two_updates_of_one_client_are_refused() -> None:
    problem = problem_of("mlp@0.1")
    (update,) = trained("mlp@0.1", 1)
    with pytest.raises(ValueError, match=r"different clients.*\[0, 0\]"):
        align_updates(problem, [update, update], align="identity", seed=0)
    with pytest.raises(ValueError, match="at least one"):
        align_updates(problem, [], align="identity", seed=0)


def test_an_untraceable_model_can_still_be_merged_without_alignment() -> None:
    class Odd(TwoLayers):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = super().forward(images)  # type: ignore[no-untyped-call]
            return hidden if hidden.sum() > -1e9 else -hidden

    problem = Problem(Odd().eval(), Examples(torch.randn(60, *SHAPE), torch.arange(60) % 3))
    updates = [Update(Odd().state_dict(), 1, index) for index in range(2)]
    assert isinstance(problem.model, nn.Module)
    align_updates(problem, updates, align="identity", seed=0)
    with pytest.raises(ValueError, match="--align identity"):
        align_updates(problem, updates, align="activations", seed=0)
