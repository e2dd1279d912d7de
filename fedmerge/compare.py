"""Many merges of the same clients: what `fedmerge compare` and `fedmerge merge` do.

The clients of a seed are trained once; every method merges the same updates. Models that one aligner has aligned are
shared by the mergers that want them so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from torch import nn

from fedmerge import federation, models, results
from fedmerge.actors import Failure
from fedmerge.catalogue import parse_method
from fedmerge.client import choose_device, num_threads
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.oneshot import Alignment, lesson, merge_aligned, prepare, screens
from fedmerge.problem import Problem, Progress, Update, silent
from fedmerge.raygrid import RayGrid
from fedmerge.runs import Result, Run, RunError
from fedmerge.seeds import derive
from fedmerge.settings import ConfigurationError, Value
from fedmerge.simulation import simulation, train_clients
from fedmerge.state import MalformedState, StateDict, conform, num_bytes, read_checkpoint
from fedmerge.updatefiles import described

logger = logging.getLogger(__name__)


def compare(
    config: Config,
    run: Run,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    progress: Progress = silent,
) -> None:
    """Train the clients of each seed and merge them by each method; what the run folder already has is not done again.

    A method that fails gets a line that says so, and the others go on.

    Args:
        config: the federation; its seed is replaced by each of `seeds`.
        run: the run folder, which gets updates, models and results.
        methods: `ALIGNER+MERGER` or `MERGER`, checked.
        seeds: at least one.
        progress: called on long work.
    """
    done = {(result["method"], result["seed"]) for result in run.results() if result["status"] == "ok"}
    with ExitStack() as stack:
        grid: RayGrid | None = None
        for seed in seeds:
            pending = [method for method in methods if (method, seed) not in done]
            if not pending:
                continue
            of_seed = config.replace(seed=seed)
            grid = grid or stack.enter_context(simulation(of_seed))
            report = _for_seed(progress, seed)
            updates = train_clients(of_seed, run, grid=grid, progress=report, resume=True)
            merge_by_methods(of_seed, run, federation.load(of_seed), updates, pending, grid=grid, progress=report)


def merge_stored(run: Run, target: Run, methods: Sequence[str], *, progress: Progress = silent) -> None:
    """Merge the updates of a run's first round again, without training.

    Args:
        run: the run whose updates are merged.
        target: the run folder that gets models and results, and whose configuration counts; it may be the same.
        methods: as in `compare`.
        progress: called on long work.

    Raises:
        RunError: if the run has no updates, or fewer than its clients.
    """
    config, settings = target.config, run.settings
    for seed in settings.get("seeds") or [config.seed]:
        of_seed = config.replace(seed=seed)
        examples = federation.load(of_seed)
        target.save_partition(seed, examples.indices())
        updates = run.load_updates(seed)
        if len(updates) < config.min_completed:
            raise RunError(
                f"{run.path} has {len(updates)} updates of seed {seed}, and needs {config.min_completed}: "
                "finish it with --resume first"
            )
        merge_by_methods(of_seed, target, examples, updates, methods, progress=_for_seed(progress, seed))


def checkpoint_config(config: Config, count: int) -> Config:
    """Return the configuration of merging checkpoints: only the server's images matter.

    Args:
        config: the architecture, and the data that the server's images are drawn from.
        count: number of checkpoints.
    """
    return config.replace(clients=count, partition="iid", client_examples=0, min_completed=count, init="independent")


def read_checkpoints(
    config: Config, paths: Sequence[Path], label_counts: Mapping[str, Sequence[int]] | None = None
) -> list[Update]:
    """Read safetensors files of one architecture that were trained elsewhere.

    Args:
        config: from `checkpoint_config`.
        paths: the files, one a client, in the clients' order.
        label_counts: images of each class by file name, or None.

    Raises:
        MalformedState: if a file does not fit the model.
    """
    examples = federation.load(config)
    expected = _architecture(config, examples).state_dict()
    return [_checkpoint(path, place, expected, label_counts, len(examples.classes)) for place, path in enumerate(paths)]


def merge_checkpoints(
    config: Config, run: Run, updates: Sequence[Update], methods: Sequence[str], *, progress: Progress = silent
) -> None:
    """Merge checkpoints, and keep copies of them in the run folder.

    Args:
        config: from `checkpoint_config`.
        run: the run folder.
        updates: from `read_checkpoints`.
        methods: as in `compare`.
        progress: called on long work.
    """
    for update in updates:
        run.save_update(config.seed, 1, update)
    merge_by_methods(config, run, federation.load(config), updates, methods, progress=progress)


def merge_by_methods(
    config: Config,
    run: Run,
    examples: Federation,
    updates: Sequence[Update],
    methods: Sequence[str],
    *,
    grid: RayGrid | None = None,
    progress: Progress = silent,
) -> None:
    """Merge updates by each method, evaluate, and store models and results.

    Args:
        config: the federation, with the seed of the updates.
        run: the run folder.
        examples: the federation's data.
        updates: the clients', checked.
        methods: as in `compare`.
        grid: a simulation whose actors merge side by side; None: one method after the other in this process.
        progress: called on long work.
    """
    cells: Iterable[tuple[str, object]]
    if grid is None:
        bench = Bench(config.to_mapping(), examples, updates, progress)
        cells = ((method, bench.answer(method)) for method in methods)
    else:
        cells = grid.map(Bench, (examples, list(updates)), methods)
    for done, (method, cell) in enumerate(cells):
        logger.info("seed %d: '%s' done, %d of %d methods", config.seed, method, done + 1, len(methods))
        progress("methods merged", done + 1, len(methods))
        result, states = _failed(config, method, cell.reason) if isinstance(cell, Failure) else cast("Cell", cell)
        if states:
            run.save_model(config.seed, 1, method, states)
        run.append(result)


Cell = tuple[Result, tuple[StateDict, ...]]
"""A line of results.jsonl, and the merged model or the ensemble's members; none where the method failed."""


