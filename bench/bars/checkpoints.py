"""Two checkpoints of a model like Llama, and the ways to read them once."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

BUFFER = 1 << 20  # bytes; of 64 KiB to 16 MiB the fastest
PIECE = 1 << 24
WIDTH, KEY_WIDTH, HIDDEN = 2048, 512, 8192  # of Llama 3.2 1B
LAYER = {
    "self_attn.q_proj": (WIDTH, WIDTH),
    "self_attn.k_proj": (KEY_WIDTH, WIDTH),
    "self_attn.v_proj": (KEY_WIDTH, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH),
    "mlp.gate_proj": (HIDDEN, WIDTH),
    "mlp.up_proj": (HIDDEN, WIDTH),
    "mlp.down_proj": (WIDTH, HIDDEN),
}


def write_pair(folder: Path, gigabytes: float, dtype: torch.dtype) -> list[Path]:
    """Two checkpoints, of so many GB together."""
    size = sum(rows * columns for rows, columns in LAYER.values()) * dtype.itemsize
    layers = max(1, round(gigabytes * 1e9 / 2 / size))
    torch.manual_seed(0)
    paths = [folder / "before.safetensors", folder / "after.safetensors"]
    weights = {name: torch.randn(shape) * 0.02 for name, shape in LAYER.items()}
    for path, noise in zip(paths, (0.0, 1e-3), strict=True):
        tensors = {
            f"model.layers.{layer}.{name}.weight": (weight + noise * torch.randn(weight.shape)).to(dtype)
            for layer in range(layers)
            for name, weight in weights.items()
        }
        save_file(tensors, path)
    return paths


def copied(path: Path) -> None:
    """Read into one buffer, again and again."""
    buffer = memoryview(bytearray(BUFFER))
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def mapped(path: Path) -> None:
    """Sum the words of pieces of the file where they are."""
    with path.open("rb") as file:
        for begin in range(0, path.stat().st_size, PIECE):
            length = min(PIECE, path.stat().st_size - begin) // 8 * 8
            memory = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=begin)
            memory.madvise(mmap.MADV_WILLNEED)
            np.frombuffer(memory, np.uint64).sum()


def read_both(read: Callable[[Path], None], paths: list[Path]) -> None:
    """Each file by a thread of its own."""
    with ThreadPoolExecutor(len(paths)) as threads:
        list(threads.map(read, paths))
