"""SteepestDescent: the optimiser."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._dispatch import check_backend
from ._ops import call_op
from ._steepest_step import check_options, prepare

__all__ = ["SteepestDescent"]


class SteepestDescent(Optimizer):
    r"""Steepest descent in L_p, 1/p + 1/q = 1, with coupled and decoupled weight decay.

    .. math::
        w \leftarrow w - \text{lr} \, (\mathrm{sign}(g) |g|^{q-1} + \text{weight\_decay} \cdot w)

    q = 1 is sign descent, the skeleton of Adam (Adam with beta1 = beta2 = eps = 0); q = 2 is gradient descent. With momentum,
    `betas=(0.9, 0.99)` at q = 1 is Lion and beta1 = beta2 is Signum. One pass over memory a step; no state while betas are 0.
    How the numbers relate: a learning rate that suits Adam suits q = 1, and grows with q as gradients are smaller than 1.

    Args:
        params: parameters or parameter groups; each group may set its own value of every option but `backend`.
        lr: learning rate, the length of a coordinate's step at q = 1; a float, or a tensor of one element that a captured CUDA
            graph reads at each replay.
        q: from 1 to 2.
        betas: (beta1, beta2) in [0, 1): the step follows beta1 m + (1 - beta1) g, then m <- beta2 m + (1 - beta2) g.
        weight_decay: decoupled decay, multiplied by lr (as in AdamW).
        coupled_weight_decay: added to the gradient, times the parameter (as in torch.optim.Adam), before its power is taken.
        normalize: multiply the step by :math:`\|c\|_q^{2-q}` over the group.
        maximize: ascend.
        backend: a name of `pysteep.backends()` to serve all groups; None chooses for each device. It is not part of
            `state_dict`, which so moves between machines.

    Raises:
        ValueError, TypeError: an option is out of its range, or a parameter or gradient is of integer dtype, sparse, or without
            memory of its own. Nothing has been written then.
        RuntimeError: `backend` cannot serve here.

    Source: Eq. 3, Eq. 5, Algorithm 2 and Appendix A of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow"
    (ICLR 2026). Formula with all options: `pysteep.functional.steepest_step`.
    """

    # GradScaler then sets .grad_scale and .found_inf for the kernels to read, instead of unscaling in a pass of its own.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        q: float = 1.0,
        *,
        betas: tuple[float, float] = (0.0, 0.0),
        weight_decay: float = 0.0,
        coupled_weight_decay: float = 0.0,
        normalize: bool = False,
        maximize: bool = False,
        backend: str | None = None,
    ) -> None:
        check_backend(backend)
        self.backend = backend
        defaults = {
            "lr": lr,
            "q": q,
            "betas": betas,
            "weight_decay": weight_decay,
            "coupled_weight_decay": coupled_weight_decay,
            "normalize": normalize,
            "maximize": maximize,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not set are the optimiser's. Raises as the class does."""
        options = {**self.defaults, **param_group}
        check_options(**{name: options[name] for name in _NUMERIC})
        super().add_param_group(param_group)
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if not (param.is_floating_point() or param.is_complex()):
                del self.param_groups[-1]
                raise TypeError(f"param {i} must be float16, bfloat16, float32, float64 or complex; got {param.dtype}")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; `.grad` is not written.

        Args:
            closure: evaluates the loss, with gradients, first.

        Returns:
            What `closure` returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        amp: dict[str, Any] = {"grad_scale": getattr(self, "grad_scale", None), "found_inf": getattr(self, "found_inf", None)}
        for group in self.param_groups:
            check_options(**{name: group[name] for name in _NUMERIC})
        prepared = []
        for group in self.param_groups:
            options: dict[str, Any] = {name: group[name] for name in _OPTIONS} | amp
            params, grads, momenta = self._tensors(group)
            if torch.compiler.is_compiling():
                call_op(params, grads, momenta, **options, backend=self.backend)
            else:
                prepared.append(prepare(params, grads, momenta, **options, backend=self.backend))
        for step in prepared:
            step()
        return loss

    def _tensors(self, group: dict[str, Any]) -> tuple[list[Tensor], list[Tensor | None], list[Tensor]]:
        params = group["params"]
        grads = [param.grad for param in params]
        if tuple(group["betas"]) == (0.0, 0.0):
            return params, grads, []
        used = [i for i, grad in enumerate(grads) if grad is not None]
        return [params[i] for i in used], [grads[i] for i in used], [self._momentum(params[i]) for i in used]

    def _momentum(self, param: Tensor) -> Tensor:
        state = self.state[param]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(param, memory_format=torch.preserve_format)
        momentum: Tensor = state["momentum"]
        return momentum

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but every tensor of the state keeps the dtype that it was saved with."""
        seen: dict[str, Any] = state_dict

        def see(_: Optimizer, hooked: dict[str, Any]) -> None:
            nonlocal seen
            seen = hooked  # what the hooks registered before this one have made of it

        handle = self.register_load_state_dict_pre_hook(see)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        saved = chain.from_iterable(group["params"] for group in seen["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, param in zip(saved, params, strict=True):
            for name, value in seen["state"].get(index, {}).items():
                if isinstance(value, Tensor) and value.dtype != self.state[param][name].dtype:
                    self.state[param][name] = value.to(device=param.device, copy=True)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}


_NUMERIC = ("lr", "q", "betas", "weight_decay", "coupled_weight_decay")
_OPTIONS = (*_NUMERIC, "normalize", "maximize")
