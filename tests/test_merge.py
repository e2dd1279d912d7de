"""One contract for every merger, and the laws of each."""

from dataclasses import replace

import pytest
import torch
from problems import blobs, doubles, problem_of, same, trained, with_statistics
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from fedmerge.catalogue import MERGERS, STATISTICS
from fedmerge.merge.average import Average, mean_state
from fedmerge.merge.best import BestClient, best_client
from fedmerge.merge.descent import Candidate, Weights, descend, split_state
from fedmerge.merge.finetune import FineTune, fresh_state
from fedmerge.merge.mixture import AffineMixture
from fedmerge.merge.nonuniform import GROUPS, NPMerge, PairwiseNPMerge
from fedmerge.merge.pair import SigmoidPair
from fedmerge.methods import resolve
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Merger, Problem, Update
from fedmerge.train import batches, evaluate

DISTILLED = ["feddf", "np-distill", "finetune-distill", "best-client-distill", "fresh-distill"]
LEARNED = [
    "np",
    "np-pairwise",
    "np-semi",
    "finetune-semi",
    "best-client-semi",
    "fresh-semi",
    "adamerging",
    "finetune",
    "head-finetune",
    "best-client-finetune",
    "server-only",
    *DISTILLED,
]


def merger(name: str) -> Merger:
    """Return a merger; a learned one with two candidates or little more to choose from, and few steps."""
    budget = ":steps=40:lrs=0.01/0.001" if name in LEARNED else ""
    found: Merger = resolve("merger", name + budget, MERGERS)
    return found


def told(problem: Problem, name: str, updates: list[Update]) -> list[Update]:
    """The updates with the statistics that a merger needs."""
    kinds = [kind for kind in STATISTICS if kind in MERGERS[name].needs]
    return with_statistics(problem, updates, kinds) if kinds else updates


