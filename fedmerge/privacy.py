"""Differential privacy at a client: DP-SGD and the ε that it costs, and noise on label counts.

DP-SGD (Abadi, Chu, Goodfellow, McMahan, Mironov, Talwar, Zhang: Deep Learning with Differential Privacy, CCS 2016,
arXiv 1607.00133) clips the gradient of each image to a norm, sums, and adds Gaussian noise in units of that norm. Its ε
is that of the sampled Gaussian mechanism (Mironov, Talwar, Zhang: Rényi Differential Privacy of the Sampled Gaussian
Mechanism, 2019, arXiv 1908.10530) over all steps. Clipping, noise, sampling and accounting are Opacus' own; gradients
of single images are torch.func's. The accountant's assumption holds: each image is in each batch independently, with
probability batch size / images (Poisson sampling), and gradients are divided by the expected size of a batch.

Label counts get two-sided geometric noise (Ghosh, Roughgarden, Sundararajan: Universally Utility-Maximizing Privacy
Mechanisms, STOC 2009, arXiv 0811.2841): P(k) ∝ exp(-|k| / scale). An image more or less changes one count by one, so
ε is 1 / scale.

Neighbours differ by one image of a client. How many images a client has is taken as known.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from fedmerge.augment import augmented
from fedmerge.metrics import EPSILON, PRIVACY
from fedmerge.problem import Examples, Update
from fedmerge.seeds import default_generator, fork
from fedmerge.settings import ConfigurationError
from fedmerge.sgd import Diverged, LocalTraining, num_batches, share_of_rate
from fedmerge.state import StateDict
from fedmerge.statistics import MOST_NUMBERS
from fedmerge.train import freeze

ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 64, 80, 96, 128, 192, 256, 512)
"""The orders of the Rényi divergence among which the accountant takes the best."""


def check_model(name: str, model: nn.Module) -> None:
    """Find out whether a model can be trained with differential privacy here.

    Args:
        name: the model's, for the message.
        model: the architecture.

    Raises:
        ConfigurationError: if it has BatchNorm that trains, or Opacus is missing.
    """
    if find_spec("opacus") is None:
        raise ConfigurationError("--dp-clip needs 'opacus': pip install 'fedmerge[privacy]', at every client")
    norms = [place for place, module in model.named_modules() if isinstance(module, _BatchNorm)]
    if norms:
        raise ConfigurationError(
            f"--model {name} has BatchNorm ('{norms[0]}'), which mixes the images of a batch, so that no image has a "
            "gradient of its own to clip (--dp-clip): use mlp, lenet5, cnn or vgg11, or a model with GroupNorm or "
            "LayerNorm in its place"
        )


def fit_privately(
    model: nn.Module,
    state: StateDict,
    examples: Examples,
    recipe: LocalTraining,
    *,
    clip: float,
    noise: float,
    generator: torch.Generator,
    moving: Collection[str] | None = None,
    most_numbers: int = MOST_NUMBERS,
) -> dict[str, Tensor]:
    """Train a copy of `model` from `state` by DP-SGD on the cross-entropy.

    A step is θ ← SGD(θ, (Σ_i g_i · min(1, C / ‖g_i‖) + σ C N(0, 1)) / E|batch|), with C the clip, σ the noise and i
    over the images of the batch, which may be none. Momentum, decay and proximal term look at no image.

    Args:
        model: the architecture, which `check_model` has seen; it is used as a workspace.
        state: the weights to start from.
        examples: at least one, on the model's device.
        recipe: the hyper-parameters; an epoch has as many steps as without privacy.
        clip: most norm of an image's gradient, greater than 0.
        noise: standard deviation of the noise, in units of `clip`; 0: no privacy.
        generator: decides batches, noise, dropout and augmentation; who knows its seed can take the noise away.
        moving: names of the tensors that are trained; None: all.
        most_numbers: of the gradients of single images that are in memory at once.

    Raises:
        ValueError: if there are no examples.
        Diverged: if a weight becomes NaN or infinite.
    """
    from opacus.optimizers import DPOptimizer
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    if len(examples) == 0:
        raise ValueError("there are no examples to train on")
    model.load_state_dict(dict(state))
    model.train()
    if moving is not None:
        freeze(model, moving)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = [parameter.detach().clone() for parameter in trained.values()] if recipe.proximal_mu else []
    rate, steps = sampling(len(examples), recipe)
    optimizer, schedule = _sgd(trained.values(), recipe, steps)
    device = examples.images.device
    with default_generator(fork(generator), device):
        chance = generator if recipe.augment == "none" else torch.Generator().manual_seed(fork(generator))
        private = DPOptimizer(
            optimizer,
            noise_multiplier=noise,
            max_grad_norm=clip,
            expected_batch_size=min(recipe.batch_size, len(examples)),
            generator=torch.Generator(device).manual_seed(fork(generator)),
            secure_mode=True,  # a sum of draws, so that rounding tells nothing: arXiv 2107.10138
        )

        def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
            return functional.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

        gradients = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
        size = max(1, most_numbers // sum(parameter.numel() for parameter in trained.values()))
        for batch in UniformWithReplacementSampler(
            num_samples=len(examples), sample_rate=rate, generator=generator, steps=steps
        ):
            index = torch.tensor(batch, dtype=torch.long, device=device)
            images = augmented(examples.images[index], recipe.augment, chance)
            parts = list(zip(torch.split(images, size), torch.split(examples.labels[index], size), strict=True))
            weights = {name: parameter.detach() for name, parameter in trained.items()}
            for number, part in enumerate(parts):
                private.zero_grad()
                found = gradients(weights, *part) if batch else {}
                for name, parameter in trained.items():
                    parameter.grad_sample = found.get(name, parameter.new_zeros((0, *parameter.shape)))  # type: ignore[attr-defined]
                private.signal_skip_step(number + 1 < len(parts))
                if private.pre_step():
                    if recipe.proximal_mu:
                        _pull(trained.values(), start, recipe.proximal_mu)
                    optimizer.step()
                    schedule.step()
            private.zero_grad()
    for parameter in trained.values():
        del parameter.grad_sample, parameter.summed_grad  # type: ignore[attr-defined]
    if not all(bool(parameter.isfinite().all()) for parameter in trained.values()):
        raise Diverged(f"a weight became NaN or infinite; lower --lr (it is {recipe.lr}) or --dp-noise (it is {noise})")
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def _sgd(
    trained: Iterable[nn.Parameter], recipe: LocalTraining, steps: int
) -> tuple[torch.optim.SGD, torch.optim.lr_scheduler.LambdaLR]:
    """Return the optimizer of a local training and its schedule over all steps."""
    optimizer = torch.optim.SGD(
        trained, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: share_of_rate(recipe, min(step, steps - 1), steps)
    )
    return optimizer, schedule


@torch.no_grad()
def _pull(trained: Iterable[nn.Parameter], start: Iterable[Tensor], strength: float) -> None:
    """Add the gradient of the proximal term to the parameters' gradients."""
    for parameter, was in zip(trained, start, strict=True):
        if parameter.grad is not None:
            parameter.grad += strength * (parameter - was)


