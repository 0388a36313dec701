"""Many tensors a call, their elements shared out to threads: what every op's loops stand on."""

from __future__ import annotations

import functools
import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic
from torch import Tensor

from .float_mode import float_mode, set_float_mode

CHUNK = 16384
SERIAL = 32768  # elements in all; with fewer, waking the threads costs more than the work
PIECES = 8  # per thread
BLOCK = 512  # intermediate results of a block stay in the first-level cache
STRETCH = 512  # bytes of a tensor before the turn of the next; with 2048 a core prefetches five streams half as fast
ROWS = 32768  # bytes of intermediate results that are kept for each of many tensors

# A loop that becomes part of each kernel before LLVM sees it; one that LLVM inlines costs 2 % more, in spilled constants.
shared = njit(inline="always", error_model="numpy")

# A loop so long that it is called, and compiled once.
loop = njit(nogil=True, error_model="numpy")


class Tensors(NamedTuple):
    """Address and number of elements of each tensor; `owners` keep the memory alive while a thread works on it."""

    addresses: np.ndarray  # int64 [roles, tensors]
    numel: np.ndarray  # int64 [tensors]
    owners: tuple[Sequence[Tensor], ...]


def tensors_of(*roles: Sequence[Tensor]) -> Tensors:
    """The i-th tensors of all roles share one element order."""
    count = len(roles[0])
    addresses = np.fromiter(map(Tensor.data_ptr, chain.from_iterable(roles)), np.int64, len(roles) * count)
    numel = np.fromiter(map(Tensor.numel, roles[0]), np.int64, count)
    return Tensors(addresses.reshape(len(roles), count), numel, roles)


@intrinsic
def pointer_to(typing_context, address, memory):
    pointer = types.CPointer(memory.dtype)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(address, memory), generate


@functools.cache
def elements_of(memory: type) -> Callable[..., Any]:
    """elements(addresses, role, tensor, begin, n): those of one tensor from `begin` on."""
    size = np.dtype(memory).itemsize

    @njit(forceinline=True)
    def elements(addresses, role, tensor, begin, n):
        return carray(pointer_to(addresses[role, tensor] + begin * size, memory), n)

    return elements


@intrinsic(prefer_literal=True)
def stack_of(typing_context, real, count):
    """Memory for a constant count of numbers on the stack, which a compiler knows to overlap no tensor.

    It is the calling function's and ends with it, even where LLVM inlines that function: LLVM 14 and 15 make all such blocks of
    a caller one. So what hands the memory on must be `shared`, which is part of its caller before LLVM sees it.
    """
    pointer, length = types.CPointer(real.dtype), count.literal_value

    def generate(context, builder, signature, arguments):
        with builder.goto_entry_block():
            block = builder.alloca(ir.ArrayType(context.get_value_type(real.dtype), length))
            block.align = 64
        return builder.bitcast(block, context.get_value_type(pointer))

    return pointer(real, count), generate


@shared
def block_of(real):
    return carray(stack_of(real, BLOCK), BLOCK)


def row_length(memory: type, real: type, rows: int) -> int:
    """Elements of a block, for a kernel that turns from tensor to tensor and keeps so many rows of intermediate results."""
    return min(STRETCH // np.dtype(memory).itemsize, ROWS // np.dtype(real).itemsize // rows // 16 * 16)


@functools.cache
def rows_of(real: type) -> Callable[..., Any]:
    """rows(count, length): an array on the stack, of no more than ROWS bytes."""
    numbers = ROWS // np.dtype(real).itemsize

    @shared
    def rows(count, length):
        return carray(stack_of(real, numbers), (count, length))

    return rows


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


def submit_others(threads: int, count: int, work: Callable[[], None]) -> list[Future[None]]:
    """Start `work` in `count` threads beside this one, each in the floating-point mode that this one has now."""
    if count == 0:
        return []
    callers = float_mode()

    def work_in_mode() -> None:
        own = float_mode()
        set_float_mode(callers)
        try:
            work()
        finally:
            set_float_mode(own)

    executor = pool.of(threads)
    return [executor.submit(work_in_mode) for _ in range(count)]


def run(share: Callable[..., None], tensors: Tensors, *arguments: Any) -> None:
    """Work on the elements of all tensors in torch.get_num_threads() threads, this one among them, in its floating-point mode.

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
        others = submit_others(threads, min(threads, count) - 1, work)
    except RuntimeError:  # the interpreter is shutting down and starts no threads: this one does it all
        others = []
    work()
    for other in others:
        if not other.cancel():
            other.result()
