"""What may import what: `_ops` knows no optimizer, `_state` not the public one, and no import runs in a circle.

Nor does a test import another: what they share is in tests/support, which knows no test.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.support.suites import TESTS

ROOT = Path(__file__).resolve().parents[2]
HOMES = {ROOT / "pysteep": "pysteep", ROOT / "kernels": "pysteep.kernels"}


def modules() -> dict[str, tuple[Path, bool]]:
    """By name: the file, and whether it is a package. The compiled one is there as its stub."""
    found = {}
    for folder, package in HOMES.items():
        for path in folder.rglob("*.py*"):
            parts = path.relative_to(folder).with_suffix("").parts
            if path.suffix not in (".py", ".pyi"):
                continue
            if folder.name == "pysteep" and parts[0] == "kernels":  # a link to the other folder, in some checkouts
                continue
            is_package = parts[-1] == "__init__"
            found[".".join([package, *(parts[:-1] if is_package else parts)])] = path, is_package
    return found


def imports(*, lazy: bool) -> dict[str, set[str]]:
    """The modules of the package that each imports, where it is loaded or, if `lazy`, also inside functions.

    Those for type checkers count as the others.
    """
    known = modules()
    graph = {}
    for name, (path, is_package) in known.items():
        tree = ast.parse(path.read_text())
        inside = [ast.walk(node) for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        late = {id(node) for nodes in inside for node in nodes}
        package = name if is_package else name.rpartition(".")[0]
        graph[name] = set()
        for node in ast.walk(tree):
            if id(node) in late and not lazy:
                continue
            if isinstance(node, ast.Import):
                asked = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                parts = package.split(".")
                base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
                source = ".".join(filter(None, [base, node.module]))
                asked = [f"{source}.{alias.name}" if f"{source}.{alias.name}" in known else source for alias in node.names]
            else:
                continue
            graph[name] |= {target for target in asked if target in known and target != name}
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Modules each of which imports the next, and the last the first; empty if there is none."""
    done: set[str] = set()

    def below(name: str, above: list[str]) -> list[str]:
        if name in above:
            return above[above.index(name) :]
        if name in done:
            return []
        for target in sorted(graph[name]):
            found = below(target, [*above, name])
            if found:
                return found
        done.add(name)
        return []

    return next(filter(None, (below(name, []) for name in sorted(graph))), [])


def test_no_import_runs_in_a_circle():
    assert circle(imports(lazy=False)) == []


def test_a_circle_would_be_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("room", "others"),
    [("pysteep._ops", ("pysteep._state", "pysteep.optim")), ("pysteep._state", ("pysteep.optim",)), ("pysteep.kernels", ())],
)
def test_private_rooms_do_not_know_who_uses_them(room, others):
    inside = {name: targets for name, targets in imports(lazy=True).items() if f"{name}.".startswith(f"{room}.")}
    assert len(inside) > 5, "the room is there"
    public = {name for name in modules() if name.count(".") == 1 and not name.rpartition(".")[2].startswith("_")}
    public -= {"pysteep.kernels"}
    for name, targets in inside.items():
        for target in targets:
            assert not any(f"{target}.".startswith(f"{other}.") for other in others), f"{name} imports {target}"
            assert target not in public, f"{name} imports {target}"


def tests_imported_by(text: str, tests: set[str]) -> list[str]:
    """The modules of tests that a file imports, anywhere in it."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return [name for name in found if {*name.split(".")} & tests]


def test_no_test_imports_another():
    """Nor does what they share, or conftest.py, import one."""
    tests = {path.stem for path in TESTS.rglob("test_*.py")}
    assert "test_rooms" in tests
    for path in TESTS.rglob("*.py"):
        assert tests_imported_by(path.read_text(), tests) == [], path


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("from tests.ops.test_rounding import MODES", 1),
        ("from tests.ops import test_rounding", 1),
        ("import tests.ops.test_rounding as rounding", 1),
        ("def test():\n    from .test_rounding import MODES, SIZES", 2),
        ("from tests.support.rounding_cases import MODES", 0),
    ],
)
def test_a_test_that_is_imported_would_be_found(text, count):
    assert len(tests_imported_by(text, {"test_rounding"})) == count