def sampling(num_examples: int, recipe: LocalTraining) -> tuple[float, int]:
    """Return the probability of each image to be in a batch, and the number of steps.

    Args:
        num_examples: of the client.
        recipe: of its training.

    Example:
        >>> sampling(100, LocalTraining(epochs=2, batch_size=25))
        (0.25, 8)
    """
    rate = min(1.0, recipe.batch_size / num_examples)
    return rate, recipe.epochs * num_batches(num_examples, recipe.batch_size)


def epsilon(*, noise: float, rate: float, steps: int, delta: float) -> float:
    """Return an upper bound of the ε of so many steps of DP-SGD at δ, by Rényi differential privacy.

    Args:
        noise: standard deviation of the noise, in units of the clip, greater than 0.
        rate: probability of each image to be in a batch, in (0, 1].
        steps: in all, at least 1.
        delta: δ, in (0, 1).
    """
    from opacus.accountants import RDPAccountant

    accountant = RDPAccountant()
    accountant.history = [(noise, rate, steps)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the")  # the bound holds, a further order may tighten it
        return float(accountant.get_epsilon(delta, alphas=list(ORDERS)))


def noised_counts(counts: Sequence[int], scale: float, *, generator: torch.Generator) -> tuple[int, ...]:
    """Return label counts with two-sided geometric noise, none below 0 and in all no more than there were.

    How many there are in all is taken as known, so what is done after the noise costs nothing. Where all counts would
    be 0, the largest is 1: a client that claims nothing is refused.

    Args:
        counts: of each class, not all 0.
        scale: of the noise, greater than 0; ε is 1 / scale.
        generator: decides the noise.
    """
    noised = torch.tensor(counts) + two_sided_geometric(len(counts), scale, generator=generator)
    kept, most = noised.clamp(min=0), sum(counts)
    kept = kept * most // max(most, int(kept.sum()))
    if int(kept.sum()) == 0:
        kept[noised.argmax()] = 1
    return tuple(kept.tolist())


def two_sided_geometric(size: int, scale: float, *, generator: torch.Generator) -> Tensor:
    """Return independent whole numbers, P(k) ∝ exp(-|k| / scale): the difference of two geometric ones.

    Args:
        size: how many.
        scale: greater than 0.
        generator: decides.
    """
    sides = (torch.empty(2, size, dtype=torch.float64).exponential_(generator=generator) * scale).floor().long()
    return sides[0] - sides[1]


def guarantee(updates: Sequence[Update]) -> dict[str, Any]:
    """Return what the clients' training guarantees, in JSON's types: the largest of what they tell; empty for nothing.

    Args:
        updates: of one round; clients have different images, so that the worst ε is that of all.

    Example:
        >>> guarantee([Update({}, 9, 0, metrics={"epsilon": 2.0, "delta": 0.1}), Update({}, 9, 1)])
        {'epsilon': 2.0, 'delta': 0.1, 'clients': 1}
    """
    found: dict[str, Any] = {
        name: max(told)
        for name in PRIVACY
        if (told := [update.metrics[name] for update in updates if name in update.metrics])
    }
    private = sum(EPSILON in update.metrics for update in updates)
    return found | ({"clients": private} if private else {})
