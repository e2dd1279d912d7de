"""On one GPU: steps of NP Merge and of clients' training, statistics for alignment, memory and a simulated round.

Floors are plain PyTorch loops on the same GPU, as they are written without a framework, and the same as CUDA graphs.
Times are wall seconds, the GPU synchronised; results that follow each other are compared. What this process computes
with is torch's default: TF32 in convolutions, not in matrix products.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import time
from collections.abc import Callable, Mapping

import align
import np_step
import torch
from _measure import Row, Timing, interleaved, main
from torch import nn
from torch.nn import functional

from fedmerge.batched import Training, fit_many, stackable
from fedmerge.examples import Part
from fedmerge.merge import kernels
from fedmerge.models import create
from fedmerge.oneshot import merge_updates
from fedmerge.problem import Examples, Problem, Update
from fedmerge.replay import SWITCH, WARM_UP, Replay
from fedmerge.seeds import generator
from fedmerge.sgd import LocalTraining
from fedmerge.state import num_bytes
from fedmerge.train import fit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRAPHED = "plain, fused Adam, CUDA graph"
COLOUR, GREY, TINY = (3, 32, 32), (1, 28, 28), (1, 8, 8)
EXAMPLES = 320
"""Images of a client: ten batches."""


def benchmark(quick: bool) -> list[Row]:
    """Return the rows of all measurements."""
    rows: list[Row] = []
    for part in (steps, training, alignment, memory, rounds):
        began = now()
        rows += part(quick)
        print(f"{part.__name__}: {now() - began:.0f} s", file=sys.stderr, flush=True)
    return rows


def steps(quick: bool) -> list[Row]:
    """Return a row for each kind of step of each architecture, batch 32."""
    rows: list[Row] = []
    for name, shape in (
        {"cnn@0.1": TINY}.items() if quick else {"vgg11": COLOUR, "resnet18": COLOUR, "cnn": GREY}.items()
    ):
        variants = np_step.of_model(name, shape, DEVICE)
        del variants["pair, not compiled"], variants["affine, K = 10, stacked"]
        if DEVICE == "cuda":
            ours = {key: run for key, run in variants.items() if key not in (np_step.FLOOR, np_step.COMPILED)}
            variants[GRAPHED] = graphed(name, shape)
            if importlib.util.find_spec("triton"):
                ours |= {f"{key}, Triton": by_triton(run) for key, run in ours.items() if key != "fine-tuning"}
            variants |= ours | {f"{key}, recorded": recorded(run) for key, run in ours.items()}
        found = interleaved(variants, repeats=1 if quick else 5, each=1 if quick else 4, clock=now)
        rows += [_row(f"step of {name}: {variant}", timing, found[np_step.FLOOR]) for variant, timing in found.items()]
    return rows


def by_triton(run: Callable[[], object]) -> Callable[[], object]:
    """Return a step of ours by Triton's kernels."""

    def step() -> None:
        os.environ[kernels.SWITCH] = "1"
        run()
        del os.environ[kernels.SWITCH]

    return step


def recorded(run: Callable[[], object]) -> Callable[[], object]:
    """Return a step of ours that is launched as a whole, once it is warm."""
    replay = Replay(able=True)

    def step() -> list[torch.Tensor]:
        run()
        return []

    for _ in range(WARM_UP):
        replay(step)
    return lambda: replay(step)


def graphed(name: str, shape: tuple[int, int, int]) -> Callable[[], object]:
    """Return a whole plain step as one CUDA graph, its batch in fixed places."""
    model = create(name, shape=shape, num_classes=10, seed=0).to(DEVICE).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-6, fused=True, capturable=True)
    images, labels = torch.randn(32, *shape, device=DEVICE), torch.arange(32, device=DEVICE) % 10

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad(set_to_none=True)
    with torch.cuda.graph(graph):
        step()

    def replay(_: object = (model, optimizer, images, labels)) -> None:  # the graph reads them, and does not keep them
        graph.replay()

    return replay


def training(quick: bool) -> list[Row]:
    """Return a row for each way to train clients, one after the other or side by side."""
    rows: list[Row] = []
    recipe = LocalTraining(epochs=1 if quick else 3)
    for name, shape in {"mlp@0.1": TINY}.items() if quick else {"mlp": GREY, "cnn": GREY, "lenet5": GREY}.items():
        model = create(name, shape=shape, num_classes=10, seed=0).to(DEVICE)
        start = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        chance = torch.Generator().manual_seed(0)
        data = Examples(torch.randn(EXAMPLES, *shape, generator=chance), torch.arange(EXAMPLES) % 10).to(DEVICE)

        def client(number: int, start: Mapping[str, torch.Tensor] = start, data: Examples = data) -> Training:
            return Training(start, Part.of_all(data), recipe, generator(0, "client", number))

        variants: dict[str, Callable[[], object]] = {
            "plain loop": plain(model, data, recipe),
            "fit": lambda model=model, start=start, data=data: fit(  # type: ignore[misc]
                model, start, data, recipe, generator=generator(0, "client", 0)
            ),
        }
        if DEVICE == "cuda":
            variants["fit, recorded"] = replayed(variants["fit"])
        counts = dict.fromkeys(variants, 1)
        for count in (1, 4) if quick else (1, 4, 16, 64):
            if stackable(model, convolutions=True):
                variants[f"{count} side by side"] = lambda model=model, client=client, count=count: fit_many(  # type: ignore[misc]
                    model, [client(number) for number in range(count)]
                )
                counts[f"{count} side by side"] = count
        found = interleaved(variants, repeats=1 if quick else 5, clock=now)
        of_one = {
            variant: Timing(tuple(seconds / counts[variant] for seconds in timing.cpu), timing.wall)
            for variant, timing in found.items()
        }
        num_steps = recipe.epochs * EXAMPLES // recipe.batch_size
        for variant, timing in of_one.items():
            row = dict(_row(f"a client's {num_steps} steps, {name}: {variant}", timing, of_one["plain loop"]))
            rows.append(row)
    return rows


