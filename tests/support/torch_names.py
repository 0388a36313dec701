"""Which names of torch a file uses, as far as its text tells: dotted ones, and attributes of torch.Tensor."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path


def used(path: Path) -> dict[str, int]:
    """Dotted names below torch, each with a line where it is used."""
    tree = ast.parse(path.read_text())
    aliases = dict(imported(tree))
    found: dict[str, int] = {}
    for name, line in ((name, line) for name, line in statements(tree)):
        found.setdefault(name, line)
    for node in ast.walk(tree):
        name = dotted(node)
        if name is None:
            continue
        head, _, rest = name.partition(".")
        if head in aliases and rest:
            found.setdefault(f"{aliases[head]}.{rest}", node.lineno)  # type: ignore[attr-defined]
    return found


def imported(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a file calls something of torch, and its whole name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "torch":
                    yield (alias.asname, alias.name) if alias.asname else ("torch", "torch")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def statements(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """What is imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.split(".")[0] == "torch")
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] == "torch":
            yield from ((f"{node.module}.{alias.name}", node.lineno) for alias in node.names)


def dotted(node: ast.AST) -> str | None:
    """a.b.c of an attribute of an attribute of a name."""
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) and parts else None
