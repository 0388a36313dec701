"""Where the tests are: `file_of("depth")` is test_depth.py, whichever folder it is in."""

from __future__ import annotations

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]


def file_of(name: str) -> Path:
    (path,) = TESTS.rglob(f"test_{name}.py")
    return path
