"""pysteep/_csrc.pyi against the extension: the same names, and under each function the same names of arguments."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

from pysteep._ops.dispatch import extension

ROOT = Path(__file__).resolve().parents[2]

pytestmark = pytest.mark.skipif(extension is None, reason="the extension is not built")

Names = dict[str, list[str] | None]
"""By name: a function's arguments, None for what is no function."""


def arguments(function: ast.FunctionDef) -> list[str]:
    return [node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)]


def declared(body: list[ast.stmt], prefix: str = "") -> Names:
    """What the stub says. A class is there as its members, `Class.member`."""
    names: Names = {}
    for node in body:
        if isinstance(node, ast.ClassDef):
            names |= declared(node.body, f"{node.name}.")
        elif isinstance(node, ast.FunctionDef):
            names[prefix + node.name] = None if node.decorator_list else arguments(node)
        elif isinstance(node, ast.AnnAssign):
            names[prefix + ast.unparse(node.target)] = None
    return names


def signature(function: Any) -> list[str]:
    """The arguments in the first line of the docstring that pybind11 writes."""
    (parsed,) = ast.parse(f"def {function.__doc__.splitlines()[0]}: ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return arguments(parsed)


def compiled(namespace: Any, prefix: str = "") -> Names:
    """What the extension has, but for what Python and pybind11 add."""
    names: Names = {}
    for name, value in vars(namespace).items():
        if name.startswith("_") and name != "__init__":
            continue
        if isinstance(value, type):
            names |= compiled(value, f"{name}.")
        else:
            names[prefix + name] = signature(value) if callable(value) else None
    return names


def test_the_stub_says_what_the_extension_has():
    stub = declared(ast.parse((ROOT / "pysteep" / "_csrc.pyi").read_text()).body)
    if not extension.cuda_architectures():
        on_gpus = ("_cuda", "_cuda_on_host")
        stub = {name: given for name, given in stub.items() if given is None or not name.endswith(on_gpus)}
    assert compiled(extension) == stub
