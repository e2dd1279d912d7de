"""The ClientApp: what a client does with a message that asks it to train, or to evaluate.

`client_app` wraps the functions of `fedmerge.local` for Flower. A node may bring data of its own
(`fedmerge.sitedata`) instead of its part of the federation's data set. A client that fails answers with its reason, so
that the server can tell the user.
"""

from __future__ import annotations

import functools
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from typing import ParamSpec, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from fedmerge import federation, privacy, sitedata
from fedmerge.anchor import anchored
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.flower import CLIENT_FAILED
from fedmerge.machine import choose_device, reproducible
from fedmerge.metrics import PARTITION_ID, records
from fedmerge.nodes import of_device, own_model, partition_of, site_settings
from fedmerge.orders import Order, own_start, told_of, workspace
from fedmerge.problem import Examples, Update
from fedmerge.settings import ConfigurationError, Value
from fedmerge.sgd import Diverged
from fedmerge.state import StateDict
from fedmerge.train import Evaluation, evaluate, fit, laid_out
from fedmerge.wire import (
    ARRAYS,
    CONFIG,
    METRICS,
    MODEL,
    NUM_EXAMPLES,
    PROXIMAL_MU,
    SERVER_ROUND,
    state_from_arrays,
    update_to_records,
)

P = ParamSpec("P")
T = TypeVar("T")

logger = logging.getLogger(__name__)

RESTARTS = 3
"""Times that a client whose training diverges starts again, each at half the learning rate: it is asked but once. Not
with differential privacy, where each training costs some."""

_sent: dict[tuple[object, ...], tuple[list[bytes], StateDict]] = {}
"""The weights that were read last, by the identity of their bytes, which are kept so that no others can have it."""


def client_app(load: Callable[[Config], Federation] = federation.load) -> ClientApp:
    """Return the ClientApp of a federation.

    Args:
        load: makes the federation of a configuration; it is called for each message.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def answer() -> RecordDict:
            order = read_order(load, message, context)
            return update_to_records(train_order(order), upload_dtype=order.config.upload_dtype)

        return Message(attempt(context, answer), reply_to=message)

    @app.evaluate()
    def judge(message: Message, context: Context) -> Message:
        def answer() -> RecordDict:
            config, partition_id = _who(context)
            arrays = records(message.content, ArrayRecord).get(ARRAYS)
            if config.dp_noise:
                raise ConfigurationError("--dp-noise: losses and accuracies on a client's images have no noise")
            if arrays is None:
                raise ValueError(f"an evaluation needs the model in the message's record '{ARRAYS}'")
            told = records(message.content, ConfigRecord).get(CONFIG, ConfigRecord())
            examples = _examples(load, config, partition_id, told, context)
            state = _state(arrays, config, examples)
            result, num_examples = evaluate_client(config, examples, partition_id, state)
            metrics = MetricRecord({NUM_EXAMPLES: num_examples, PARTITION_ID: partition_id, **told_of(result)})
            return RecordDict({METRICS: metrics})

        return Message(attempt(context, answer), reply_to=message)

    @app.query()
    def who(message: Message, context: Context) -> Message:
        def answer() -> RecordDict:
            return RecordDict({METRICS: MetricRecord({PARTITION_ID: _who(context)[1]})})

        return Message(attempt(context, answer), reply_to=message)

    return app


def train_client(
    config: Config,
    examples: Federation,
    partition_id: int,
    server_round: int,
    start: StateDict | None,
    *,
    layers: int = 0,
    secret: int | None = None,
) -> Update:
    """Train a client's model on the client's images.

    Args:
        config: the federation's configuration, with the client's own model.
        examples: the federation, of which only the client's part is used.
        partition_id: the client's number, from 0.
        server_round: the round, from 1.
        start: the weights that the server sent; in the first round with independent initialisations they are the
            anchor alone, and may be None without one.
        layers: how many of the model's last layers are trained, and sent; 0: all.
        secret: as in `Order`.

    Returns:
        The update, on the CPU. A training that diverges starts again at half the learning rate, up to `RESTARTS`
        times, and the update tells how often. With `dp_noise` it tells its ε and δ, and no loss and accuracy: these
        have no noise.
    """
    return train_order(Order(config, examples, partition_id, server_round, start, layers, secret=secret))


def train_order(order: Order) -> Update:
    """Train a client's model as it is asked, and return the update, on the CPU."""
    began = time.perf_counter()
    start, recipe, restarts = order.start, order.recipe, 0
    with reproducible(), workspace(order.config, order.examples) as model:
        data = laid_out(model, order.part(choose_device(order.config.device)).copied(), recipe.batch_size)
        if order.config.dp_clip:
            privacy.check_model(order.config.model, model)
            state = privacy.fit_privately(
                model,
                start,
                data,
                recipe,
                clip=order.config.dp_clip,
                noise=order.config.dp_noise,
                generator=order.hidden_chance("private"),
                moving=order.moving,
            )
        else:
            state, restarts = _trained(order, model, data)
        if order.anchor is not None:
            state = anchored(model, state, order.anchor, data.images[:2], generator=order.chance("anchor"))
        return order.update(model, state, lambda: data, time.perf_counter() - began, restarts=restarts)


