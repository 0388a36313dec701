from typing import Any

from torch import Tensor

CUDA_PARTIAL_SUMS: int

class Tensors:
    """Many tensors a call: addresses, element counts, a dtype code for weights, gradients and momenta."""

    def __init__(
        self,
        weights: list[int],
        gradients: list[int],
        momenta: list[int],
        numel: list[int],
        dtypes: list[int],
        on_cuda: bool,
        device_index: int,
    ) -> None: ...
    @property
    def on_cpu(self) -> bool: ...
    @property
    def on_cuda(self) -> bool: ...
    @property
    def device_index(self) -> int: ...

class SteepestOptions:
    def __init__(
        self,
        q: float,
        beta1: float,
        beta2: float,
        weight_decay: float,
        coupled_weight_decay: float,
        maximize: bool,
        lr: float | tuple[int, int],
        step_scale: float | tuple[int, int],
        grad_scale: float | tuple[int, int],
        found_inf: float | tuple[int, int],
    ) -> None: ...

def flat_tensors(
    exchange_api: Any, tensor_type: type[Tensor], weights: list[Tensor], gradients: list[Tensor | None], momenta: list[Tensor]
) -> Tensors | None: ...
def steepest_step_cpu(tensors: Tensors, options: SteepestOptions) -> None: ...
def steepest_power_sum_cpu(tensors: Tensors, options: SteepestOptions) -> float: ...
def steepest_step_cuda(tensors: Tensors, options: SteepestOptions, stream: int) -> None: ...
def steepest_power_sum_cuda(tensors: Tensors, options: SteepestOptions, partial_sums: int, stream: int) -> None: ...
def steepest_step_cuda_on_host(tensors: Tensors, options: SteepestOptions) -> None: ...
def steepest_power_sum_cuda_on_host(tensors: Tensors, options: SteepestOptions) -> float: ...
def isa() -> str: ...
def isas() -> list[str]: ...
def select_isa(name: str) -> None: ...
def cuda_architectures() -> list[str]: ...
