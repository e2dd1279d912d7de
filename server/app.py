"""The ServerApp that `flwr run` and SuperLinks load: see `fedmerge.server`."""

from __future__ import annotations

import logging
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fedmerge.config import Config
from fedmerge.resuming import Answers, enter
from fedmerge.server import serve

app = ServerApp()

logger = logging.getLogger("flwr.fedmerge")  # below Flower's logger: it shows where the user looks
"""Logs to the run's log."""


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the federation of the run configuration, and leave its results in the run folder `out`.

    Submitted again with the same settings after an interruption, it goes on in its folder.
    """
    config = Config.from_mapping(context.run_config)
    path = Path(config.out or f"runs/flower-{context.run_id}")
    if not path.is_absolute():
        logger.warning("the run folder is relative: it lies in the working directory of Flower's server")
    run = enter(path, config)
    logger.info("run folder: %s", run.path)
    with run.locked(), run.logging():
        serve(grid, config, run, answers=Answers(run, config))
