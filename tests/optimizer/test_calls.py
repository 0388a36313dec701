"""How many calls of Python functions an eager step takes: each costs more than a dozen elements of a parameter."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pysteep import SteepestDescent, backends


@pytest.mark.skipif(not backends()["cpp"].available, reason="the extension is not built")
@pytest.mark.parametrize(("options", "most"), [({}, 40), ({"depth": 3}, 65)], ids=["depth 1", "tied depth 3"])
def test_calls_of_one_step(options, most):
    """Of three parameters. Comprehensions count where Python calls them, which it does before 3.12."""
    params = [nn.Parameter(torch.randn(8)) for _ in range(3)]
    optimizer = SteepestDescent(params, lr=1e-3, backend="cpp", **options)
    for param in params:
        param.grad = torch.randn(8)
    for _ in range(3):
        optimizer.step()
    called = []

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and frame.f_globals.get("__name__", "").startswith("pysteep."):
            called.append(f"{Path(code.co_filename).name}: {code.co_qualname}")

    sys.setprofile(note)
    try:
        optimizer.step()
    finally:
        sys.setprofile(None)
    assert 20 < len(called) <= most, called
