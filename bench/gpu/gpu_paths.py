"""Ways through the CUDA kernels' machine code for sm_90: the instructions that a thread issues for the elements of one pass.

Where a kernel loads, computes and stores without choices, the shortest way that makes all accesses is the way taken. Where the
power and the depth are told apart at run time it is not, and the ways are written down here, as read once in the disassembly
that cuobjdump gives of the extension by CUDA 13.0: spans of instructions by their numbers, and how often each is taken.
"""

from __future__ import annotations

import heapq
import re
from typing import NamedTuple

from .gpu_machine_code import Kernel

Code = list[tuple[str, str]]  # operations and operands
Span = tuple[int, int, int]  # how often, from which instruction, up to which


class Path(NamedTuple):
    """A way that was read in a kernel of so many instructions; one of another length must be read anew."""

    length: int
    elements: int  # of a thread in one pass
    spans: list[Span]

    def of(self, kernel: Kernel) -> list[str]:
        """Its operations, each as often as it is issued. Raises ValueError."""
        if len(kernel.code) != self.length:
            raise ValueError(f"a kernel of {self.length} instructions was read, this one has {len(kernel.code)}: {kernel.name}")
        return [operation for times, first, stop in self.spans for operation, _ in kernel.code[first:stop] * times]


def once(*spans: tuple[int, int]) -> list[Span]:
    return [(1, first, stop) for first, stop in spans]


# ---- mirror_step_kernel, float32: a pass of 8 elements, which come in turn ---------------------------------------------------

# The chunk's tensor, addresses, type of storage, 16-byte loads | what follows the last element: stores, next chunk.
MIRROR_ENDS = once((235, 239), (254, 301), (348, 355), (385, 396), (426, 440), (2248, 2258), (2279, 2288), (2303, 2314))
ROTATED = (8, 440, 457), (8, 540, 542), (8, 622, 626), (8, 2230, 2248)  # registers move on; tests of power and depth
SIGNS = (8, 457, 461), (8, 534, 540), (8, 542, 546), (8, 617, 622)  # q = 1: of x and of the gradient
# q = 1: one square root | q = 2: a division and a square root | the move of x.
TWO = {1.0: [(8, 2205, 2213), (8, 2217, 2222)], 2.0: [(8, 2131, 2133), (8, 2163, 2180), (8, 2184, 2193), (8, 2197, 2205)]}
TWO_MOVE = (8, 2129, 2131), (8, 2222, 2230)
TEN = [
    *((8, 626, 687), (8, 692, 702)),  # |x|^(q/L), two divisions by the unit
    *((8, 707, 723), (24, 723, 733), (8, 733, 734)),  # the 10th power: three bits after the highest
    *((8, 948, 969), (8, 973, 980)),  # the first guess, a division
    # Halley's iteration, a 9th power and a division each: two, as the first starts within 3 % and 0.16 % end it.
    *((16, 980, 991), (48, 991, 1001), (16, 1001, 1002), (16, 1216, 1241), (16, 1244, 1253)),
    *((8, 1253, 1256), (8, 1540, 1556), (8, 1561, 1574), (24, 1574, 1587), (8, 1587, 1588)),  # how far w_2 moves, to the 9th
    *((8, 1886, 1897), (24, 1897, 1907), (8, 1907, 1908), (8, 2122, 2129)),  # y to the 9th, the move of x
]

# ---- factor_step_kernel, float32: a pass of 4 elements -----------------------------------------------------------------------