def stream() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("name", MERGERS)
class TestEveryMerger:
    def test_keys_shapes_and_dtypes_are_kept_and_inputs_untouched(self, name: str) -> None:
        problem = problem_of("resnet20@0.25", server_examples=20)
        updates = told(problem, name, trained("resnet20@0.25"))
        before = [{key: tensor.clone() for key, tensor in update.state.items()} for update in updates]
        weights = {key: tensor.clone() for key, tensor in problem.model.state_dict().items()}
        found = merger(name)(problem, updates, generator=stream())
        for state in found.states:
            assert list(state) == list(before[0])
            for key, tensor in before[0].items():
                assert state[key].shape == tensor.shape
                assert state[key].dtype == tensor.dtype
                assert torch.isfinite(state[key]).all()
            given = {tensor.data_ptr() for update in updates for tensor in update.state.values()}
            assert not given & {tensor.data_ptr() for tensor in state.values()}
        assert all(same(dict(update.state), original) for update, original in zip(updates, before, strict=True))
        assert same(dict(problem.model.state_dict()), weights)
        assert not problem.model.training
        assert not any(parameter.grad is not None for parameter in problem.model.parameters())

    def test_same_generator_same_bits(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        updates = told(problem, name, trained("mlp@0.1"))
        first, second = (merger(name)(problem, updates, generator=stream()) for _ in range(2))
        assert all(map(same, first.states, second.states))
        assert first.diagnostics == second.diagnostics

    def test_integer_buffers_are_integers_of_a_client(self, name: str) -> None:
        problem = problem_of("resnet20@0.25", server_examples=20)
        updates = told(problem, name, trained("resnet20@0.25"))
        for update in updates:
            update.state["1.num_batches_tracked"].fill_(3 + 4 * update.partition_id)
        for state in merger(name)(problem, updates, generator=stream()).states:
            assert state["1.num_batches_tracked"].dtype == torch.int64
            assert int(state["1.num_batches_tracked"]) in (0, 3, 7, 11)  # 0: a new network

    @pytest.mark.parametrize("examples", [1, 49, 50])
    def test_few_examples_do_not_break_it(self, name: str, examples: int) -> None:
        problem = problem_of("cnn@0.1", server_examples=examples)
        found = merger(name)(problem, told(problem, name, trained("cnn@0.1")), generator=stream())
        assert all(torch.isfinite(tensor).all() for state in found.states for tensor in state.values())

    def test_what_it_says_it_used_is_at_most_what_there_is(self, name: str) -> None:
        problem = problem_of("mlp@0.1")
        updates = told(problem, name, trained("mlp@0.1"))
        found = merger(name)(problem, updates, generator=stream())
        assert 0 <= found.server_examples <= len(problem.data)
        unlabelled = replace(problem, data=Examples(problem.data.images, torch.zeros_like(problem.data.labels)))
        blind = merger(name)(unlabelled, updates, generator=stream())
        if not found.server_labels:
            assert all(map(same, found.states, blind.states))
        if found.server_examples == 0:
            elsewhere = replace(problem, data=blobs(60, seed=1234))
            assert all(map(same, found.states, merger(name)(elsewhere, updates, generator=stream()).states))
        assert found.uses_clients is (name != "server-only")


@pytest.mark.parametrize(
    "name",
    ["fedavg", "mean", "mean-head", "np", "np-distill", "np-pairwise", "best-client", "ensemble", "ensemble-counts"],
)
def test_one_model_is_returned_as_it_is(name: str) -> None:
    problem = problem_of("mlp@0.1")
    (update,) = trained("mlp@0.1", 1)
    assert same(merger(name)(problem, [update], generator=stream()).state, dict(update.state))


@pytest.mark.parametrize("name", ["fedavg", "mean", "mean-head", "np", "np-distill", "np-pairwise", "best-client"])
@pytest.mark.parametrize("architecture", ["mlp@0.1", "resnet20@0.25"])
def test_equal_models_merge_to_themselves(name: str, architecture: str) -> None:
    problem = problem_of(architecture, server_examples=60 if architecture.startswith("mlp") else 20)
    (update,) = trained(architecture, 1)
    copies = [replace(update, partition_id=index, num_examples=index + 1) for index in range(3)]
    found = merger(name)(problem, copies, generator=stream()).state
    for key, _ in problem.model.named_parameters():
        assert torch.equal(found[key], update.state[key])


def test_fedavg_is_the_mean_by_examples() -> None:
    states = [
        {"w": torch.tensor([1.0, 2.0]), "n": torch.tensor(4)},
        {"w": torch.tensor([5.0, 6.0]), "n": torch.tensor(9)},
    ]
    found = mean_state(states, [3, 1])
    assert found["w"].tolist() == [2.0, 3.0]
    assert int(found["n"]) == 4


def test_the_mean_of_small_and_large_tensors_of_any_type_has_the_bits_of_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("fedmerge.merge.average.SMALL", 40)
    shapes = {"a": (3, 5), "b": (), "c": (7, 9), "d": (2, 2, 2), "e": (0,), "f": (6,), "g": (30,), "h": (1,)}
    types = {"d": torch.float64, "e": torch.float64, "f": torch.int64}
    states = [
        {
            name: (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 9).to(types.get(name))
            for name, shape in shapes.items()
        }
        for seed in range(4)
    ]
    weights, expected = [3.0, 1.0, 0.0, 5.0], {name: tensor.clone() for name, tensor in states[0].items()}
    for name, tensor in expected.items():
        for state, weight in zip(states[1:], weights[1:], strict=True) if name != "f" else ():
            tensor += (state[name] - states[0][name]) * (weight / sum(weights))
    before = [{name: tensor.clone() for name, tensor in state.items()} for state in states]
    found = mean_state(states, weights)
    assert list(found) == list(shapes)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
        assert tensor.dtype == states[0][name].dtype
        tensor.add_(1)  # it is the merge's own, and so is each of its tensors
    assert all(torch.equal(state[name], was[name]) for state, was in zip(states, before, strict=True) for name in was)
    assert all(torch.equal(tensor, expected[name] + 1) for name, tensor in found.items())


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [1], [float("nan"), 1], [float("inf"), 1]])
def test_unusable_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="expected 2 weights"):
        mean_state([{"w": torch.zeros(1)}] * 2, weights)


