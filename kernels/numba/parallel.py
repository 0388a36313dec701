"""Many tensors a call, their elements shared out to threads: what every op's loops stand on."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic
from torch import Tensor

CHUNK = 16384
SERIAL = 32768  # elements in all; with fewer, waking the threads costs more than the work
PIECES = 8  # per thread
BLOCK = 512  # intermediate results of a block stay in the first-level cache


class Tensors(NamedTuple):
    """Address and number of elements of each tensor; `owners` keep the memory alive while a thread works on it."""

    addresses: np.ndarray  # int64 [3, tensors]: weight, gradient, momentum (without one, the weight again)
    numel: np.ndarray  # int64 [tensors]
    owners: tuple[Sequence[Tensor] | None, ...]


@intrinsic
def pointer_to(typing_context, address, memory):
    pointer = types.CPointer(memory.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, memory), generate


@intrinsic
def block_of(typing_context, real):
    """Memory for BLOCK numbers on the stack, which a compiler knows to overlap no tensor."""
    pointer = types.CPointer(real.dtype)

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(context.get_value_type(real.dtype), BLOCK))
            block.align = 64
        return builder.bitcast(block, context.get_value_type(pointer))

    return pointer(real), generate


def for_each_chunk(work: Callable[..., None]) -> Callable[..., None]:
    """share(numel, low, high, *arguments), which calls work(tensor, begin, n, chunk, *arguments).

    It does so for each chunk that begins in the elements [low, high) of all tensors. Chunks are numbered the same way however
    the elements are shared out.
    """

    @njit(nogil=True, error_model="numpy")
    def share(numel, low, high, *arguments):
        first, first_chunk = 0, 0  # of the tensor
        for tensor in range(numel.size):
            if first >= high:
                break
            skipped = (max(low - first, 0) + CHUNK - 1) // CHUNK
            for begin in range(skipped * CHUNK, min(numel[tensor], high - first), CHUNK):
                work(tensor, begin, min(CHUNK, numel[tensor] - begin), first_chunk + begin // CHUNK, *arguments)
            first += numel[tensor]
            first_chunk += (numel[tensor] + CHUNK - 1) // CHUNK

    return share


class Pool:
    """The process's threads. A thread does not survive a fork, so the child starts with none."""

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        self.lock = threading.Lock()
        self.executor: ThreadPoolExecutor | None = None
        self.workers = 0

    def of(self, workers: int) -> ThreadPoolExecutor:
        """At least so many workers. A smaller executor ends when the last call that uses it lets it go."""
        with self.lock:
            if self.executor is None or self.workers < workers:
                self.executor, self.workers = ThreadPoolExecutor(workers, thread_name_prefix="pysteep"), workers
            return self.executor


pool = Pool()


def run(share: Callable[..., None], tensors: Tensors, *arguments: Any) -> None:
    """Work on the elements of all tensors in torch.get_num_threads() threads, this one among them.

    Each thread takes piece after piece, because a core may be busy: torch's own threads spin for milliseconds after their work.
    """
    total = int(tensors.numel.sum())
    threads = torch.get_num_threads() if total >= SERIAL else 1
    count = min(PIECES * threads, -(-total // CHUNK)) if threads > 1 else 1
    pieces = deque(range(count))

    def work() -> None:
        while True:
            try:
                piece = pieces.popleft()
            except IndexError:
                return
            share(tensors.numel, total * piece // count, total * (piece + 1) // count, tensors.addresses, *arguments)

    try:
        others = [pool.of(threads).submit(work) for _ in range(min(threads, count) - 1)]
    except RuntimeError:  # the interpreter is shutting down and starts no threads: this one does it all
        others = []
    work()
    for other in others:
        if not other.cancel():
            other.result()
