"""Tables: what they say, and that no name can break them."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_runs import RESULTS, failed, result
from rich.console import Console

from fedmerge.runs import Result
from fedmerge.summary import summarize
from fedmerge.tables import clean, duration, markdown_table, size, text_table


def rendered(results: Sequence[Result], width: int = 160) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(text_table(summarize(results)))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_terminal_table_shows_what_came_out() -> None:
    lines = rendered(RESULTS, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    text = " ".join(" ".join(lines).split())
    assert "activations+np 62.0 ± 2.0 +21.0 ± 2.5 2.0 3.0 kB 1.0 kB 100 best single model" in text
    assert "ensemble 90.0 ± 0.0 +49.0 ± 2.5 2.0 3.0 kB 1.0 kB 100 ensemble of 3 models" in text
    assert "server-only failed – – – –" in text
    assert text.count("best single model") == 1


def test_the_terminal_table_says_which_seeds_a_mean_is_over() -> None:
    text = " ".join(rendered(RESULTS, width=300).split())
    assert "2 of 3 seeds failed on seed 1" in text
    assert "failed on seeds 0, 1, 2" in text
    assert "server-only, seed 0: it broke" in text
    assert "seed 1: ValueError: <img src=x onerror=alert(2)>" in text


def test_names_cannot_command_the_terminal() -> None:
    text = rendered([result("[red]np[/red]\x1b[2J\n+a"), result("mean")])
    assert "[red]np[/red]\ufffd[2J +a" in text
    assert "\x1b" not in text


def test_the_markdown_table_has_the_same_number_of_cells_in_each_line() -> None:
    table = markdown_table(summarize([result("a|b"), result("c*d"), failed("e_f", error="x | y\nz")]))
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()} == {8}
    assert r"**a\|b**" in table
    assert r"c\*d" in table
    assert r"failed on seed 0; seed 0: x \| y z" in table


def test_only_a_run_with_the_baseline_has_a_column_of_differences() -> None:
    assert "vs fedavg" in markdown_table(summarize(RESULTS))
    assert "vs" not in markdown_table(summarize([result("mean"), result("np")]))
    assert "vs mean" in markdown_table(summarize([result("mean"), result("np")]), baseline="mean")


def test_unlabelled_images_are_said_to_be() -> None:
    rows = summarize([result("teacher", server_labels=False), result("mean", server_examples=0, server_labels=False)])
    lines = markdown_table(rows).splitlines()
    assert "server's labels unused" in lines[2]
    assert "unused" not in lines[3]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(None, "–"), (0, "0"), (1, "1 B"), (999, "999 B"), (1000, "1.0 kB"), (999_990, "1.0 MB"), (10**16, "10000.0 TB")],
)
def test_bytes_are_written_in_decimal_units(num_bytes: int | None, text: str) -> None:
    assert size(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.014, "0.01"), (0.999, "1.0"), (3.21, "3.2"), (99.7, "100")])
def test_seconds_have_as_many_digits_as_are_of_interest(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@given(st.text())
def test_cleaned_text_is_one_line_that_can_be_written(text: str) -> None:
    cleaned = clean(text)
    assert len(cleaned.splitlines()) <= 1
    cleaned.encode()
    assert clean(cleaned) == cleaned
