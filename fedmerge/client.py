"""What a client does with a message: it trains, or evaluates, on its own images.

`train_client` and `evaluate_client` are plain functions of the configuration, the federation and the client's number;
`client_app` wraps them for Flower. A client uses one CPU thread: many run beside each other, and the numbers must not
depend on how many. A node may bring data of its own (`fedmerge.sitedata`) instead of its part of the federation's data
set. A client that fails answers with its reason, so that the server can tell the user.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from fedmerge import federation, models, sitedata
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.flower import CLIENT_FAILED
from fedmerge.metrics import PARTITION_ID
from fedmerge.nodes import of_device, own_model, partition_of, site_settings
from fedmerge.partial import last_layers
from fedmerge.problem import Examples, Update
from fedmerge.seeds import derive, generator
from fedmerge.settings import ConfigurationError
from fedmerge.state import StateDict, num_bytes
from fedmerge.statistics import collect
from fedmerge.train import Evaluation, LocalTraining, evaluate, fit, laid_out
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

logger = logging.getLogger(__name__)


def client_app(load: Callable[[Config], Federation] = federation.load) -> ClientApp:
    """Return the ClientApp of a federation.

    Args:
        load: makes the federation of a configuration; it is called for each message.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        def answer(config: Config, partition_id: int) -> RecordDict:
            arrays = message.content.array_records.get(ARRAYS)
            examples = _examples(load, config, partition_id, message, context)
            own = own_model(config, partition_id, context.node_config)
            record = message.content.config_records.get(CONFIG, ConfigRecord())
            sent, model = record.get(MODEL, config.model), "" if own == config.model else own
            config = _told(config.replace(model=own, models=""), message)
            config, layers = of_device(config, partition_id, context.node_config)
            start: StateDict | None = None
            if arrays is not None and sent == own:
                start = state_from_arrays(arrays, _architecture(config, examples).state_dict())
            elif arrays is not None:
                start = own_start(config, examples, partition_id)
            update = train_client(config, examples, partition_id, _server_round(message), start, layers=layers)
            return update_to_records(replace(update, model=model), upload_dtype=config.upload_dtype)

        return _reply(message, context, answer)

    @app.evaluate()
    def judge(message: Message, context: Context) -> Message:
        def answer(config: Config, partition_id: int) -> RecordDict:
            arrays = message.content.array_records.get(ARRAYS)
            if arrays is None:
                raise ValueError(f"an evaluation needs the model in the message's record '{ARRAYS}'")
            examples = _examples(load, config, partition_id, message, context)
            state = state_from_arrays(arrays, _architecture(config, examples).state_dict())
            result, num_examples = evaluate_client(config, examples, partition_id, state)
            metrics = {"loss": result.loss, "accuracy": result.accuracy}
            return RecordDict(
                {METRICS: MetricRecord({NUM_EXAMPLES: num_examples, PARTITION_ID: partition_id, **metrics})}
            )

        return _reply(message, context, answer)

    return app


def train_client(
    config: Config,
    examples: Federation,
    partition_id: int,
    server_round: int,
    start: StateDict | None,
    *,
    layers: int = 0,
) -> Update:
    """Train a client's model on the client's images.

    Args:
        config: the federation's configuration.
        examples: the federation, of which only the client's part is used.
        partition_id: the client's number, from 0.
        server_round: the round, from 1.
        start: the weights that the server sent; in the first round with independent initialisations they are not
            used, and may be None.
        layers: how many of the model's last layers are trained, and sent; 0: all.

    Returns:
        The update, on the CPU.

    Raises:
        ValueError: if `start` is missing, or the client has no images.
    """
    began = time.perf_counter()
    path = ("client", partition_id)
    own = examples.client(partition_id)
    if server_round == 1 and config.init == "independent":
        start = own_start(config, examples, partition_id)
        model = _architecture(config, examples)
    elif start is None:
        raise ValueError(f"the server sent no weights to start round {server_round} from (--init {config.init})")
    else:
        model = _architecture(config, examples)
    low, high = config.epochs_range
    drawn = torch.randint(low, high + 1, (), generator=generator(config.seed, *path, "epochs", server_round))
    recipe = LocalTraining(
        epochs=int(drawn),
        batch_size=config.batch_size,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        proximal_mu=config.proximal_mu,
    )
    with _reproducible():
        device = choose_device(config.device)
        model = model.to(device)
        data = laid_out(model, own.to(device))
        moving = last_layers(start, layers) if layers else None
        chance = generator(config.seed, *path, "round", server_round)
        state, _ = fit(model, start, data, recipe, generator=chance, moving=moving)
        result = evaluate(model, [state], data)
        chance = generator(config.seed, *path, "statistics", server_round)
        told = collect(config.statistics, model, state, data.images, generator=chance)
    state = {name: tensor.cpu() for name, tensor in state.items()}
    return Update(
        state=state,
        num_examples=len(own),
        partition_id=partition_id,
        label_counts=_label_counts(own, len(examples.classes)) if config.label_counts else None,
        metrics={"loss": result.loss, "accuracy": result.accuracy, "seconds": time.perf_counter() - began},
        num_bytes=num_bytes(state if moving is None else {name: state[name] for name in moving}),
        layers=layers,
        statistics={kind: {name: tensor.cpu() for name, tensor in of.items()} for kind, of in told.items()},
    )


