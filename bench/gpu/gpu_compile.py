"""Seconds for which Triton compiles factor_step at a user's first step: `python -m bench gpu-compile`, without a GPU."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Sequence

BAR = 3.0  # seconds, at any depth
DEPTHS = (1, 3, 5, 7, 10, 64)  # full factors: one group, the largest groups, several
MODES = ("nearest", "stochastic", "compensated")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench gpu-compile", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--depths", default=",".join(map(str, DEPTHS)), help="of full factors with momenta")
    asked = parser.parse_args(arguments)
    os.environ["TRITON_ALWAYS_COMPILE"] = "1"  # nothing comes from the cache on disk

    import triton.language as tl

    from .gpu_triton_code import TARGETS, compiled_factor_step

    compiled_factor_step(2, 2, TARGETS[90], storage=tl.float32, q=2.0, momentum=False)  # what is imported at first
    print("| factors | type | rounding | aligned | seconds |", "|---|---|---|---|---|", sep="\n")
    worst = 0.0
    for depth, storage, mode, aligned in itertools.product(
        map(int, asked.depths.split(",")), (tl.float16, tl.bfloat16), MODES, (True, False)
    ):
        start = time.perf_counter()
        compiled_factor_step(depth, depth, TARGETS[90], storage=storage, q=1.7, momentum=True, mode=mode, aligned=aligned)
        seconds = time.perf_counter() - start
        worst = max(worst, seconds)
        print(f"| {depth} | {storage} | {mode} | {'yes' if aligned else 'no'} | {seconds:.2f} |", flush=True)
    print(f"\nlongest: {worst:.2f} s, bar {BAR:g} s: {'met' if worst <= BAR else 'MISSED'}")
    return int(worst > BAR)
