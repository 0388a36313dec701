"""`python -m bench COMMAND`: what is measured beside `pytest bench --benchmark-only`, and what is made of the results."""

from __future__ import annotations

import argparse
import importlib
import sys

COMMANDS = {
    "bars": ("bench.bars", "what pysteep must reach on a CPU"),
    "report": ("bench.report", "Markdown and pictures of results"),
    "readme": ("bench.report.readme", "README's section on speed, from the committed results"),
    "gpu-code": ("bench.gpu.gpu_code", "registers, spills and accesses of the GPU kernels, without a GPU"),
    "gpu-compile": ("bench.gpu.gpu_compile", "how long Triton compiles at the first step, without a GPU"),
    "gpu-predicted": ("bench.gpu.gpu_predicted", "what a GPU will reach by the machine code, said before one is asked"),
    "device": ("bench.measure.machine", "the folder of this machine's results"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (_, purpose) in COMMANDS.items():
        commands.add_parser(name, help=purpose, add_help=False)
    asked = parser.parse_args(sys.argv[1:2])
    module = importlib.import_module(COMMANDS[asked.command][0])
    result: int = module.main(sys.argv[2:])
    return result


if __name__ == "__main__":
    sys.exit(main())
