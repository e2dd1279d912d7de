"""Tables of a run's summary, for the terminal and for documents, and how their numbers are written."""

from __future__ import annotations

import math
import re
import textwrap
import unicodedata
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from fedmerge.summary import BASELINE, Difference, Row, best_single_model, paired_differences

if TYPE_CHECKING:
    from rich.table import Table

NOTHING = "\N{EN DASH}"


def text_table(rows: Sequence[Row], baseline: str = BASELINE) -> Table:
    """Return the rows as a table for a terminal of 80 columns, compared with the baseline if it is among them."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    best = best_single_model(rows)
    headings, lines = _cells(rows, baseline)
    table = Table(box=box.SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False, caption_justify="left")
    table.add_column(headings[0], overflow="fold")
    for heading in headings[1:]:
        table.add_column(Text(heading.replace(" ", "\n")), justify="right", no_wrap=True)
    for row, cells in zip(rows, lines, strict=True):
        style = "bold" if row is best else "red" if row.mean is None else ""
        method = Text(cells[0], style=style)
        for remark in remarks(row, best):
            method.append(f"\n  {remark}", style="green" if row is best else "red" if row.errors else "dim")
        table.add_row(method, *(Text(cell, style=style) for cell in cells[1:]))
    failures = "\n".join(f"{clean(row.method)}, {first_error(row)}" for row in rows if row.errors)
    table.caption = Text(failures, style="red") if failures else None
    return table


def markdown_table(rows: Sequence[Row], baseline: str = BASELINE) -> str:
    """Return the rows as a Markdown table, compared with the baseline if it is among them, the best in bold."""
    best = best_single_model(rows)
    headings, lines = _cells(rows, baseline)
    table = [[*headings, "Note"], ["---", *["---:"] * (len(headings) - 1), "---"]]
    for row, cells in zip(rows, lines, strict=True):
        note = "; ".join([*remarks(row, best), *([first_error(row)] if row.errors else [])])
        escaped = [re.sub(r"([\\`*_\[\]<>|])", r"\\\1", cell) for cell in (*cells, note)]
        table.append([f"**{cell}**" for cell in escaped[:2]] + escaped[2:] if row is best else escaped)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def _cells(rows: Sequence[Row], baseline: str) -> tuple[list[str], list[list[str]]]:
    differences = paired_differences(rows, baseline) if baseline in [row.method for row in rows] else {}
    compared = [f"vs {clean(baseline)}"] if differences else []
    lines = []
    for row in rows:
        difference = [points(differences[row.method]) if row.method in differences else ""] if differences else []
        traffic = [duration(row.seconds), size(row.bytes_up), size(row.bytes_down)]
        images = NOTHING if row.server_examples is None else str(row.server_examples)
        lines.append([clean(row.method), percent(row), *difference, *traffic, images])
    return ["Method", "Accuracy %", *compared, "Seconds", "Up", "Down", "Server images"], lines


def remarks(row: Row, best: Row | None) -> list[str]:
    """Return what a reader must know about a row beside its numbers; `best` is the table's best single model."""
    found = []
    if row is best:
        found.append("best single model")
    if row.models > 1:
        found.append(f"ensemble of {row.models} models")
    elif any(row.architectures):
        found.append(f"a model of {clean(', '.join(filter(None, row.architectures)))}")
    if row.note:
        found.append(clean(row.note))
    if row.server_examples and not row.server_labels:
        found.append("server's labels unused")
    if row.accuracies and not row.complete:
        found.append(row.coverage)
    if row.missing:
        count = sum(row.missing.values())
        found.append(f"{count} update{'s' * (count > 1)} missing on {_seeds(row.missing)}")
    if row.errors:
        found.append(f"failed on {_seeds(row.errors)}")
    return found


def _seeds(seeds: Collection[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"


def first_error(row: Row) -> str:
    """Return the first seed that failed and the beginning of its message."""
    seed, error = next(iter(row.errors.items()))
    return f"seed {seed}: {textwrap.shorten(clean(error), 120, placeholder=' …')}"


def percent(row: Row) -> str:
    """Return a row's accuracy in percent, as mean ± standard deviation."""
    if row.mean is None:
        return "failed" if row.errors else NOTHING
    deviation = "" if row.deviation is None else f" ± {100 * row.deviation:.1f}"
    return f"{100 * row.mean:.1f}{deviation}"


def points(difference: Difference) -> str:
    """Return a difference in percentage points, with its interval's half width.

    Example:
        >>> points(Difference(mean=-0.0123, half_width=0.004, seeds=3))
        '−1.2 ± 0.4'
    """
    half_width = "" if difference.half_width is None else f" ± {100 * difference.half_width:.1f}"
    return signed(difference.mean) + half_width


def signed(share: float) -> str:
    """Return a share in percentage points, with its sign."""
    return f"{100 * share:+.1f}".replace("-", "\N{MINUS SIGN}")


def duration(seconds: float | None) -> str:
    """Return seconds with as many digits as are of interest."""
    return NOTHING if seconds is None else f"{seconds:.{2 if seconds < 0.995 else 1 if seconds < 99.5 else 0}f}"


def size(num_bytes: int | None) -> str:
    """Return a number of bytes in decimal units.

    Example:
        >>> size(1_689_640), size(999_950), size(0)
        ('1.7 MB', '1.0 MB', '0')
    """
    if not num_bytes:
        return NOTHING if num_bytes is None else "0"
    exponent = min(4, max(0, math.floor((math.log10(num_bytes) + 1e-4) / 3)))
    return f"{num_bytes} B" if exponent == 0 else f"{num_bytes / 1000**exponent:.1f} {' kMGT'[exponent]}B"


def clean(text: str) -> str:
    """Return `text` on one line and `printable`."""
    return " ".join(printable(text).split())


def printable(text: str) -> str:
    """Return `text` with a replacement character for what neither a page nor a terminal should get."""
    return "".join(
        "\ufffd" if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n" else character
        for character in text
    )
