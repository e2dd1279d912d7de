"""DP-SGD against slow oracles, ε against closed forms, and what a client tells with and without them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from flwr.app import ConfigRecord, Message, MessageType, RecordDict
from opacus.utils.uniform_sampler import UniformWithReplacementSampler
from problems import doubles
from scipy.special import ndtr
from torch import Tensor, nn
from torch.nn import functional

from fedmerge import federation, models
from fedmerge.augment import augmented
from fedmerge.cli import main
from fedmerge.client import client_app, train_client
from fedmerge.compare import Bench
from fedmerge.config import Config
from fedmerge.flower import identity, node_context
from fedmerge.metrics import average_metrics
from fedmerge.nodes import site_settings
from fedmerge.privacy import (
    check_model,
    epsilon,
    fit_privately,
    guarantee,
    noised_counts,
    sampling,
    two_sided_geometric,
)
from fedmerge.problem import Examples, Update
from fedmerge.report import write_report
from fedmerge.runs import Run
from fedmerge.seeds import fork, generator
from fedmerge.settings import ConfigurationError
from fedmerge.sgd import share_of_rate
from fedmerge.sitedata import ImageFormat
from fedmerge.train import Diverged, LocalTraining
from fedmerge.updatefiles import read_update, update_to_bytes
from fedmerge.wire import arrays_from_state, update_from_records, update_to_records
from fedmerge.words import privacy

RECIPE = LocalTraining(epochs=3, batch_size=6, lr=0.2, momentum=0.8, weight_decay=0.01, proximal_mu=0.1, warmup=0)
CONFIG = Config(clients=3, client_examples=150, local_epochs="1", model="mlp@0.1", dp_clip=1.0, dp_noise=1.5)


def stream(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Convolutional(nn.Sequential):
    """A net with weights that each image reads at many places, and a norm without statistics."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 3, 3),
            nn.GroupNorm(1, 3),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(48, 3),
        )


def problem(convolutional: bool = False) -> tuple[nn.Module, dict[str, Tensor], Examples]:
    made, (state,) = doubles(1)
    examples = made.data[:23]
    if not convolutional:
        return made.model, state, examples
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Convolutional().double()
    images = examples.images.reshape(23, 1, 6, 6)
    return (
        model,
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        Examples(images, examples.labels),
    )


def private(case: tuple[nn.Module, dict[str, Tensor], Examples], **options: Any) -> dict[str, Tensor]:
    model, state, examples = case
    recipe = options.pop("recipe", RECIPE)
    settings = {"clip": 1e9, "noise": 0.0, "generator": stream(), **options}
    return fit_privately(model, state, examples, recipe, **settings)


