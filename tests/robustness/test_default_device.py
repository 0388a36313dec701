"""Other defaults of torch's, device and dtype: the package names those of each tensor that it makes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pysteep
from pysteep import SteepestDescent, backends, flow, theory
from pysteep._state.clipping import clipping_scale
from pysteep.diagnostics import balance_report, hessian_spectrum, sparsity_report
from tests.support.cases import same_bits
from tests.support.default_device import MetaByDefault
from tests.support.suites import file_of

SUITES = "averaging bad_input depth_state initial loading optim pruning sparsity theory_gradients"


@pytest.fixture
def defaults() -> Iterator[None]:
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    plain: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
    return nn.Sequential(nn.Linear(5, 7, **plain), nn.Tanh(), nn.Linear(7, 3, **plain))


def batch() -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(1)
    return tuple(torch.randn(4, n, generator=draw, device="cpu", dtype=torch.float32) for n in (5, 3))


def trained(*, total_norm: float | Tensor | None = None, **options: Any) -> list[Tensor]:
    model, (x, y) = net(), batch()
    optimizer = SteepestDescent(model.parameters(), lr=0.01, weight_decay=0.1, **options)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.mse_loss(model(x), y).backward()
        optimizer.step(total_norm=total_norm, max_norm=None if total_norm is None else 0.1)
    return [parameter.detach().clone() for parameter in model.parameters()]


def no_gradient() -> list[Tensor]:
    model = net()
    SteepestDescent(model.parameters(), normalize=True).step()
    return [parameter.detach() for parameter in model.parameters()]


def spectrum() -> list[Tensor]:
    return [torch.from_numpy(hessian_spectrum(net(), nn.functional.mse_loss, [batch()], k=3, progress=False).values)]


def sparsity() -> list[Tensor]:
    report = sparsity_report(net(), thresholds=(0.1, 0.2))
    return [torch.from_numpy(report.zeros), torch.from_numpy(report.below)]


def balance() -> list[Tensor]:
    optimizer = SteepestDescent(net().parameters(), depth=3, storage="full")
    numbers = [list(layer[2:]) for layer in balance_report(optimizer).layers]
    return [torch.tensor(numbers, dtype=torch.float64, device="cpu")]


def of_theory(function: Callable[..., Tensor]) -> list[Tensor]:
    x = torch.tensor([-0.3, 0.0, 0.7], dtype=torch.float64, device="cpu", requires_grad=True)
    found = [function(x)]
    for _ in range(2):
        found += torch.autograd.grad(found[-1].sum(), x, create_graph=True)
    return [tensor.detach() for tensor in found]


def of_flow(**options: Any) -> list[Tensor]:
    result = flow.simulate(flow.regression(3, 4, 1), lr=0.01, steps=5, record=1, progress=False, **options)
    return [torch.from_numpy(result.trajectory)]


THEORY: dict[str, Callable[..., Tensor]] = {
    "metric": partial(theory.inverse_metric, q=1.5, depth=3, lam=0.1),
    "mirror map": partial(theory.mirror_map, q=1.5, depth=3, lam=0.1),
    "inverse mirror map": lambda y: theory.inverse_mirror_map(y, 1.5, 3, 0.1),
    "potential": partial(theory.potential, q=1.5, depth=3, lam=0.1),
    "divergence": lambda x: theory.bregman_divergence(x, x + 1, 1.5, 3, 0.1),
    "escape time": partial(theory.escape_time, q=1.5, depth=3, lam=0.1),
    "entropy": partial(theory.hyperbolic_entropy, beta=0.3),
    "manifold regularizer": partial(theory.manifold_regularizer, q=1.5, depth=3),
    "coupled regularizer": partial(theory.coupled_regularizer, depth=3),
}
CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "plain": partial(trained, q=1.5),
    "clipped": partial(trained, q=1.5, total_norm=0.7),
    "momentum": partial(trained, betas=(0.9, 0.9)),
    "stochastic": partial(trained, rounding="stochastic"),
    "no gradient": no_gradient,
    "spectrum": spectrum,
    "sparsity": sparsity,
    "balance": balance,
    **{f"normalize, {name}": partial(trained, normalize=True, q=1.5, backend=name) for name in ("cpp", "numba", "reference")},
    **{f"depth 3, {name}": partial(trained, depth=3, storage=name) for name in ("full", "tied")},
    **{f"depth 3, {name}": partial(trained, depth=3, init=name, scale=0.3) for name in ("saddle", "lambda")},
    "depth 3, balanced": partial(trained, depth=3, init="balanced"),
    "depth 3, implicit": partial(trained, depth=3, storage="implicit", init="balanced"),
    **{f"theory: {name}": partial(of_theory, function) for name, function in THEORY.items()},
    **{f"flow, {name}": partial(of_flow, backend=name, batch_size=2) for name in ("cpp", "numba", "reference")},
    "flow: adam": partial(of_flow, optimizer="adam"),
}


@pytest.fixture
def call(request: pytest.FixtureRequest) -> Callable[[], list[Tensor]]:
    name = str(request.param).rpartition(", ")[2]
    if name in backends() and not backends()[name].available:
        pytest.skip(backends()[name].reason)
    return CALLS[request.param]


@pytest.mark.parametrize("call", CALLS, indirect=True)
@pytest.mark.usefixtures("defaults")
def test_another_default_device_changes_nothing(call):
    expected = call()
    torch.set_default_device("meta")
    found = call()
    torch.set_default_device(None)
    assert {tensor.device.type for tensor in found} == {"cpu"}
    assert all(map(same_bits, found, expected))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS, indirect=True)
@pytest.mark.usefixtures("defaults")
def test_another_default_dtype_changes_nothing(call, dtype):
    expected = call()
    torch.set_default_dtype(dtype)
    found = call()
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in expected]
    assert all(map(same_bits, found, expected))


def test_a_norm_is_read_as_the_number_that_it_is():
    as_tensor = clipping_scale(torch.tensor(0.7, dtype=torch.float64), 0.1, None)
    assert clipping_scale(0.7, 0.1, None).item() == as_tensor.item() == pytest.approx((0.7 + 1e-6) / 0.1, rel=1e-15)


def test_the_mode_of_the_suite_is_for_the_package_alone():
    ours: dict[str, Any] = {}
    with MetaByDefault():
        exec(compile("import torch; found = torch.ones(1), torch.ones(1, device='cpu')", pysteep.__file__, "exec"), ours)
        assert not torch.ones(1).is_meta
    assert [tensor.is_meta for tensor in ours["found"]] == [True, False]


@pytest.mark.slow
def test_the_suite_holds_with_another_default_device():
    """In every file of tests whose tensors the package makes in this process, outside of compiled steps."""
    root = Path(__file__).parents[2]
    files = map(file_of, SUITES.split())
    options = ["--meta-by-default", "-q", "-x", "-p", "no:cacheprovider", "-m", "not slow and not fuzz"]
    command = [sys.executable, "-m", "pytest", *options, *map(str, files)]
    finished = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", timeout=900)
    assert finished.returncode == 0, finished.stdout[-5000:]
    assert " passed" in finished.stdout
