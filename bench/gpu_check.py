"""What only a GPU can show, in one command without network: `make gpu-check`, or `bench/gpu_check.py --pieces build,test`.

Three pieces, each a process with a time limit of its own, so that one that fails leaves the rest:
    build   the package, without isolation, for the GPU at hand
    test    the tests marked `gpu`
    time    every op against a device-to-device copy and torch's fused optimisers
Logs and results go to one folder; a short table comes last. Exits 1 if a piece failed.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"build": 190, "test": 200, "time": 140}  # seconds


# Those with tests marked `gpu`; others need packages that a GPU machine may lack.
TESTS = ("test_gpu.py", "test_gpu_rounding.py", "test_cuda_graphs.py", "test_triton.py")


def architecture() -> str:
    """Of the GPU at hand, as CMake takes it."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}"


def command(piece: str, output: Path) -> list[str]:
    python = [sys.executable, "-P", "-m"]  # -P: not the source tree, whose pysteep has no extension
    if piece == "build":
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--quiet", "--target", str(output / "site")]
        settings = {
            "build-dir": output / "cmake",
            "wheel.cmake": "true",
            "cmake.define.PYSTEEP_CUDA": "ON",
            "cmake.define.CMAKE_CUDA_ARCHITECTURES": architecture(),
        }
        return [*python, "pip", "install", *options, *(f"-C{name}={value}" for name, value in settings.items()), "."]
    if piece == "test":
        files = [str(ROOT / "tests" / name) for name in TESTS]
        return [*python, "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), *files]
    return [*python, "bench.gpu_time", "--output", str(output)]


def run(piece: str, output: Path) -> str:
    """Run one piece; its outcome in a few words."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(output / "site"), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    log = output / f"{piece}.log"
    start = time.perf_counter()
    with log.open("w") as file:
        try:
            done = subprocess.run(
                command(piece, output),
                cwd=ROOT if piece == "build" else output,
                env=environment,
                stdout=file,
                stderr=subprocess.STDOUT,
                timeout=LIMITS[piece],
                check=False,
            )
            outcome = "ok" if done.returncode == 0 else f"FAILED with exit code {done.returncode}"
        except subprocess.TimeoutExpired:
            outcome = f"FAILED: not done after {LIMITS[piece]} s"
    return f"{outcome}, {time.perf_counter() - start:.0f} s"


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", default="build,test,time", help="which, in order (default: build,test,time)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and results")
    arguments = parser.parse_args()
    pieces = arguments.pieces.split(",")
    if unknown := [piece for piece in pieces if piece not in LIMITS]:
        parser.error(f"--pieces must be among {', '.join(LIMITS)}; got {', '.join(unknown)}")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for piece in pieces:
        print(f"{piece} ...", flush=True)
        outcomes[piece] = run(piece, output)
        if "FAILED" in outcomes[piece]:
            print((output / f"{piece}.log").read_text()[-4000:])
    if "test" in outcomes:
        print(*(output / "test.log").read_text().splitlines()[-3:], sep="\n")
    if "time" in outcomes and (output / "times.md").exists():
        print((output / "times.md").read_text())
    for piece, outcome in outcomes.items():
        print(f"{piece}: {outcome}")
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
