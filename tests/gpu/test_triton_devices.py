"""On which GPU the Triton home launches: that of the tensors, whichever is the current one. Seen without a GPU."""

from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from pysteep import kernels  # noqa: E402
from pysteep.kernels.triton import (  # noqa: E402
    diagonal_flow,
    factor_product,
    factor_step,
    mirror_step,
    sign_vote,
    steepest_step,
    tensor_table,
)
from tests.support.pretend_gpu import NewTensors, OnGpu  # noqa: E402

SECOND = torch.device("cuda", 1)
RATE = {"lr": 0.1, "q": 1.5, "weight_decay": 0.0, "maximize": False, "grad_scale": 1.0, "found_inf": 0.0}
DIRECTION = {"betas": (0.0, 0.0), "coupled_weight_decay": 0.0}
OF_SUM = {"q": 1.5, "maximize": False, "grad_scale": 1.0, **DIRECTION}
DATA = {"batch_size": 0, "loss": "mse", "reduction": "mean", "betas": (0.0, 0.0), "epsilon": 1e-8, "begin": 0, "end": 1}
OF_RUNS = ("problem", "depth", "seed", "lr", "weight_decay", "coupled_weight_decay")


def there(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return OnGpu(torch.zeros(shape, dtype=dtype), SECOND)


def run_flow() -> None:
    numbers = {name: there(1) for name in OF_RUNS}
    with NewTensors():
        diagonal_flow.diagonal_flow(
            there(1, 4), there(1, 4), None, there(1, 3, 4), there(1, 3), **numbers, q=torch.ones(1), **DATA
        )


WORDS = {"dtype": torch.uint8}
HOME = (diagonal_flow, factor_product, factor_step, mirror_step, sign_vote, steepest_step)
MODULES = {module.__name__.rpartition(".")[2]: module for module in HOME}
CALLS = {
    "steepest_step": [
        lambda: steepest_step.steepest_step([there(9)], [there(9)], None, step_scale=1.0, **RATE, **DIRECTION),
        lambda: steepest_step.steepest_power_sum([there(9)], [there(9)], None, **OF_SUM),
    ],
    "factor_step": [
        lambda: factor_step.factor_step([there(9)], [there(9)], [[there(9)]] * 2, None, depth=3, **RATE, **DIRECTION),
    ],
    "mirror_step": [
        lambda: mirror_step.mirror_step([there(9)], [there(9)], [there(1, dtype=torch.float64)], depth=3, **RATE),
    ],
    "factor_product": [
        lambda: factor_product.factor_product([there(9), there(9)], there(9)),
        lambda: factor_product.factor_product_backward(there(9), [there(9)] * 2, [there(9)] * 2),
        lambda: factor_product.factor_product_double_backward(there(9), [there(9)], [there(9)], there(9), [there(9)]),
    ],
    "sign_vote": [
        lambda: sign_vote.pack_signs(there(1, 9), there(1, 2, **WORDS), 0),
        lambda: sign_vote.count_votes(there(3, 2, **WORDS), there(9)),
    ],
    "diagonal_flow": [run_flow],
}


def test_every_op_that_launches_is_here():
    folder = Path(kernels.__file__).parent / "triton"
    launching = {path.stem for path in folder.glob("*.py") if "_kernel[" in path.read_text()}
    assert launching == set(CALLS)


@pytest.mark.parametrize(("op", "number"), [(op, i) for op, calls in CALLS.items() for i in range(len(calls))])
def test_launches_are_on_the_gpu_of_the_tensors(op, number, monkeypatch):
    module, call = MODULES[op], CALLS[op][number]
    current, launched = [0], []

    @contextmanager
    def device_index(index):
        current.append(index)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(current[-1])

    monkeypatch.setattr(torch.accelerator, "device_index", device_index)
    for name in [name for name in vars(module) if name.endswith("_kernel")]:
        monkeypatch.setattr(module, name, Kernel())
    if hasattr(module, "tables"):
        table = tensor_table.Table(torch.zeros(1, dtype=torch.int64), 1, 1, True)
        monkeypatch.setattr(module, "tables", lambda *_, **__: [table])
    call()
    assert launched == [SECOND.index]
    assert current == [0]
