"""What a GPU will reach, said before one is asked: `python -m bench gpu-predicted --output FILE`. Nothing here is measured.

A copy's rate sets the time in which an element's bytes move. In that time a multiprocessor issues four instructions a cycle,
each for the elements of 32 threads; of some kinds fewer: half as many integer and float64 ones, an eighth as many reciprocals,
roots and conversions of float64. Where an element takes more instructions than that, the share of the copy's rate is the ratio
of the two. Where too few bytes are on their way for memory's latency (Little's law), the share is that ratio. "At most" is the
smallest of these: arithmetic and memory overlap entirely. "No overlap" is what remains if they never do. "Expected" lies
between them, nearer to the former the more warps there are to overlap; a measurement outside of it is a finding.

Instructions are counted on the way that a full chunk takes through the machine code for sm_90 (gpu_paths.py), of Triton's
kernels from the first wide load to the last wide store, with their inner loops taken once.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from pysteep._ops.dispatch import extension

from .gpu_code import TRITON_THREADS, readable
from .gpu_machine_code import MACHINES, Kernel, is_integer, kernels
from .gpu_paths import PATHS, shortest

ARCHITECTURE, CUDA_THREADS = 90, 256
LATENCY = 0.8e-6  # of memory under load, seconds
SPECIAL, HALF = ("MUFU", "F2F.F32.F64", "F2F.F64"), ("DADD", "DMUL", "DFMA", "DSETP")


class Gpu(NamedTuple):
    name: str
    multiprocessors: int
    clock: float  # Hz, what a step is likely to get at least
    peak: float  # bytes a second
    copy: float  # of a copy, as measured elsewhere


GPUS = (Gpu("H100", 132, 1.755e9, 3.35e12, 3.0e12), Gpu("H200", 132, 1.755e9, 4.8e12, 4.3e12))


class Count(NamedTuple):
    """Of one element."""

    work: str
    home: str
    instructions: float
    integer: float
    special: float  # reciprocals, roots, conversions of float64
    half: float  # float64
    moved: float  # bytes
    read: float
    in_flight: float  # bytes that a multiprocessor's loads ask for at a time
    warps: int

    def cycles(self) -> float:
        """Of one of a multiprocessor's four schedulers, for a warp."""
        return max(self.instructions, 2 * self.integer, 2 * self.half, 8 * self.special)

    def arithmetic(self, gpu: Gpu) -> float:
        """The time of the instructions beside that of the bytes at a copy's rate."""
        seconds = self.cycles() / 32 / (4 * gpu.multiprocessors * gpu.clock)
        return seconds / (self.moved / gpu.copy)

    def memory(self, gpu: Gpu) -> float:
        """The share of the copy's rate that the bytes on their way allow."""
        reads = gpu.multiprocessors * self.in_flight / LATENCY
        return min(1.0, reads * self.moved / self.read / gpu.copy)

    def at_most(self, gpu: Gpu) -> float:
        return min(1.0, self.memory(gpu), 1 / self.arithmetic(gpu))

    def without_overlap(self, gpu: Gpu) -> float:
        return 1 / (1 / self.memory(gpu) + self.arithmetic(gpu))

    def binds(self, gpu: Gpu) -> str:
        if self.at_most(gpu) == 1:
            return "memory"
        if self.memory(gpu) < 1 / self.arithmetic(gpu):
            return "bytes in flight"
        of = {
            "issue": self.instructions,
            "integer": 2 * self.integer,
            "float64": 2 * self.half,
            "special functions": 8 * self.special,
        }
        return max(of, key=of.__getitem__)


# On an H100, of CUDA and Triton alike, from warps, bytes in flight and counts; written before any measurement.
EXPECTED = (
    ("steepest_step, one tensor, float32", "0.95 to 1"),
    ("steepest_step, one tensor, bfloat16, q = 1.7", "0.85 to 0.97"),
    ("steepest_step, one tensor, bfloat16", "0.95 to 1"),
    ("factor_step", "0.88 to 0.97"),
    ("factor_product", "0.88 to 1"),
    ("mirror_step, L = 2", "0.6 to 0.85"),
    ("mirror_step, L = 10", "0.25 to 0.33"),
)


def expected(work: str) -> str:
    return next(share for start, share in EXPECTED if work.startswith(start))


def count(work: str, home: str, kernel: Kernel, operations: Sequence[str], elements: float, threads: int) -> Count:
    read, written = words_of(work)
    itemsize = 2 if "bfloat16" in work else 4
    warps = MACHINES[ARCHITECTURE].resident_warps(kernel, threads)

    def of(*kinds: str) -> float:
        return sum(operation.startswith(kinds) for operation in operations) / elements

    integer = sum(map(is_integer, operations)) / elements
    moved = (read + written) * itemsize
    in_flight = warps * 32 * kernel.bytes_in_flight()
    return Count(
        work, home, len(operations) / elements, integer, of(*SPECIAL), of(*HALF), moved, read * itemsize, in_flight, warps
    )


def words_of(work: str) -> tuple[int, int]:
    """Read and written, of an element."""
    depth = int(work.split("L = ")[1].split(",")[0]) if "L = " in work else 1
    if work.startswith("factor_step"):
        stored = depth if "full" in work else 2
        return stored + 1, stored + 1
    if work.startswith("factor_product"):
        return (depth, 1) if "forward" in work else (depth + 1, depth)
    return 2, 1


