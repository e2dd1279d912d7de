"""The ClientApp that `flwr run` and SuperNodes load: see `fedmerge.client`."""

from fedmerge.client import client_app

app = client_app()
