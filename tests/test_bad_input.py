"""Bad input gets an error that names the argument, the value and what is allowed, before anything is written."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pysteep
from pysteep import SteepestDescent
from tests.cases import BACKENDS

BAD_OPTIONS = [
    ({"q": 0.9}, "q must be"),
    ({"q": 2.1}, "q must be"),
    ({"q": float("nan")}, "q must be"),
    ({"q": "1"}, "q must be"),
    ({"lr": -1e-3}, "lr must be"),
    ({"lr": float("nan")}, "lr must be"),
    ({"lr": torch.tensor([1.0, 2.0])}, "lr must be"),
    ({"lr": torch.tensor(-1.0)}, "lr must be"),
    ({"betas": (0.9, 1.0)}, "betas must be"),
    ({"betas": (-0.1, 0.9)}, "betas must be"),
    ({"betas": 0.9}, "betas must be"),
    ({"betas": torch.tensor([0.9, 0.99])}, "betas must be two numbers in"),
    ({"betas": (torch.tensor(1.0), 0.9)}, r"betas must be two numbers in \[0, 1\), or .* got \(tensor\(1\.\), 0\.9\)"),
    ({"betas": (0.9, torch.tensor(-0.1))}, "betas must be"),
    ({"betas": (torch.tensor(float("nan")), 0.9)}, "betas must be"),
    ({"betas": (torch.tensor([0.9, 0.9]), 0.9)}, "betas must be"),
    ({"betas": (0.9, torch.tensor(0))}, "betas must be"),
    ({"betas": (0.9, torch.tensor(0.5j))}, "betas must be"),
    ({"weight_decay": -1.0}, "^weight_decay must be"),
    ({"coupled_weight_decay": float("inf")}, "coupled_weight_decay must be"),
    ({"backend": "fast"}, "backend must be one of cuda, triton, cpp, numba, reference"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_OPTIONS, ids=str)
def test_bad_options_are_named(bad, message):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        SteepestDescent([p], **bad)
    if "backend" in bad:
        return
    optimizer = SteepestDescent([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **bad})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones(3)
    optimizer.param_groups[0].update(bad)  # as a scheduler would
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_a_bad_group_stops_the_others_before_they_are_written():
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="gradient 0 must be dense"):
        SteepestDescent([{"params": [good]}, {"params": [bad]}]).step()
    assert good.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tensors_are_named_and_nothing_is_written(backend):
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="gradient 1 must be dense"):
        SteepestDescent([good, bad], backend=backend).step()
    assert good.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(TypeError, match=r"param 0 must be float16.*got torch.int64"):
        SteepestDescent([torch.ones(3, dtype=torch.int64)], backend=backend)
    step = pysteep.functional.steepest_step
    w = torch.ones(3)
    for grads, error, message in (
        ([torch.ones(4)], ValueError, "gradient 0 must have its param's shape"),
        ([torch.ones(3, device="meta")], ValueError, "gradient 0 must be on its param's device"),
        ([torch.ones(3, dtype=torch.complex64)], TypeError, "gradient 0 must be complex if and only if"),
        ([torch.ones(3, dtype=torch.int32)], TypeError, "gradient 0 must be float16"),
        ([1.0], TypeError, "gradient 0 must be a torch.Tensor; got 1.0"),
        ([], ValueError, "grads must hold one entry"),
    ):
        with pytest.raises(error, match=message):
            step([w], grads, lr=0.1, backend=backend)
    with FakeTensorMode(), pytest.raises(TypeError, match="param 0 must hold its own memory; got a FakeTensor"):
        step([torch.ones(3)], [torch.ones(3)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="momenta must be one tensor a param"):
        step([w], [torch.ones(3)], lr=0.1, betas=(0.9, 0.9), backend=backend)
    with pytest.raises(ValueError, match="momenta must be None or empty"):
        step([w], [torch.ones(3)], [torch.ones(3)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="must not share memory"):
        step([torch.ones(1).expand(3)], [torch.ones(3)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="must not share memory"):
        step([torch.ones(8).as_strided((3, 3), (1, 2))], [torch.ones(3, 3)], lr=0.1, backend=backend)
    assert w.tolist() == [1.0, 1.0, 1.0]