def cuda_counts(library: str) -> Iterator[Count]:
    """Raises ValueError where the library has no code for sm_90, or other code than was read."""
    found = {readable(name): kernel for name, kernel in kernels(library, f"sm_{ARCHITECTURE}").items()}
    if not found:
        raise ValueError(f"{library} holds no machine code for sm_{ARCHITECTURE}; build with CUDAARCHS={ARCHITECTURE}")
    loads, stores = "LDG.E.128", "STG.E.128"
    straight = {}
    for storage, elements in (("float32", 16), ("bfloat16", 32)):
        for q in (1.0, 1.5, 1.7, 2.0):
            kernel = f"steepest_step_kernel, q = {f'{q:g}' if q != 1.7 else 'any'}, {storage}, {storage}, none"
            needed = {loads: 8, stores: 4} | ({"MUFU.RSQ": elements} if q == 1.5 else {})
            straight[f"steepest_step, one tensor, {storage}, q = {q:g}"] = kernel, needed, elements
    for depth in (3, 10):
        straight[f"factor_product, forward, L = {depth}"] = (
            "factor_product_kernel, float32, Forward",
            {loads: depth, stores: 1},
            4,
        )
    backward = "factor_product_kernel, float32, Backward, 4", {loads: 4, stores: 3}, 4
    straight["factor_product, backward, L = 3"] = backward
    for work, (name, needed, elements) in straight.items():
        kernel = found[name]
        yield count(work, "cuda", kernel, shortest(kernel.code, needed), elements, CUDA_THREADS)
    for work, (name, path) in PATHS.items():
        yield count(work, "cuda", found[name], path.of(found[name]), path.elements, CUDA_THREADS)


def triton_counts() -> Iterator[Count]:
    """Of the kernels that gpu_code compiles; loops inside of a pass are counted once."""
    from .gpu_code import triton_kernels
    from .gpu_triton_code import machine_code_of

    works = {
        "step_kernel": "steepest_step, one tensor",
        "factor_kernel": "factor_step",
        "product_kernel": "factor_product",
        "mirror_kernel": "mirror_step",
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, asm in triton_kernels(ARCHITECTURE):
            kind, *rest = name.split(", ")
            if kind not in works:
                continue
            *rest, last = rest
            storage = {"fp32": "float32", "bf16": "bfloat16"}[last]
            work = ", ".join([works[kind], *([storage] if kind == "step_kernel" else []), *rest])
            work = work.replace("full, L = 2", "tied, L = 2")  # the same at that depth
            kernel = machine_code_of(asm, Path(folder))
            path = kernel.between_wide_accesses()
            written = words_of(work)[1]
            elements = (
                sum(".128" in op for op in path if op.startswith("STG")) * 16 / (2 if storage == "bfloat16" else 4) / written
            )
            yield count(work, "triton", kernel, path, elements, TRITON_THREADS)


def table(counts: Sequence[Count]) -> str:
    heads = ["work", "home", "instructions", "integer", "special", "float64", "bytes", "KB in flight", "warps of 64"]
    for gpu in GPUS:
        heads += [f"{gpu.name}: at most", "bound by", "no overlap"]
    lines = ["| " + " | ".join([*heads, "expected, H100"]) + " |", "|---" * (len(heads) + 1) + "|"]
    for one in counts:
        cells = [one.work, one.home, *(f"{x:.3g}" for x in (one.instructions, one.integer, one.special, one.half, one.moved))]
        cells += [f"{one.in_flight / 1024:.0f}", str(one.warps)]
        for gpu in GPUS:
            cells += [f"{one.at_most(gpu):.2f}", one.binds(gpu), f"{one.without_overlap(gpu):.2f}"]
        lines.append("| " + " | ".join([*cells, expected(one.work)]) + " |")
    return "\n".join(lines)


def text(counts: Sequence[Count]) -> str:
    about = (__doc__ or "").split("\n\n", 1)[1]
    of_gpus = "; ".join(
        f"{gpu.name}: {gpu.multiprocessors} multiprocessors at {gpu.clock / 1e9:g} GHz, {gpu.peak / 1e12:g} TB/s, "
        f"{gpu.copy / 1e12:g} TB/s for a copy"
        for gpu in GPUS
    )
    parts = ["# Predicted shares of a copy's rate", "A prediction: nothing here was measured.", about.strip()]
    parts += [f"{of_gpus}. Columns of instructions and bytes are of one element.", table(counts)]
    parts.append(
        "At 1.98 GHz, the highest clock, shares that issue binds are 1.13 times as high. Llama-8B's 291 tensors take the "
        "bfloat16 kernel of one tensor and a search for the tensor of each chunk: 0.75 to 0.9. The bars of mirror_step at "
        "L = 10 are marked as expected misses for what stands here; at L = 2 the bar, 0.8, lies within what is expected."
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-predicted", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file")
    parser.add_argument("--library", default=None, help="an extension with code for sm_90 (default: the one in use)")
    asked = parser.parse_args(arguments)
    if asked.library is None and extension is None:
        parser.error("the extension is not built; --library names one")
    try:
        counts = [*cuda_counts(asked.library or extension.__file__), *triton_counts()]
        counts.sort(key=lambda one: (one.home, one.work.split(",")[0], "bfloat16" in one.work))
    except ValueError as error:
        parser.error(str(error))
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text(text(counts))
    print(table(counts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
