"""What a run of the benchmarks left in JSON, checked: timings and ceilings of benchmarks.json, bars of bars.json."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .fields import Fields, ResultsError

SUITES = ("steepest_step", "factor_step", "mirror_step", "factor_product", "diagonal_flow", "scaling")  # as a reader meets them
BEYOND_CACHES = 100_000_000  # bytes
SCALED = ("size", "tensors", "threads", "depth")  # what a benchmark of the suite "scaling" grows


@dataclass(frozen=True)
class Machine:
    """Where it was measured; `folder` is its name under bench/results."""

    device: str
    kind: Literal["cpu", "cuda"]
    folder: str
    threads: int | None
    memory_gib: float | None
    versions: dict[str, str]

    @property
    def yardstick(self) -> Literal["triad", "copy"]:
        """Whose bandwidth a share is of: a triad's on a CPU, a device-to-device copy's on a GPU."""
        return "triad" if self.kind == "cpu" else "copy"


@dataclass(frozen=True)
class Ceilings:
    """The roofs of the roofline: GB/s of a copy and of a triad, GFLOP/s of a float32 matrix product."""

    copy: float
    triad: float
    gigaflops: float


@dataclass(frozen=True)
class Absent:
    """A contender that could not take part, and why; in one work of a suite, or (None) in all."""

    suite: str
    contender: str
    reason: str
    work: str | None


@dataclass(frozen=True)
class Timing:
    """One benchmark. `microseconds` is the median of a call, `spread` the quartiles' distance over it.

    `bytes` are the fewest that a call must move and `operations` those on floating-point numbers, `steps` what a call of the
    simulator takes over all runs; None where they are not defined. `over` and `at`: what grew, in the suite "scaling".
    """

    name: str
    suite: str
    work: str
    contender: str
    dtype: str
    q: float | None
    depth: int | None
    storage: str | None
    microseconds: float
    spread: float
    bytes: int | None
    operations: int | None
    launches: int | None
    steps: int | None
    triad_microseconds: float | None
    share_of_triad: float | None
    share_of_copy: float | None
    over: str | None
    at: float | None

    @property
    def ours(self) -> bool:
        return self.contender.startswith("pysteep ")

    @property
    def gigabytes_per_second(self) -> float | None:
        return None if self.bytes is None else self.bytes / self.microseconds / 1e3

    @property
    def gigaflops(self) -> float | None:
        return None if self.operations is None else self.operations / self.microseconds / 1e3

    @property
    def microseconds_a_step(self) -> float | None:
        return None if self.steps is None else self.microseconds / self.steps

    @property
    def result(self) -> tuple[object, ...]:
        """What came out, by whatever way: those with the same are asked for as few bytes."""
        return (self.suite, self.work, self.dtype, self.depth, self.storage, self.over, self.at)

    @property
    def subject(self) -> tuple[object, ...]:
        """What was timed; no two timings of a machine have the same."""
        return (*self.result, self.contender, self.q)


@dataclass(frozen=True)
class Bar:
    """What was reached (None: not measured, for `reason`), and what it must be at least (">=") or at most ("<=")."""

    suite: str
    name: str
    reached: float | None
    sign: str
    bar: float
    met: bool
    reason: str
    expected: str = ""  # why a miss was expected


@dataclass(frozen=True)
class InTurn:
    """What a contender took in turn with all others, and the triad over the same memory; absent: None, for `reason`."""

    work: str
    contender: str
    q: float | None
    microseconds: float | None
    triad_microseconds: float | None
    reason: str

    @property
    def share(self) -> float | None:
        """The triad's time beside the contender's."""
        if self.microseconds is None or self.triad_microseconds is None:
            return None
        return self.triad_microseconds / self.microseconds


@dataclass(frozen=True)
class Suite:
    """The bars of one suite with the tables that they were read from, and times of contenders that took turns."""

    name: str
    date: str
    conditions: str
    tables: tuple[str, ...]
    bars: tuple[Bar, ...]
    times: tuple[InTurn, ...]


@dataclass(frozen=True)
class Results:
    """All that is known of one machine. `date` and `ceilings` are those of the first file of timings, `commit` is of all."""

    machine: Machine
    date: str
    commit: str
    ceilings: Ceilings | None
    absent: tuple[Absent, ...]
    timings: tuple[Timing, ...]
    suites: tuple[Suite, ...]

    @property
    def bars(self) -> list[Bar]:
        return [bar for suite in self.suites for bar in suite.bars]

    @functools.cached_property
    def fewest_bytes(self) -> dict[tuple[object, ...], int]:
        """By result, what it takes those who move the least."""
        fewest: dict[tuple[object, ...], int] = {}
        for one in self.timings:
            if one.bytes is not None:
                fewest[one.result] = min(one.bytes, fewest.get(one.result, one.bytes))
        return fewest

    @functools.cached_property
    def roofs(self) -> Ceilings | None:
        """The ceilings, or the fastest triad and copy that took turns with a timing: memory is not always as fast."""
        if self.ceilings is None:
            return None
        rates = {"triad": [self.ceilings.triad], "copy": [self.ceilings.copy]}
        for one in self.timings:
            if one.bytes is not None and one.bytes >= BEYOND_CACHES:
                known = (("triad", one.share_of_triad), ("copy", one.share_of_copy))
                for name, share in known:
                    if share:
                        rates[name].append(one.bytes / (share * one.microseconds) / 1e3)
        return Ceilings(copy=max(rates["copy"]), triad=max(rates["triad"]), gigaflops=self.ceilings.gigaflops)

    def share(self, timing: Timing) -> float | None:
        """The time of the machine's yardstick over the fewest bytes of the result, in turn with the call, beside the call's.

        So it compares times: who moves more bytes than others for the same result has the smaller share.
        """
        own = timing.share_of_triad if self.machine.yardstick == "triad" else timing.share_of_copy
        if own is None or not timing.bytes:
            return None
        return own * self.fewest_bytes[timing.result] / timing.bytes

    def of_suite(self, suite: str) -> list[Timing]:
        return [timing for timing in self.timings if timing.suite == suite]

    def absent_from(self, suite: str) -> list[Absent]:
        return [one for one in self.absent if one.suite == suite]


def read(files: Sequence[Path]) -> Results:
    """The results of one machine, from files of benchmarks and of bars in any order.

    Raises ResultsError, naming the file and the field, where a file is not what `bench` writes, where files are of different
    machines, and where two hold the same.
    """
    parts = [_of_file(Fields.of_file(file)) for file in files]
    first = next((part for part in parts if part.ceilings), parts[0])
    for file, part in zip(files, parts, strict=True):
        if part.machine.folder != first.machine.folder:
            raise ResultsError(
                f"{file}: machine_info.folder must be {first.machine.folder!r} as in the files beside it, "
                f"got {part.machine.folder!r}: a report is of one machine"
            )
    _no_two_alike(files, [[timing.subject for timing in part.timings] for part in parts])
    _no_two_alike(files, [[suite.name for suite in part.suites] for part in parts])
    return Results(
        first.machine,
        first.date,
        ", ".join(dict.fromkeys(part.commit for part in (first, *parts))),
        first.ceilings,
        tuple(dict.fromkeys(one for part in parts for one in part.absent)),
        tuple(sorted((timing for part in parts for timing in part.timings), key=_place)),
        tuple(suite for part in parts for suite in part.suites),
    )


def _place(timing: Timing) -> int:
    return SUITES.index(timing.suite) if timing.suite in SUITES else len(SUITES)


def _no_two_alike(files: Sequence[Path], subjects: Sequence[Sequence[object]]) -> None:
    seen: dict[object, Path] = {}
    for file, own in zip(files, subjects, strict=True):
        for subject in own:
            if subject in seen:
                raise ResultsError(f"{file}: {subject} is there twice, first in {seen[subject]}")
            seen[subject] = file


def _of_file(top: Fields) -> Results:
    if not (top.has("benchmarks") or top.has("suites")):
        raise ResultsError(f"{top.file}: must have a field benchmarks or suites")
    info, commit = top.object("machine_info"), top.object("commit_info")
    changed = " with changes" if commit.has("dirty") and commit.flag("dirty") else ""
    commit_id = commit.text("id")[:7] + changed
    machine = _machine(info)
    if not top.has("benchmarks"):
        suites = top.object("suites")
        found = tuple(_suite(name, suites.object(name)) for name in suites.values)
        return Results(machine, max((suite.date for suite in found), default=""), commit_id, None, (), (), found)
    roofs = top.object("ceilings")
    return Results(
        machine,
        top.text("datetime")[:10],
        commit_id,
        Ceilings(*(roofs.positive(name) for name in ("copy_gigabytes_per_second", "triad_gigabytes_per_second", "gigaflops"))),
        tuple(_absent(one) for one in top.objects("absent")),
        tuple(_timing(one) for one in top.objects("benchmarks")),
        (),
    )


def _machine(info: Fields) -> Machine:
    versions = info.object("versions")
    kind: Literal["cpu", "cuda"] = "cpu" if info.one_of("kind", ("cpu", "cuda")) == "cpu" else "cuda"
    return Machine(
        info.text("device"),
        kind,
        info.text("folder"),
        info.whole("threads") if info.has("threads") else None,
        info.positive("memory_gib") if info.has("memory_gib") else None,
        {name: versions.text(name) for name in versions.values if versions.has(name)},
    )


def _absent(one: Fields) -> Absent:
    work = one.text("work") if one.has("work") else None
    return Absent(one.text("suite"), one.text("contender"), one.text("reason"), work)


def _timing(one: Fields) -> Timing:
    info, stats = one.object("extra_info"), one.object("stats")
    suite = info.text("suite")

    def number(name: str) -> float | None:
        return info.number(name) if info.has(name) else None

    def whole(name: str) -> int | None:
        return info.whole(name) if info.has(name) else None

    return Timing(
        name=one.text("name"),
        suite=suite,
        work=info.text("work"),
        contender=info.text("contender"),
        dtype=info.text("dtype"),
        q=number("q"),
        depth=whole("depth"),
        storage=info.text("storage") if info.has("storage") else None,
        microseconds=info.positive("microseconds"),
        spread=stats.number("iqr") / stats.positive("median"),
        bytes=whole("bytes"),
        operations=whole("operations"),
        launches=whole("launches"),
        steps=whole("steps"),
        triad_microseconds=number("triad_microseconds"),
        share_of_triad=number("share_of_triad"),
        share_of_copy=number("share_of_copy"),
        over=info.one_of("over", SCALED) if suite == "scaling" else None,
        at=info.positive("at") if suite == "scaling" else None,
    )


def _suite(name: str, fields: Fields) -> Suite:
    bars = tuple(
        Bar(
            name,
            one.text("name"),
            one.number("reached") if one.has("reached") else None,
            one.one_of("sign", ("<=", ">=")),
            one.number("bar"),
            one.flag("met") if one.has("reached") else False,
            one.text("reason") if one.values.get("reason") else "",
            one.text("expected") if one.values.get("expected") else "",
        )
        for one in fields.objects("bars")
    )
    times = tuple(map(_in_turn, fields.objects("times")))
    return Suite(name, fields.text("date"), fields.text("conditions"), fields.texts("tables"), bars, times)


def _in_turn(one: Fields) -> InTurn:
    absent = not one.has("microseconds")
    return InTurn(
        one.text("work"),
        one.text("contender"),
        one.number("q") if one.has("q") else None,
        None if absent else one.positive("microseconds"),
        None if absent else one.positive("triad_microseconds"),
        one.text("reason") if absent else "",
    )
