"""Every name of torch that is used exists in the oldest torch that is supported, which is also that of GPU machines."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from bench.gpu import gpu_check
from tests.support.torch_names import used

ROOT = Path(__file__).resolve().parents[2]
ASKED_FOR_FIRST = {"torch.distributed.all_gather_single"}  # by hasattr


def known() -> dict[str, set[str]]:
    """The names in each module."""
    names: dict[str, set[str]] = {}
    module = ""
    for line in (ROOT / "tests" / "support" / "torch_2_11.txt").read_text().splitlines():
        head, colon, rest = line.partition(": ")
        if line.startswith("#"):
            continue
        if colon and not line.startswith(" "):
            module, line = head, rest
        names.setdefault(module, set()).update(line.split())
    return names


def lacking(name: str, names: dict[str, set[str]]) -> bool:
    """Whether a module on the way to the name is known and has no such name."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        own = names.get(".".join(parts[:end]))
        if own is not None:
            return parts[end] not in own and not parts[end].startswith("__")
    return False


def with_support(path: Path) -> set[Path]:
    """A file of tests and what it uses of tests/support."""
    used_there = re.findall(r"^from tests\.support\.(\w+) import", path.read_text(), re.MULTILINE)
    return {path}.union(*(with_support(ROOT / "tests" / "support" / f"{name}.py") for name in used_there))


def files() -> list[Path]:
    """What a machine with a GPU runs."""
    own = [path for folder in ("pysteep", "kernels", "bench") for path in sorted((ROOT / folder).rglob("*.py"))]
    tests = (with_support(ROOT / "tests" / name) for name in ("conftest.py", *gpu_check.TESTS))
    return [*own, *sorted(set().union(*tests))]


def test_names_that_torch_2_11_lacks_are_not_used():
    names = known()
    found = {(name, path, line) for path in files() for name, line in used(path).items() if lacking(name, names)}
    assert [f"{path.relative_to(ROOT)}:{line}: {name}" for name, path, line in found if name not in ASKED_FOR_FIRST] == []
    assert {name for name, _, _ in found} == ASKED_FOR_FIRST, "what is asked for first is used, and nowhere else"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\ntorch.accelerator.device_index(0)", set()),
        ("import torch\ntorch.accelerator.is_idle()", {"torch.accelerator.is_idle"}),
        ("import torch\ntorch.Tensor.no_such_method(x)", {"torch.Tensor.no_such_method"}),
        ("import torch as t\nt.no_such_thing.at_all", {"torch.no_such_thing", "torch.no_such_thing.at_all"}),
        (
            "from torch import Tensor, nn\nnn.Linear, Tensor.add_, nn.functional.no_such_loss",
            {"torch.nn.functional.no_such_loss"},
        ),
        ("from torch.optim import NoSuchOptimizer", {"torch.optim.NoSuchOptimizer"}),
        ("import torch.distributed as dist\ndist.ReduceOp.AVG", set()),
        ("torch = 1\ntorch.no_such_thing", set()),
    ],
)
def test_what_a_file_uses(text, expected, tmp_path):
    path = tmp_path / "file.py"
    path.write_text(text)
    names = known()
    assert {name for name in used(path) if lacking(name, names)} == expected