@pytest.mark.parametrize("name", ["fedavg", "mean"])
@pytest.mark.parametrize("examples", [60, 600])
def test_averages_of_models_with_batch_norm_depend_on_no_label(name: str, examples: int) -> None:
    problem, updates = problem_of("resnet20@0.25", server_examples=examples), trained("resnet20@0.25", 2)
    garbage = replace(problem, data=Examples(problem.data.images, problem.data.labels.flip(0)))
    first, second = (merger(name)(side, updates, generator=stream()) for side in (problem, garbage))
    assert same(first.state, second.state)
    assert not first.server_labels


def test_fedavg_without_calibration_averages_the_statistics_and_needs_no_data() -> None:
    problem, updates = problem_of("resnet20@0.25"), trained("resnet20@0.25", 2)
    found = Average("examples", calibrate=False)(problem, updates, generator=stream())
    first, second = (update.state["1.running_var"] for update in updates)
    shares = [update.num_examples for update in updates]
    torch.testing.assert_close(found.state["1.running_var"], (shares[0] * first + shares[1] * second) / sum(shares))
    assert found.server_examples == 0


def test_the_best_client_has_the_least_loss_on_the_server() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    losses = [evaluate(problem.model, [update.state], problem.data).loss for update in updates]
    chosen, found = best_client(problem, updates)
    assert found == losses
    assert chosen == losses.index(min(losses))
    diagnostics = BestClient()(problem, updates, generator=stream()).diagnostics
    assert diagnostics["client"] == updates[chosen].partition_id


@pytest.mark.parametrize("name", LEARNED)
@pytest.mark.parametrize("examples", [60, 600])
def test_a_learned_merge_is_never_chosen_worse_than_its_start(name: str, examples: int) -> None:
    problem = problem_of("mlp@0.1", server_examples=examples)
    updates = trained("mlp@0.1")
    found = merger(name)(problem, updates, generator=stream())
    for stage in found.diagnostics.get("pairs", [found.diagnostics]):
        assert stage["validation-loss"] <= stage["start-loss"]
    if examples == 600 and "pairs" not in found.diagnostics:
        judge = problem
        if name in DISTILLED or name.endswith("-semi"):
            judge = merger(name).objective.teach(problem, updates)  # type: ignore[attr-defined]
        kept = evaluate(problem.model, found.states, judge.validation).loss
        assert kept == pytest.approx(found.diagnostics["validation-loss"])


def test_a_diverging_learning_rate_falls_back_to_the_start() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=600), trained("mlp@0.1")
    found = NPMerge(groups="parameter", lrs=(1e30,), steps=40, start="mean")(problem, updates, generator=stream())
    assert found.diagnostics["steps"] == 0
    mean = mean_state([update.state for update in updates])
    for key, tensor in found.state.items():
        torch.testing.assert_close(tensor, mean[key])


def test_np_merge_learns() -> None:
    problem, updates = problem_of("mlp@0.5", server_examples=500), trained("mlp@0.5", shared=True)
    found = NPMerge(lrs=(1e-2,))(problem, updates, generator=stream())
    mean = mean_state([update.state for update in updates])
    test = blobs(400, seed=77)
    assert evaluate(problem.model, found.states, test).loss < evaluate(problem.model, [mean], test).loss


def test_server_only_training_depends_on_no_client() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    first = merger("server-only")(problem, updates, generator=stream())
    second = merger("server-only")(problem, updates[:1], generator=stream())
    assert same(first.state, second.state)
    assert same(fresh_state(problem, 3), fresh_state(problem, 3))
    assert not same(fresh_state(problem, 3), fresh_state(problem, 4))


def test_all_learned_methods_have_the_same_budget() -> None:
    """As many candidates, and as many steps each, for ours as for every control; with few images half as many."""
    updates = trained("mlp@0.1", 2)
    tried = {
        (examples, name): resolve("merger", f"{name}:steps=20", MERGERS)(
            problem_of("mlp@0.1", server_examples=examples), updates, generator=stream()
        ).diagnostics["candidates"]
        for examples in (60, 600)
        for name in ("np", "finetune", "head-finetune", "best-client-finetune", "server-only", "feddf")
    }
    assert tried.pop((60, "np")) == 3
    assert set(tried.values()) == {6}
    assert NPMerge().steps == FineTune().steps == PairwiseNPMerge().steps


