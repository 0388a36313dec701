"""What a compiled GPU kernel is made of: registers, memory, instructions; read with the cuobjdump of Triton's package."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+ )?([A-Z][\w.]*)([^;]*);")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
OF_THE_INTEGER_PIPE = ["IADD", "IADD3", "IMNMX", "ISETP", "LEA", "LOP3", "PLOP3", "PRMT", "SEL", "SHF", "SHL", "SHR", "VIMNMX"]


@dataclass
class Kernel:
    """One kernel for one architecture. Bytes of stack and local memory are a thread's, shared ones a block's."""

    name: str
    registers: int
    stack: int
    shared: int
    local: int
    code: list[tuple[str, str]] = field(default_factory=list)  # operation and operands, in order; a predicate before them

    @cached_property
    def operations(self) -> Counter[str]:
        return Counter(operation for operation, _ in self.code)

    def wide(self, kind: str) -> int:
        """How many accesses of 16 bytes there are: LDG, loads, or STG, stores."""
        return sum(n for op, n in self.operations.items() if op.startswith(kind) and ".128" in op)

    def widest(self, kind: str) -> int:
        """Bits of the widest access; 0 where there is none."""
        found = [op for op in self.operations if op.startswith(kind)]
        return max((int(width[1]) if (width := re.search(r"\.(64|128)\b", op)) else 32 for op in found), default=0)

    def count(self, *kinds: str) -> int:
        """Operations whose names begin so."""
        return sum(n for op, n in self.operations.items() if op.startswith(kinds))

    def bytes_in_flight(self) -> int:
        """Of a thread: the most that its loads have asked for before an instruction needs what one of them brings."""
        most = asked = 0
        awaited: set[int] = set()
        for operation, operands in self.code:
            used = {int(number) for number in re.findall(r"\bR(\d+)\b", operands)}
            if awaited & used and not operation.startswith("LDG"):
                asked, awaited = 0, set()
            if operation.startswith("LDG") and ".128" in operation:
                first = int(re.findall(r"\bR(\d+)\b", operands)[0])
                asked, awaited = asked + 16, awaited | set(range(first, first + 4))
                most = max(most, asked)
        return most

    def between_wide_accesses(self) -> list[str]:
        """The operations from the first load of 16 bytes to the last store: what a full chunk takes, where that is straight."""
        operations = [operation for operation, _ in self.code]
        loads = [i for i, op in enumerate(operations) if op.startswith("LDG") and ".128" in op]
        stores = [i for i, op in enumerate(operations) if op.startswith("STG") and ".128" in op]
        return operations[loads[0] : stores[-1] + 1] if loads and stores else []


def is_integer(operation: str) -> bool:
    """Whether a Hopper multiprocessor has half as many lanes for the operation as for one of float32."""
    return operation.split(".")[0] in OF_THE_INTEGER_PIPE


@dataclass(frozen=True)
class Machine:
    """What a multiprocessor holds: CUDA C++ Programming Guide, technical specifications per compute capability."""

    warps: int
    blocks: int
    registers: int = 65536
    registers_of_a_warp: int = 256  # allocated at a time

    def resident_warps(self, kernel: Kernel, threads: int) -> int:
        """By its registers, and by the shared memory that is not chosen at launch."""
        own = -(-kernel.registers * 32 // self.registers_of_a_warp) * self.registers_of_a_warp
        blocks = min(self.blocks, self.warps * 32 // threads, self.registers // own // (threads // 32))
        return blocks * threads // 32


MACHINES = {80: Machine(64, 32), 90: Machine(64, 32), 100: Machine(64, 32)}


def cuobjdump() -> Path | None:
    """Triton's, or else the one on the path."""
    spec = importlib.util.find_spec("triton")
    folders = list(spec.submodule_search_locations or []) if spec else []
    candidates = [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in folders]
    on_path = shutil.which("cuobjdump")
    return next((tool for tool in candidates if tool.exists()), Path(on_path) if on_path else None)


def kernels(file: Path | str, architecture: str | None = None) -> dict[str, Kernel]:
    """The kernels of a cubin, or of a library for `architecture` ("sm_90"), by their mangled names, with their instructions."""
    found: dict[str, Kernel] = {}
    name = ""
    for line in _dump("--dump-resource-usage", architecture, file):
        if "Function " in line:
            name = line.split("Function ")[1].strip().rstrip(":")
        elif usage := USAGE.search(line):
            registers, stack, shared, local = map(int, usage.groups())
            found[name] = Kernel(name, registers, stack, shared, local)
    code: list[tuple[str, str]] = []
    for line in _dump("-sass", architecture, file):
        if "Function : " in line:
            code = found[line.split("Function : ")[1].strip()].code
        elif instruction := INSTRUCTION.match(line):
            code.append((instruction[2], (instruction[1] or "") + instruction[3]))
    return found


def _dump(what: str, architecture: str | None, file: Path | str) -> list[str]:
    tool = cuobjdump()
    if tool is None:
        raise FileNotFoundError("cuobjdump, which comes with triton and with the CUDA toolkit, is not installed")
    command = [tool, what, *(["-arch", architecture] if architecture else []), file]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
