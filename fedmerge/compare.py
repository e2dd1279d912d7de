"""Many merges of the same clients: what `fedmerge compare` and `fedmerge merge` do.

The clients of a seed are trained once; every method merges the same updates. Models that one aligner has aligned are
shared by the mergers that want them so.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import cast

from fedmerge import federation, federation_models, results
from fedmerge.actorside import Failure
from fedmerge.config import Config
from fedmerge.federation import Federation
from fedmerge.machine import choose_device, reproducible
from fedmerge.merge.shares import describe_shares, is_mixture
from fedmerge.methods import parse_method
from fedmerge.mixed import is_mixed, merge_federation
from fedmerge.oneshot import Alignment, lesson, merge_aligned, prepare, screens
from fedmerge.outcomes import Outcome
from fedmerge.problem import Problem, Progress, Update, silent
from fedmerge.raygrid import RayGrid
from fedmerge.runs import Result, Run, RunError
from fedmerge.seeds import derive
from fedmerge.settings import Value
from fedmerge.simulation import simulation, train_clients
from fedmerge.state import StateDict, num_bytes
from fedmerge.summary import refused
from fedmerge.train import laid_out

logger = logging.getLogger(__name__)

MISSING = "a client has no update: log.txt tells which, and why"


def compare(
    config: Config,
    run: Run,
    methods: Sequence[str],
    seeds: Sequence[int],
    *,
    progress: Progress = silent,
) -> None:
    """Train the clients of each seed and merge them by each method; what the run folder already has is not done again.

    A method that fails gets a line that says so, and the others go on. A client that has no update is trained again by
    the next call, and all that was merged without it is merged again: methods are compared on the same clients.

    Args:
        config: the federation; its seed is replaced by each of `seeds`.
        run: the run folder, which gets updates, models and results.
        methods: `ALIGNER+MERGER` or `MERGER`, checked.
        seeds: at least one.
        progress: called on long work.
    """
    done = {(result["method"], result["seed"]) for result in run.results() if _is_whole(result)}
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
        RunError: if the run has no updates, or fewer than `min_completed`.
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


def merge_checkpoints(
    config: Config, run: Run, updates: Sequence[Update], methods: Sequence[str], *, progress: Progress = silent
) -> None:
    """Merge checkpoints, and keep copies of them in the run folder.

    Args:
        config: from `fedmerge.checkpoints.checkpoint_config`.
        run: the run folder.
        updates: from `fedmerge.checkpoints.read_checkpoints`.
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
        lines = _failed(config, method, cell.reason) if isinstance(cell, Failure) else cast("list[Line]", cell)
        for result, states, names in lines:
            if states:
                run.save_model(config.seed, 1, result["method"], states, names)
            run.append(result)


Line = tuple[Result, tuple[StateDict, ...], tuple[str, ...]]
"""A line of results.jsonl, the merged model or the ensemble's members (none where the method failed), and the names of
their architectures, as in `Merged.models`."""


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
        model = federation_models.of_server(self.config, examples).to(device)
        server = laid_out(model, examples.server.to(device))
        start = model.state_dict() if self.config.init == "shared" else None
        others = federation_models.of_others(self.config, examples, device)
        self.problem = Problem(
            model,
            server,
            self.config.seed,
            self.config.batch_size,
            progress,
            start=start,
            others=others,
            low_memory=self.config.low_memory,
        )
        self.evaluation = laid_out(model, examples.evaluation.to(device))
        self.missing = [MISSING] * (self.config.asked - len(updates))
        self.prepared: dict[tuple[str, object, bool], tuple[Problem, Alignment]] = {}

    def answer(self, method: str) -> list[Line]:
        """Merge the updates by a method and evaluate the result, and each step of it.

        Args:
            method: `ALIGNER+MERGER` or `MERGER`, checked.
        """
        align, merge = parse_method(method)
        state = self.problem.model.state_dict()
        try:
            with reproducible(self.config.threads):
                lines = results.measured_with_steps(
                    method=method,
                    seed=self.config.seed,
                    server_round=1,
                    outcome=self._merged(align, merge),
                    problem=self.problem,
                    evaluation=self.evaluation,
                    updates=self.updates,
                    bytes_down=len(self.updates) * num_bytes(state) if self.problem.start or self.config.anchor else 0,
                    server_model=self.config.model,
                    refused=self.missing,
                )
        except (ArithmeticError, RuntimeError, ValueError) as error:  # this method's; the others go on
            logger.exception("method '%s' failed", method)
            return _failed(self.config, method, f"{type(error).__name__}: {error}")
        return [
            (
                line,
                tuple({name: tensor.cpu() for name, tensor in state.items()} for state in merged.states),
                merged.models,
            )
            for line, merged in lines
        ]

    def _merged(self, align: str, merge: str) -> Outcome:
        seed = derive(self.config.seed, "merge", 1)
        settings = {"align": align, "merge": merge, "screen": self.config.screen}
        if is_mixed(self.updates):
            return merge_federation(self.problem, self.updates, seed=seed, **settings)
        key = align, lesson(self.problem, merge), screens(align, merge)
        if key not in self.prepared:
            self.prepared[key] = prepare(self.problem, self.updates, seed=seed, **settings)
        problem, alignment = self.prepared[key]
        outcome = merge_aligned(problem, alignment, merge=merge, seed=seed)
        if len(alignment.updates) < 2 or not is_mixture(merge):
            return outcome
        model, shape = self.problem.model, self.problem.data.images.shape[1:]
        shares = describe_shares(model, outcome.merged.state, alignment.updates, shape)
        return replace(outcome, diagnostics={**outcome.diagnostics, "shares": shares})


def _is_whole(result: Result) -> bool:
    return result["status"] == "ok" and not refused(result)


def _failed(config: Config, method: str, reason: str) -> list[Line]:
    return [(results.failed(method=method, seed=config.seed, server_round=1, reason=reason), (), ())]


def _for_seed(progress: Progress, seed: int) -> Progress:
    return lambda task, done, total: progress(f"seed {seed}: {task}", done, total)
