"""What only a GPU can show, in one command without network: `make gpu-check`, or `bench/gpu_check.py --pieces build,cuda`.

Pieces, each a process with a time limit of its own, so that one that fails leaves the rest:
    build        the package, without isolation, for the GPU at hand
    cuda         the tests marked `gpu`, without Triton's
    time-cuda    bench.gpu_bars: every op of CUDA against a device-to-device copy
    triton       the tests of Triton, most of whose time goes to compiling
    time-triton  the bars of Triton
    counters     bench.gpu_counters: bytes moved by the hardware's counters, where ncu is installed
These take less than 9 minutes together. Only where they are asked for, as by `make gpu-memcheck` and `make bench-gpu`:
    memcheck     a few of the tests, those marked `sanitized`, where compute-sanitizer is installed
    racecheck    the same with what shares memory between threads
    bench        every benchmark beside its peers
    report       tables and pictures of it
Logs and results go to one folder, which a run that builds clears first, and after each piece to one archive; a short
table comes last. Exits 1 if a piece failed. The card's settings stay as they are.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import IO, NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"build": 110, "cuda": 80, "time-cuda": 100, "triton": 120, "time-triton": 80, "counters": 40}  # seconds
ASKED_FOR = {"memcheck": 150, "racecheck": 60, "bench": 470, "report": 60}
GRACE = 10  # seconds that a piece has to say how far it came, once its time is up
TOOLS = {"counters": "ncu", "memcheck": "compute-sanitizer", "racecheck": "compute-sanitizer"}
WITHOUT_GPU = ("build", "report")
WORKERS = min(8, os.cpu_count() or 1)  # that test Triton at once

# Those with tests marked `gpu`. pytest would import all others too, for packages that a GPU machine may lack.
TESTS = (
    "test_gpu.py",
    "test_gpu_depth.py",
    "test_gpu_rounding.py",
    "test_cuda_graphs.py",
    "test_spectrum.py",
    "test_triton.py",
)
CHOSEN = {
    "cuda": ["-m", "gpu", "-k", "not triton"],
    "triton": ["-m", "gpu", "-k", "triton"],
    "memcheck": ["-m", "gpu and sanitized", "-k", "cuda"],
    "racecheck": ["-m", "gpu and sanitized", "-k", "cuda and simulated"],
}
PACKAGES = ("torch", "triton", "numpy", "pybind11", "scikit-build-core", "pytest", "pytest-xdist", "pytest-benchmark")
PROGRAMS = ("nvcc", "g++", "cmake", "ninja", "ncu", "compute-sanitizer", "git")


class Places(NamedTuple):
    """Where a run keeps what it makes, and how much that is."""

    output: Path  # logs and results
    build: Path  # the package and what it was built in
    scale: float = 1.0  # of the sizes of what is timed

    @property
    def site(self) -> Path:
        return self.build / "site"

    def log(self, piece: str) -> Path:
        return self.output / f"{piece}.log"


# ---- what is here ------------------------------------------------------------------------------------------------------------


def said(*command: str) -> str:
    """The first line with a number of what a program says, or nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    lines = [line.strip() for line in done.stdout.splitlines() if any(sign.isdigit() for sign in line)]
    releases = [line for line in lines if "release" in line]
    return (releases or lines or [""])[0] if done.returncode == 0 else ""


