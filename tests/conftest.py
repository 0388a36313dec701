"""Fresh memory is NaN, so that an output that nobody wrote shows; GPU tests are skipped by name where there is no GPU.

`pytest --meta-by-default` runs any tests as where torch.set_default_device("meta") holds for the package and not for the tests.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator

import pytest
import torch

pytest.register_assert_rewrite("tests.support")  # so that what tests share says what it found, as they do
os.environ.setdefault("OMP_NUM_THREADS", "2")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it a GPU's products are refused as not deterministic


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--meta-by-default", action="store_true", help="the package's default device is meta")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if _is_seldom_compiled(item) or _is_one_of_many(item):
            item.add_marker(pytest.mark.slow)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def _is_seldom_compiled(item: pytest.Item) -> bool:
    """Of float16 and float64 `make test` has numba compile q = 1.5 and general q, which have all that q = 1 and 2 have."""
    params = getattr(item, "callspec", None) and item.callspec.params  # type: ignore[attr-defined]
    if not params or params.get("home") != "numba" or params.get("q") not in (1.0, 2.0):
        return False
    return any(value is dtype for value in params.values() for dtype in (torch.float16, torch.float64))


def _is_one_of_many(item: pytest.Item) -> bool:
    """Of the kernels that Triton compiles for GPUs `make test` takes one in six of each test, the same ones each time."""
    of_triton = item.path.stem.startswith("test_triton") and "compile" in item.name.split("[")[0]
    return of_triton and zlib.crc32(item.name.encode()) % 6 != 0


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def meta_by_default(pytestconfig: pytest.Config) -> Iterator[None]:
    if not pytestconfig.getoption("--meta-by-default"):
        yield
        return
    from tests.support.default_device import MetaByDefault

    with MetaByDefault():
        yield