def test_only_the_head_is_fine_tuned_and_it_learns() -> None:
    problem, updates = problem_of("mlp@0.1", server_examples=200), trained("mlp@0.1", shared=True)
    found = merger("head-finetune")(problem, updates, generator=stream())
    mean = mean_state([update.state for update in updates])
    assert found.diagnostics["steps"] > 0
    changed = {key for key, tensor in found.state.items() if not torch.equal(tensor, mean[key])}
    assert changed == {"5.weight", "5.bias"}
    test = blobs(400, seed=77)
    assert evaluate(problem.model, found.states, test).loss < evaluate(problem.model, [mean], test).loss


def test_feddf_is_distillation_of_the_plain_ensemble_into_the_mean() -> None:
    problem, updates = problem_of("mlp@0.1"), [replace(item, label_counts=None) for item in trained("mlp@0.1")]
    distilled = FineTune(targets="soft", teacher="mean", mixtures=0, steps=40)(problem, updates, generator=stream())
    found = merger("feddf")(problem, updates, generator=stream())
    assert same(found.state, distilled.state)
    assert not found.server_labels


def test_unknown_groups_and_starts_are_refused() -> None:
    with pytest.raises(ValueError, match="model, tensor, channel, parameter"):
        NPMerge(groups="layer")
    with pytest.raises(ValueError, match="mean, best, fresh"):
        FineTune(start="worst")
    with pytest.raises(ValueError, match="layers must be one of all, head"):
        FineTune(layers="last")


# The hand-made gradients against autograd through the merge, in float64.


def oracle_batches(problem: Problem, steps: int, seed: int) -> list[Examples]:
    generator = torch.Generator().manual_seed(seed)
    found: list[Examples] = []
    while len(found) < steps:
        found += [problem.data[index] for index in batches(len(problem.data), problem.batch_size, generator)]
    return found[:steps]


def loss_of(problem: Problem, state: dict[str, Tensor], batch: Examples) -> Tensor:
    return functional.cross_entropy(functional_call(problem.model, state, (batch.images,)), batch.labels)


