"""What only a GPU can show, in one command without network: `make gpu-check`, or `bench/gpu/gpu_check.py --pieces build,cuda`.

Pieces, each a process with a time limit of its own, so that one that fails leaves the rest:
    build        the package, without isolation, for the GPU at hand
    cuda         the tests marked `gpu`, without Triton's
    time-cuda    bench.gpu.gpu_bars: every op of CUDA against a device-to-device copy
    triton       the tests of Triton, most of whose time goes to compiling
    time-triton  the bars of Triton
    counters     bench.gpu.gpu_counters: bytes moved by the hardware's counters, where ncu is installed
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
import fcntl
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

ROOT = Path(__file__).resolve().parents[2]
LIMITS = {"build": 110, "cuda": 80, "time-cuda": 100, "triton": 120, "time-triton": 80, "counters": 45}  # seconds
ASKED_FOR = {"memcheck": 150, "racecheck": 60, "bench": 470, "report": 60}
GRACE = 10  # seconds that a piece has to say how far it came, once its time is up
TOOLS = {"counters": "ncu", "memcheck": "compute-sanitizer", "racecheck": "compute-sanitizer"}
WITHOUT_GPU = ("build", "report")
WORKERS = min(8, os.cpu_count() or 1)  # that test Triton at once

# Those with tests marked `gpu`. pytest would import all others too, for packages that a GPU machine may lack.
TESTS = (
    "gpu/test_gpu.py",
    "gpu/test_gpu_depth.py",
    "gpu/test_gpu_rounding.py",
    "gpu/test_cuda_graphs.py",
    "diagnostics/test_spectrum.py",
    "gpu/test_triton.py",
)
CHOSEN = {
    "cuda": ["-m", "gpu", "-k", "not triton"],
    "triton": ["-m", "gpu", "-k", "triton"],
    "memcheck": ["-m", "gpu and sanitized", "-k", "cuda"],
    "racecheck": ["-m", "gpu and sanitized", "-k", "cuda and simulated"],
}
PACKAGES = ("torch", "triton", "numpy", "scipy", "numba", "safetensors", "tqdm", "psutil")  # that the package or bench imports
PACKAGES += ("pybind11", "scikit-build-core", "pytest", "pytest-xdist", "pytest-benchmark")
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


class StoppedError(Exception):
    """Somebody asks this program to end."""


def say(text: str) -> None:
    """Print, also where nobody reads any more, or reads another encoding."""
    encoding = sys.stdout.encoding or "utf-8"
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))
        sys.stdout.flush()


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
        f"commit: {said('git', 'describe', '--always', '--dirty', '--abbrev=40') or 'unknown'}",
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
        plugins = ["-p", "no:cacheprovider", "-p", "no:benchmark", "-p", "bench.gpu.failures"]
        options = ["-q", "--tb=short", "--continue-on-collection-errors", *plugins, "-c", str(ROOT / "pyproject.toml")]
        pytest = [*python, "pytest", *options, *CHOSEN[piece], *files]
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
        return [*python, "bench.gpu.gpu_counters", *sizes]
    return [*python, "bench.gpu.gpu_bars", "--homes", piece.removeprefix("time-"), *sizes]


def run(piece: str, places: Places, at_most: float = math.inf) -> str:
    """Run one piece; its outcome in a few words. What it says is printed as it comes, and kept in its log."""
    places.log(piece).write_text("")
    if piece not in WITHOUT_GPU and not torch.cuda.is_available():
        return "FAILED: torch sees no GPU"
    if piece in TOOLS and shutil.which(TOOLS[piece]) is None:
        return f"not run: {TOOLS[piece]} is not installed"
    if piece == "build":
        shutil.rmtree(places.site, ignore_errors=True)  # of another commit, perhaps
    elif not (places.site / "pysteep").exists():
        return f"FAILED: no package in {places.site}; the piece build makes it"
    if piece == "report" and not (places.output / "benchmarks.json").exists():
        return "not run: the piece bench has left no benchmarks.json"
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
    reader = threading.Thread(target=passed_on, args=(process.stdout, places.log(piece)), daemon=True)
    try:
        reader.start()
        code = process.wait(limit)
        outcome = "ok" if code == 0 else f"FAILED with exit code {code}"
        if code < 0:  # not by this program, which says so; as the system does where memory runs out
            outcome = f"FAILED: ended by {signal.Signals(-code).name} from elsewhere"
    except subprocess.TimeoutExpired:
        outcome = f"FAILED: not done after {limit:g} s"
    finally:
        stop(process)
        reader.join(GRACE)
    return f"{outcome}, {time.perf_counter() - start:.0f} s"


def passed_on(output: IO[bytes] | None, log: Path) -> None:
    """Print what a piece says and append it to its log, as it comes. The piece goes on where neither takes it."""
    assert output is not None
    with log.open("ab", buffering=0) as file:
        for part in iter(lambda: os.read(output.fileno(), 1 << 16), b""):
            with contextlib.suppress(OSError):  # as of a disk that is full
                file.write(part)
            say(part.decode(errors="backslashreplace"))


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a piece with all that it started. One that still runs is interrupted first: pytest then sums up what it has."""
    try:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGINT)
            process.wait(GRACE)
    except (ProcessLookupError, subprocess.TimeoutExpired):
        pass
    finally:  # also where another signal comes meanwhile
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


