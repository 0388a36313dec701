"""python -m pysteep info | demo | compare."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from importlib import metadata

import torch

from . import __version__
from ._demo import geometry
from ._ops.dispatch import backends, extension, serving


def info(_: argparse.Namespace) -> int:
    """Print versions, threads, what was built, and which backend serves and why. 1 if PYSTEEP_BACKEND serves nothing here."""
    versions = {"pysteep": __version__, "Python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numba", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    rows = [("versions", ", ".join(f"{name} {version}" for name, version in versions.items()))]
    rows.append(("threads", f"{torch.get_num_threads()} (torch.set_num_threads)"))
    if extension is not None:
        rows.append(("instruction set", f"{extension.isa()} (this machine runs {', '.join(extension.isas())})"))
        rows.append(("CUDA architectures", ", ".join(extension.cuda_architectures()) or "none built"))
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    served = {device: _served_by(device) for device in devices}
    rows += [
        (f"{device} tensors", f"served by {name}" if name else f"not served: {error}")
        for device, (name, error) in served.items()
    ]
    serves = any(name for name, _ in served.values())
    if asked := os.environ.get("PYSTEEP_BACKEND"):
        rows.append(("PYSTEEP_BACKEND", asked if serves else f"wrong: {served['cpu'][1]}"))
    for name, backend in backends().items():
        rows.append((f"backend {name}", f"{'available' if backend.available else 'not available'}: {backend.reason}"))
    width = max(len(name) for name, _ in rows)
    print(*(f"{name:<{width}}  {value}" for name, value in rows), sep="\n")
    return 0 if serves else 1


def _served_by(device: str) -> tuple[str, str]:
    """The backend that serves it, or what keeps any from it."""
    try:
        return serving(device), ""
    except (RuntimeError, ValueError) as error:
        return "", str(error)


def compare(arguments: argparse.Namespace) -> int:
    """Print what fine-tuning changed between two checkpoints."""
    from .diagnostics import compare_checkpoints

    pairs = [(query, key) for query, key in arguments.pairs] if arguments.pairs else "auto"
    try:
        print(
            compare_checkpoints(
                arguments.before, arguments.after, pairs, pickled=arguments.pickled, progress=sys.stderr.isatty()
            )
        )
    except (OSError, ValueError) as error:
        print(f"pysteep compare: {error}", file=sys.stderr)
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pysteep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("info", help="versions, backends and why").set_defaults(run=info)
    demo = commands.add_parser("demo", help="train small networks with and without depth")
    geometry.add_arguments(demo)
    demo.set_defaults(run=geometry.run)
    comparison = commands.add_parser("compare", help="sign flips and the balance of queries and keys of two checkpoints")
    comparison.add_argument("before", help="a .safetensors file, the .json index of one in shards, or a folder with either")
    comparison.add_argument("after", help="the same, fine-tuned")
    comparison.add_argument(
        "--pairs",
        nargs=2,
        action="append",
        metavar=("QUERY", "KEY"),
        help="names of a layer's query and key matrix, again for each layer (default: found by their names)",
    )
    comparison.add_argument("--pickled", action="store_true", help="also read .bin, .pt, .pth, .ckpt: tensors, no code")
    comparison.set_defaults(run=compare)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
