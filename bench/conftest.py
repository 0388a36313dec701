"""Options and results of `pytest bench --benchmark-only`: which device, how large, and what stands in the JSON file."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from .measure import machine
from .peers.cases import ABSENT

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # JAX would take the GPU's memory from everyone else


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where the work is done (default cpu)")
    group.addoption("--at-most", type=int, metavar="WEIGHTS", help="the first weights of each work only")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device must be cpu: torch sees no GPU here; got cuda")
    if (weights := config.getoption("--at-most")) is not None and weights < 1:
        raise pytest.UsageError(f"--at-most must be a number of weights >= 1; got {weights}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A function has the cases of its module that are of its suite: bench_factor_step those of factor_step."""
    if "case" in metafunc.fixturenames:
        suite = metafunc.function.__name__.removeprefix("bench_")
        cases = [case for case in metafunc.module.cases(metafunc.config.getoption("--device")) if case.suite == suite]
        metafunc.parametrize("case", cases, ids=[case.id for case in cases])


@pytest.fixture
def device(request: pytest.FixtureRequest) -> str:
    chosen: str = request.config.getoption("--device")
    return chosen


@pytest.fixture
def at_most(request: pytest.FixtureRequest) -> int | None:
    return request.config.getoption("--at-most")


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, Any]:
    return machine.machine(config.getoption("--device"))


def pytest_benchmark_generate_commit_info() -> dict[str, Any]:
    return machine.commit()


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    device = config.getoption("--device")
    output_json["absent"] = ABSENT
    output_json["ceilings"] = machine.ceilings(device)
    for benchmark in output_json["benchmarks"]:
        del benchmark["params"], benchmark["options"]  # functions: what they do is in extra_info
        benchmark["stats"].pop("data", None)