# ---- all of them -------------------------------------------------------------------------------------------------------------


def pack(output: Path, archive: Path) -> bool:
    """Put all logs and results in one file, whole at any time; whether that could be done."""
    unfinished = archive.with_name(archive.name + ".new")
    try:
        archive.parent.mkdir(parents=True, exist_ok=True)
        with tarfile.open(unfinished, "w:gz") as file:
            file.add(output, arcname=output.name)
        unfinished.replace(archive)
    except OSError as error:
        say(f"no archive {archive}: {error}\n")
        return False
    return True


def begin_anew(output: Path) -> None:
    """Remove what an earlier run left, that nothing of it passes for a result of this one."""
    names = [f"{piece}.log" for piece in LIMITS | ASKED_FOR]
    names += ["bars.json", "bars.md", "times.json", "outcomes.txt", "versions.txt", "benchmarks.json", "report.md"]
    names += [f"counters.{kind}" for kind in ("json", "csv", "md")]
    for path in (*(output / name for name in names), *output.glob("*.png")):
        path.unlink(missing_ok=True)


def missed(output: Path, pieces: Sequence[str]) -> list[str]:
    """A line for each bar that one of the pieces measured and missed, expected or not."""
    path = output / "bars.json"
    lines = []
    try:
        suites = json.loads(path.read_text())["suites"] if path.exists() else {}
        for piece in pieces:
            for bar in (
                suites.get(f"gpu {piece.removeprefix('time-')}", {"bars": []})["bars"] if piece.startswith("time-") else ()
            ):
                if bar["reached"] is not None and not bar["met"]:
                    reason = f" (expected: {bar['expected']})" if bar.get("expected") else ""
                    lines.append(f"missed: {bar['name']}: {bar['reached']:.2f}, must be {bar['sign']} {bar['bar']:g}{reason}")
    except (ValueError, LookupError, TypeError, AttributeError):  # its piece was ended in the middle of writing it
        return [f"{path.name} is not whole"]
    return lines


def last_words(piece: str, places: Places) -> list[str]:
    """What the end of the output says of a piece beside its outcome."""
    if piece not in CHOSEN or not places.log(piece).exists():
        return []
    with places.log(piece).open("rb") as log:
        log.seek(max(log.seek(0, os.SEEK_END) - 4096, 0))
        lines = log.read().decode(errors="backslashreplace").splitlines()
    return [f"{piece}:", *lines[-3:]] if lines else []


def positive(text: str) -> float:
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"must be > 0; got {text}")
    return number


