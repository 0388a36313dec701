"""Many tensors in one launch: a table on the device of their addresses and sizes, and of the chunk that each program has.

A table of n tensors is int64: numel[n], the number of chunks before each tensor [n], a row of n addresses for each operand,
rows of other numbers of each tensor, and for each chunk the number of its tensor.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # elements of a program
KEPT_TABLES = 32


class Table(NamedTuple):
    rows: Tensor
    tensors: int
    chunks: int  # one for each program of the launch
    aligned: bool  # whether every address allows 128-bit loads, and the first number of each tensor is a multiple of eight


# ---- in a kernel -------------------------------------------------------------------------------------------------------------


@triton.jit
def chunk_of(table, count, OPERANDS: tl.constexpr, CHUNK: tl.constexpr):
    """This program's tensor, as a column of the table, and where in it the chunk starts and stops."""
    program = tl.program_id(0).to(tl.int64)
    column = table + tl.load(table + (2 + OPERANDS) * count + program)
    start = (program - tl.load(column + count)) * CHUNK
    return column, start, tl.minimum(start + CHUNK, tl.load(column))


@triton.jit
def operand(column, count, index, STORAGE: tl.constexpr, ALIGNED: tl.constexpr):
    """The address of the tensor's operand of that index."""
    address = tl.load(column + (2 + index) * count).to(tl.pointer_type(STORAGE))
    return tl.multiple_of(address, 16) if ALIGNED else address


# ---- on the host -------------------------------------------------------------------------------------------------------------


class Uploaded(NamedTuple):
    tables: list[Table]
    stream: torch.Stream


recent: OrderedDict[tuple[object, ...], Uploaded] = OrderedDict()
recent_lock = threading.Lock()
captured: list[Tensor] = []  # what CUDA graphs read when they are replayed, however long ago they were captured


def tables(*operands: Sequence[Tensor], vectors: int | None = None, numbers: Sequence[Sequence[int]] = ()) -> list[Table]:
    """One table for the tensors that are aligned, one for the others; neither where it would be empty.

    Operand i of tensor j is operands[i][j]; all have the numel of the first, but for those from `vectors` on, which are single
    numbers and may lie anywhere. numbers[k][j] is a number from 0 to 2^63 - 1. Only what was not used recently is uploaded.
    """
    device = operands[0][0].device
    # Each step pays for this line.
    columns = [tuple(map(Tensor.numel, operands[0])), *(tuple(map(Tensor.data_ptr, tensors)) for tensors in operands)]
    if numbers:
        vectors = len(operands) if vectors is None else vectors
        columns.extend(map(tuple, numbers))
    if device.type == "cpu":
        return host_tables(columns, vectors, len(numbers))
    key = (device, vectors, *columns)
    stream = torch.get_device_module(device).current_stream(device)
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    with recent_lock:
        uploaded = recent.get(key)
        if uploaded is not None:
            recent.move_to_end(key)
    if uploaded is None:
        on_host = [table._replace(rows=table.rows.pin_memory()) for table in host_tables(columns, vectors, len(numbers))]
        if capturing:
            # The upload is a part of this graph. No other call may rely on it, and each replay repeats it before the table is
            # read, so that the graph's pool may have the memory back.
            captured.extend(table.rows for table in on_host)
            return upload(on_host, device)
        uploaded = Uploaded(upload_to_keep(on_host, device, stream), stream)
        with recent_lock:
            recent[key] = uploaded
            if len(recent) > KEPT_TABLES:
                recent.popitem(last=False)
    elif uploaded.stream != stream and not capturing:
        # A capture cannot wait for work outside it. It need not: whoever steps these tensors again does so after the step
        # that uploaded their table.
        stream.wait_stream(uploaded.stream)
        for table in uploaded.tables:
            table.rows.record_stream(stream)
    if capturing:
        captured.extend(table.rows for table in uploaded.tables)
    return uploaded.tables


def upload(on_host: list[Table], device: torch.device) -> list[Table]:
    return [table._replace(rows=table.rows.to(device, non_blocking=True)) for table in on_host]


def upload_to_keep(on_host: list[Table], device: torch.device, stream: torch.Stream) -> list[Table]:
    """In memory that stays theirs."""
    module = torch.get_device_module(device)
    if device.type != "cuda" or stream == module.default_stream(device):
        return upload(on_host, device)

    # torch.compile(mode="reduce-overhead") warms up on a stream of its own, with a pool for what that thread allocates, and
    # takes the pool's memory back afterwards. What another thread allocates comes from elsewhere.
    def run() -> list[Table]:
        with module.stream(stream):
            return upload(on_host, device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(run).result()


def host_tables(columns: list[tuple[int, ...]], vectors: int | None, numbers: int = 0) -> list[Table]:
    # Some devices have addresses above 2^63.
    matrix = torch.tensor(columns, dtype=torch.uint64, device="cpu").view(torch.int64)
    aligned = (matrix[1:][:vectors] % 16 == 0).all(0)
    if numbers:
        aligned &= matrix[-numbers] % 8 == 0
    result = []
    for flag, chosen in ((True, aligned), (False, ~aligned)):
        numel, *addresses = matrix[:, chosen & (matrix[0] > 0)]
        if len(numel):
            chunks = (numel + CHUNK - 1) // CHUNK
            first = chunks.cumsum(0) - chunks
            # The number of each chunk's tensor. torch.repeat_interleave would wake the threads of the pool for it.
            begins_tensor = first.new_zeros(int(chunks.sum()))
            begins_tensor[first[1:]] = 1
            rows = torch.cat([numel, first, *addresses, begins_tensor.cumsum(0)])
            result.append(Table(rows, len(numel), len(begins_tensor), flag))
    return result
