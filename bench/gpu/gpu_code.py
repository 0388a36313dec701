"""What the GPU kernels must be to be fast, seen without a GPU: `python -m bench gpu-code --output FILE` (.md; .json beside it).

Of each CUDA kernel in the extension, and of the Triton kernels at their usual sizes: registers, local and shared memory, the
width of accesses, how many warps a multiprocessor holds and the bytes that they ask of memory at a time. A multiprocessor of an
H100 must keep some 15 KB on their way to use all bandwidth: 3.35 TB/s times 0.6 µs over 132. Then launches for a step.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pysteep._ops.dispatch import extension

from ..measure.works import RESNET50, Work
from .gpu_machine_code import MACHINES, Kernel, is_integer, kernels
from .gpu_works import LLAMA_8B

MANY_TINY = Work("2240 tensors of 8", ((8,),) * 2240)
THREADS = {"diagonal_flow_kernel": 128}  # of a block; 256 elsewhere
TRITON_THREADS = 128
TABLE = re.compile(r"TableI\w*?Li(\d+)ELi(\d+)E")  # a kernel's argument: most tensors, most addresses
NAME = re.compile(r"\d([a-z_]+_kernel)I(.*?)EEv")
ARGUMENT = re.compile(
    r"5PowerE(?P<power>\d)E|\d(?P<narrow>b?float16)E|4(?P<nothing>None)E"
    r"|\d+(?P<order>Forward|Backward|DoubleBackward)I(?:S\d*_|[fdNE])|Li(?P<count>\d+)E|Lb(?P<rounds>[01])E"
    r"|(?P<repeated>S\d*_)(?!\d)|S\d*_|8portable|(?P<wide>[fd])"
)


class Row(NamedTuple):
    kernel: str
    registers: int
    stack: int
    shared: int  # bytes, but for what is asked for at launch
    load: int  # bits of the widest access to global memory
    store: int
    local_accesses: int
    warps: int  # a multiprocessor holds, by the kernel's registers
    kilobytes_in_flight: float  # of them, on a multiprocessor
    operations: int  # of a thread from its first wide load to its last wide store
    integer_operations: int  # of them, at half the rate


def row(name: str, kernel: Kernel, architecture: int, threads: int) -> Row:
    warps = MACHINES[architecture].resident_warps(kernel, threads)
    path = kernel.between_wide_accesses()
    return Row(
        name,
        kernel.registers,
        kernel.stack,
        kernel.shared,
        kernel.widest("LDG"),
        kernel.widest("STG"),
        kernel.count("LDL", "STL"),
        warps,
        round(warps * 32 * kernel.bytes_in_flight() / 1024, 1),
        len(path),
        sum(map(is_integer, path)),
    )


def readable(mangled: str) -> str:
    """`steepest_step_kernel, q = 1, float32, float32, none`: a kernel and its arguments, the operands' types among them."""
    found = NAME.search(mangled)
    if found is None:
        return mangled
    kernel, arguments = found.groups()
    words, stored = [kernel], ""
    for token in ARGUMENT.finditer(arguments):
        kind, word = token.lastgroup, token[token.lastgroup] if token.lastgroup else ""
        if kind == "narrow":
            stored = word
        if kind == "power":
            words.append(f"q = {('1', '1.5', '2', 'any')[int(word)]}")
        elif kind == "repeated":
            words.append(stored)
        elif kind == "rounds":
            words.extend(["rounds"] if word == "1" else [])
        elif kind:
            words.append({"f": "float32", "d": "float64", "None": "none"}.get(word, word))
    return ", ".join(words)


@functools.cache
def of_extension(architecture: str) -> dict[str, Kernel]:
    """The CUDA kernels for "sm_90" and the like, by their mangled names."""
    return kernels(extension.__file__, architecture) if extension is not None else {}


def cuda_rows(architecture: int) -> list[Row]:
    found = {readable(name): kernel for name, kernel in of_extension(f"sm_{architecture}").items()}
    return [row(name, found[name], architecture, THREADS.get(name.split(",")[0], 256)) for name in sorted(found)]


