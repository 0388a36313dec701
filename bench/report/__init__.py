"""From results of the benchmarks to a report: `python -m bench report RESULTS.json... [--output DIR]`.

Writes report.md and its pictures: a roofline, a bar chart for each suite, and how times grow with size, number of tensors,
threads and depth. The files are of one machine: benchmarks.json as pytest-benchmark wrote it, bars.json as the bars did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .fields import ResultsError
from .results import read
from .tables import report


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report; the exit code: 2 if a file cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m bench report", description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.json", help="of one machine: benchmarks and bars")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder to write to (default: that of the first file)")
    arguments = parser.parse_args(argv)
    folder = arguments.output or arguments.results[0].parent
    try:
        results = read(arguments.results)
    except ResultsError as error:
        print(f"bench report: {error}", file=sys.stderr)
        return 2
    from .figures import save  # matplotlib, which the README's section does without

    folder.mkdir(parents=True, exist_ok=True)
    names = save(results, folder)
    (folder / "report.md").write_text(report(results, names), encoding="utf-8")
    for name in ["report.md", *(f"{name}.png" for name in names)]:
        print(folder / name)
    return 0
