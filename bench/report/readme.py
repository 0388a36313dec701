"""The performance section of README.md, written from the results under bench/results: `python -m bench readme [--check]`.

The section stands between two comments of README.md; what no measurement changes is written by hand around it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .fields import ResultsError
from .readme_tables import NOT_MEASURED, depth_table, simulator, step_table
from .results import Results, read
from .tables import bars_met, reached
from .words import conditions, markdown

ROOT = Path(__file__).resolve().parents[2]
BEGIN, END = "<!-- performance: begin -->", "<!-- performance: end -->"
FILES = ("benchmarks.json", "bars.json")

NO_CPU = "No results of a CPU are under bench/results; [bench/NOTES.md](bench/NOTES.md) has earlier figures."
NO_GPU = "No GPU has been measured, and no figure is claimed for one."

# What a GPU must reach, until one has been asked.
GPU_BARS = (
    ("`steepest_step`, 1 G float32 or 2 G bfloat16 weights: share of a copy's bandwidth", ">= 0.92"),
    ("`steepest_step`, the 291 tensors of Llama-8B in bfloat16: share of a copy's bandwidth", ">= 0.9"),
    ("the same: launches", "<= 4"),
    ("the same: time / the fastest peer's", "<= 1"),
    ("a step of 161 tensors of 8: time on the host / torch's fused SGD", "<= 0.5"),
    ("the same with fresh gradients at every step", "<= 1"),
    ("`factor_step`, tied at depth 2, 3, 10, full at depth 3: share of a copy's bandwidth", ">= 0.9"),
    ("`factor_product` forward and backward, depth 3, 10: share of a copy's bandwidth", ">= 0.9"),
    ("`mirror_step`, depth 2, 10, q = 1, 2: share of a copy's bandwidth", ">= 0.8"),
    ("`diagonal_flow`, 4096 runs: times as fast as two cores in C++", ">= 50"),
)


def section(root: Path) -> str:
    """The text between the comments, from root/bench/results/*/{benchmarks,bars}.json. Raises ResultsError."""
    machines = [results for folder in sorted((root / "bench" / "results").glob("*")) if (results := _of_folder(folder))]
    on_cpus: Sequence[Results | None] = [one for one in machines if one.machine.kind == "cpu"] or [None]
    on_gpus: Sequence[Results | None] = [one for one in machines if one.machine.kind == "cuda"] or [None]
    parts = [*(part for results in on_cpus for part in _cpu(results)), *(part for results in on_gpus for part in _gpu(results))]
    return "\n\n".join(parts)


def _of_folder(folder: Path) -> Results | None:
    files = [folder / name for name in FILES if (folder / name).is_file()]
    if not files:
        return None
    results = read(files)
    if results.machine.folder != folder.name:
        raise ResultsError(f"{files[0]}: machine_info.folder must be its own, {folder.name!r}, got {results.machine.folder!r}")
    return results


def _cpu(results: Results | None) -> list[str]:
    if results is None:
        return [NO_CPU, *_figures(None)]
    figures = _figures(results)
    return [_title(results), *figures, *(_bars_line(results) if results.bars else [])]


def _gpu(results: Results | None) -> list[str]:
    headers = ("bar on a GPU", "must be", "reached")
    if results is None:
        table = markdown(headers, [(name, bar, NOT_MEASURED) for name, bar in GPU_BARS])
        return [NO_GPU, table]
    rows = [(bar.name, f"{bar.sign} {bar.bar:g}", reached(bar)) for bar in results.bars]
    figures = _figures(results) if results.timings else []
    return [_title(results), *figures, *([markdown(headers, rows), *_bars_line(results)] if rows else [])]


def _title(results: Results) -> str:
    return f"Measured on {conditions(results)}."


def _figures(results: Results | None) -> list[str]:
    """Tables of steps, of depth and of the simulator, and one picture; None leaves every cell unmeasured."""
    yardstick = results.machine.yardstick if results else "triad"
    explained = (
        f"Medians, decoupled decay on. In brackets the time of a {yardstick} over the fewest bytes that must move, taken in "
        "turn with the step, as a share of the step's: 100 % is the limit that memory sets. The contenders of a column took "
        "turns; below, each took turns with the triad alone, and memory is faster in one minute than in the next: shares "
        "compare there, times do not."
    )
    parts = [
        explained,
        step_table(next((suite for suite in results.suites if suite.times), None) if results else None),
        "Depth, q = 2 unless said otherwise:",
        depth_table(results),
        simulator(results),
    ]
    if results and results.of_suite("steepest_step"):
        picture = f"bench/results/{results.machine.folder}/steepest_step.png"
        text = f"The time of a {yardstick} over the fewest bytes, beside that of a step by every contender"
        parts.append(f"![{text}]({picture})")
    return parts


def _bars_line(results: Results) -> list[str]:
    report = f"bench/results/{results.machine.folder}/report.md"
    return [f"{bars_met(results.bars)}: [every figure]({report}), [what was tried](bench/NOTES.md)."]


def put(readme: str, text: str) -> str:
    """README.md's text with `text` between the comments. Raises ResultsError if they are not there once each, in order."""
    before, begin, rest = readme.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end) or BEGIN in rest or END in before + after:
        raise ResultsError(f"README.md must hold {BEGIN} and after it {END}, once each")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main(argv: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """Write the section, or with --check only compare; the exit code: 1 if --check finds a difference, 2 for a bad file."""
    parser = argparse.ArgumentParser(prog="python -m bench readme", description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if the section is not what the results say")
    arguments = parser.parse_args(argv)
    readme = root / "README.md"
    before = readme.read_text(encoding="utf-8")
    try:
        after = put(before, section(root))
    except ResultsError as error:
        print(f"bench readme: {error}", file=sys.stderr)
        return 2
    if after == before:
        return 0
    if arguments.check:
        print(f"{readme}: the performance section is not what bench/results say; python -m bench readme", file=sys.stderr)
        return 1
    readme.write_text(after, encoding="utf-8")
    print(readme)
    return 0