def loop(
    case: tuple[nn.Module, dict[str, Tensor], Examples],
    recipe: LocalTraining,
    clip: float,
    moving: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """DP-SGD without noise, an image and a parameter at a time, on the same batches."""
    model, state, examples = case
    model.load_state_dict(state)
    chance = stream()
    fork(chance)
    changing = chance if recipe.augment == "none" else torch.Generator().manual_seed(fork(chance))
    fork(chance)
    rate, steps = sampling(len(examples), recipe)
    velocity = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
    batches = UniformWithReplacementSampler(num_samples=len(examples), sample_rate=rate, generator=chance, steps=steps)
    for step, batch in enumerate(batches):
        total = {name: torch.zeros_like(tensor) for name, tensor in model.named_parameters()}
        images = augmented(examples.images[batch], recipe.augment, changing)
        for place, index in enumerate(batch):
            model.zero_grad()
            functional.cross_entropy(model(images[[place]]), examples.labels[[index]]).backward()  # type: ignore[no-untyped-call]
            trained = {
                name: parameter.grad
                for name, parameter in model.named_parameters()
                if parameter.grad is not None and (not moving or name in moving)
            }
            norm = math.sqrt(sum(float(gradient.square().sum()) for gradient in trained.values()))
            for name, gradient in trained.items():
                total[name] += gradient * min(1.0, clip / (norm + 1e-6))
        lr = recipe.lr * share_of_rate(recipe, step, steps)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if not moving or name in moving:
                    gradient = total[name] / min(recipe.batch_size, len(examples))
                    gradient += recipe.proximal_mu * (parameter - state[name]) + recipe.weight_decay * parameter
                    velocity[name] = recipe.momentum * velocity[name] + gradient
                    parameter.sub_(lr * velocity[name])
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def close(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(tensor, second[name], rtol=0, atol=1e-12) for name, tensor in first.items())


def same(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(tensor, second[name]) for name, tensor in first.items())


@pytest.mark.parametrize("convolutional", [False, True])
def test_without_noise_and_limit_it_is_sgd_on_the_same_batches(convolutional: bool) -> None:
    case = problem(convolutional)
    model, state, examples = case
    found = private(case)
    model.load_state_dict(state)
    chance = stream()
    fork(chance), fork(chance)
    rate, steps = sampling(len(examples), RECIPE)
    assert (rate, steps) == (6 / 23, 12)
    optimizer = torch.optim.SGD(model.parameters(), lr=RECIPE.lr, momentum=RECIPE.momentum, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for batch in UniformWithReplacementSampler(num_samples=23, sample_rate=rate, generator=chance, steps=steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(examples.images[batch]), examples.labels[batch], reduction="sum") / 6
        pulls = [(p - state[name]).square().sum() for name, p in model.named_parameters()]
        (loss + RECIPE.proximal_mu / 2 * torch.stack(pulls).sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    assert close(found, model.state_dict())


@pytest.mark.parametrize("convolutional", [False, True])
@pytest.mark.parametrize("clip", [1e9, 0.3])
def test_the_gradient_of_each_image_is_clipped_as_in_a_loop_over_images(convolutional: bool, clip: float) -> None:
    case = problem(convolutional)
    assert close(private(case, clip=clip), loop(case, RECIPE, clip))


def test_images_are_augmented_before_their_gradients_are_clipped() -> None:
    case, recipe = problem(convolutional=True), replace(RECIPE, augment="both")
    assert close(private(case, recipe=recipe, clip=0.3), loop(case, recipe, 0.3))
    assert close(private(case, recipe=recipe, most_numbers=1), private(case, recipe=recipe, most_numbers=10**9))
    assert not close(private(case, recipe=recipe, clip=0.3), private(case, clip=0.3))


def test_the_learning_rate_follows_the_schedule_that_was_asked_for() -> None:
    recipe = replace(RECIPE, schedule="linear", warmup=0.5)
    assert close(private(problem(), recipe=recipe, clip=0.3), loop(problem(), recipe, 0.3))
    assert not close(private(problem(), recipe=recipe, clip=0.3), private(problem(), recipe=RECIPE, clip=0.3))


def test_batches_may_be_empty() -> None:
    case = problem()
    recipe = LocalTraining(epochs=1, batch_size=1, lr=0.1, momentum=0.0)
    rate, steps = sampling(23, recipe)
    chance = stream()
    fork(chance), fork(chance)
    sizes = map(len, UniformWithReplacementSampler(num_samples=23, sample_rate=rate, generator=chance, steps=steps))
    assert 0 in list(sizes)
    assert close(private(case, recipe=recipe, clip=0.3), loop(case, recipe, 0.3))


def test_a_batch_larger_than_all_images_is_all_images_in_each_step() -> None:
    recipe = LocalTraining(epochs=4, batch_size=100)
    assert sampling(23, recipe) == (1.0, 4)
    case = problem()
    assert close(private(case, recipe=recipe, clip=0.5), loop(case, recipe, 0.5))


def test_layers_that_do_not_move_stay_and_have_no_part_in_the_norm() -> None:
    case = problem()
    moving = ("3.weight", "3.bias")
    found = private(case, clip=0.2, moving=moving)
    assert all(torch.equal(found[name], case[1][name]) for name in ("1.weight", "1.bias"))
    case[0].requires_grad_(True)
    assert close(found, loop(case, RECIPE, 0.2, moving))


def test_parts_of_a_batch_give_what_the_whole_batch_gives() -> None:
    case = problem()
    settings = {"clip": 0.3, "noise": 0.7}
    numbers = sum(parameter.numel() for parameter in case[0].parameters())
    whole = private(case, **settings)
    assert close(private(case, **settings, most_numbers=2 * numbers), whole)
    assert close(private(case, **settings, most_numbers=1), whole)


def test_the_noise_is_gaussian_of_the_size_that_was_asked_for_whatever_the_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 400), nn.Tanh(), nn.Linear(400, 3)).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    case = model, state, problem()[2]
    recipe = LocalTraining(epochs=1, batch_size=23, lr=0.5, momentum=0.0)
    quiet, loud = private(case, recipe=recipe, clip=0.1), private(case, recipe=recipe, clip=0.1, noise=2.0)
    drawn = torch.cat([(quiet[name] - loud[name]).flatten() for name in quiet]) * 23 / (0.5 * 2.0 * 0.1)
    assert len(drawn) > 16_000
    assert float(drawn.mean()) == pytest.approx(0, abs=0.03)
    assert float(drawn.std()) == pytest.approx(1, abs=0.02)
    assert float((drawn.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.015)


def test_one_image_changes_a_step_by_no_more_than_its_share_of_the_clip() -> None:
    model, state, examples = problem()
    recipe = LocalTraining(epochs=1, batch_size=23, lr=1.0, momentum=0.0)
    images = examples.images.clone()
    images[5] *= 1e6
    found = private((model, state, examples), recipe=recipe, clip=0.1)
    other = private((model, state, Examples(images, examples.labels)), recipe=recipe, clip=0.1)
    moved = math.sqrt(sum(float((found[name] - other[name]).square().sum()) for name in found))
    assert 0 < moved <= 2 * 0.1 / 23 * (1 + 1e-9)


def test_the_same_generator_gives_the_same_bits_and_leaves_the_default_generator_alone() -> None:
    case = problem()
    before = torch.get_rng_state()
    first = private(case, clip=0.3, noise=1.0)
    assert same(first, private(case, clip=0.3, noise=1.0))
    assert not same(first, private(case, clip=0.3, noise=1.0, generator=stream(4)))
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_is_drawn_for_each_image_and_by_the_generator() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(36, 3)).double()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    case = model, state, problem()[2]
    recipe = LocalTraining(epochs=1, batch_size=23)
    found = private(case, recipe=recipe)
    assert same(found, private(case, recipe=recipe))
    untouched = (found["2.weight"] == state["2.weight"]).all(0)
    assert not untouched.any(), "one mask for all images would leave half of the inputs without a gradient"


def test_no_images_and_weights_that_explode_are_errors() -> None:
    model, state, examples = problem()
    with pytest.raises(ValueError, match="no examples"):
        private((model, state, examples[:0]))
    with pytest.raises(Diverged, match=r"lower --lr \(it is 1e\+200\)"):
        private((model, state, examples), recipe=LocalTraining(epochs=4, batch_size=6, lr=1e200, weight_decay=1.0))


def exact_delta(eps: float, noise: float) -> float:
    """δ of the Gaussian mechanism at ε (Balle, Wang: ICML 2018, arXiv 1805.06530, theorem 8)."""
    return float(ndtr(0.5 / noise - eps * noise) - math.exp(eps) * ndtr(-0.5 / noise - eps * noise))


@pytest.mark.parametrize(("noise", "delta"), [(1.0, 1e-5), (4.0, 1e-5), (2.0, 1e-3), (0.7, 1e-2)])
def test_one_step_on_all_images_costs_what_the_gaussian_mechanism_costs(noise: float, delta: float) -> None:
    found = epsilon(noise=noise, rate=1.0, steps=1, delta=delta)
    assert exact_delta(found, noise) <= delta, "the bound must hold"
    orders = np.linspace(1.0001, 3000, 2_000_000)  # Canonne, Kamath, Steinke, NeurIPS 2020, proposition 12
    best = orders / (2 * noise**2) + np.log1p(-1 / orders) - (math.log(delta) + np.log(orders)) / (orders - 1)
    assert found == pytest.approx(best.min(), rel=2e-3)
    assert found <= 1 / (2 * noise**2) + math.sqrt(2 * math.log(1 / delta)) / noise


def test_steps_compose_as_one_step_of_less_noise() -> None:
    assert epsilon(noise=3.0, rate=1.0, steps=9, delta=1e-5) == pytest.approx(
        epsilon(noise=1.0, rate=1.0, steps=1, delta=1e-5)
    )


def test_the_accountants_published_example_holds() -> None:
    """Abadi et al., section 3.2: q = 0.01, σ = 4, 10,000 steps, δ = 1e-5 have ε ≈ 1.26; later bounds are tighter."""
    assert 0.9 < epsilon(noise=4.0, rate=0.01, steps=10_000, delta=1e-5) <= 1.26


def test_more_noise_fewer_steps_and_rarer_images_cost_less() -> None:
    usual = {"noise": 1.0, "rate": 0.05, "steps": 200, "delta": 1e-4}
    base = epsilon(**usual)  # type: ignore[arg-type]
    for change in ({"noise": 1.2}, {"rate": 0.04}, {"steps": 150}, {"delta": 1e-3}):
        assert epsilon(**{**usual, **change}) < base  # type: ignore[arg-type]


def test_the_noise_of_label_counts_is_whole_and_its_odds_are_its_epsilon() -> None:
    scale, number = 1.5, 200_000
    found = Counter(two_sided_geometric(number, scale, generator=stream()).tolist())
    ratio = math.exp(-1 / scale)
    for value in range(-3, 4):
        expected = (1 - ratio) / (1 + ratio) * ratio ** abs(value)
        assert found[value] / number == pytest.approx(expected, abs=0.003), value


def test_noised_counts_are_counts_of_no_more_than_there_are() -> None:
    for seed in range(300):
        counts = noised_counts([0, 3, 40, 0, 7], 6.0, generator=stream(seed))
        assert min(counts) >= 0
        assert 1 <= sum(counts) <= 50
        assert 1 <= sum(noised_counts([1, 0, 0], 20.0, generator=stream(seed))) <= 1
    assert noised_counts([5, 9], 1e-9, generator=stream()) == (5, 9)


def trained(config: Config = CONFIG, client: int = 1, server_round: int = 1, secret: int | None = None) -> Update:
    start = models.create(config.model, shape=(1, 8, 8), num_classes=10, seed=0).state_dict()
    return train_client(config, federation.load(config), client, server_round, start, secret=secret)


def test_a_client_tells_its_epsilon_and_nothing_of_its_images_without_noise() -> None:
    update = trained()
    rate, steps = sampling(update.num_examples, LocalTraining(epochs=1, batch_size=32))
    delta = 1 / update.num_examples
    assert update.metrics["epsilon"] == epsilon(noise=1.5, rate=rate, steps=steps, delta=delta)
    assert update.metrics["delta"] == delta
    assert set(update.metrics) == {"epsilon", "delta", "seconds"}
    assert trained(CONFIG.replace(dp_delta=1e-4)).metrics["delta"] == 1e-4
    clipped = trained(CONFIG.replace(dp_noise=0.0))
    assert set(clipped.metrics) == {"loss", "accuracy", "seconds"}
    assert not same(clipped.state, trained(CONFIG.replace(dp_noise=0.0, dp_clip=0.0)).state)


def test_rounds_and_drawn_epochs_add_up() -> None:
    config = CONFIG.replace(local_epochs="1..4", init="shared")
    update = trained(config, server_round=3)
    epochs = [
        int(torch.randint(1, 5, (), generator=generator(0, "client", 1, "epochs", number))) for number in (1, 2, 3)
    ]
    rate, steps = sampling(update.num_examples, LocalTraining(epochs=sum(epochs), batch_size=32))
    expected = epsilon(noise=1.5, rate=rate, steps=steps, delta=1 / update.num_examples)
    assert update.metrics["epsilon"] == expected > trained(config, server_round=2).metrics["epsilon"]


def test_the_noise_is_the_seeds_unless_the_client_has_a_secret() -> None:
    update = trained()
    assert same(update.state, trained().state)
    secret = trained(secret=5)
    assert same(secret.state, trained(secret=5).state)
    assert not same(update.state, secret.state)


def test_label_counts_with_noise_tell_their_epsilon_and_that_of_all_rounds() -> None:
    config = CONFIG.replace(label_count_noise=4.0, init="shared")
    exact = trained().label_counts
    first, third = trained(config), trained(config, server_round=3)
    assert first.label_counts != exact
    assert first.label_counts != third.label_counts
    assert first.metrics["label-count-epsilon"] == 0.25
    assert third.metrics["label-count-epsilon"] == 0.75
    assert first.label_counts != trained(config, secret=5).label_counts
    kept = trained(config.replace(label_counts=False))
    assert kept.label_counts is None
    assert "label-count-epsilon" not in kept.metrics
    assert same(first.state, trained(CONFIG.replace(init="shared")).state)


def asked(config: Config, **node: Any) -> Message:
    told = ConfigRecord({"server-round": 1, **ImageFormat.of(federation.load(config).dataset).to_mapping()})
    with identity():
        message = Message(RecordDict({"config": told}), 1, MessageType.TRAIN)
        context = node_context(config, 0)
        context.node_config |= node
        return client_app()(message, context)


def test_a_site_with_data_of_its_own_draws_noise_that_nobody_can_draw_again(tmp_path: Path) -> None:
    config = CONFIG.replace(label_count_noise=5.0)
    own = federation.load(config).client(0)
    file = tmp_path / "site.npz"
    np.savez(file, images=np.zeros((40, 8, 8), dtype=np.uint8), labels=own.labels[:40].numpy())
    answers = [asked(config, data=str(file)).content for _ in range(2)]
    arrays = [answer.array_records["arrays"]["5.weight"].numpy() for answer in answers]
    assert not np.array_equal(arrays[0], arrays[1])
    counts = [answer.metric_records["metrics"]["label-counts"] for answer in answers]
    assert counts[0] != counts[1]
    again = [asked(config).content.array_records["arrays"]["5.weight"].numpy() for _ in range(2)]
    assert np.array_equal(again[0], again[1]), "images that the server has too need no secret"


def test_a_site_may_have_more_privacy_than_the_run_asks_for() -> None:
    run = CONFIG.replace(dp_noise=0.0, dp_clip=0.0)
    given = {"dp-clip": 0.5, "dp-noise": 3.0, "label-counts": False}
    assert site_settings(given | {"merge": "mean"}) == given
    metrics = asked(run, **given).content.metric_records["metrics"]
    assert 0 < float(metrics["epsilon"]) < trained().metrics["epsilon"]  # type: ignore[arg-type]
    assert "label-counts" not in metrics
    reply = asked(run.replace(merge="fisher"), **given)
    assert "fisher: statistics of the clients' images have no noise" in (reply.error.reason or "")


def test_a_private_client_does_not_evaluate_models_on_its_images() -> None:
    with identity():
        state = models.create(CONFIG.model, shape=(1, 8, 8), num_classes=10, seed=0).state_dict()
        message = Message(RecordDict({"arrays": arrays_from_state(state)}), 1, MessageType.EVALUATE)
        reply = client_app()(message, node_context(CONFIG, 0))
    assert "--dp-noise: losses and accuracies on a client's images have no noise" in (reply.error.reason or "")


def test_what_was_guaranteed_arrives_in_replies_and_files(tmp_path: Path) -> None:
    update = trained(CONFIG.replace(label_count_noise=2.0))
    content = update_to_records(update, upload_dtype="float32")
    assert update_from_records(content, update.state, fallback_id=0).metrics == update.metrics
    (tmp_path / "update").write_bytes(update_to_bytes(update))
    assert read_update(tmp_path / "update").metrics == update.metrics
    assert set(average_metrics([content], "num-examples")) == {"seconds"}


def test_the_guarantee_is_that_of_the_worst_client_and_counts_those_that_have_one() -> None:
    told = [
        Update({}, 5, 0, metrics={"epsilon": 2.0, "delta": 0.1, "loss": 3.0}),
        Update({}, 5, 1, metrics={"epsilon": 4.0, "delta": 0.01, "label-count-epsilon": 0.2}),
        Update({}, 5, 2),
    ]
    assert guarantee(told) == {"epsilon": 4.0, "delta": 0.1, "label-count-epsilon": 0.2, "clients": 2}
    assert guarantee(told[2:]) == {}


def test_every_merge_has_the_clients_epsilon_and_what_needs_no_client_has_none(tmp_path: Path) -> None:
    config = CONFIG.replace(server_examples=60)
    examples = federation.load(config)
    updates = [trained(config, client) for client in range(3)]
    bench = Bench(config.to_mapping(), examples, updates)
    methods = ["mean", "ensemble", "server-only:steps=2:lrs=0.01"]
    lines = [line for method in methods for line, _, _ in bench.answer(method)]
    worst = max(update.metrics["epsilon"] for update in updates)
    assert [line.get("privacy", {}).get("epsilon") for line in lines] == [worst, worst, None]
    run = Run.create(tmp_path / "run", "compare", config, methods=methods, seeds=[0])
    for line in lines:
        run.append(line)
    page = write_report(run).read_text()
    assert f"Models are differentially private for each image of each client, over all rounds: ε ≤ {worst:.3g}" in page
    assert "no merge changes that" in page


def test_a_report_says_what_is_not_covered() -> None:
    line = {"privacy": {"epsilon": 3.0, "delta": 0.01, "clients": 3}}
    assert privacy(CONFIG, [line])[1:] == ["Label counts are exact, and not covered.", "Numbers of images are exact."]
    assert "Label counts are kept back." in privacy(CONFIG.replace(label_counts=False), [line])
    noised = {"privacy": {**line["privacy"], "label-count-epsilon": 0.5}}
    assert "Label counts have noise: ε = 0.5, to be added." in privacy(CONFIG, [line, noised])
    assert "each image of 2 of 3, over" in privacy(CONFIG, [{"privacy": {**line["privacy"], "clients": 2}}])[0]
    assert privacy(Config(), [{}]) == []
    clipped = CONFIG.replace(dp_noise=0.0)
    assert privacy(clipped, []) == ["Gradients are clipped without noise (--dp-noise): that alone is no privacy."]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"dp_noise": 1.0}, "--dp-noise 1.0 is in units of --dp-clip: give that too"),
        ({"dp_clip": -1.0}, "--dp-clip must be at least 0 and finite, got -1.0"),
        (
            {"dp_clip": 1.0, "dp_noise": 1.0, "merge": "regmean"},
            "gram: statistics of the clients' images have no noise",
        ),
        ({"dp_clip": 1.0, "dp_noise": 1.0, "client_statistics": "fisher"}, "fisher: statistics"),
        ({"dp_delta": 1.0}, r"--dp-delta must be in \[0, 1\), got 1.0"),
        ({"label_count_noise": -2.0}, "--label-count-noise must be at least 0 and finite"),
    ],
)
def test_settings_that_would_leave_clients_without_privacy_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        Config(**settings)


def test_a_model_with_batchnorm_is_refused_before_and_at_the_clients(tmp_path: Path) -> None:
    words = ["simulate", "--model", "resnet20@0.25", "--dp-clip", "1", "--out", str(tmp_path / "run")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert "--model resnet20@0.25 has BatchNorm ('" in done.output
    assert "use mlp, lenet5, cnn or vgg11, or a model with GroupNorm or LayerNorm" in done.output
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigurationError, match="has BatchNorm"):
        trained(CONFIG.replace(model="resnet20@0.25"))


@pytest.mark.parametrize("name", ["mlp", "lenet5", "cnn", "vgg11"])
def test_the_models_that_the_error_names_can_be_used(name: str) -> None:
    check_model(name, models.create(f"{name}@0.1", shape=(1, 8, 8), num_classes=10, seed=0))


def test_without_opacus_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmerge.privacy.find_spec", lambda _: None)
    with pytest.raises(ConfigurationError, match=r"needs 'opacus': pip install 'fedmerge\[privacy\]', at every client"):
        trained()
