"""The tables of the performance section of README.md: a few works, geometries and depths of all that was timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .results import Absent, Results, Suite, Timing
from .words import MEMORY_BOUND, digits, duration, exponent, markdown, percent, together

NOT_MEASURED, NOT_TIMED = "not measured", "–"
STEP_WORKS = ("ResNet-50", "Llama-8B", "one huge tensor", "thousands of tiny tensors", "161 tensors of 8")
"""What the works of the step are called until they have been timed."""
STEP_QS = (1.0, 1.7, 2.0)
DEPTHS, DEPTH_QS = (2, 3, 10), (2.0, 1.7)
DEPTH_SUITES = ("factor_step", "mirror_step", "factor_product")
STORAGES = {"full": "factor_step", "tied": "factor_step", "implicit": "mirror_step"}
NO_STEPS = [f"pysteep {home}" for home in ("cpp", "numba")]

Row = tuple[str, ...]


def step_table(suite: Suite | None) -> str:
    """Each contender and geometry, all of a column timed in turn; None leaves every cell unmeasured."""
    if suite is None:
        unknown = (NOT_MEASURED,) * len(STEP_WORKS)
        return markdown(("a step", "q", *STEP_WORKS), [(name, exponent(q), *unknown) for name in NO_STEPS for q in STEP_QS])
    works = list(dict.fromkeys(one.work for one in suite.times))
    timed = {(one.contender, one.q, one.work): one for one in suite.times if one.q in STEP_QS}
    reasons = {(one.contender, one.work): f"absent: {one.reason}" for one in suite.times if one.reason}
    bound = {work: max(one.share or 0 for one in suite.times if one.work == work) >= MEMORY_BOUND for work in works}

    def cell(contender: str, q: float, work: str) -> str:
        one = timed.get((contender, q, work))
        if one is None or one.microseconds is None:
            return reasons.get((contender, work), NOT_TIMED)
        return duration(one.microseconds) + (f" ({percent(one.share)})" if bound[work] else "")

    rows: list[Row] = []
    for contender in dict.fromkeys(one.contender for one in suite.times):
        own = sorted({q for name, q, _ in timed if name == contender and q is not None})
        rows += [(contender, exponent(q), *(cell(contender, q, work) for work in works)) for q in own]
        if not own:
            why = "; ".join(dict.fromkeys(reason for (name, _), reason in reasons.items() if name == contender))
            rows.append((contender, "", why, *[""] * (len(works) - 1)))
    return markdown(("a step", "q", *works), rows)


def depth_table(results: Results | None) -> str:
    """Ours by storage, geometry and depth, of the home that stands first, and the peers; None leaves every cell unmeasured."""
    headers = ("", *(f"depth {depth}" for depth in DEPTHS))
    if results is None:
        return markdown(headers, [(_stored(storage), *[NOT_MEASURED] * len(DEPTHS)) for storage in STORAGES])
    timings = {suite: _one_work(results.of_suite(suite), "") for suite in DEPTH_SUITES}
    home = next((one.contender for own in timings.values() for one in own if one.ours), "")
    lines: list[tuple[str, list[Timing]]] = []
    for storage, suite in STORAGES.items():
        stored = [one for one in timings[suite] if one.contender == home and one.storage in (storage, None)]
        for q in DEPTH_QS:
            name = f"{home}, {_stored(storage)}" if q == DEPTH_QS[0] else f"… q = {exponent(q)}"
            lines.append((name, [one for one in stored if one.q == q]))
        if storage != "tied":  # its peers are those of "full"
            lines += _peers(timings[suite])
    product = timings["factor_product"]
    lines.append((f"{home}, `factor_product`, forward and backward", [one for one in product if one.contender == home]))
    lines += _peers(product)
    rows: list[Row] = []
    for name, own in lines:
        of_depth = {one.depth: _cell(one, results) for one in own}
        if any(depth in of_depth for depth in DEPTHS):
            rows.append((name, *(of_depth.get(depth, NOT_TIMED) for depth in DEPTHS)))
    absent = [one for suite in DEPTH_SUITES for one in results.absent_from(suite)]
    rows += [(name, reason, *[""] * (len(DEPTHS) - 1)) for name, reason in _absences(absent, results.timings)]
    return markdown(headers, rows)


def simulator(results: Results | None) -> str:
    """A line for each work of the simulator: its time a step and run, and that of the peers."""
    timings = results.of_suite("diagonal_flow") if results else []
    lines = []
    for (work,), own in together(timings, lambda one: (one.work,)).items():
        ours, dtype = next(((one, one.dtype) for one in own if one.ours), (None, own[0].dtype))
        parts = []
        for one in own:
            time = one.microseconds_a_step
            if one.dtype != dtype or time is None:
                continue
            beside = ""
            if ours and ours.microseconds_a_step and not one.ours:
                beside = f" ({digits(time / ours.microseconds_a_step)} times as long)"
            parts.append(f"{one.contender} {duration(time)}{beside}")
        lines.append(f"- {work}, {dtype}: {'; '.join(parts)}")
    if results:
        lines += [f"- {name}: {reason}" for name, reason in _absences(results.absent_from("diagonal_flow"), timings)]
    lines = lines or [f"- {NOT_MEASURED}"]
    return "\n".join(["`pysteep.flow`, the time of a step and run, all threads at work:", "", *lines])


def _one_work(timings: Sequence[Timing], part: str) -> list[Timing]:
    """The timings of the first work with `part` in its name, in float32 if it was timed so."""
    works = list(together((one for one in timings if part in one.work), lambda one: (one.work, one.dtype)).values())
    return min(works, key=lambda own: own[0].dtype != "float32", default=[])


def _cell(timing: Timing, results: Results) -> str:
    share = percent(results.share(timing))
    return f"{duration(timing.microseconds)} ({share})" if share else duration(timing.microseconds)


def _peers(timings: Sequence[Timing]) -> list[tuple[str, list[Timing]]]:
    own = [one for one in timings if not one.ours and one.q in (None, DEPTH_QS[0])]
    return [(name, of_peer) for (name,), of_peer in together(own, lambda one: (one.contender,)).items()]


def _stored(storage: str) -> str:
    return f'`storage="{storage}"`'


def _absences(absent: Iterable[Absent], timings: Iterable[Timing]) -> list[tuple[str, str]]:
    """Those who took no part at all, each with its reasons."""
    present = {one.contender for one in timings}
    reasons: dict[str, dict[str, None]] = {}
    for one in absent:
        if one.contender not in present:
            reasons.setdefault(one.contender, {})[one.reason] = None
    return [(name, f"absent: {'; '.join(own)}") for name, own in reasons.items()]
