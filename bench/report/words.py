"""How numbers, machines and tables are written, alike in every report."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from .results import Results, Timing

MEMORY_BOUND = 0.2  # the least best share that says how well memory is used; below it, overhead is what was timed


def markdown(headers: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, without the columns that are empty in every row."""
    rows = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    kept = [k for k in range(len(headers)) if not rows or any(row[k] for row in rows)]
    lines = [[headers[k] for k in kept], ["---"] * len(kept), *([row[k] for k in kept] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" if len(line) > 1 else f"| {line[0]} |" for line in lines)


def duration(microseconds: float) -> str:
    """Three digits and the unit that fits."""
    for unit, size in (("s", 1e6), ("ms", 1e3)):
        if microseconds >= 0.9995 * size:
            return f"{digits(microseconds / size)} {unit}"
    return f"{digits(microseconds)} µs"


def short_duration(microseconds: float) -> str:
    """For an axis: no digits beyond those that are not 0."""
    for unit, size in (("s", 1e6), ("ms", 1e3), ("µs", 1.0)):
        if microseconds >= size:
            return f"{microseconds / size:g} {unit}"
    return f"{microseconds * 1e3:g} ns"


def digits(value: float) -> str:
    """Three significant digits, or all before the point, never in powers of ten."""
    if abs(value) >= 99.95:
        return f"{value:,.0f}".replace(",", " ")
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"


def count_of(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:g} {unit}"
    return f"{number:g}"


def percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def exponent(q: float | None) -> str:
    return "" if q is None else f"{q:g}"


def memory_bound(timings: Iterable[Timing], results: Results) -> bool:
    """Whether a share of memory's rate says more of these timings than their time: the best of them is near it."""
    return max((results.share(timing) or 0 for timing in timings), default=0) >= MEMORY_BOUND


def together(timings: Iterable[Timing], key: Callable[[Timing], tuple[str, ...]]) -> dict[tuple[str, ...], list[Timing]]:
    """The timings of each key, both in the order of the file."""
    groups: dict[tuple[str, ...], list[Timing]] = {}
    for timing in timings:
        groups.setdefault(key(timing), []).append(timing)
    return groups


def series(timings: Sequence[Timing], key: Callable[[Timing], tuple[str, ...]]) -> dict[tuple[str, ...], list[Timing]]:
    """The timings of each work and key, where something grows: a work that is another at every size goes by its largest."""
    works: dict[float | None, set[str]] = {}
    for timing in timings:
        works.setdefault(timing.at, set()).add(timing.work)
    grown = all(len(own) == 1 for own in works.values()) and len(set.union(*works.values())) > 1
    largest = max(timings, key=lambda one: one.at or 0).work
    return together(timings, lambda one: (f"up to {largest}" if grown else one.work, *key(one)))


def conditions(results: Results) -> str:
    """The machine, what ran on it, and when, in one line."""
    machine = results.machine
    parts = [machine.device]
    if machine.threads is not None and machine.kind == "cpu":
        parts.append(f"{machine.threads} threads")
    if machine.memory_gib is not None:
        parts.append(f"{digits(machine.memory_gib)} GiB")
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    return f"{', '.join(parts)}; {versions}; commit {results.commit}; {results.date}"


def chart_of(timing: Timing) -> str:
    """The picture that a timing is in: the ops of depth share one, 16-bit weights have theirs."""
    name = "depth" if timing.suite in ("factor_step", "factor_product", "mirror_step") else timing.suite
    apart = timing.dtype in ("float16", "bfloat16") and timing.suite != "scaling"
    return f"{name}_{timing.dtype}" if apart else name
