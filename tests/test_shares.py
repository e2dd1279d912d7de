"""Coefficients that made a mixture are found again, and what they do not explain is told."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from problems import SHAPE, doubles, problem_of, trained
from torch import Tensor, nn

from fedmerge.cli import main
from fedmerge.config import Config
from fedmerge.merge import shares
from fedmerge.merge.average import mean_state
from fedmerge.merge.shares import describe_shares, recovered
from fedmerge.models import create
from fedmerge.problem import Update
from fedmerge.runs import Run

TINY = Config(clients=2, client_examples=100, model="mlp@0.2", server_examples=60, align="identity")


def some(rows: int, entries: int, count: int, seed: int = 0) -> list[Tensor]:
    stream = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, entries, generator=stream, dtype=torch.float64) for _ in range(count)]


def mixed(alpha: Tensor, models: list[Tensor]) -> Tensor:
    return sum((alpha[:, k, None] * model for k, model in enumerate(models)), torch.zeros_like(models[0]))


@pytest.mark.parametrize(("rows", "entries", "count"), [(1, 2, 2), (1, 40, 5), (3, 7, 4), (10, 200, 20)])
def test_the_coefficients_that_made_a_mixture_are_found(rows: int, entries: int, count: int) -> None:
    models = some(rows, entries, count)
    alpha = torch.cat(some(rows, count, 1, seed=1))
    alpha += (1 - alpha.sum(1, keepdim=True)) / count
    found, explained = recovered(mixed(alpha, models), models)
    torch.testing.assert_close(found, alpha, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(explained, torch.ones(rows, dtype=torch.float64))


def test_any_other_model_has_the_least_squares_coefficients_and_the_share_that_they_explain() -> None:
    models, (merged,) = some(1, 30, 4), some(1, 30, 1, seed=2)
    found, explained = recovered(merged, models)
    mean = torch.stack(models).mean(0)
    deviations = torch.cat([model - mean for model in models[1:]]).T.numpy()  # without one: a basis
    _, residual, *_ = np.linalg.lstsq(deviations, (merged - mean)[0].numpy(), rcond=None)
    assert float(found.sum()) == pytest.approx(1)
    assert float((merged - mixed(found, models)).square().sum()) == pytest.approx(float(residual[0]))
    assert float(explained) == pytest.approx(1 - float(residual[0]) / float((merged - mean).square().sum()))
    assert 0 < float(explained) < 1


def test_models_that_do_not_differ_have_equal_coefficients() -> None:
    (same,) = some(2, 6, 1)
    for merged, expected in ((same, 1.0), (same + 1, 0.0)):
        found, explained = recovered(merged, [same] * 3)
        torch.testing.assert_close(found, torch.full((2, 3), 1 / 3, dtype=torch.float64))
        assert explained.tolist() == [expected] * 2
    twins = some(1, 9, 2)
    found, _ = recovered(twins[0], [twins[0], twins[1], twins[0]])
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64))


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    models, (merged,) = some(2, 50, 3), some(2, 50, 1, seed=2)
    whole = recovered(merged, models)
    monkeypatch.setattr(shares, "BLOCK", 7)
    torch.testing.assert_close(recovered(merged, models), whole)


def test_a_description_names_clients_parameters_and_classes() -> None:
    problem, states = doubles(3)
    updates = [Update(state, 10, client) for state, client in zip(states, (0, 2, 5), strict=True)]
    told = describe_shares(problem.model, mean_state(states, [0.5, 0.3, 0.2]), updates, SHAPE)
    assert told["clients"] == [0, 2, 5]
    assert list(told["tensors"]) == [name for name, _ in problem.model.named_parameters()]
    for name in ("1.weight", "1.bias", "3.weight"):
        assert told["tensors"][name] == [0.5, 0.3, 0.2]
        assert told["explained"][name] == 1.0
    assert told["classes"] == [[0.5, 0.3, 0.2]] * 3
    rows = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.2, 0.2, 0.6]], dtype=torch.float64)
    by_class = dict(states[0]) | {
        name: torch.stack(
            [mixed(rows[[c]], [state[name][[c]].reshape(1, -1) for state in states])[0] for c in range(3)]
        )
        for name in ("3.weight", "3.bias")
    }
    by_class["3.bias"] = by_class["3.bias"][:, 0]
    assert describe_shares(problem.model, by_class, updates, SHAPE)["classes"] == rows.tolist()


def test_a_model_whose_outputs_are_mixed_has_no_classes() -> None:
    problem, updates = problem_of("mlp@0.1"), trained("mlp@0.1", 2)
    model = nn.Sequential(problem.model, nn.Softmax(1))
    wrapped = [
        Update({f"0.{name}": tensor for name, tensor in update.state.items()}, 10, update.partition_id)
        for update in updates
    ]
    told = describe_shares(model, wrapped[0].state, wrapped, SHAPE)
    assert "classes" not in told
    assert all(alpha == [1.0, 0.0] for alpha in told["tensors"].values())


def test_merges_of_a_run_tell_their_coefficients(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "compare", TINY, methods=["mean"], seeds=[0])
    states = [create("mlp@0.2", shape=(1, 8, 8), num_classes=10, seed=seed).state_dict() for seed in range(2)]
    for client in range(2):
        run.save_update(0, 1, Update(states[client], 50 + client, client, (5,) * 10, num_bytes=10))
    methods = "np:lrs=0.01:steps=20,np-pairwise:lrs=0.1:steps=20,mean"
    done = CliRunner().invoke(main, ["merge", str(run.path), "--methods", methods])
    assert done.exit_code == 0, done.output
    told = {line["method"].partition(":")[0]: line["diagnostics"].get("shares") for line in run.results()}
    assert told["mean"] is None
    for name in ("np", "np-pairwise"):
        assert told[name]["clients"] == [0, 1]
        assert len(told[name]["classes"]) == 10
        assert all(sum(alpha) == pytest.approx(1, abs=1e-3) for alpha in told[name]["tensors"].values())