# Two factors, all four elements side by side: the chunk's tensor, loads | power's choice | stores, next chunk.
FACTOR_TWO = once((121, 126), (140, 211), (226, 233), (251, 262), (635, 637), (688, 700), (1467, 1469))
FACTOR_TWO += once((1512, 1539), (1554, 1561), (1573, 1605))
STEP_OF_TWO = {1.0: once((700, 702), (1105, 1198)), 2.0: once((1198, 1251))}
# No other factors at L = 2 | r^(L-2) for the gradients, then for x: by no bit after the highest at L = 3, by three at L = 10.
OTHERS = {
    2: once((680, 688), (1508, 1512)),
    3: once((637, 644), (667, 680), (1469, 1476), (1499, 1508)),
    10: [*once((637, 651), (667, 680), (1469, 1483), (1499, 1508)), (3, 651, 667), (3, 1483, 1499)],
}
# Three of up to four factors, elements in turn.
FACTOR_FULL = once((105, 110), (124, 226), (237, 244), (259, 266), (284, 301), (354, 355), (868, 926), (936, 943), (958, 966))
FACTOR_FULL += [*once((977, 1004)), (4, 355, 393), (4, 830, 868)]
STEP_OF_FULL = {1.0: [(4, 393, 395), (4, 617, 660)], 2.0: [(4, 675, 703)]}

# ---- all of them, by kernel and work -----------------------------------------------------------------------------------------

PATHS: dict[str, tuple[str, Path]] = {}
for q in (1.0, 2.0):
    signs = SIGNS if q == 1 else ()
    two = Path(2592, 8, [*MIRROR_ENDS, *ROTATED, *signs, *TWO[q], *TWO_MOVE])
    PATHS[f"mirror_step, L = 2, q = {q:g}"] = "mirror_step_kernel, float32", two
    PATHS[f"mirror_step, L = 10, q = {q:g}"] = (
        "mirror_step_kernel, float32",
        Path(2592, 8, [*MIRROR_ENDS, *ROTATED, *signs, *TEN]),
    )
    for depth, others in OTHERS.items():
        tied = Path(1680, 4, [*FACTOR_TWO, *STEP_OF_TWO[q], *others])
        PATHS[f"factor_step, tied, L = {depth}, q = {q:g}"] = "factor_step_kernel, float32, none, 2", tied
    full = Path(1080, 4, [*FACTOR_FULL, *STEP_OF_FULL[q]])
    PATHS[f"factor_step, full, L = 3, q = {q:g}"] = "factor_step_kernel, float32, none, 4", full
# Ten factors at once, their gradients element by element.
PATHS["factor_product, backward, L = 10"] = (
    "factor_product_kernel, float32, Backward, 10",
    Path(712, 4, [*once((6, 11), (25, 45), (324, 493), (572, 697)), (4, 493, 572)]),
)


def shortest(code: Code, needed: dict[str, int]) -> list[str]:
    """The operations of the shortest way from the first load of 16 bytes round to it again, on which each of the operations
    in `needed` ("LDG.E.128") comes so often at least.

    Raises:
        ValueError: there is none.
    """
    kinds = list(needed)
    start = next(i for i, (operation, _) in enumerate(code) if operation.startswith("LDG") and ".128" in operation)
    full = tuple(needed.values())
    before: dict[tuple[int, tuple[int, ...]], tuple[int, tuple[int, ...]] | None] = {}
    waiting: list[tuple[int, int, tuple[int, ...], tuple[int, tuple[int, ...]] | None]] = [(0, start, (0,) * len(kinds), None)]
    while waiting:
        issued, at, seen, previous = heapq.heappop(waiting)
        if (at, seen) in before:
            continue
        before[at, seen] = previous
        if at == start and seen == full and previous is not None:
            way, state = [], previous
            while state is not None:
                way.append(code[state[0]][0])
                state = before[state]
            return way[::-1]
        operation = code[at][0]
        after = tuple(min(n + operation.startswith(kind), most) for n, kind, most in zip(seen, kinds, full, strict=True))
        for following in _following(code, at):
            heapq.heappush(waiting, (issued + 1, following, after, (at, seen)))
    raise ValueError(f"no way round makes {needed}")


def _following(code: Code, at: int) -> list[int]:
    """Where a thread may go on. A call is of what is seldom needed, and is taken by none."""
    operation, operands = code[at]
    further = [at + 1] if at + 1 < len(code) else []
    if operation.startswith("BRA") and (target := re.search(r"0x([0-9a-f]+)\s*$", operands)):
        return [int(target[1], 16) // 16, *(further if operands.startswith("@") else [])]
    if operation.startswith(("CALL", "RET", "EXIT", "BRX")):
        return further if operands.startswith("@") and operation.startswith("EXIT") else []
    return further