def versions() -> list[str]:
    """Lines on the GPU, the packages and the programs that were found, and on those that were not."""
    found, missing = {"Python": platform.python_version()}, []
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            missing.append(package)
    programs = {program: said(program, "--version") for program in PROGRAMS}
    missing += [program for program, line in programs.items() if not line]
    gpu = said("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
    return [
        f"GPU: {gpu or 'nvidia-smi names none'}; torch sees {'one' if torch.cuda.is_available() else 'none'}",
        f"commit: {said('git', 'rev-parse', 'HEAD') or 'unknown'}",
        ", ".join(f"{name} {version}" for name, version in found.items()),
        *(f"{program}: {line}" for program, line in programs.items() if line),
        f"not found: {', '.join(missing) or 'nothing'}",
    ]


def architecture() -> str:
    """Of the GPU at hand, as CMake takes it."""
    major, minor = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
    return f"{major}{minor}"


# ---- one piece ---------------------------------------------------------------------------------------------------------------


def command(piece: str, places: Places) -> list[str]:
    python = [sys.executable, "-P", "-m"]  # -P: not the source tree, whose pysteep has no extension
    sizes = ["--output", str(places.output), "--scale", str(places.scale)]
    if piece == "build":
        options = ["--no-build-isolation", "--no-deps", "--no-index", "--upgrade", "--quiet", "--target", str(places.site)]
        settings = {
            "build-dir": places.build / "cmake",
            "wheel.cmake": "true",
            "cmake.define.PYSTEEP_CUDA": "ON",
            "cmake.define.CMAKE_CUDA_ARCHITECTURES": architecture(),
        }
        return [*python, "pip", "install", *options, *(f"--config-settings={k}={v}" for k, v in settings.items()), "."]
    if piece in CHOSEN:
        files = [str(ROOT / "tests" / name) for name in TESTS]
        plugin = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "bench.failures", "-c", str(ROOT / "pyproject.toml")]
        pytest = [*python, "pytest", "-q", "--tb=short", *plugin, *CHOSEN[piece], *files]
        if piece in TOOLS:
            return [TOOLS[piece], "--tool", piece, "--error-exitcode", "9", "--target-processes", "all", *pytest]
        spread = piece == "triton" and importlib.util.find_spec("xdist")
        return [*pytest, *(["-n", str(WORKERS), "--dist", "loadgroup"] if spread else [])]
    if piece == "bench":
        pytest = [*python, "pytest", str(ROOT / "bench"), "-c", str(ROOT / "pyproject.toml"), "-q", "-p", "no:cacheprovider"]
        results = f"--benchmark-json={places.output / 'benchmarks.json'}"
        return [*pytest, "--device", "cuda", "--benchmark-only", "--benchmark-columns=median,iqr,rounds", results]
    if piece == "report":
        return [*python, "bench", "report", str(places.output / "benchmarks.json")]
    if piece == "counters":
        return [*python, "bench.gpu_counters", *sizes]
    return [*python, "bench.gpu_bars", "--homes", piece.removeprefix("time-"), *sizes]