def share(text: str) -> float:
    number = positive(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"must be at most 1; got {text}")
    return number


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    every, folder = ",".join(LIMITS), ROOT / "build" / "gpu-check"
    parser = argparse.ArgumentParser(
        prog="gpu_check.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pieces", default=every, help=f"which, in order (default: {every})")
    parser.add_argument("--output", type=Path, default=folder, help="folder for logs and results (default build/gpu-check)")
    parser.add_argument("--archive", type=Path, help="file for all of them (default: OUTPUT.tar.gz)")
    parser.add_argument(
        "--build", type=Path, default=folder.with_name("gpu-build"), help="folder of the package (build/gpu-build)"
    )
    parser.add_argument("--scale", type=share, default=1.0, help="of the sizes of what is timed and counted (default 1)")
    parser.add_argument(
        "--at-most", type=positive, default=math.inf, metavar="SECONDS", help="for each piece (default: its limit)"
    )
    asked = parser.parse_args(arguments)
    asked.pieces = [piece.strip() for piece in asked.pieces.split(",") if piece.strip()]
    unknown = [piece for piece in asked.pieces if piece not in LIMITS | ASKED_FOR]
    if unknown or not asked.pieces:
        parser.error(f"--pieces must be among {', '.join(LIMITS | ASKED_FOR)}; got {', '.join(unknown) or 'none'}")
    asked.output, asked.build = asked.output.resolve(), asked.build.resolve()
    if asked.output.exists() and not asked.output.is_dir():
        parser.error(f"--output must be a folder; got the file {asked.output}")
    if asked.output.exists() and any(asked.output.iterdir()) and not (asked.output / "versions.txt").exists():
        parser.error(f"--output must be new, empty or a folder of an earlier run, since it is archived; got {asked.output}")
    asked.archive = (asked.archive or asked.output.with_name(asked.output.name + ".tar.gz")).resolve()
    if asked.archive.is_dir():
        parser.error(f"--archive must be a file; got the folder {asked.archive}")
    if any(asked.output in (path, *path.parents) for path in (asked.archive, asked.build)):
        parser.error(f"--archive and --build must lie outside {asked.output}, which the archive holds")
    return asked


def main(arguments: Sequence[str] | None = None) -> int:
    asked = parsed(arguments)
    places = Places(asked.output, asked.build, asked.scale)
    for folder in (places.output, places.build):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            say(f"{folder} cannot be made: {error}\n")
            return 2
    with (places.build / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say(f"another run uses {places.build}: one at a time, or no time would be right\n")
            return 2
        return run_all(asked, places)


def run_all(asked: argparse.Namespace, places: Places) -> int:
    def end(number: int, _: object) -> None:
        raise StoppedError(signal.Signals(number).name)

    ends = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C, `timeout`, a connection that is lost
    before = {number: signal.signal(number, end) for number in ends}
    if "build" in asked.pieces:
        begin_anew(places.output)
    earlier = outcomes_in(places.output)  # of pieces whose logs and results are still there
    outcomes: dict[str, str] = {}
    packed = False
    try:
        found = "\n".join(versions()) + "\n"
        with (places.output / "versions.txt").open("a") as file:  # of an earlier run too, whose results may stand beside
            file.write(found)
        say(found)
        for piece in asked.pieces:
            say(f"{piece} ...\n")
            outcomes[piece] = "FAILED: stopped before its end"
            outcomes[piece] = run(piece, places, asked.at_most)
            write_outcomes(earlier | outcomes, places.output)
            pack(places.output, asked.archive)
    except StoppedError as stopped:
        say(f"\nstopped by {stopped}\n")
        outcomes |= {piece: "FAILED: stopped before its end" for piece in asked.pieces if piece not in outcomes}
    finally:
        write_outcomes(earlier | outcomes, places.output)
        packed = pack(places.output, asked.archive)
        for number, handler in before.items():
            signal.signal(number, handler)
    words = [line for piece in outcomes for line in last_words(piece, places)]
    last = [
        *words,
        *missed(places.output, asked.pieces),
        table(outcomes) + f"all of it: {asked.archive if packed else places.output}",
    ]
    say("\n" + "\n".join(last) + "\n")
    return int(not packed or any("FAILED" in outcome for outcome in outcomes.values()))


def table(outcomes: dict[str, str]) -> str:
    width = max(map(len, outcomes), default=0)
    return "".join(f"{piece:{width}}  {outcome}\n" for piece, outcome in outcomes.items())


def outcomes_in(output: Path) -> dict[str, str]:
    """What an earlier run wrote of its pieces."""
    try:
        lines = (output / "outcomes.txt").read_text().splitlines()
    except OSError:
        return {}
    return dict(line.split(maxsplit=1) for line in lines if len(line.split(maxsplit=1)) == 2)


def write_outcomes(outcomes: dict[str, str], output: Path) -> None:
    try:
        (output / "outcomes.txt").write_text(table(outcomes))
    except OSError as error:
        say(f"no outcomes.txt: {error}\n")


if __name__ == "__main__":
    sys.exit(main())