def own_start(config: Config, examples: Federation, partition_id: int) -> StateDict:
    """Return the weights that a client starts from where the server has sent it none of its architecture.

    Args:
        config: the federation's configuration, with the client's own model.
        examples: the federation, for the size of its images and the number of classes.
        partition_id: the client's number, from 0; with a shared initialisation all have the same weights.
    """
    path = ("init",) if config.init == "shared" else ("client", partition_id, "init")
    return _architecture(config, examples, derive(config.seed, *path)).state_dict()


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
    with _reproducible():
        device = choose_device(config.device)
        model = _architecture(config, examples).to(device)
        data = laid_out(model, own.to(device))
        result = evaluate(model, [{name: tensor.to(device) for name, tensor in state.items()}], data)
    return result, len(own)


def choose_device(name: str) -> torch.device:
    """Return the device of the setting `device`; "auto" is CUDA where this process has one.

    Args:
        name: "auto", "cpu", "cuda" or "cuda:N".

    Raises:
        ConfigurationError: if it is none of these, or CUDA is asked for where there is none.
    """
    available = torch.cuda.is_available()
    if name == "auto":
        return torch.device("cuda" if available else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigurationError(f"--device must be cpu, cuda, cuda:N or auto, got '{name}'") from error
    if device.type == "cuda" and (not available or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigurationError(f"--device {name}: this process sees {torch.cuda.device_count()} CUDA devices")
    return device


@contextmanager
def num_threads(count: int) -> Iterator[None]:
    """Let torch compute with `count` CPU threads inside the block (0: as many as there are cores), then as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or os.cpu_count() or 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _reply(message: Message, context: Context, answer: Callable[[Config, int], RecordDict]) -> Message:
    """Answer a message; whatever goes wrong is told to the server, naming the client."""
    name = f"client {context.node_config.get(PARTITION_ID, '?')}"
    try:
        config = Config.from_mapping({**context.run_config, **site_settings(context.node_config)})
        return Message(answer(config, partition_of(context.node_config, config)), reply_to=message)
    except Exception as error:
        logger.exception("%s failed", name)
        return Message(Error(CLIENT_FAILED, f"{name}: {type(error).__name__}: {error}"), reply_to=message)


def _server_round(message: Message) -> int:
    config = message.content.config_records.get(CONFIG)
    server_round = None if config is None else config.get(SERVER_ROUND)
    if not isinstance(server_round, int) or server_round < 1:
        raise ValueError(f"the message's record '{CONFIG}' has {SERVER_ROUND}={server_round!r}, expected 1 or more")
    return server_round


def _told(config: Config, message: Message) -> Config:
    """Return the configuration with what a strategy may tell with the message: FedProx's μ."""
    record = message.content.config_records.get(CONFIG)
    told = None if record is None else record.get(PROXIMAL_MU)
    return config if told is None else Config.from_mapping({**config.to_mapping(), PROXIMAL_MU: told})


def _examples(
    load: Callable[[Config], Federation], config: Config, partition_id: int, message: Message, context: Context
) -> Federation:
    """Return the federation, or, where the node brings its own data, what it has of it: that data."""
    place = context.node_config.get(sitedata.NODE_DATA)
    if place is None:
        return load(config)
    wanted = sitedata.ImageFormat.from_mapping(message.content.config_records.get(CONFIG) or {})
    if wanted is None:  # another server than ours: it tells none
        wanted = sitedata.ImageFormat.of(load(config).dataset)
    return sitedata.federation_of(sitedata.read(str(place), wanted), wanted, partition_id, config.clients)


def _architecture(config: Config, examples: Federation, seed: int = 0) -> nn.Module:
    return models.create(config.model, shape=examples.dataset.shape, num_classes=len(examples.classes), seed=seed)


def _label_counts(own: Examples, num_classes: int) -> tuple[int, ...]:
    return tuple(torch.bincount(own.labels, minlength=num_classes).tolist())


@contextmanager
def _reproducible() -> Iterator[None]:
    """Compute with one CPU thread and, on CUDA, with cuDNN's deterministic algorithms."""
    with num_threads(1), torch.backends.cudnn.flags(enabled=True, deterministic=True):
        yield
