"""Clients of one process that train side by side, their small models stacked (`fedmerge.batched`).

Each answers its own message, as if it had trained alone: the same numbers, but for rounding. What cannot be stacked
trains alone.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from flwr.app import Context, Error, Message, RecordDict
from torch import nn

from fedmerge.batched import Training, fit_many, stackable
from fedmerge.client import attempt, read_order, train_order
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.machine import choose_device, reproducible
from fedmerge.orders import Order, workspace
from fedmerge.problem import Update
from fedmerge.sgd import Diverged
from fedmerge.wire import update_to_records

GROUP_BYTES = 2**30
"""Weights, velocities and gradients of a group on a GPU take no more."""

LARGEST_GROUP = 64


def group_size(config: Config, model_bytes: int) -> int:
    """Return how many clients train side by side; it depends on nothing that a machine has.

    Unless it is asked for, models with convolutions do not: stacked, a round of theirs took four times as long on an
    H100 as one after the other (benchmarks/gpu.py).

    Args:
        config: the federation's configuration.
        model_bytes: size of a model.
    """
    if config.batched_clients:
        return config.batched_clients
    on_gpu = config.client_gpus > 0 and config.device != "cpu"
    if not on_gpu or config.models or config.model.partition("@")[0] != "mlp":
        return 1
    return max(1, min(LARGEST_GROUP, GROUP_BYTES // max(1, 4 * model_bytes)))


def answer_together(load: Callable[[Config], Federation], asked: Sequence[tuple[Message, Context]]) -> list[Message]:
    """Answer training messages, those of small models of one architecture and recipe side by side.

    Args:
        load: makes the federation of a configuration.
        asked: the messages with their nodes' contexts.

    Returns:
        The replies, in the order of the messages.
    """
    orders = [attempt(context, _read, load, message, context) for message, context in asked]
    kinds: dict[object, list[int]] = {}
    for place, order in enumerate(orders):
        if isinstance(order, Order):
            kinds.setdefault(_kind(order), []).append(place)
    contents: dict[int, RecordDict | Error] = {}
    for places in kinds.values():
        group = [(asked[place][1], order) for place in places if isinstance(order := orders[place], Order)]
        try:
            results = _train(group)
        except Exception as error:  # it is every member's, and each tells the server
            results = [attempt(context, _fail, error) for context, _ in group]
        contents |= dict(zip(places, results, strict=True))
    return [
        Message(order if isinstance(order, Error) else contents[place], reply_to=asked[place][0])
        for place, order in enumerate(orders)
    ]


def _read(load: Callable[[Config], Federation], message: Message, context: Context) -> Order:
    """Return what a client is asked to train, once it is known that it can begin."""
    order = read_order(load, message, context)
    order.start  # noqa: B018 - raises where there is none
    return order


def _kind(order: Order) -> object:
    """Return what orders have in common that are trained in one stack."""
    return order.config.model, replace(order.recipe, epochs=1), order.config.device, order.layers


def _train(group: Sequence[tuple[Context, Order]]) -> list[RecordDict | Error]:
    """Train clients of one kind, and return what each answers, or what went wrong."""
    config, examples = group[0][1].config, group[0][1].examples
    device = choose_device(config.device)
    with reproducible(), workspace(config, examples) as model:
        plain = not (config.dp_clip or config.anchor or group[0][1].layers) and config.augment == "none"
        if plain and stackable(model, convolutions=device.type == "cuda"):
            return _train_stacked(model, device, group)
    return [attempt(context, _alone, order) for context, order in group]


def _train_stacked(
    model: nn.Module, device: torch.device, group: Sequence[tuple[Context, Order]]
) -> list[RecordDict | Error]:
    began = time.perf_counter()
    data = [order.part(device) for _, order in group]
    states = fit_many(
        model,
        [
            Training(order.start, part, order.recipe, order.chance("round"))
            for (_, order), part in zip(group, data, strict=True)
        ],
    )
    seconds = (time.perf_counter() - began) / len(group)

    def answer(place: int) -> RecordDict:
        order, state = group[place][1], states[place]
        if isinstance(state, Diverged):
            return _alone(order)  # which starts again at a lower rate
        return _records(order, order.update(model, state, data[place].copied, seconds))

    return [attempt(context, answer, place) for place, (context, _) in enumerate(group)]


def _alone(order: Order) -> RecordDict:
    return _records(order, train_order(order))


def _fail(error: Exception) -> RecordDict:
    raise error


def _records(order: Order, update: Update) -> RecordDict:
    return update_to_records(update, upload_dtype=order.config.upload_dtype)