def run(piece: str, places: Places, at_most: float = math.inf) -> str:
    """Run one piece; its outcome in a few words. What it says is printed as it comes, and kept in its log."""
    places.log(piece).write_text("")
    if piece not in WITHOUT_GPU and not torch.cuda.is_available():
        return "FAILED: torch sees no GPU"
    if piece in TOOLS and shutil.which(TOOLS[piece]) is None:
        return f"not run: {TOOLS[piece]} is not installed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(places.site), str(ROOT)]), "PYTHONUNBUFFERED": "1"}
    if inherited := os.environ.get("PYTHONPATH"):
        environment["PYTHONPATH"] += os.pathsep + inherited
    if piece == "memcheck":
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # so that each tensor is an allocation with an end
    start, limit = time.perf_counter(), min((LIMITS | ASKED_FOR)[piece], at_most)
    process = subprocess.Popen(
        command(piece, places),
        cwd=ROOT if piece == "build" else places.output,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    reader = threading.Thread(target=passed_on, args=(process.stdout, places.log(piece)), daemon=True)
    reader.start()
    try:
        code = process.wait(limit)
        outcome = "ok" if code == 0 else f"FAILED with exit code {code}"
    except subprocess.TimeoutExpired:
        outcome = f"FAILED: not done after {limit:g} s"
    finally:
        stop(process)
        reader.join(GRACE)
    return f"{outcome}, {time.perf_counter() - start:.0f} s"


def passed_on(lines: IO[bytes], log: Path) -> None:
    """Print what a piece says and append it to its log, as it comes."""
    with log.open("ab", buffering=0) as file:
        for line in iter(lines.readline, b""):
            file.write(line)
            sys.stdout.write(line.decode(errors="replace"))
            sys.stdout.flush()


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a piece with all that it started. One that still runs is interrupted first: pytest then sums up what it has."""
    for signal_, wait in ((signal.SIGINT, GRACE), (signal.SIGKILL, GRACE)):
        if signal_ == signal.SIGINT and process.poll() is not None:
            continue
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)


# ---- all of them -------------------------------------------------------------------------------------------------------------


def pack(output: Path, archive: Path) -> None:
    """Put all logs and results in one file, whole at any time."""
    archive.parent.mkdir(parents=True, exist_ok=True)
    unfinished = archive.with_name(archive.name + ".new")
    with tarfile.open(unfinished, "w:gz") as file:
        file.add(output, arcname=output.name)
    unfinished.replace(archive)


def begin_anew(output: Path) -> None:
    """Remove what an earlier run left, that nothing of it passes for a result of this one."""
    for pattern in ("*.log", "bars.*", "times.json", "counters.*", "outcomes.txt", "benchmarks.json"):
        for path in output.glob(pattern):
            path.unlink()


def missed(output: Path) -> list[str]:
    """A line for each bar that was measured and missed, expected or not."""
    path = output / "bars.json"
    try:
        suites = json.loads(path.read_text())["suites"] if path.exists() else {}
    except (ValueError, KeyError):  # its piece was ended in the middle of writing it
        return [f"{path.name} is not whole"]
    bars = [bar for suite in suites.values() for bar in suite["bars"] if bar["reached"] is not None and not bar["met"]]
    expected = [f" (expected: {bar['expected']})" if bar.get("expected") else "" for bar in bars]
    return [
        f"missed: {bar['name']}: {bar['reached']:.2f}, must be {bar['sign']} {bar['bar']:g}{reason}"
        for bar, reason in zip(bars, expected, strict=True)
    ]


def last_words(piece: str, places: Places) -> list[str]:
    """What the end of the output says of a piece beside its outcome."""
    lines = places.log(piece).read_text(errors="replace").splitlines()
    return [f"{piece}:", *lines[-3:]] if piece in CHOSEN and lines else []


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    every, folder = ",".join(LIMITS), ROOT / "build" / "gpu-check"
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", default=every, help=f"which, in order (default: {every})")
    parser.add_argument("--output", type=Path, default=folder, help="folder for logs and results (default build/gpu-check)")
    parser.add_argument("--archive", type=Path, help="file for all of them (default: OUTPUT.tar.gz)")
    parser.add_argument("--build", type=Path, help="folder of the build, kept for a later run (default: OUTPUT-build)")
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes of what is timed and counted (default 1)")
    parser.add_argument(
        "--at-most", type=float, default=math.inf, metavar="SECONDS", help="for each piece, if its limit is longer"
    )
    asked = parser.parse_args(arguments)
    asked.pieces = asked.pieces.split(",")
    if unknown := [piece for piece in asked.pieces if piece not in LIMITS | ASKED_FOR]:
        parser.error(f"--pieces must be among {', '.join(LIMITS | ASKED_FOR)}; got {', '.join(unknown)}")
    asked.output = asked.output.resolve()
    asked.archive = (asked.archive or asked.output.with_name(asked.output.name + ".tar.gz")).resolve()
    asked.build = (asked.build or asked.output.with_name(asked.output.name + "-build")).resolve()
    if asked.output in (asked.archive.parent, *asked.build.parents, asked.build):
        parser.error(f"--archive and --build must lie outside {asked.output}, which the archive holds")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    places = Places(asked.output, asked.build, asked.scale)
    for folder in (places.output, places.build):
        folder.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("gpu_check.py: stopped"))  # as `timeout` does; the piece ends first
    if "build" in asked.pieces:
        begin_anew(places.output)
    found = "\n".join(versions())
    (places.output / "versions.txt").write_text(found + "\n")
    print(found, flush=True)
    outcomes = {}
    try:
        for piece in asked.pieces:
            print(f"{piece} ...", flush=True)
            outcomes[piece] = "FAILED: stopped before its end"
            outcomes[piece] = run(piece, places, asked.at_most)
            write_outcomes(outcomes, places.output)
            pack(places.output, asked.archive)
    finally:
        write_outcomes(outcomes, places.output)
        pack(places.output, asked.archive)
    words = [line for piece in asked.pieces for line in last_words(piece, places)]
    last = [
        *words,
        *missed(places.output),
        (places.output / "outcomes.txt").read_text().rstrip(),
        f"all of it: {asked.archive}",
    ]
    print("", *last, sep="\n")
    return int(any("FAILED" in outcome for outcome in outcomes.values()))


def write_outcomes(outcomes: dict[str, str], output: Path) -> None:
    width = max(map(len, outcomes), default=0)
    lines = [f"{piece:{width}}  {outcome}\n" for piece, outcome in outcomes.items()]
    (output / "outcomes.txt").write_text("".join(lines))


if __name__ == "__main__":
    sys.exit(main())