def _trained(order: Order, model: nn.Module, data: Examples) -> tuple[dict[str, Tensor], int]:
    """Return the trained weights, and how often the training diverged and started again at half the rate before."""
    for restarts in range(RESTARTS):
        try:
            return _fitted(order, model, data, restarts), restarts
        except Diverged as error:
            logger.warning("client %d starts again at half the learning rate: %s", order.partition_id, error)
    return _fitted(order, model, data, RESTARTS), RESTARTS


def _fitted(order: Order, model: nn.Module, data: Examples, halvings: int) -> dict[str, Tensor]:
    recipe = order.recipe
    if halvings:
        recipe = replace(recipe, lr=recipe.lr / 2**halvings)
    return fit(model, order.start, data, recipe, generator=order.chance("round"), moving=order.moving)[0]


def evaluate_client(
    config: Config, examples: Federation, partition_id: int, state: StateDict
) -> tuple[Evaluation, int]:
    """Evaluate a model on a client's images.

    Args:
        config: the federation's configuration.
        examples: the federation, of which only the client's part is used.
        partition_id: the client's number, from 0.
        state: the weights.

    Returns:
        The evaluation and the number of images.
    """
    own = examples.client(partition_id)
    with reproducible(), workspace(config, examples) as model:
        device = choose_device(config.device)
        data = laid_out(model, own.to(device))
        result = evaluate(model, [{name: tensor.to(device) for name, tensor in state.items()}], data)
    return result, len(own)


def read_order(load: Callable[[Config], Federation], message: Message, context: Context) -> Order:
    """Return what a message asks a client to train.

    Args:
        load: makes the federation of a configuration.
        message: asks for training.
        context: of the client's node.
    """
    config, partition_id = _who(context)
    arrays = records(message.content, ArrayRecord).get(ARRAYS)
    record = records(message.content, ConfigRecord).get(CONFIG, ConfigRecord())
    examples = _examples(load, config, partition_id, record, context)
    own = own_model(config, partition_id, context.node_config)
    fits, declared = record.get(MODEL, config.model) == own, "" if own == config.model else own
    config, layers = of_device(config, partition_id, context.node_config)
    config = _told(_with_model(config, own), record)
    sent: StateDict | None = None
    if arrays is not None:
        sent = _state(arrays, config, examples) if fits else own_start(config, examples, partition_id)
    secret = secrets.randbits(63) if sitedata.NODE_DATA in context.node_config else None
    return Order(config, examples, partition_id, _server_round(record), sent, layers, declared, secret)


def attempt(context: Context, work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T | Error:
    """Do a client's work; whatever goes wrong is what it tells the server, with the client's name.

    Args:
        context: of the client's node.
        work: what to do.
        arguments: of the work.
        options: of the work.
    """
    try:
        return work(*arguments, **options)
    except Exception as error:
        name = f"client {context.node_config.get(PARTITION_ID, '?')}"
        logger.exception("%s failed", name)
        return Error(CLIENT_FAILED, f"{name}: {type(error).__name__}: {error}")


def _who(context: Context) -> tuple[Config, int]:
    """Return the configuration, with the node's own settings, and which client the node is."""
    settings = {**context.run_config, **site_settings(context.node_config)}
    config = _config(tuple(settings.items()), tuple(map(type, settings.values())))
    return config, partition_of(context.node_config, config)


def _server_round(record: ConfigRecord) -> int:
    server_round = record.get(SERVER_ROUND)
    if not isinstance(server_round, int) or server_round < 1:
        raise ValueError(f"the message's record '{CONFIG}' has {SERVER_ROUND}={server_round!r}, expected 1 or more")
    return server_round


@functools.lru_cache(maxsize=64)
def _config(settings: tuple[tuple[str, Value], ...], types: tuple[type, ...]) -> Config:  # noqa: ARG001 - for the cache
    """Return the configuration of settings that are told apart also by their types, as 1 and True."""
    return Config.from_mapping(dict(settings))


@functools.lru_cache(maxsize=64)
def _with_model(config: Config, model: str) -> Config:
    return config.replace(model=model, models="")


def _told(config: Config, record: ConfigRecord) -> Config:
    """Return the configuration with what a strategy may tell with the message: FedProx's μ."""
    told = record.get(PROXIMAL_MU)
    return config if told is None else Config.from_mapping({**config.to_mapping(), PROXIMAL_MU: told})


def _examples(
    load: Callable[[Config], Federation], config: Config, partition_id: int, record: ConfigRecord, context: Context
) -> Federation:
    """Return the federation, or, where the node brings its own data, what it has of it: that data."""
    place = context.node_config.get(sitedata.NODE_DATA)
    if place is None:
        return load(config)
    wanted = sitedata.ImageFormat.from_mapping(record)
    if wanted is None:  # another server than ours: it tells none
        wanted = sitedata.ImageFormat.of(load(config).dataset)
    return sitedata.federation_of(sitedata.read(str(place), wanted), wanted, partition_id, config.clients)


def _state(arrays: ArrayRecord, config: Config, examples: Federation) -> StateDict:
    """Return the weights that were sent, read once for all clients of this process; nobody writes into them."""
    told = [(name, id(array.data), array.dtype, array.shape, array.stype) for name, array in arrays.items()]
    place = config.model, examples.dataset.shape, len(examples.classes), *told
    if place not in _sent:
        with workspace(config, examples) as model:
            state = state_from_arrays(arrays, model.state_dict())
        _sent.clear()
        _sent[place] = [array.data for array in arrays.values()], state
    return _sent[place][1]
