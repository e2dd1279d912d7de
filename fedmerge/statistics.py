"""What a client may tell beside its model: statistics of its images under its model, for the rivals that need them.

- `fisher`: the diagonal of the Fisher information, E_x Σ_c p(c|x) (∂ log p(c|x) / ∂θ)², by parameter.
- `gram`: the second moments E[x xᵀ] of each linear or convolutional layer's inputs (`fedmerge.layers.rows`), by weight.

They are computed only if they are asked for, sent in float32, and follow a model whose units are renamed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from fedmerge.basis import BasisChange, Permutation, rebase
from fedmerge.layers import linear_layers, num_inputs, observing, rows
from fedmerge.problem import Update
from fedmerge.settings import ConfigurationError
from fedmerge.spaces import Space
from fedmerge.state import StateDict
from fedmerge.train import EVALUATION_BATCH, evaluating, predict

MOST_NUMBERS = 2**25
"""Of the gradients of single images that are in memory at once."""


def collect(
    kinds: Sequence[str], model: nn.Module, state: StateDict, images: Tensor, *, generator: torch.Generator
) -> dict[str, dict[str, Tensor]]:
    """Return statistics of a model on images, in float32.

    Args:
        kinds: of `fedmerge.catalogue.STATISTICS`.
        model: the architecture.
        state: its weights.
        images: (examples, …), at least one, on the state's device.
        generator: decides the signs of the Fisher's estimate.
    """
    found: dict[str, dict[str, Tensor]] = {}
    if "fisher" in kinds:
        num_classes = predict(model, state, images[:1]).shape[1]
        signs = torch.randint(0, 2, (len(images), num_classes), generator=generator) * 2.0 - 1
        found["fisher"] = diagonal_fisher(model, state, images, signs.to(images))
    if "gram" in kinds:
        found["gram"] = gram_matrices(model, state, images)
    return {kind: {name: tensor.float() for name, tensor in tensors.items()} for kind, tensors in found.items()}


def diagonal_fisher(
    model: nn.Module, state: StateDict, images: Tensor, signs: Float[Tensor, "examples classes"]
) -> dict[str, Tensor]:
    """Estimate the diagonal of the Fisher information, by one gradient for each image.

    With independent signs s_c, E_s (∂ Σ_c s_c √p_c log p_c / ∂θ)² = Σ_c p_c (∂ log p_c / ∂θ)², the √p_c taken as
    constants: no class has to be drawn, and a model that is sure of itself has no less exact an estimate.

    Args:
        model: the architecture.
        state: its weights, on the images' device.
        images: (examples, …), at least one.
        signs: -1 or 1.

    Returns:
        The mean over the images, in float64, by parameter name.
    """
    parameters = {name: state[name].detach() for name, _ in model.named_parameters()}
    buffers = {name: state[name] for name, _ in model.named_buffers()}

    def score(weights: dict[str, Tensor], image: Tensor, sign: Tensor) -> Tensor:
        found: Tensor = functional_call(model, {**weights, **buffers}, (image[None],))[0].log_softmax(0)
        return (sign * found.detach().exp().sqrt() * found).sum()

    gradients = vmap(grad(score), in_dims=(None, 0, 0))
    totals = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in parameters.items()}
    size = max(1, min(EVALUATION_BATCH, MOST_NUMBERS // sum(tensor.numel() for tensor in parameters.values())))
    with evaluating(model):
        for part, of_part in zip(torch.split(images, size), torch.split(signs, size), strict=True):
            for name, found in gradients(parameters, part, of_part).items():
                totals[name] += found.detach().square().sum(0)
    return {name: total / len(images) for name, total in totals.items()}


def gram_matrices(model: nn.Module, state: StateDict, images: Tensor) -> dict[str, Tensor]:
    """Return the second moments of the inputs of each layer that is linear in them.

    Args:
        model: the architecture.
        state: its weights, on the images' device.
        images: (examples, …), at least one.

    Returns:
        (inputs, inputs) in float64, by the weight's name.
    """
    layers = linear_layers(model)
    totals: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def see(name: str, inputs: Tensor) -> None:
        found = rows(layers[name], inputs)
        counts[name] += len(found)
        product = (found.T @ found).double()
        totals[name] = totals[name] + product if name in totals else product

    with observing(layers, see):
        predict(model, state, images)
    return {name: total / counts[name] for name, total in totals.items()}


def expected_shape(kind: str, name: str, state: StateDict) -> tuple[int, ...] | None:
    """Return the shape that a statistic of a tensor has; None if there can be none.

    Args:
        kind: of `fedmerge.catalogue.STATISTICS`.
        name: of the tensor.
        state: of the model, for its shapes.
    """
    if name not in state or not state[name].is_floating_point():
        return None
    if kind == "fisher":
        return tuple(state[name].shape)
    return (num_inputs(name, state),) * 2 if state[name].ndim > 1 else None


def rebased(
    statistics: Mapping[str, StateDict],
    state: StateDict,
    spaces: Sequence[Space],
    changes: Sequence[BasisChange],
) -> dict[str, dict[str, Tensor]]:
    """Return the statistics of a model whose units were renamed; none if a change is more than that.

    A number of the Fisher moves with its parameter, a row and column of a Gram matrix with the input. No diagonal, and
    no input by itself, survives a dense change of basis.

    Args:
        statistics: of the model, by kind.
        state: the model's, before or after, for its shapes.
        spaces: the feature spaces.
        changes: one for each space.
    """
    if not all(isinstance(change, Permutation) for change in changes):
        return {}
    found: dict[str, dict[str, Tensor]] = {}
    for kind, tensors in statistics.items():
        places = {name: _input_places(state[name]) if kind == "gram" else tensor for name, tensor in tensors.items()}
        moved = rebase({**state, **places}, spaces, changes)
        if kind == "gram":
            found[kind] = {name: _reordered(tensor, moved[name][0].flatten()) for name, tensor in tensors.items()}
        else:
            found[kind] = {name: moved[name] for name in tensors}
    return found


def known_statistics(updates: Sequence[Update], kind: str, what: str) -> list[StateDict]:
    """Return a statistic of each client.

    Args:
        updates: at least one.
        kind: of `fedmerge.catalogue.STATISTICS`.
        what: what needs it, for the error.

    Raises:
        ConfigurationError: if a client has not told it, or told it of other tensors than the first.
    """
    missing = [update.partition_id for update in updates if kind not in update.statistics]
    if missing:
        raise ConfigurationError(
            f"{what} needs the statistic '{kind}' of every client, and {len(missing)} of {len(updates)} have none (the "
            f"first is client {missing[0]}): ask for it where they train (--client-statistics {kind}), and align by "
            "permutations alone (identity, activations, weights, universe): it cannot follow a dense change of basis"
        )
    found = [update.statistics[kind] for update in updates]
    for update, tensors in zip(updates, found, strict=True):
        if tensors.keys() != found[0].keys():
            raise ConfigurationError(
                f"{what}: expected the statistic '{kind}' of the same tensors from every client, and client "
                f"{update.partition_id} differs from client {updates[0].partition_id}"
            )
    return found


def _input_places(weight: Tensor) -> Tensor:
    """Return a tensor of the weight's shape that holds in each place the number of its input."""
    places = torch.arange(weight[0].numel(), device=weight.device)
    return places.reshape(weight.shape[1:]).expand(weight.shape)


def _reordered(gram: Tensor, order: Tensor) -> Tensor:
    bias = torch.arange(len(order), len(gram), device=order.device)
    index = torch.cat([order, bias])
    return gram[index][:, index]