def triton_kernels(architecture: int) -> Iterator[tuple[str, Any]]:
    """Names, and the assembly of each as it is compiled."""
    import triton.language as tl

    from pysteep.kernels.triton import steepest_step

    from . import gpu_triton_code as code

    target = code.TARGETS[architecture]
    for storage in (tl.float32, tl.bfloat16):
        for q in (1.0, 1.5, 1.7, 2.0):
            options = {"storage": storage, "q": q, "momentum": False}
            yield f"step_kernel, q = {q:g}, {storage}", code.compiled_step(steepest_step.step_kernel, target, **options)
    for stored, depth in ((2, 2), (2, 3), (2, 10), (3, 3)):
        options = {"storage": tl.float32, "q": 2.0, "momentum": False}
        kind = "tied" if stored < depth else "full"
        yield f"factor_kernel, {kind}, L = {depth}, q = 2, fp32", code.compiled_factor_step(stored, depth, target, **options)
    for depth in (3, 10):
        for order, name in enumerate(("forward", "backward")):
            asm = code.compiled_product(order, depth, target, storage=tl.float32)
            yield f"product_kernel, {name}, L = {depth}, fp32", asm
    for depth in (2, 10):
        for q in (1.0, 2.0):
            asm = code.compiled_mirror_step(depth, target, storage=tl.float32, q=q)
            yield f"mirror_kernel, L = {depth}, q = {q:g}, fp32", asm
    asm = code.compiled_flow(80, 100, target, storage=tl.float32, q=1.0, adam=False, loss="mse")
    yield "flow_kernel, q = 1, k = 80, n = 100, fp32", asm


def triton_rows(architecture: int) -> list[Row]:
    from .gpu_triton_code import machine_code_of

    with tempfile.TemporaryDirectory() as folder:
        found = [(name, machine_code_of(asm, Path(folder))) for name, asm in triton_kernels(architecture)]
    return [row(name, kernel, architecture, TRITON_THREADS) for name, kernel in found]


def cuda_launches(work: Work, addresses: int) -> int:
    """Of steepest_step, by the size of the table that its kernels take; `addresses` of each tensor: 2, with momentum 3."""
    names = of_extension(next(name for name in extension.cuda_architectures() if name.startswith("sm_")))
    (sizes,) = {size.groups() for name in names if "steepest_step_kernel" in name and (size := TABLE.search(name))}
    most_tensors, most_addresses = map(int, sizes)
    return -(-len(work.shapes) // min(most_tensors, most_addresses // addresses))


def triton_launches(work: Work, addresses: int) -> int:
    """The tables that the host makes of tensors of these sizes, each at an aligned address of its own."""
    from pysteep.kernels.triton.tensor_table import host_tables

    sizes = tuple(math.prod(shape) for shape in work.shapes)
    places = tuple(4096 * i for i in range(1, len(sizes) + 1))
    return len(host_tables([sizes, *[places] * addresses], None))


def table(title: str, rows: list[Row]) -> str:
    head = "registers | stack, bytes | shared, bytes | widest load, bits | widest store, bits | LDL, STL | warps | KB in flight"
    head += " | operations | of them integer"
    lines = [f"| {title} | {head} |", "|---" * len(Row._fields) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(str, each)) + " |" for each in rows)])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-code", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--output", type=Path, required=True, help="the Markdown file; a JSON file is written beside it")
    parser.add_argument("--architectures", default="90,80,100", help="compute capabilities, e.g. 90,80,100 (the default)")
    asked = parser.parse_args(arguments)
    architectures = [int(each) for each in asked.architectures.split(",")]
    if unknown := [each for each in architectures if each not in MACHINES]:
        parser.error(f"--architectures must be among {', '.join(map(str, MACHINES))}; got {unknown}")
    built = extension.cuda_architectures() if extension is not None else []
    rows: dict[str, list[Row]] = {}
    for architecture in architectures:
        if f"sm_{architecture}" in built:
            rows[f"CUDA, sm_{architecture}"] = cuda_rows(architecture)
        rows[f"Triton, sm_{architecture}"] = triton_rows(architecture)
    launches = []
    for work in (LLAMA_8B, RESNET50, MANY_TINY):
        for momentum in (False, True):
            addresses = 2 + momentum
            of_cuda = cuda_launches(work, addresses) if any(name.startswith("sm_") for name in built) else None
            launches.append([work.name, "momentum" if momentum else "none", of_cuda, triton_launches(work, addresses)])
    lines = ["| launches of a step | momentum | CUDA | Triton |", "|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, each)) + " |" for each in launches]
    tables = [table(title, own) for title, own in rows.items()]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    asked.output.write_text("\n\n".join([*tables, "\n".join(lines)]) + "\n")
    of_kernels = {title: [each._asdict() for each in own] for title, own in rows.items()}
    report = {"kernels": of_kernels, "launches": launches}
    asked.output.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
