"""The library's ClientApp for Flower's own simulation engine, which gives a client no configuration by itself."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedmerge.client import client_app
from fedmerge.config import Config


def app_of(config: Config) -> ClientApp:
    """Return the ClientApp with its configuration.

    Args:
        config: the federation's.
    """
    settings, inner, app = config.to_mapping(), client_app(), ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        told = Context(context.run_id, context.node_id, context.node_config, context.state, settings)
        return inner(message, told)

    return app
