"""What a GPU must keep beside the numbers: memory by its own meter, and the same bits however clients share it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpus import DEVICE, NEEDS_GPU, assert_close, on_gpu
from problems import problem_of, same, trained

from fedmerge.machine import choose_device
from fedmerge.memory import Peak, TooLarge, available, foreseen
from fedmerge.oneshot import merge_updates
from fedmerge.settings import ConfigurationError
from fedmerge.state import num_bytes

pytestmark = NEEDS_GPU


def test_a_merge_tells_the_gpus_memory() -> None:
    problem, updates = problem_of("mlp"), trained("mlp")
    size = num_bytes(updates[0].state)
    for _ in range(2):  # cuBLAS takes its scratch memory (32 MiB) in the first
        outcome = merge_updates(
            on_gpu(problem), updates, align="identity", merge="np:groups=parameter:steps=20", seed=0
        )
    assert outcome.peak_bytes is not None
    assert 4 * size < outcome.peak_bytes < 40 * size


def test_the_peak_is_that_of_the_tensors_on_the_gpu() -> None:
    with Peak(torch.device(DEVICE)) as peak:
        held = torch.empty(2**20, device=DEVICE)
        del held
    assert peak.bytes == 2**22


def test_what_the_gpu_cannot_hold_is_refused_with_the_numbers() -> None:
    device = torch.device(DEVICE, 0)
    free = available(device)
    assert free is not None
    assert 0 < free <= torch.cuda.mem_get_info(device)[1]
    with pytest.raises(TooLarge, match=r"'np' of 1000000 MB, which holds 7 such states, needs .* on cuda:0, and "):
        foreseen(10**12, 7, "'np'", device)


def test_a_gpu_that_is_not_there_is_refused() -> None:
    count = torch.cuda.device_count()
    assert choose_device("auto") == torch.device("cuda")
    with pytest.raises(ConfigurationError, match=f"--device cuda:{count}: this process sees {count} CUDA devices"):
        choose_device(f"cuda:{count}")


# The federation.


@pytest.mark.parametrize("name", ["mlp", "lenet5"])
def test_clients_answer_side_by_side_as_alone(name: str) -> None:
    from test_together import CONFIG, messages, read

    from fedmerge import federation
    from fedmerge.client import client_app
    from fedmerge.together import answer_together

    config = CONFIG.replace(model=name, device=DEVICE)
    asked, app = messages(config, name=name), client_app()
    found, again = (answer_together(federation.load, asked) for _ in range(2))
    for (message, context), reply, other in zip(asked, found, again, strict=True):
        together, alone = read(reply, name), read(app(message, context), name)
        assert_close(together.state, alone.state, rtol=1e-2, atol=1e-3)
        assert same(dict(together.state), dict(read(other, name).state))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")  # Ray's own
@pytest.mark.parametrize("batched", [8, 1])
def test_a_simulation_gives_the_same_bits_with_any_number_of_actors(batched: int, tmp_path: Path) -> None:
    from fedmerge import federation
    from fedmerge.config import Config
    from fedmerge.runs import Run
    from fedmerge.simulation import simulation, train_clients

    states = []
    for actors, share in ((1, 1.0), (4, 0.25)):
        config = Config(
            data="digits",
            model="lenet5",
            clients=8,
            local_epochs="1",
            init="shared",
            batched_clients=batched,
            client_cpus=1.0,
            client_gpus=share,
        )
        with simulation(config, federation.load(config), num_cpus=actors, num_gpus=1) as grid:
            run = Run.create(tmp_path / f"{actors}", "simulate", config)
            updates = train_clients(config, run, grid=grid)
        states.append([dict(update.state) for update in updates])
    assert all(map(same, *states))
