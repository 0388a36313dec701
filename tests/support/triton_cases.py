"""What the tests of Triton's kernels share: which of them compile or run here, tensors, and comparisons to the bit."""

import pytest
import torch
import triton

from bench.gpu.gpu_triton_code import machine_code_of
from pysteep.kernels.triton import tensor_table

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

compiles = pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")

CHUNK = tensor_table.CHUNK
OPTIONS = {
    "lr": 0.1,
    "q": 1.5,
    "betas": (0.9, 0.99),
    "weight_decay": 0.01,
    "coupled_weight_decay": 0.003,
    "maximize": False,
    "step_scale": 0.7,
    "grad_scale": 3.0,
    "found_inf": 0.0,
}


def runs(test):
    """A test that runs kernels: in the interpreter, or on a GPU."""
    test = pytest.mark.filterwarnings("ignore::RuntimeWarning")(test)
    return pytest.mark.skipif(not INTERPRETED and DEVICE == "cpu", reason="needs the interpreter or a GPU")(test)


def local_memory(asm, folder):
    kernel = machine_code_of(asm, folder)
    return {"STACK": kernel.stack, "LOCAL": kernel.local}


def data(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Numbers of many magnitudes, with zeros, subnormals, infinities and NaN among them."""
    generator = torch.Generator().manual_seed(seed)
    scale = 10.0 ** torch.randint(-9, 4, (numel,), generator=generator)
    x = (torch.randn(numel, dtype=torch.float64, generator=generator) * scale).to(dtype)
    tiny = torch.finfo(dtype).tiny
    special = torch.tensor([0.0, -0.0, tiny / 4, -tiny / 8, torch.inf, -torch.inf, torch.nan, tiny, 1.0, -1.0]).to(dtype)
    places = torch.randperm(numel, generator=generator)[: min(numel // 2, 40)]
    x[places] = special[torch.randint(len(special), (len(places),), generator=generator)]
    return x


def tensors(dtype: torch.dtype, sizes: list[int], seed: int, skip: int = 0) -> list[torch.Tensor]:
    """The last one starts `skip` elements into its storage, and all are surrounded by elements that are not theirs."""
    result = []
    for i, numel in enumerate(sizes):
        start = 16 + (skip if i == len(sizes) - 1 else 0)
        storage = torch.full((start + numel + 16,), 77.0, dtype=dtype, device=DEVICE)
        view = storage[start : start + numel]
        result.append(view.copy_(data(numel, dtype, seed + i)))
    return result


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    actual = actual.cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[actual.element_size()]
    assert torch.equal(actual.isnan(), expected.isnan())
    torch.testing.assert_close(actual.nan_to_num(0).view(integer), expected.nan_to_num(0).view(integer), rtol=0, atol=0)


def assert_surroundings_kept(tensor: torch.Tensor) -> None:
    storage = torch.empty(0, dtype=tensor.dtype, device=DEVICE).set_(tensor.untyped_storage())
    start = tensor.storage_offset()
    assert (storage[:start] == 77).all()
    assert (storage[start + tensor.numel() :] == 77).all()


def copies(group):
    return None if group is None else [tensor.cpu().clone() for tensor in group]
