"""What a node tells of its site in its configuration, which goes before what the run says of all clients."""

from __future__ import annotations

from collections.abc import Mapping

from fedmerge.config import Config
from fedmerge.metrics import NUM_PARTITIONS, PARTITION_ID
from fedmerge.settings import ConfigurationError, known

PRIVACY_SETTINGS = ("dp-clip", "dp-noise", "dp-delta", "label-counts", "label-count-noise")
SITE_SETTINGS = ("data-dir", "device", "local-epochs", "upload-dtype", "anchor", *PRIVACY_SETTINGS)
"""Settings that a site may give; they go before the run's."""

NODE_LAYERS = "layers"
"""Key of how many of its model's last layers the site trains and sends."""

NODE_MODEL = "model"
"""Key of the architecture that the site trains; it must be one of the run's."""


def site_settings(node_config: Mapping[str, object]) -> dict[str, object]:
    """Return the settings that a node gives.

    Args:
        node_config: of the SuperNode.
    """
    return {name: node_config[name] for name in SITE_SETTINGS if name in node_config}


def partition_of(node_config: Mapping[str, object], config: Config) -> int:
    """Return which client a node is.

    Args:
        node_config: of the SuperNode, or of the simulation's virtual node.
        config: the federation's configuration.

    Raises:
        ConfigurationError: if the node does not tell, or tells of another number of clients.
    """
    partition_id, partitions = node_config.get(PARTITION_ID), node_config.get(NUM_PARTITIONS, config.clients)
    if partitions != config.clients:
        raise ConfigurationError(
            f"the node has {NUM_PARTITIONS}={partitions}, but the run has clients={config.clients}; make them equal: "
            f'flwr run . --run-config "clients={partitions}", or --federation-config "num-supernodes={config.clients}"'
        )
    if not isinstance(partition_id, int) or not 0 <= partition_id < config.clients:
        raise ConfigurationError(
            f"the node's configuration has {PARTITION_ID}={partition_id!r}, expected a whole number from 0 to "
            f'{config.clients - 1}; start it with --node-config "{PARTITION_ID}=0 {NUM_PARTITIONS}={config.clients}"'
        )
    return partition_id


def own_model(config: Config, partition_id: int, node_config: Mapping[str, object]) -> str:
    """Return the name of a client's architecture: its node's, or else that of its place in --models.

    Args:
        config: the federation's configuration.
        partition_id: the client's number, from 0.
        node_config: of its node.
    """
    told = node_config.get(NODE_MODEL)
    if told is None:
        return config.client_models[partition_id]
    names = list(dict.fromkeys([config.model, *config.client_models]))
    known(f"{NODE_MODEL} in the node's configuration", str(told), names)
    return str(told)


def of_device(config: Config, partition_id: int, node_config: Mapping[str, object]) -> tuple[Config, int]:
    """Return the configuration of a client's device, and how many layers it trains; its node goes before --devices.

    Args:
        config: the federation's configuration.
        partition_id: the client's number, from 0.
        node_config: of its node.

    Raises:
        ConfigurationError: if the node tells what cannot be.
    """
    device = config.client_devices[partition_id]
    if device.epochs and "local-epochs" not in node_config:
        config = config.replace(local_epochs=str(device.epochs))
    if device.float16 and "upload-dtype" not in node_config:
        config = config.replace(upload_dtype="float16")
    layers = node_config.get(NODE_LAYERS, device.layers)
    if not isinstance(layers, int) or layers < 0:
        raise ConfigurationError(f"{NODE_LAYERS} in the node's configuration must be a whole number, got {layers!r}")
    if layers and config.init != "shared":
        raise ConfigurationError(
            f"{NODE_LAYERS}={layers} in the node's configuration leaves the other layers at the start that all clients "
            f"share, and the run has init={config.init}: it needs init=shared"
        )
    return config, layers
