"""A plugin for pytest: which tests of a GPU a pretended one runs. Most are skipped for time, some for what a CPU has not."""

from __future__ import annotations

import zlib

import pytest

NEED_A_GPU = (
    "graph",
    "replay",
    "stream",
    "waits_for_nothing",
    "two_to_the_31",
    "captured",
    "scaler",
    "thousands",
    "kinds_of_device",
)
ONE_IN = 12


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if any(word in item.nodeid for word in NEED_A_GPU):
            item.add_marker(pytest.mark.skip(reason="needs a real GPU"))
        elif zlib.crc32(item.name.encode()) % ONE_IN:
            item.add_marker(pytest.mark.skip(reason="one in twelve is run on a pretended GPU"))
