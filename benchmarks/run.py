"""Run all benchmarks one after the other, and put their tables into README.md.

python benchmarks/run.py            # hours of a quiet machine's time are not needed: about half an hour
python benchmarks/run.py --quick    # toy sizes, in a minute: shows that each runs, and writes nothing
python benchmarks/run.py --tables   # only writes README.md again, from results/*.json

Where there is no GPU, gpu.py is left out, and its last table stays.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

import torch
from _measure import HERE, RESULTS, table

BENCHMARKS = ("np_step", "memory", "align", "align_peer", "rounds", "actors", "growth", "gpu")
MARK = "<!-- table: {} -->"
UNMEASURED = "Unmeasured: the command has not run yet."


def with_tables(text: str) -> str:
    """Return a page with each table between its two marks made again from its result.

    Args:
        text: the page.
    """
    for name in BENCHMARKS:
        mark = MARK.format(name)
        before, _, after = text.split(mark)
        result = RESULTS / f"{name}.json"
        shown = table(json.loads(result.read_text(encoding="utf-8"))) if result.exists() else UNMEASURED
        text = f"{before}{mark}\n{shown}\n{mark}{after}"
    return text


def run() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--quick", action="store_true", help="toy sizes; nothing is written")
    only.add_argument("--tables", action="store_true", help="write README.md again, measure nothing")
    arguments = parser.parse_args()
    for name in () if arguments.tables else BENCHMARKS:
        if name == "gpu" and not (arguments.quick or torch.cuda.is_available()):
            print("gpu.py is left out: there is no GPU here")
            continue
        flags = ["--quick"] if arguments.quick else []
        subprocess.run([sys.executable, str(HERE / f"{name}.py"), *flags], check=True)
    if not arguments.quick:
        page = HERE / "README.md"
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run()
