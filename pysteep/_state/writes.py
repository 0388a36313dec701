"""Whether somebody else wrote to a parameter of depth > 1 since its factors last fitted it: told by version counters.

A step that runs as it is notes its parameters' counters when it is done. A compiled step cannot: the compiler copies results
into the parameters after the ops have run. It notes the counters of a parameter and of its first factor when it begins, which
whatever comes after it in the compiled function raises alike; the parameter's alone is raised by others.

A write through `.data` raises no counter. So a step on a CPU also keeps 32 bytes of each parameter, others each time, and the
next one compares them. Where they differ each parameter is compared with the product of its factors, from then on at each step.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._ops.dispatch import extension
from .depth import Depth
from .sharding import local, mark

Marks = list[tuple[int, int, int]]  # of `marks`: versions, addresses and bytes


class PythonSamples:
    """As csrc/python/samples.h, where there is no extension."""

    def __init__(self, marks: Marks, readable: list[int]) -> None:
        self._blocks, self._then, self._turn = [mark[1:] for mark in marks], [b""] * len(marks), 0
        self._readable = readable

    def note(self, marks: Marks) -> bool:
        """Keep other bytes of each block; False if the blocks are not those of the marks."""
        if not self._are_of(marks):
            return False
        self._turn += 7919
        self._then = self._read()
        return True

    def changed(self, marks: Marks) -> bool:
        """Whether bytes are not what was kept; False if the blocks are not those of the marks."""
        return self._are_of(marks) and self._read() != self._then

    def _are_of(self, marks: Marks) -> bool:
        return [mark[1:] for mark in marks] == self._blocks

    def _read(self) -> list[bytes]:
        return [
            ctypes.string_at(address + self._turn % (size - SAMPLED + 1), SAMPLED) if size > SAMPLED
            else ctypes.string_at(address, size)
            for (address, _), size in zip(self._blocks, self._readable, strict=True)
        ]  # fmt: skip


SAMPLED = 32  # bytes of a parameter, in csrc/python/samples.h too
Samples: Any = PythonSamples if extension is None else extension.Samples


@dataclass(slots=True)
class Snapshot:
    """A parameter at the time when its factors last fitted it."""

    mark: tuple[int, int, int]
    depth: Depth
    witness_version: int | None  # None: noted when the step was done
    samples: Any = None  # of this and the parameters that are stepped with it, this one first

    @classmethod
    def now(cls, param: Tensor, depth: Depth, witness: Tensor | None = None) -> Snapshot:
        return cls(mark(param), depth, None if witness is None else witness._version)

    def is_of(self, param: Tensor, witness: Tensor) -> bool:
        """Whether only steps wrote to the parameter since."""
        version, *memory = self.mark
        steps = 0 if self.witness_version is None else witness._version - self.witness_version
        return mark(param) == (version + steps, *memory)


def are_last(snapshots: Sequence[Snapshot | None], marks: Marks, depth: Depth) -> tuple[bool, bool]:
    """Whether nobody wrote to the parameters, whose marks are given, since a step of such factors; and of this very depth."""
    same = True
    for was, now in zip(snapshots, marks, strict=True):
        if was is None or was.mark != now or was.witness_version is not None:
            return False, False
        if was.depth is not depth:
            if not was.depth.is_alike(depth):
                return False, False
            same = same and was.depth == depth
            if same:
                was.depth = depth  # the next comparison is one of objects
    return True, same


def note_samples(params: Sequence[Tensor], seen: Sequence[Snapshot], marks: Marks) -> None:
    """Note bytes of the parameters, which a step has written to. On a GPU the host would have to wait for them."""
    own = seen[0]
    if own.samples is None or not own.samples.note(marks):
        own.samples = Samples(marks, [_readable(local(param.detach())) for param in params])
        own.samples.note(marks)


def _readable(x: Tensor) -> int:
    """How many bytes from the address of the tensor on are its own."""
    if x.device.type != "cpu" or x.numel() == 0:
        return 0
    dense = x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x)
    return x.element_size() * (x.numel() if dense else 1)


def samples_changed(seen: Sequence[Snapshot], marks: Marks) -> bool:
    """Whether the parameters, none of which was written to by counted ways, are not what their samples were."""
    samples = seen[0].samples if seen else None
    return samples is not None and bool(samples.changed(marks))
