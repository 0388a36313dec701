"""What only a GPU can show, in one command without network: `make gpu-check`, or `bench/gpu_check.py --pieces build,test`.

Pieces, each a process with a time limit of its own, so that one that fails leaves the rest:
    build      the package, without isolation, for the GPU at hand
    test       the tests marked `gpu`
    time       bench.gpu_bars: every op against a device-to-device copy
    counters   bench.gpu_counters: bytes moved by the hardware's counters, where ncu is installed
    memcheck   a few of the tests, those marked `sanitized`, where compute-sanitizer is installed
    racecheck  the same with what shares memory between threads
These take less than 9 minutes together. Only where they are asked for, as by `make bench-gpu`:
    bench      every benchmark beside its peers
    report     tables and pictures of it
Logs and results go to one folder; a short table comes last. Exits 1 if a piece failed. The card's settings stay as they are.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"build": 110, "test": 120, "time": 140, "counters": 60, "memcheck": 60, "racecheck": 40}  # seconds
ASKED_FOR = {"bench": 470, "report": 60}
TOOLS = {"counters": "ncu", "memcheck": "compute-sanitizer", "racecheck": "compute-sanitizer"}
WITHOUT_GPU = ("build", "report")
SUMMARIES = {"time": "bars.md", "counters": "counters.md"}
WORKERS = 8  # that test at once: most of their time goes to compiling for Triton

# Those with tests marked `gpu`; others need packages that a GPU machine may lack.
TESTS = ("test_gpu.py", "test_gpu_depth.py", "test_gpu_rounding.py", "test_cuda_graphs.py", "test_triton.py")
CHOSEN = {
    "test": ["-m", "gpu"],
    "memcheck": ["-m", "gpu and sanitized", "-k", "cuda"],
    "racecheck": ["-m", "gpu and sanitized", "-k", "cuda and simulated"],
}


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
    if piece in CHOSEN:
        files = [str(ROOT / "tests" / name) for name in TESTS]
        pytest = [*python, "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml"), *CHOSEN[piece], *files]
        if piece == "test":
            return [*pytest, *(["-n", str(WORKERS), "--dist", "loadgroup"] if importlib.util.find_spec("xdist") else [])]
        return [TOOLS[piece], "--tool", piece, "--error-exitcode", "9", "--target-processes", "all", *pytest]
    if piece == "bench":
        pytest = [*python, "pytest", str(ROOT / "bench"), "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
        results = f"--benchmark-json={output / 'benchmarks.json'}"
        return [*pytest, "--device", "cuda", "--benchmark-only", "--benchmark-columns=median,iqr,rounds", results]
    if piece == "report":
        return [*python, "bench", "report", str(output / "benchmarks.json")]
    return [*python, {"time": "bench.gpu_bars", "counters": "bench.gpu_counters"}[piece], "--output", str(output)]


def run(piece: str, output: Path) -> str:
    """Run one piece; its outcome in a few words."""
    (output / f"{piece}.log").write_text("")
    if piece not in WITHOUT_GPU and not torch.cuda.is_available():
        return "FAILED: torch sees no GPU"
    if piece in TOOLS and shutil.which(TOOLS[piece]) is None:
        return f"not run: {TOOLS[piece]} is not installed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(output / "site"), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    if piece == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that each tensor is an allocation with an end
    start, limit = time.perf_counter(), (LIMITS | ASKED_FOR)[piece]
    with (output / f"{piece}.log").open("w") as log:
        process = subprocess.Popen(
            command(piece, output),
            cwd=ROOT if piece == "build" else output,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            outcome = "ok" if code == 0 else f"FAILED with exit code {code}"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it started
            process.wait()
            outcome = f"FAILED: not done after {limit} s"
    return f"{outcome}, {time.perf_counter() - start:.0f} s"


def main() -> int:
    every = ",".join(LIMITS)
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", default=every, help=f"which, in order (default: {every})")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu-check", help="folder for logs and results")
    arguments = parser.parse_args()
    pieces = arguments.pieces.split(",")
    if unknown := [piece for piece in pieces if piece not in LIMITS | ASKED_FOR]:
        parser.error(f"--pieces must be among {', '.join(LIMITS | ASKED_FOR)}; got {', '.join(unknown)}")
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    outcomes = {}
    for piece in pieces:
        print(f"{piece} ...", flush=True)
        if piece in SUMMARIES:
            (output / SUMMARIES[piece]).unlink(missing_ok=True)
        outcomes[piece] = run(piece, output)
        if "FAILED" in outcomes[piece]:
            print((output / f"{piece}.log").read_text()[-4000:])
    for piece in pieces:
        if piece in SUMMARIES and (output / SUMMARIES[piece]).exists():
            print((output / SUMMARIES[piece]).read_text())
        elif piece in CHOSEN:
            print(f"{piece}:", *(output / f"{piece}.log").read_text().splitlines()[-3:], sep="\n")
    width = max(map(len, pieces))
    print(*(f"{piece:{width}}  {outcome}" for piece, outcome in outcomes.items()), sep="\n")
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
