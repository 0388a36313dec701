"""The Triton kernel of diagonal_flow, as in test_triton.py: compiled for several GPUs, and run against the reference."""

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from pysteep import flow  # noqa: E402
from pysteep.kernels.triton import diagonal_flow, signed_power  # noqa: E402
from tests.test_triton import DEVICE, TARGETS, compiles, local_memory, runs  # noqa: E402

INTEGERS = ("runs", "k", "n", "begin", "end", "batch_size")
TYPES = {"selected": "*i64", "problem_at": "*i64", "depth_at": "*i64", "seed_at": "*i64"}
TYPES |= dict.fromkeys(("q_at", "lr_at", "decay_at", "coupled_at"), "*fp64") | dict.fromkeys(INTEGERS, "i32")


@compiles
@pytest.mark.parametrize("loss", ["mse", "exponential"])
@pytest.mark.parametrize(("q", "adam"), [(1, False), (1.7, False), (1, True)])
@pytest.mark.parametrize("storage", [tl.float32, tl.float64], ids=str)
@pytest.mark.parametrize("arch", [80, 90])
def test_compiles_for_nvidia(arch, storage, q, adam, loss, tmp_path):
    """The paper's size; no more than a few addresses are put aside in memory."""
    constants = {
        "POWER": signed_power.power_of(q),
        "REAL": storage,
        "ADAM": adam,
        "EXPONENTIAL": loss == "exponential",
        **diagonal_flow.blocks(80, 100, torch.float32 if storage == tl.float32 else torch.float64),
    }
    memory = "*fp32" if storage == tl.float32 else "*fp64"
    names = diagonal_flow.flow_kernel.arg_names
    types = {name: TYPES.get(name, memory if name.endswith("_at") else "fp64") for name in names}
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(fn=diagonal_flow.flow_kernel, signature=signature, constexprs=constants)
    options = {"num_warps": diagonal_flow.WARPS, "enable_fp_fusion": False}
    asm = triton.compile(source, target=TARGETS[arch], options=options).asm
    memory = local_memory(asm["cubin"], tmp_path)
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