class Bench:
    """The updates of a seed, merged by any method; each aligner aligns them once for each lesson.

    Args:
        settings: the configuration.
        examples: the federation's data.
        updates: the clients'.
        progress: called on long work.
    """

    def __init__(
        self,
        settings: Mapping[str, Value],
        examples: Federation,
        updates: Sequence[Update],
        progress: Progress = silent,
    ) -> None:
        self.config = Config.from_mapping(settings)
        self.updates = updates
        device = choose_device(self.config.device)
        model, server = _architecture(self.config, examples).to(device), examples.server.to(device)
        start = model.state_dict() if self.config.init == "shared" else None
        self.problem = Problem(model, server, self.config.seed, self.config.batch_size, progress, start=start)
        self.evaluation = examples.evaluation.to(device)
        self.prepared: dict[tuple[str, object, bool], tuple[Problem, Alignment]] = {}

    def answer(self, method: str) -> Cell:
        """Merge the updates by a method and evaluate the result.

        Args:
            method: `ALIGNER+MERGER` or `MERGER`, checked.
        """
        seed = derive(self.config.seed, "merge", 1)
        align, merge = parse_method(method)
        state = self.problem.model.state_dict()
        try:
            with num_threads(self.config.threads):
                key = align, lesson(self.problem, merge), screens(align, merge)
                if key not in self.prepared:
                    settings = {"align": align, "merge": merge, "screen": self.config.screen}
                    self.prepared[key] = prepare(self.problem, self.updates, seed=seed, **settings)
                outcome = merge_aligned(*self.prepared[key], merge=merge, seed=seed)
                result = results.measured(
                    method=method,
                    seed=self.config.seed,
                    server_round=1,
                    outcome=outcome,
                    model=self.problem.model,
                    evaluation=self.evaluation,
                    bytes_up=results.bytes_up(self.updates, method),
                    bytes_down=len(self.updates) * num_bytes(state) if self.problem.start else 0,
                )
        except (ArithmeticError, RuntimeError, ValueError) as error:  # this method's; the others go on
            logger.exception("method '%s' failed", method)
            return _failed(self.config, method, f"{type(error).__name__}: {error}")
        return result, tuple({name: tensor.cpu() for name, tensor in state.items()} for state in outcome.merged.states)


def _failed(config: Config, method: str, reason: str) -> Cell:
    return results.failed(method=method, seed=config.seed, server_round=1, reason=reason), ()


def read_label_counts(path: Path) -> dict[str, list[int]]:
    """Read images of each class by checkpoint file name from a JSON file.

    Args:
        path: an object {"site-a.safetensors": [12, 0, …], …}.

    Raises:
        ConfigurationError: if it is anything else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--label-counts {path}: cannot be read as JSON: {error}") from error
    valid = isinstance(found, dict) and all(
        isinstance(counts, list) and all(type(count) is int and count >= 0 for count in counts)
        for counts in found.values()
    )
    if not valid:
        raise ConfigurationError(
            f'--label-counts {path}: expected an object {{"FILE NAME": [images of class 0, of class 1, …], …}}'
        )
    return dict(found)


def _architecture(config: Config, examples: Federation) -> nn.Module:
    shape, num_classes = examples.dataset.shape, len(examples.classes)
    return models.create(config.model, shape=shape, num_classes=num_classes, seed=derive(config.seed, "init"))


def _checkpoint(
    path: Path,
    partition_id: int,
    expected: StateDict,
    label_counts: Mapping[str, Sequence[int]] | None,
    num_classes: int,
) -> Update:
    state, header = read_checkpoint(path)
    try:
        state = conform(state, expected)
    except MalformedState as error:
        raise MalformedState(f"{path}: {error}; is --model the architecture that it was trained with?") from error
    about = described(path, header)
    counts = about.get("label-counts") if label_counts is None else label_counts.get(path.name)
    if label_counts is not None and (counts is None or len(counts) != num_classes or not sum(counts)):
        raise ConfigurationError(
            f"--label-counts: expected {num_classes} counts for '{path.name}', not all 0, got {counts}"
        )
    return Update(
        state=state,
        num_examples=sum(counts) if counts else about.get("num-examples", 1),
        partition_id=partition_id,
        label_counts=tuple(counts) if counts else None,
        metrics=about.get("metrics", {}),
        num_bytes=num_bytes(state),
    )


def _for_seed(progress: Progress, seed: int) -> Progress:
    return lambda task, done, total: progress(f"seed {seed}: {task}", done, total)
