"""Run all benchmarks one after the other, and put their tables into README.md.

python benchmarks/run.py            # hours of a quiet machine's time are not needed: about half an hour
python benchmarks/run.py --quick    # toy sizes, in a minute: shows that each runs, and writes nothing
python benchmarks/run.py --tables   # only writes README.md again, from results/*.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from _measure import HERE, RESULTS, table

BENCHMARKS = ("np_step", "memory", "align", "rounds", "actors", "growth")
MARK = "<!-- table: {} -->"


def with_tables(text: str) -> str:
    """Return a page with each table between its two marks made again from its result.

    Args:
        text: the page.
    """
    for name in BENCHMARKS:
        mark = MARK.format(name)
        before, _, after = text.split(mark)
        found = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        text = f"{before}{mark}\n{table(found)}\n{mark}{after}"
    return text


def run() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="toy sizes; nothing is written")
    only.add_argument("--tables", action="store_true", help="write README.md again, measure nothing")
    arguments = parser.parse_args()
    for name in () if arguments.tables else BENCHMARKS:
        flags = ["--quick"] if arguments.quick else []
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *flags], check=True)
    if not arguments.quick:
        page = HERE / "README.md"
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run()