def replayed(run: Callable[[], object]) -> Callable[[], object]:
    """Return a training whose steps are recorded."""

    def training() -> None:
        was = os.environ.get(SWITCH)
        os.environ[SWITCH] = "1"
        try:
            run()
        finally:
            os.environ.pop(SWITCH) if was is None else os.environ.update({SWITCH: was})

    return training


def plain(model: nn.Module, data: Examples, recipe: LocalTraining) -> Callable[[], object]:
    """Return a client's training as one would write it without a framework."""
    model.train()

    def run() -> None:
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=recipe.momentum, foreach=True)
        for _ in range(recipe.epochs):
            for index in torch.split(torch.randperm(len(data), device=DEVICE), recipe.batch_size):
                optimizer.zero_grad()
                functional.cross_entropy(model(data.images[index]), data.labels[index]).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    return run


def alignment(quick: bool) -> list[Row]:
    """Return a row for each part of an alignment of two models, in units of bare forward passes of both."""
    rows: list[Row] = []
    full = {"resnet20": (COLOUR, 5000), "vgg11": (COLOUR, 5000), "resnet18": (COLOUR, 5000)}
    for name, (shape, images) in {"cnn@0.1": (TINY, 60)}.items() if quick else full.items():
        variants = align.of_model(name, shape, images, DEVICE)
        found = interleaved(variants, repeats=1 if quick else 3, clock=now)
        floor = found["forward passes"]
        rows += [_row(f"2 × {name}, {images} images: {what}", timing, floor) for what, timing in found.items()]
    return rows


def memory(quick: bool) -> list[Row]:
    """Return a row for each merge: the GPU's memory above ten models, in models."""
    name, shape, count = ("cnn@0.1", TINY, 3) if quick else ("vgg11", COLOUR, 10)
    state = create(name, shape=shape, num_classes=10, seed=0).state_dict()
    updates = [
        Update({key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in state.items()}, 100, client)
        for client in range(count)
    ]
    data = Examples(torch.randn(500, *shape), torch.arange(500) % 10).to(DEVICE)
    rows: list[Row] = []
    budget = "steps=20:lrs=0.001"
    for merge in (
        "mean",
        f"finetune:{budget}",
        f"np:{budget}:groups=channel",
        f"np:{budget}:groups=parameter",
        f"np:{budget}:groups=parameter:form=box",
        f"np-pairwise:{budget}",
    ):
        problem = Problem(create(name, shape=shape, num_classes=10, seed=0).to(DEVICE), data)
        began = now()
        outcome = merge_updates(problem, updates, align="identity", merge=merge, seed=0, screen="off")
        seconds = now() - began
        above = (outcome.peak_bytes or 0) / num_bytes(state)
        rows.append(
            {
                "what": f"`{merge}` of {count} × {name}",
                "ms": f"{1e3 * seconds:.0f}",
                "/ floor": "",
                "models above the inputs": f"{above:.1f}",
            }
        )
    return rows


def rounds(quick: bool) -> list[Row]:
    """Return a row for each way to share the GPU among the actors of a simulation."""
    if quick or importlib.util.find_spec("ray") is None or importlib.util.find_spec("flwr") is None:
        return []
    import rounds as simulated

    from fedmerge import federation
    from fedmerge.simulation import simulation

    config = simulated.COMMON.replace(
        data="digits",
        split="test",
        model="lenet5",
        partition="iid",
        clients=40,
        client_examples=400,
        local_epochs="10",
    )
    recipe = LocalTraining(epochs=10)
    examples = federation.load(config)
    model = create(config.model, shape=examples.dataset.shape, num_classes=len(examples.classes), seed=0).to(DEVICE)
    clients = [plain(model, examples.client(client).to(DEVICE), recipe) for client in range(config.clients)]
    found: dict[str, Timing] = {}
    for share, batched in ((1.0, 1), (0.25, 64)):
        measured = simulated.Rounds(lambda: [client() for client in clients])
        chosen = config.replace(client_gpus=share, client_cpus=1.0, batched_clients=batched)
        with simulation(chosen, examples) as grid:
            simulated.run_rounds(grid, chosen, measured, 3)
        ours, bare = measured.timings()
        name = f"{round(1 / share)} actors" + (", side by side" if batched > 1 else "")
        found[name] = Timing(ours.wall, ours.wall)
        found["plain loop, one process"] = Timing(bare.wall, bare.wall)
    floor = found["plain loop, one process"]
    return [
        _row(f"a round of 40 lenet5, 10 epochs of 10 images: {name}", timing, floor) for name, timing in found.items()
    ]


def now() -> float:
    """Return seconds, when the GPU has done all that it was given."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _row(what: str, timing: Timing, floor: Timing) -> Row:
    return {"what": what, "ms": timing.milliseconds, "/ floor": timing.over(floor), "models above the inputs": ""}


if __name__ == "__main__":
    if DEVICE == "cpu" and "--quick" not in sys.argv:
        raise SystemExit("benchmarks/gpu.py measures a GPU, and there is none: --quick shows on a CPU that it runs")
    main(__doc__, benchmark, device=torch.cuda.get_device_name() if DEVICE == "cuda" else "one thread")
