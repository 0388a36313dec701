"""Tests that need several processes: named cases, all run by one set of them, as to start a process takes seconds.

CASES = Cases(__name__)

@CASES.add
def weights_agree() -> None: ...   # run by every rank, in a gloo group

results = CASES.fixture(ranks=2)
test_in_two_processes = CASES.test()
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

ROOT = Path(__file__).parents[2]
TIMEOUT = 60  # seconds that a rank waits for another


class Cases:
    """The cases of one test module, which other processes import by its name."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.cases: dict[str, Callable[[], None]] = {}
        self.folder = Path()  # what the cases wrote, once they have run

    def add(self, case: Callable[[], None]) -> Callable[[], None]:
        self.cases[case.__name__] = case
        return case

    def fixture(self, ranks: int) -> Any:
        @pytest.fixture(scope="module")
        def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
            self.folder = tmp_path_factory.mktemp("ranks")
            return run_ranks(self.module, [*self.cases], ranks, self.folder)

        return results

    def test(self) -> Any:
        @pytest.mark.parametrize("case", [*self.cases])
        def test_case(case: str, results: dict[str, str]) -> None:
            assert results[case] == "passed", results[case]

        return test_case


def run_ranks(module: str, names: list[str], ranks: int, folder: Path) -> dict[str, str]:
    """Run the functions of `module` in fresh processes, in turn: "passed" for each, or the tracebacks of the ranks."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    store = folder / f"store{time.monotonic_ns()}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.support.processes", module, str(rank), str(ranks), store, folder, *names],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        outputs = [process.communicate(timeout=10 * TIMEOUT)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    results = {}
    for name in names:
        told = []
        for rank, output in enumerate(outputs):
            path = folder / f"{store.name}-{rank}.json"
            reports = json.loads(path.read_text()) if path.exists() else {}
            report = reports.get(name, f"no report:\n{output}")
            if report != "passed":
                told.append(f"rank {rank}: {report}")
        results[name] = "\n".join(told) or "passed"
    return results


def main(module: str, rank: str, ranks: str, store: str, folder: str, *names: str) -> None:
    """One rank."""
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=int(rank), world_size=int(ranks), timeout=timedelta(seconds=TIMEOUT)
    )
    cases, reports = importlib.import_module(module), {}
    os.environ["PYSTEEP_TEST_FOLDER"] = folder
    for name in names:
        torch.manual_seed(0)
        begun = time.perf_counter()
        try:
            getattr(cases, name)()
            reports[name] = "passed"
        except (Exception, pytest.fail.Exception):  # the report is for the parent process
            reports[name] = traceback.format_exc()
        print(name, f"{time.perf_counter() - begun:.2f} s", flush=True)
        (Path(folder) / f"{Path(store).name}-{rank}.json").write_text(json.dumps(reports))
        dist.barrier()  # a rank that waits within the case for one that failed gives up after TIMEOUT
    dist.destroy_process_group()


def folder() -> Path:
    """Where a case may write, the same for all ranks."""
    return Path(os.environ["PYSTEEP_TEST_FOLDER"])


if __name__ == "__main__":
    main(*sys.argv[1:])
