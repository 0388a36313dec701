"""python -m pysteep info | demo."""

from __future__ import annotations

import argparse
import platform
import sys
from importlib import metadata

import torch

from . import __version__, _demo
from ._dispatch import backends, extension, serving


def info(_: argparse.Namespace) -> int:
    """Print versions, threads, what was built, and which backend serves and why."""
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
    rows += [(f"{device} tensors", f"served by {serving(device)}") for device in devices]
    for name, backend in backends().items():
        rows.append((f"backend {name}", f"{'available' if backend.available else 'not available'}: {backend.reason}"))
    width = max(len(name) for name, _ in rows)
    print(*(f"{name:<{width}}  {value}" for name, value in rows), sep="\n")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m pysteep", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    commands.add_parser("info", help="versions, backends and why").set_defaults(run=info)
    demo = commands.add_parser("demo", help="train small networks with and without depth")
    _demo.add_arguments(demo)
    demo.set_defaults(run=_demo.run)
    arguments = parser.parse_args(argv)
    return int(arguments.run(arguments))


if __name__ == "__main__":
    sys.exit(main())
