"""The Triton kernel of diagonal_flow, as in test_triton.py: compiled for several GPUs, and run against the reference."""

import numpy as np
import pytest

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from bench.gpu.gpu_triton_code import TARGETS, compiled_flow  # noqa: E402
from pysteep import flow  # noqa: E402
from tests.support.triton_cases import DEVICE, compiles, local_memory, runs  # noqa: E402


@compiles
@pytest.mark.parametrize("loss", ["mse", "exponential"])
@pytest.mark.parametrize(("q", "adam"), [(1, False), (1.7, False), (1, True)])
@pytest.mark.parametrize(("arch", "storage"), [(80, tl.float32), (90, tl.float32), (90, tl.float64)], ids=str)
def test_compiles_for_nvidia(arch, storage, q, adam, loss, tmp_path):
    """The paper's size; no more than a few addresses are put aside in memory."""
    asm = compiled_flow(80, 100, TARGETS[arch], storage=storage, q=q, adam=adam, loss=loss)
    memory = local_memory(asm, tmp_path)
    assert memory["LOCAL"] == 0
    assert memory["STACK"] <= 64


@runs
@pytest.mark.parametrize("batch_size", [None, 3])
@pytest.mark.parametrize("optimizer", ["steepest", "adam"])
def test_runs_like_the_reference(optimizer, batch_size):
    problem = flow.regression(6, 9, 2, seed=range(2))
    options = {"q": [[1.0], [1.7]], "depth": [[[1]], [[2]], [[5]]], "lr": 0.01, "steps": 4, "weight_decay": 0.2, "scale": 0.6}
    options |= {"coupled_weight_decay": 0.1, "optimizer": optimizer, "batch_size": batch_size, "progress": False}
    result = flow.simulate(problem, device=DEVICE, backend="triton", **options)
    expected = flow.simulate(problem, backend="reference", **options)
    np.testing.assert_allclose(result.first, expected.first, rtol=1e-11, atol=1e-14)
    np.testing.assert_allclose(result.rest, expected.rest, rtol=1e-11, atol=1e-14)
