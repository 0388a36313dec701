"""What a result was measured on: the machine, the versions, the commit, and what its memory and cores can do."""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

from .timing import Step, copy_of, medians

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = (
    "torch",
    "triton",
    "numba",
    "numpy",
    "pysteep",
    "lion-pytorch",
    "torch-optimi",
    "pytorch-optimizer",
    "bitsandbytes",
    "apex",
    "jax",
)


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    models = re.findall(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo")) or [platform.processor() or platform.machine()]
    return f"{models[0]}, {os.cpu_count()} cores"


def _read(path: str) -> str:
    return Path(path).read_text() if Path(path).exists() else ""


def folder(device: str) -> str:
    """Of the results of this machine, below bench/results."""
    name = ("" if device == "cuda" else "cpu ") + device_name(device)
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


@functools.cache
def versions(contender: str | None = None) -> dict[str, str]:
    """Of all packages that are here, or of those that a contender runs with."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        named = contender is None or package.replace("-", "_") in contender.lower().replace("-", "_")
        if named or package in ("pysteep", "torch"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found[package] = importlib.metadata.version(package)
    return found | {"torch": torch.__version__}


@functools.cache
def commit() -> dict[str, Any]:
    """That is checked out, and whether files differ from it."""

    def git(*arguments: str) -> str:
        try:
            done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        except FileNotFoundError:  # no git here
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    return {
        "id": git("rev-parse", "HEAD") or "unknown",
        "time": git("log", "-1", "--format=%cI"),
        "dirty": bool(git("status", "--porcelain", "--", "bench", "csrc", "kernels", "pysteep", ":!bench/results")),
    }


def machine(device: str) -> dict[str, Any]:
    return {
        "device": device_name(device),
        "kind": device,
        "folder": folder(device),
        "system": platform.system(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "versions": versions(),
    }


def ceilings(device: str) -> dict[str, float]:
    """What bounds every op: bytes a second of a copy and of a triad of 600 MB, floating-point operations of a product."""
    large, side = 50_000_000, 2048
    w, g = (torch.randn(large, device=device) for _ in range(2))
    a, b = (torch.randn(side, side, device=device) for _ in range(2))
    steps: dict[str, Step] = {
        "copy": copy_of(12 * large, device),
        "triad": lambda: w.add_(g, alpha=1e-9),
        "product": lambda: torch.mm(a, b),
    }
    times = medians(steps, 9, device)
    return {
        "copy_gigabytes_per_second": round(12 * large / times["copy"] / 1e9, 1),
        "triad_gigabytes_per_second": round(12 * large / times["triad"] / 1e9, 1),
        "gigaflops": round(2 * side**3 / times["product"] / 1e9, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench device", description="The folder of this machine's results.")
    parser.add_argument("device", nargs="?", default="cpu", choices=("cpu", "cuda"))
    print(Path("bench", "results", folder(parser.parse_args(arguments).device)))
    return 0
