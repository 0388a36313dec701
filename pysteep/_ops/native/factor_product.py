"""factor_product by the extension: "cpp" for CPU tensors, "cuda" for those on NVIDIA GPUs. Formula: kernels/reference."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ... import _csrc
from .tensors import CODES, current, stream


def factor_product(factors: Sequence[Tensor], result: Tensor) -> None:
    """As kernels/reference/factor_product.py."""
    _run("factor_product", factors, result=result)


def factor_product_backward(gradient: Tensor, factors: Sequence[Tensor], results: Sequence[Tensor]) -> None:
    """As kernels/reference/factor_product.py."""
    _run("factor_product_backward", factors, gradient=gradient, results=results)


def factor_product_double_backward(
    gradient: Tensor, factors: Sequence[Tensor], tangents: Sequence[Tensor], result: Tensor, results: Sequence[Tensor]
) -> None:
    """As kernels/reference/factor_product.py."""
    _run("factor_product_double_backward", factors, tangents, gradient, result, results)


def _run(
    op: str,
    factors: Sequence[Tensor],
    tangents: Sequence[Tensor] = (),
    gradient: Tensor | None = None,
    result: Tensor | None = None,
    results: Sequence[Tensor] = (),
) -> None:
    first = factors[0]
    product = _csrc.Product(
        first.numel(),
        CODES[first.dtype],
        [factor.data_ptr() for factor in factors],
        [tangent.data_ptr() for tangent in tangents],
        0 if gradient is None else gradient.data_ptr(),
        0 if result is None else result.data_ptr(),
        [gradient.data_ptr() for gradient in results],
    )
    if first.is_cuda:
        with current(first.device.index):
            getattr(_csrc, op + "_cuda")(product, first.device.index, stream(first.device.index))
    else:
        getattr(_csrc, op + "_cpu")(product)
