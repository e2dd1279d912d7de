"""Benchmarks: ratios are of runs side by side, and what the page says is what was measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parents[1] / "benchmarks"


def module(name: str) -> ModuleType:
    """Import a script of the folder, as it is when it is run."""
    spec = importlib.util.spec_from_file_location(name, HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[name] = found
    spec.loader.exec_module(found)
    return found


measure, run, plan = module("_measure"), module("run"), module("plan")


def test_the_tables_are_the_results() -> None:
    page = (HERE / "README.md").read_text(encoding="utf-8")
    assert run.with_tables(page) == page


def test_the_plan_on_paper_is_of_these_results() -> None:
    page = plan.PAGE.read_text(encoding="utf-8")
    assert plan.with_figures(page) == page


def test_times_and_sizes_are_told_in_units_that_can_be_read() -> None:
    assert [plan._time(seconds) for seconds in (0.0021, 3, 200, 9000, 10**6)] == [
        "2.1 ms",
        "3 s",
        "3.33 min",
        "2.5 h",
        "11.6 days",
    ]
    assert [plan._size(count) for count in (5e6, 4e9, 1.5e12, 2e15)] == ["5 MB", "4 GB", "1.5 TB", "2 PB"]


def test_an_exponent_is_the_slope_on_logarithmic_scales() -> None:
    growth = module("growth")
    slope, error = growth.exponent([1, 2, 4, 8], [3, 12, 48, 192])
    assert (slope, error) == pytest.approx((2, 0), abs=1e-9)
    assert growth.told([1, 10, 100, 1000, 10_000], [7, 5, 5, 5, 5]) == "0.00 ± 0.00"  # of the last four alone
    noisy = growth.exponent([1, 2, 4, 8], [1.1, 1.9, 4.2, 7.8])
    assert abs(noisy[0] - 1) < 2 * noisy[1] < 0.2


def test_every_script_is_run_and_has_a_table() -> None:
    scripts = {path.stem for path in HERE.glob("[a-z]*.py")} - {"run", "plan"}
    results = {path.stem for path in (HERE / "results").glob("*.json")}
    assert scripts == set(run.BENCHMARKS) == results | {"gpu"}
    for name in results:
        found = json.loads((HERE / "results" / f"{name}.json").read_text(encoding="utf-8"))
        assert found["command"] == f"python benchmarks/{name}.py"
        assert {"date", "machine", "versions"} <= set(found)


def test_variants_take_turns_and_the_first_run_does_not_count() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    found = measure.interleaved(
        {name: lambda name=name: order.append(name) for name in "ab"},
        repeats=2,
        each=2,
        clock=lambda: float(next(ticks)),
    )
    assert "".join(order) == "ab" + "aabb" * 2
    assert found["a"].cpu == found["b"].cpu == (0.5, 0.5)


def test_a_ratio_is_the_median_of_ratios_side_by_side() -> None:
    slow, fast = measure.Timing((2.0, 30.0, 8.0, 4.0), (0.0,) * 4), measure.Timing((1.0, 10.0, 4.0, 2.0), (0.0,) * 4)
    assert slow.over(fast) == "2.00 (2.00 to 2.00)"
    assert fast.milliseconds == "3000.0"


def test_a_quick_run_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(sys, "argv", ["some.py", "--quick"])
    asked: list[bool] = []

    def benchmark(quick: bool) -> list[dict[str, str]]:
        asked.append(quick)
        return [{"what": "a", "ms": "1"}]

    measure.main("text", benchmark)
    assert asked == [True]
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(sys, "argv", ["some.py"])
    measure.main("text", benchmark)
    found = json.loads((tmp_path / "results" / "some.json").read_text(encoding="utf-8"))
    assert measure.table(found).endswith("| what | ms |\n| --- | --- |\n| a | 1 |")
