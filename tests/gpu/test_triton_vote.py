"""The Triton kernels of sign_vote, as in test_triton.py: compiled for several GPUs, and run against the reference."""

import pytest
import torch

triton = pytest.importorskip("triton")

from bench.gpu.gpu_triton_code import TARGETS, compiled_vote  # noqa: E402
from pysteep.kernels.reference import sign_vote as reference  # noqa: E402
from pysteep.kernels.triton import sign_vote  # noqa: E402
from tests.support.cases import DTYPES  # noqa: E402
from tests.support.triton_cases import DEVICE, compiles, data, local_memory, runs  # noqa: E402


@compiles
@pytest.mark.parametrize(
    ("arch", "dtype"), [*((90, d) for d in DTYPES), *((a, torch.bfloat16) for a in (80, 100, "gfx942"))], ids=str
)
@pytest.mark.parametrize("kernel", ["pack_kernel", "count_kernel"])
def test_compiles(arch, kernel, dtype, tmp_path):
    asm = compiled_vote(kernel, dtype, TARGETS[arch])
    if "cubin" in asm:
        assert local_memory(asm, tmp_path) == {"STACK": 0, "LOCAL": 0}


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_several_programs(dtype):
    """More bytes than a program has, rows that end within one, and voters of both parities."""
    n = 8 * sign_vote.BLOCK + 77
    for rows in (1, 4, 5):
        gradient = data(rows * n, dtype, seed=rows).view(rows, n)
        expected, words = (
            torch.full((rows, -(-n // 8) + 3), 7, dtype=torch.uint8, device=device) for device in ("cpu", DEVICE)
        )
        reference.pack_signs(gradient, expected, 1)
        sign_vote.pack_signs(gradient.to(DEVICE), words, 1)
        assert torch.equal(words.cpu(), expected)
        majority, result = torch.empty(n, dtype=dtype), torch.empty(n, dtype=dtype, device=DEVICE)
        reference.count_votes(expected, majority)
        sign_vote.count_votes(words, result)
        assert torch.equal(result.cpu(), majority)
