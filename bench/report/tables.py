"""report.md: the bars, then every timing in a table for each work."""

from __future__ import annotations

import re
from collections.abc import Sequence

from .results import Absent, Bar, Results, Suite, Timing
from .words import chart_of, conditions, count_of, digits, duration, exponent, markdown, percent, series, together

LONG = 12  # lines of tables that a reader need not fold away

# A missed bar leads to the heading of bench/NOTES.md that says why.
NOTES_HEADINGS = {
    "steepest_step": "steepest_step",
    "depth": "factor_step, factor_product, mirror_step",
    "factor_step": "factor_step, factor_product, mirror_step",
    "factor_product": "factor_step, factor_product, mirror_step",
    "mirror_step": "factor_step, factor_product, mirror_step",
    "flow": "diagonal_flow",
    "diagonal_flow": "diagonal_flow",
    "diagnostics": "pysteep.diagnostics",
    "rounding": "Rounding to 16 bits",
    "sharded": "Host time of sharded parameters",
    "gpu cuda": "GPU",
    "gpu triton": "GPU",
}
OVER = {"size": "weights: {}", "tensors": "tensors: {}", "threads": "threads: {}", "depth": "depth {}"}


def bars_met(bars: Sequence[Bar]) -> str:
    """How many bars are met, missed and not measured, as part of a sentence."""
    measured = [bar for bar in bars if bar.reached is not None]
    met = sum(bar.met for bar in measured)
    counts = [f"{met} of {len(bars)} bars are met", f"{len(measured) - met} missed"]
    if expected := sum(bool(bar.expected) and not bar.met for bar in measured):
        counts[-1] += f" ({expected} as expected)"
    if len(measured) < len(bars):
        counts.append(f"{len(bars) - len(measured)} not measured")
    return ", ".join(counts)


def reached(bar: Bar) -> str:
    if bar.reached is None:
        return f"not measured: {bar.reason}" if bar.reason else "not measured"
    return f"{bar.reached:.2f}"


def notes_anchor(heading: str) -> str:
    """The link that GitHub gives a heading: lower case, punctuation left out, hyphens for spaces."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def _verdict(bar: Bar) -> str:
    if bar.reached is None:
        return ""
    heading = NOTES_HEADINGS.get(bar.suite)
    anchor = f"#{notes_anchor(heading)}" if heading else ""
    if bar.met:
        return "met, though a miss was expected" if bar.expected else "met"
    return f"missed as expected: {bar.expected}" if bar.expected else f"MISSED, [why](../../NOTES.md{anchor})"


def bars_table(bars: Sequence[Bar]) -> str:
    rows = [(bar.suite, bar.name, reached(bar), f"{bar.sign} {bar.bar:g}", _verdict(bar)) for bar in bars]
    return markdown(("suite", "bar", "reached", "must be", "verdict"), rows)


def _timings_table(timings: Sequence[Timing], absent: Sequence[Absent]) -> str:
    headers = (
        "contender",
        "storage",
        "depth",
        "q",
        "time",
        "a step and run",
        "GB/s",
        "of the triad",
        "of a copy",
        "GFLOP/s",
        "launches",
        "spread",
    )
    rows: list[Sequence[str]] = [
        (
            timing.contender,
            timing.storage or "",
            "" if timing.depth is None else str(timing.depth),
            exponent(timing.q),
            duration(timing.microseconds),
            "" if timing.microseconds_a_step is None else duration(timing.microseconds_a_step),
            "" if timing.gigabytes_per_second is None else digits(timing.gigabytes_per_second),
            percent(timing.share_of_triad),
            percent(timing.share_of_copy),
            "" if timing.gigaflops is None else digits(timing.gigaflops),
            "" if timing.launches is None else str(timing.launches),
            percent(timing.spread),
        )
        for timing in timings
    ]
    blank = ("",) * (len(headers) - 5)
    rows += [(one.contender, "", "", "", f"absent: {one.reason}", *blank) for one in absent]
    return markdown(headers, rows)


def _absent_table(absent: Sequence[Absent]) -> list[str]:
    """Those that no other table has."""
    rows = [(one.contender, one.work or "", f"absent: {one.reason}") for one in absent]
    return [markdown(("contender", "work", ""), rows)] if rows else []


def _scaling_tables(timings: Sequence[Timing]) -> list[str]:
    """For each of what grew: a row for each line of the picture, a column for each size."""
    parts = []
    for (over,), own in together(timings, lambda one: (one.over or "",)).items():
        sizes = sorted({one.at for one in own if one.at is not None})
        lines = series(own, lambda one: (one.contender, one.storage or "", one.dtype, exponent(one.q)))
        rows = []
        for line, points in lines.items():
            times = {point.at: duration(point.microseconds) for point in points}
            rows.append((*line, *(times.get(size, "") for size in sizes)))
        names = (OVER[over].format(count_of(size)) for size in sizes)
        headers = ("work", "contender", "storage", "dtype", "q", *names)
        parts += [f"### Over {over}", markdown(headers, rows)]
    return parts


def _folded(suite: Suite) -> str:
    text = "\n\n".join(suite.tables)
    title = f"{suite.name}, {suite.date}, {suite.conditions}"
    if text.count("\n") < LONG:
        return f"### {title}\n\n{text}"
    return f"<details>\n<summary>{title}</summary>\n\n{text}\n\n</details>"


def report(results: Results, pictures: Sequence[str]) -> str:
    """The text of report.md; `pictures` are the names of the PNGs beside it, without suffix."""
    machine, parts = results.machine, [f"# Speed on {results.machine.device}", conditions(results)]
    left = list(pictures)

    def show(name: str, text: str) -> None:
        if name in left:
            left.remove(name)
            parts.append(f"![{text}]({name}.png)")

    if results.roofs:
        roofs = results.roofs
        parts.append(
            f"Memory at its fastest in the run: {digits(roofs.triad)} GB/s by a triad, {digits(roofs.copy)} GB/s by a copy. "
            f"Arithmetic: {digits(roofs.gigaflops)} GFLOP/s by a float32 matrix product. Times are medians, the spread is the "
            "distance of their quartiles; GB/s count the fewest bytes that a call must move. Shares of the triad and of a copy "
            f"are of the same bytes, taken in turn with the call. In the charts the {machine.yardstick} is over the fewest "
            "bytes that any contender needs for the same result, so that who moves more does not look as fast."
        )
    show("roofline", f"GFLOP/s of each op against its operations per byte, on {machine.device}")
    if results.suites:
        parts += ["## Bars", f"{bars_met(results.bars)}.", bars_table(results.bars)]
    for suite in dict.fromkeys([*(one.suite for one in results.timings), *(one.suite for one in results.absent)]):
        parts.append(f"## {suite}")
        timings, absent = results.of_suite(suite), results.absent_from(suite)
        for chart in dict.fromkeys(map(chart_of, timings)):
            show(chart, f"{chart}: every contender side by side")
        if suite == "scaling":
            parts += [*_scaling_tables(timings), *_absent_table(absent)]
            continue
        shown: set[Absent] = set()
        for (work, dtype), own in together(timings, lambda one: (one.work, one.dtype)).items():
            present = {one.contender for one in own}
            missing = [one for one in absent if one.work in (work, None) and one.contender not in present]
            parts += [f"### {work}, {dtype}", _timings_table(own, missing)]
            shown.update(missing)
        parts += _absent_table([one for one in absent if one not in shown])
    if any(suite.tables for suite in results.suites):
        parts.append("## Tables of the bars")
        parts += [_folded(suite) for suite in results.suites if suite.tables]
    return "\n\n".join(parts) + "\n"