def test_the_papers_form_is_a_plain_transcription_of_its_equations() -> None:
    problem, (first, second) = doubles(2)
    raw = {key: torch.zeros_like(tensor, requires_grad=True) for key, tensor in first.items()}
    optimizer = torch.optim.Adam(raw.values(), lr=0.1)
    for batch in oracle_batches(problem, 30, seed=4):
        alpha = {key: torch.sigmoid(tensor) for key, tensor in raw.items()}
        merged = {key: alpha[key] * first[key] + (1 - alpha[key]) * second[key] for key in raw}
        optimizer.zero_grad()
        loss_of(problem, merged, batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    expected = {key: raw[key].sigmoid() * first[key] + (1 - raw[key].sigmoid()) * second[key] for key in raw}
    candidate = Candidate({}, 0.1, lambda: SigmoidPair(first, second))
    *_, found = descend(problem, candidate, {}, problem.data, [0, 30], seed=4)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("groups", GROUPS)
@pytest.mark.parametrize("count", [2, 4])
def test_affine_coefficients_equal_autograd_through_the_merge(groups: str, count: int) -> None:
    problem, states = doubles(count)
    mean = mean_state(states)
    deviations = {key: torch.stack([state[key] - mean[key] for state in states]) for key in mean}
    mixture = AffineMixture(mean, deviations, groups)
    oracle = [value.clone().requires_grad_() for value in mixture.values]
    optimizer = torch.optim.Adam(oracle, lr=0.05)

    def merged() -> dict[str, Tensor]:
        spread = oracle if groups != "model" else [oracle[0].reshape(-1, *[1] * mean[key].ndim) for key in mean]
        alpha = {key: 1 / count + beta - beta.mean(0) for key, beta in zip(mean, spread, strict=True)}
        return {key: sum(a * state[key] for a, state in zip(alpha[key], states, strict=True)) for key in mean}

    for batch in oracle_batches(problem, 25, seed=2):
        optimizer.zero_grad()
        (loss_of(problem, merged(), batch) * count / (count - 1)).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    candidate = Candidate({}, 0.05, lambda: AffineMixture(mean, deviations, groups))
    *_, found = descend(problem, candidate, {}, problem.data, [0, 25], seed=2)
    for key, tensor in merged().items():
        torch.testing.assert_close(found[key], tensor.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("groups", GROUPS)
def test_coefficients_sum_to_one_and_give_the_mixture(groups: str) -> None:
    _, states = doubles(3)
    mean = mean_state(states)
    mixture = AffineMixture(
        mean, {key: torch.stack([state[key] - mean[key] for state in states]) for key in mean}, groups
    )
    for value in mixture.values:
        value.copy_(torch.randn(value.shape, generator=stream(), dtype=torch.float64))
    for key, alpha in mixture.coefficients().items():
        torch.testing.assert_close(alpha.sum(0), torch.ones_like(alpha[0]))
        stacked = torch.stack([state[key] for state in states])
        torch.testing.assert_close(mixture.parameters()[key], (alpha * stacked).sum(0))


def test_two_models_jointly_are_the_pair_without_its_sigmoid() -> None:
    problem, (first, second) = doubles(2)
    share = {key: torch.full_like(tensor, 0.5, requires_grad=True) for key, tensor in first.items()}
    optimizer = torch.optim.Adam(share.values(), lr=0.02)

    def merged() -> dict[str, Tensor]:
        return {key: alpha * first[key] + (1 - alpha) * second[key] for key, alpha in share.items()}

    for batch in oracle_batches(problem, 20, seed=6):
        optimizer.zero_grad()
        loss_of(problem, merged(), batch).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    mean = mean_state([first, second])
    deviations = {key: torch.stack([first[key] - mean[key], second[key] - mean[key]]) for key in mean}
    candidate = Candidate({}, 0.02, lambda: AffineMixture(mean, deviations, "parameter"))
    *_, found = descend(problem, candidate, {}, problem.data, [0, 20], seed=6)
    for key, tensor in merged().items():
        torch.testing.assert_close(found[key], tensor.detach(), rtol=1e-9, atol=1e-11)


def test_successive_pairs_are_pairs_of_pairs() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1")
    method = PairwiseNPMerge(lrs=(0.1,), steps=40)
    generator = stream()
    pair = method(problem, updates[:2], generator=generator)
    expected = method(problem, [replace(updates[0], state=pair.state), updates[2]], generator=generator)
    assert same(method(problem, updates, generator=stream()).state, expected.state)


def test_descent_yields_the_start_first_and_batches_do_not_depend_on_the_looks() -> None:
    problem, states = doubles(1)
    (state,) = states
    candidate = Candidate({}, 0.01, lambda: Weights(state))
    often = list(descend(problem, candidate, {}, problem.data, range(0, 13, 3), seed=1))
    seldom = list(descend(problem, candidate, {}, problem.data, [0, 12], seed=1))
    assert same(often[0], state)
    assert same(often[-1], seldom[-1])


def test_dropout_of_a_descent_comes_from_its_seed_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(36, 3)).eval()
    problem = Problem(model, blobs(60, seed=1))
    updates = [
        Update({key: tensor + index for key, tensor in model.state_dict().items()}, 1, index) for index in range(2)
    ]
    torch.manual_seed(1)
    first = merge_updates(problem, updates, align="identity", merge="np:steps=40", seed=0)
    torch.manual_seed(2)
    before = torch.get_rng_state()
    second = merge_updates(problem, updates, align="identity", merge="np:steps=40", seed=0)
    assert same(first.merged.state, second.merged.state)
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_is_split_into_parameters_and_buffers() -> None:
    problem = problem_of("resnet20@0.25")
    parameters, buffers = split_state(problem, problem.model.state_dict())
    assert parameters.keys() == dict(problem.model.named_parameters()).keys()
    assert buffers.keys() == dict(problem.model.named_buffers()).keys()
