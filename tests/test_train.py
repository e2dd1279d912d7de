"""Local training against SGD written by hand, and evaluation against probabilities written by hand."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmerge.configcheck import SCHEDULES
from fedmerge.errors import FedmergeError
from fedmerge.models import create
from fedmerge.problem import Examples
from fedmerge.seeds import default_generator, fork, generator
from fedmerge.sgd import share_of_rate
from fedmerge.train import Diverged, Evaluation, LocalTraining, batches, evaluate, fit, laid_out, num_batches, predict


def blobs(size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Examples:
    """Three classes that a line can separate."""
    stream = generator(seed, "blobs")
    labels = torch.arange(size) % 3
    centres = 4 * torch.tensor([[1.0, 0.0], [-0.5, 0.9], [-0.5, -0.9]])
    return Examples((centres[labels] + torch.randn(size, 2, generator=stream)).to(dtype), labels)


def network(dropout: float = 0.0) -> nn.Module:
    with default_generator(0):
        return nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3))


def linear(dtype: torch.dtype = torch.float64) -> nn.Module:
    with default_generator(1):
        return nn.Linear(2, 3, dtype=dtype)


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def share_by_hand(recipe: LocalTraining, epoch: float, step: float) -> float:
    """The height at a time in epochs: a line from a step before the start up to 1, then half a cosine or a line."""
    top = recipe.warmup * recipe.epochs
    if epoch < top:
        return (epoch + step) / (top + step)
    done = (epoch - top) / (recipe.epochs - top)
    return 1 - done if recipe.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2


def sgd_by_hand(
    state: dict[str, Tensor], examples: Examples, recipe: LocalTraining, sizes: Sequence[int], seed: int
) -> tuple[dict[str, Tensor], float]:
    """Softmax regression: the gradient is (p − y) ⊗ x, the learning rate rises and falls by the epoch."""
    weight, bias = state["weight"].clone(), state["bias"].clone()
    velocity, start = [torch.zeros_like(weight), torch.zeros_like(bias)], [weight.clone(), bias.clone()]
    stream = generator(seed)
    fork(stream)  # dropout's seed comes first
    step, losses = 0, list[float]()
    for _ in range(recipe.epochs):
        order, losses = torch.randperm(len(examples), generator=stream), []
        for batch in torch.split(order, list(sizes)):
            images, labels = examples.images[batch], examples.labels[batch]
            logits = images @ weight.T + bias
            shares = torch.exp(logits - logits.max(1, keepdim=True).values)
            shares = shares / shares.sum(1, keepdim=True)
            losses += (-shares[torch.arange(len(batch)), labels].log()).tolist()
            error = (shares - torch.eye(3, dtype=shares.dtype)[labels]) / len(batch)
            lr = recipe.lr * share_by_hand(recipe, step / len(sizes), 1 / len(sizes))
            for index, (value, gradient) in enumerate(((weight, error.T @ images), (bias, error.sum(0)))):
                drawn = gradient + recipe.weight_decay * value + recipe.proximal_mu * (value - start[index])
                velocity[index] = recipe.momentum * velocity[index] + drawn
                value -= lr * velocity[index]
            step += 1
    return {"weight": weight, "bias": bias}, sum(losses) / len(losses)


# training


@pytest.mark.parametrize(
    ("size", "sizes"), [(12, (4, 4, 4)), (14, (4, 4, 4, 2)), (13, (4, 4, 5)), (3, (3,)), (1, (1,))]
)
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.9, 0.0), (0.5, 0.1)])
def test_fit_is_sgd_with_momentum_weight_decay_and_a_cosine(
    size: int, sizes: tuple[int, ...], momentum: float, weight_decay: float
) -> None:
    recipe = LocalTraining(epochs=3, batch_size=4, lr=0.1, momentum=momentum, weight_decay=weight_decay, warmup=0)
    examples, model = blobs(size, dtype=torch.float64), linear()
    expected, expected_loss = sgd_by_hand(copied(model), examples, recipe, sizes, seed=5)
    found, loss = fit(linear(), copied(model), examples, recipe, generator=generator(5))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    assert loss == pytest.approx(expected_loss, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.25, 0.5])
def test_the_learning_rate_rises_and_decays_as_the_schedule_says(schedule: str, warmup: float) -> None:
    recipe = LocalTraining(3, 4, 0.1, weight_decay=0.1, schedule=schedule, warmup=warmup)
    examples, model = blobs(14, dtype=torch.float64), linear()
    expected, _ = sgd_by_hand(copied(model), examples, recipe, (4, 4, 4, 2), seed=5)
    found, _ = fit(linear(), copied(model), examples, recipe, generator=generator(5))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)


@given(st.integers(1, 9), st.integers(1, 20))
def test_without_a_warm_up_the_cosine_has_the_bits_that_it_always_had(epochs: int, batches_of_one: int) -> None:
    steps = epochs * batches_of_one
    for step in range(steps):
        expected = 0.5 * (1 + math.cos(math.pi * step / steps))
        assert share_of_rate(LocalTraining(epochs=epochs, warmup=0), step, steps) == expected


@given(st.sampled_from(SCHEDULES), st.integers(1, 90), st.floats(0, 1, exclude_max=True))
def test_the_learning_rate_is_never_0_and_is_highest_when_the_warm_up_ends(
    schedule: str, steps: int, warmup: float
) -> None:
    recipe, peak = LocalTraining(schedule=schedule, warmup=warmup), round(warmup * steps)
    shares = [share_of_rate(recipe, step, steps) for step in range(steps)]
    assert all(0 < share <= 1 for share in shares)
    assert shares[: peak + 1] == sorted(shares[: peak + 1])
    assert shares[peak:] == sorted(shares[peak:], reverse=True)
    assert [share == 1 for share in shares] == [step == peak for step in range(steps)]


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the schedule 'cosine' or 'linear', got 'step'"):
        share_of_rate(LocalTraining(schedule="step"), 0, 3)


def test_the_proximal_term_is_in_every_gradient() -> None:
    recipe = LocalTraining(epochs=3, batch_size=4, lr=0.1, momentum=0.5, weight_decay=0.1, proximal_mu=0.7, warmup=0)
    examples, model = blobs(12, dtype=torch.float64), linear()
    expected, expected_loss = sgd_by_hand(copied(model), examples, recipe, (4, 4, 4), seed=5)
    found, loss = fit(linear(), copied(model), examples, recipe, generator=generator(5))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-12, atol=1e-12)
    assert loss == pytest.approx(expected_loss, rel=1e-6)  # of the cross-entropy alone


def test_without_a_proximal_term_the_bits_are_the_same_and_a_strong_one_holds_the_weights_at_the_start() -> None:
    examples, start = blobs(60), copied(network())

    def moved(mu: float) -> tuple[dict[str, Tensor], float]:
        recipe = LocalTraining(epochs=30, lr=0.01, momentum=0.0, proximal_mu=mu)
        state, _ = fit(network(), start, examples, recipe, generator=generator(0))
        return state, sum(float((state[name] - start[name]).norm()) for name in ("0.weight", "4.weight"))

    plain, far = moved(0.0)
    recipe = LocalTraining(epochs=30, lr=0.01, momentum=0.0)
    assert same(plain, fit(network(), start, examples, recipe, generator=generator(0))[0])
    distances = [far, *(moved(mu)[1] for mu in (1.0, 10.0, 100.0))]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1 * far


def test_a_proximal_term_that_is_too_strong_for_the_learning_rate_is_named() -> None:
    with pytest.raises(Diverged, match=r"lower --lr \(it is 0.05\) or --proximal-mu \(it is 10000.0\)"):
        fit(
            linear(),
            copied(linear()),
            blobs(60, dtype=torch.float64),
            LocalTraining(epochs=80, proximal_mu=1e4),
            generator=generator(0),
        )


def test_fit_learns_what_can_be_learned() -> None:
    examples, model = blobs(90), network()
    start = copied(model)
    state, loss = fit(model, start, examples, LocalTraining(epochs=15), generator=generator(0))
    before, after = evaluate(model, [start], examples), evaluate(model, [state], examples)
    assert after.accuracy > 0.95 > before.accuracy
    assert after.loss < 0.3 * before.loss
    assert loss < 0.5 * before.loss


def test_the_same_generator_gives_the_same_bits_whatever_torchs_own_does() -> None:
    examples, start = blobs(30), copied(network())
    recipe = LocalTraining(epochs=2, batch_size=8)
    found = []
    for number, seed in enumerate((3, 3, 4)):
        torch.manual_seed(number)
        before = torch.get_rng_state()
        found.append(fit(network(dropout=0.5), start, examples, recipe, generator=generator(seed)))
        assert torch.equal(torch.get_rng_state(), before)
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]
    assert not same(found[0][0], found[2][0])


def test_the_generator_decides_dropout_too() -> None:
    examples, start = blobs(4), copied(network())
    recipe = LocalTraining(epochs=1, batch_size=4)  # one batch: the order of the examples does not matter
    first, second = (
        fit(network(dropout=0.5), start, examples, recipe, generator=generator(seed))[0] for seed in (0, 1)
    )
    assert not torch.allclose(first["4.weight"], second["4.weight"], rtol=1e-3)


def test_what_is_given_stays_as_it_was_and_the_models_own_weights_do_not_matter() -> None:
    examples, model = blobs(20), network()
    start = copied(model)
    before = copy.deepcopy((start, examples.images, examples.labels))
    recipe = LocalTraining(epochs=2, batch_size=8)
    first, _ = fit(model, start, examples, recipe, generator=generator(0))
    assert same(start, before[0])
    assert torch.equal(examples.images, before[1])
    assert torch.equal(examples.labels, before[2])
    assert not same(first, start)
    kept = copy.deepcopy(first)
    fit(model, start, examples, recipe, generator=generator(1))
    assert same(first, kept)
    second, _ = fit(model, start, examples, recipe, generator=generator(0))  # the model was trained meanwhile
    assert same(first, second)
    assert not any(tensor.requires_grad for tensor in first.values())


def test_batch_normalisation_trains_with_one_example_left_over() -> None:
    model = network().eval()
    state, loss = fit(model, copied(model), blobs(9), LocalTraining(epochs=2, batch_size=4), generator=generator(0))
    assert math.isfinite(loss)
    assert int(state["1.num_batches_tracked"]) == 2 * 2


def test_nothing_to_train_on_is_refused() -> None:
    with pytest.raises(ValueError, match="no examples to train on"):
        fit(linear(), copied(linear()), blobs(0, dtype=torch.float64), LocalTraining(), generator=generator(0))


def test_a_training_that_diverges_says_which_learning_rate() -> None:
    model = network()
    with pytest.raises(Diverged, match=r"the training loss became (nan|inf); lower --lr \(it is 1e\+30\)"):
        fit(model, copied(model), blobs(64), LocalTraining(epochs=3, lr=1e30), generator=generator(0))
    assert issubclass(Diverged, FedmergeError)


# batches


@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 5))
def test_an_epoch_holds_every_example_once(size: int, batch_size: int, seed: int) -> None:
    found = [batch.tolist() for batch in batches(size, batch_size, generator(seed))]
    assert sorted(index for batch in found for index in batch) == list(range(size))
    assert len(found) == num_batches(size, batch_size)
    assert all(len(batch) == batch_size for batch in found[:-1])
    assert len(found[-1]) <= batch_size + 1
    if size > 1 and batch_size > 1:
        assert min(map(len, found)) > 1


def test_epochs_differ_and_follow_the_generator() -> None:
    stream, again = generator(0), generator(0)
    epochs = [torch.cat(list(batches(50, 8, stream))) for _ in range(2)]
    assert not torch.equal(*epochs)
    assert torch.equal(epochs[0], torch.cat(list(batches(50, 8, again))))


# prediction


def test_predict_is_the_model_in_evaluation_mode_and_changes_nothing() -> None:
    model = network(dropout=0.5)
    state = {name: tensor + 0.5 if tensor.is_floating_point() else tensor for name, tensor in copied(model).items()}
    reference = network(dropout=0.5)
    reference.load_state_dict(state)
    images = blobs(700).images
    with torch.no_grad():
        expected = reference.eval()(images)
    before = copied(model), copy.deepcopy(state)
    model.train()
    model[1].eval()  # type: ignore[index] # a layer that is frozen
    modes = [module.training for module in model.modules()]
    found = predict(model, state, images)
    torch.testing.assert_close(found, expected)
    assert not predict(
        model, dict(reference.named_parameters()) | dict(reference.named_buffers()), images
    ).requires_grad
    assert [module.training for module in model.modules()] == modes
    assert same(copied(model), before[0])
    assert same(state, before[1])


def test_predict_keeps_the_modes_after_an_error_too() -> None:
    model = network().train()
    with pytest.raises(RuntimeError):
        predict(model, copied(model), torch.zeros(2, 5))
    assert all(module.training for module in model.modules())


# evaluation


def test_accuracy_loss_and_accuracy_by_class_are_those_computed_by_hand() -> None:
    shares = [(0.7, 0.2, 0.1, 0.0), (0.5, 0.3, 0.1, 0.1), (0.1, 0.8, 0.1, 0.0), (0.25, 0.25, 0.5, 0.0)]
    labels = torch.tensor([0, 1, 1, 2])
    logits = torch.tensor(shares, dtype=torch.float64).log() + torch.tensor([[0.0], [1.0], [-20.0], [300.0]])
    found = evaluate(nn.Identity(), [{}], Examples(logits, labels))
    assert found.accuracy == 3 / 4
    assert found.loss == pytest.approx(-(math.log(0.7) + math.log(0.3) + math.log(0.8) + math.log(0.5)) / 4)
    assert found.per_class_accuracy == (1.0, 0.5, 1.0, None)


def test_an_ensemble_averages_probabilities() -> None:
    members = [
        {"weight": 3 * torch.randn(3, 2, generator=generator(seed)), "bias": torch.zeros(3)} for seed in range(4)
    ]
    examples = blobs(600)
    shares = torch.stack(
        [(examples.images @ state["weight"].T + state["bias"]).double().softmax(1) for state in members]
    ).mean(0)
    chosen = shares.argmax(1)
    found = evaluate(linear(torch.float32), members, examples)
    assert found.accuracy == float((chosen == examples.labels).double().mean())
    assert found.loss == pytest.approx(float(-shares[torch.arange(600), examples.labels].log().mean()), rel=1e-6)
    assert found.per_class_accuracy == pytest.approx(
        tuple(float((chosen[examples.labels == label] == label).double().mean()) for label in range(3))
    )
    single = [evaluate(linear(torch.float32), [state], examples) for state in members]
    assert found.loss < sum(item.loss for item in single) / 4  # Jensen


def test_an_ensemble_of_equals_is_the_single_model() -> None:
    model, examples = linear(torch.float32), blobs(50)
    one, three = (evaluate(model, [copied(model)] * size, examples) for size in (1, 3))
    assert one.accuracy == three.accuracy
    assert one.per_class_accuracy == three.per_class_accuracy
    assert one.loss == pytest.approx(three.loss, rel=1e-12)


def test_the_loss_of_a_certain_and_wrong_model_is_large_and_not_infinite() -> None:
    logits = torch.tensor([[0.0, 500.0]])
    assert evaluate(nn.Identity(), [{}], Examples(logits, torch.tensor([0]))) == Evaluation(0.0, 500.0, (0.0, None))


# The layout of images.


class Viewed(nn.Module):
    """A model that takes its activations as they lie in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 4, 3)
        self.linear = nn.Linear(64, 3)

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.linear(self.convolution(images).view(len(images), -1))
        return found


@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_convolutions_lie_channels_last_and_give_the_same_outputs(channels: int) -> None:
    model = create("cnn@0.1", shape=(channels, 8, 8), num_classes=3, seed=0)
    images = torch.randn(5, channels, 8, 8)
    examples = Examples(images, torch.zeros(5, dtype=torch.int64))
    found = laid_out(model, examples)
    assert torch.equal(found.images, images)
    assert found[torch.tensor([3, 1])].images.stride()[1] == 1
    state = model.state_dict()
    torch.testing.assert_close(predict(model, state, found.images), predict(model, state, images), rtol=1e-4, atol=1e-5)


def test_a_model_without_convolutions_or_with_views_gets_images_as_they_are() -> None:
    images = torch.randn(5, 2, 6, 6)
    examples = Examples(images, torch.zeros(5, dtype=torch.int64))
    assert laid_out(nn.Sequential(nn.Flatten(), nn.Linear(72, 3)), examples) is examples
    viewed = Viewed()
    assert laid_out(viewed, examples) is examples
    assert viewed.training
    rows = Examples(torch.randn(5, 7), torch.zeros(5, dtype=torch.int64))
    assert laid_out(viewed, rows) is rows
