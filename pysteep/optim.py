"""SteepestDescent: the optimiser."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ._numbers import check_function
from ._ops.dispatch import BackendName, check_backend
from ._ops.layout import FLOATING
from ._ops.options import has_momentum
from ._ops.rounding import count_step
from ._state.clipping import check_norms, clipping_scale
from ._state.cut import check_uncut, watch_wrappers
from ._state.depth import Depth, Init, Storage, keep_memory
from ._state.depth_checks import check_depth_param
from ._state.fitting import fitting
from ._state.groups import INTEGERS, check_group, checked_values, named
from ._state.loading import check_is_state_dict, converted_state_dict, keep_dtypes, with_entries
from ._state.memory import Memory
from ._state.plan import prepare_step
from ._state.rounding import COUNT, begin_count, check_rounded_param, places_of
from ._state.sharding import check_placements, is_sharded, whole
from ._state.traced_step import allow_tracing, traced_step
from .kernels.rounding import Mode

__all__ = ["SteepestDescent"]


class SteepestDescent(Optimizer):
    r"""Steepest descent in L_p, 1/p + 1/q = 1, with coupled and decoupled weight decay.

    .. math::
        w \leftarrow w - \text{lr} \, (\mathrm{sign}(g) |g|^{q-1} + \text{weight\_decay} \cdot w)

    q = 1 is sign descent, the skeleton of Adam (Adam with beta1 = beta2 = eps = 0); q = 2 is gradient descent. With momentum,
    `betas=(0.9, 0.99)` at q = 1 is Lion and beta1 = beta2 is Signum. One pass over memory a step; no state while betas are 0.
    How the numbers relate: a learning rate that suits Adam suits q = 1, and grows with q as gradients are smaller than 1.

    **Depth.** With `depth` L > 1 each parameter x is trained as the elementwise product of L factors, x = w_1 * ... * w_L, each
    of which follows the rule above; the model keeps the dense x and the factors are state of the optimiser:

    .. math::
        w_i \leftarrow w_i - \text{lr} \, \big(u(g \textstyle\prod_{j \ne i} w_j) + \text{weight\_decay} \cdot w_i\big),
        \quad u(c) = \mathrm{sign}(c)|c|^{q-1}, \qquad x \leftarrow w_1 \odot \dots \odot w_L

    where g is x's gradient. So gradient clipping acts on g, not on the gradients of the factors.

    Args:
        params: parameters or parameter groups (`pysteep.param_groups` makes them of a model); each group may set its own value
            of every option but `backend`.
        lr: learning rate, the length of a coordinate's step at q = 1; a float, or a tensor of one element, which a compiled
            step reads at each call and a captured CUDA graph, if it is on the GPU, at each replay.
        q: from 1 to 2.
        betas: (beta1, beta2) in [0, 1): the step follows beta1 m + (1 - beta1) g, then m <- beta2 m + (1 - beta2) g. At depth >
            1 each factor that is stored has an m of its own. Each may be a tensor of one element, read as lr is; then there is
            an m, whatever it holds.
        weight_decay: decoupled decay, multiplied by lr (as in AdamW).
        coupled_weight_decay: added to the gradient, times the parameter (as in torch.optim.Adam), before its power is taken.
        normalize: multiply the step by :math:`\|c\|_q^{2-q}` over the group. At depth 1 only.
        maximize: ascend.
        depth: L, from 1 (no factors) to 64.
        storage: what is kept of the factors. "full": all L. "tied": w_1 and the w_2 = ... = w_L that equal gradients keep
            equal: two buffers at any depth, and the step of depth 10 costs that of depth 2. "implicit": nothing but one number
            a parameter, the balance lambda = |w_2|^q - |w_1|^q, from which each step rebuilds the factors: the flow of the
            factors to first order in lr, at the memory of plain SGD; without momentum and coupled decay.
        init: the factors of a parameter when they are made. "identity": w_1 = x, the others 1. "balanced": |w_i| = |x|^(1/L),
            the sign on w_1; an exact 0 then never moves. "lambda": |w_j|^q - |w_1|^q = scale^q, so the others are `scale` where
            x = 0. "saddle": x is set to 0 when the optimiser is built, w_1 = 0 and the others `scale`: in a net of several such
            layers no gradient is left, there start from a small random x and "lambda". All but "saddle" leave x as it is.
            "implicit" takes "balanced", "lambda" and "saddle".
        scale: > 0, for "lambda" and "saddle" only.
        rounding: of parameters and factors of 16 bits, where an update of less than half a unit in the last place can be lost:
            with "nearest" it is. "stochastic": up or down, with chances that leave the expected value as it is; the random
            numbers follow from `seed`, the group's count of steps (part of `state_dict`), and from the places of the parameter
            in the optimiser and of the element in it, on any backend and however it is sharded. "compensated": the 16 bits
            that follow are state, two bytes an element; a bfloat16 parameter then has, with them, the bits of a float32 one.
            Momenta are rounded to the nearest; so is the product x of factors, for it is these that accumulate.
        seed: of "stochastic", from 0 to 2^64 - 1.
        state_dtype: of momenta and factors of parameters of 16 bits: torch.float32, or None, the parameter's.
        backend: a name of `pysteep.backends()` to serve all groups; None chooses for each device. It is not part of
            `state_dict`, which so moves between machines.

    A parameter that was written to from outside (loaded, pruned, averaged) is noticed at the next step by its version counter:
    in the coordinates that changed, factors are made anew by `init` ("saddle" as "lambda") and their momenta start at 0. Writes
    through `param.data` do not count. On a CPU a step that is not compiled finds those to most elements by samples, and warns
    once; call `refactor_` after those to few or on a GPU, and after those of a compiled function beside its own step, or where
    a CUDA graph is replayed, which notices none. A checkpoint of the model alone holds x but not the factors.

    A frozen parameter, one with `requires_grad=False`, is never written, not by "saddle" either, whatever its `.grad` holds.
    Once it requires a gradient again it is stepped like any other; its factors are made of what it is ("saddle" as "lambda").

    Parameters may be DTensors (FSDP2, tensor parallelism), placed by Shard or Replicate: a step works on the local parts, and
    momenta and factors are DTensors of the parameter's placements. Only `normalize` then asks the other ranks, for one sum.

    Raises:
        ValueError, TypeError: an option is out of its range or not possible with the others, or a parameter or gradient is of
            integer dtype, sparse, without memory of its own, or at depth > 1 complex or, with stored factors, in memory that
            processes share (Hogwild). Nothing has been written then.
        RuntimeError: `backend` cannot serve here.

    Source: Eq. 3, Eq. 5, Algorithm 2, Section 4 and Appendices A and J of "Never Saddle for Reparameterized Steepest Descent as
    Mirror Flow" (ICLR 2026). Formulas with all options: `pysteep.functional`.
    """

    # GradScaler then sets .grad_scale and .found_inf for the kernels to read, instead of unscaling in a pass of its own.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]],
        lr: float | Tensor = 1e-3,
        q: float = 1.0,
        *,
        betas: tuple[float | Tensor, float | Tensor] = (0.0, 0.0),
        weight_decay: float = 0.0,
        coupled_weight_decay: float = 0.0,
        normalize: bool = False,
        maximize: bool = False,
        depth: int = 1,
        storage: Storage = "tied",
        init: Init = "identity",
        scale: float | None = None,
        rounding: Mode = "nearest",
        seed: int = 0,
        state_dtype: torch.dtype | None = None,
        backend: BackendName | None = None,
    ) -> None:
        check_backend(backend)
        self.backend = backend
        self._prepare_tracing()
        defaults = {
            "lr": lr,
            "q": q,
            "betas": betas,
            "weight_decay": weight_decay,
            "coupled_weight_decay": coupled_weight_decay,
            "normalize": normalize,
            "maximize": maximize,
            "depth": depth,
            "storage": storage,
            "init": init,
            "scale": scale,
            "rounding": rounding,
            "seed": seed,
            "state_dtype": state_dtype,
        }
        self._built = False
        super().__init__(params, defaults)
        self._built = True
        self._enter_saddles(self.param_groups)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters; options that it does not set are the optimiser's. Raises as the class does."""
        options = {**self.defaults, **param_group}
        check_group(options)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group |= {name: options[name] for name in INTEGERS}
        try:
            for name, param in named(group):
                if param.dtype not in FLOATING and not param.is_complex():
                    raise TypeError(f"{name} must be float16, bfloat16, float32, float64 or complex; got {param.dtype}")
                check_placements(name, param)
                check_depth_param(name, param, group)
                check_rounded_param(name, param, group)
            check_uncut(group)
        except (TypeError, ValueError):
            del self.param_groups[-1]
            raise
        begin_count(group)
        self._memory.checked.clear()  # a group that is gone may have had the id of this one
        if self._built:
            self._enter_saddles([group])

    @torch.no_grad()
    def _enter_saddles(self, groups: list[dict[str, Any]]) -> None:
        """x = 0 where `init` asks for it; only once every group was found right."""
        for group in groups:
            if group["depth"] > 1 and group["init"] == "saddle":
                for param in group["params"]:
                    if param.requires_grad:
                        param.zero_()

    def step(
        self,
        closure: Callable[[], Any] | None = None,
        *,
        total_norm: float | Tensor | None = None,
        max_norm: float | None = None,
    ) -> Any:
        """Update every parameter that has a gradient and requires one; `.grad` is not written.

        Args:
            closure: evaluates the loss, with gradients, first.
            total_norm: the norm of all gradients as they are in `.grad`, as of torch.nn.utils.get_total_norm: with it and
                `max_norm` they are clipped as by clip_grad_norm_, but in the pass of the step. A tensor stays on its device.
            max_norm: > 0, of the gradients after any GradScaler's scale is divided out.

        Returns:
            What `closure` returned, or None.

        Raises:
            ValueError: `max_norm` is not > 0, or one of the two norms is given without the other.
            TypeError: `closure` is no function.
        """
        if total_norm is not None or max_norm is not None:
            check_norms(total_norm, max_norm)
        if closure is not None:
            check_function("closure", closure)
        if not torch.compiler.is_compiling():
            return self._step(closure, total_norm, max_norm)
        for group in self.param_groups:
            check_group(group)
            if any(map(is_sharded, group["params"])):
                return _untraced()(self, closure, total_norm, max_norm)
        loss = self._loss(closure) if closure is not None else None
        with torch.no_grad():
            scaling = self._scaling(total_norm, max_norm)
        traced_step(self._memory, self.state, self.param_groups, scaling, self.backend)
        return loss

    def _step(self, closure: Callable[[], Any] | None, total_norm: float | Tensor | None, max_norm: float | None) -> Any:
        loss = self._loss(closure) if closure is not None else None
        self._step_groups(self.param_groups, total_norm, max_norm)
        for group in self.param_groups:
            if COUNT in group:
                count_step(group[COUNT], group["lr"])
        return loss

    def _loss(self, closure: Callable[[], Any]) -> Any:
        with torch.enable_grad():
            return closure()

    def _scaling(self, total_norm: float | Tensor | None, max_norm: float | None) -> dict[str, Tensor | None]:
        """What the kernels divide gradients by, by the name of their argument, and what has them write nothing."""
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None or found_inf is not None:
            grad_scale, found_inf = whole(grad_scale), whole(found_inf)
        if total_norm is not None and max_norm is not None:
            grad_scale = clipping_scale(whole(total_norm), max_norm, grad_scale)
        return {"grad_scale": grad_scale, "found_inf": found_inf}

    def _step_groups(
        self,
        groups: list[dict[str, Any]],
        total_norm: float | Tensor | None = None,
        max_norm: float | None = None,
        places: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """`places`: those in the optimizer of the parameters of each group, if these are not all groups."""
        self._memory.steps += 1
        scaling = self._scaling(total_norm, max_norm)
        for group in groups:
            if check_group(group, self._memory.checked.get(id(group))):
                if group["depth"] > 1 or group["state_dtype"] is not None:
                    for name, param in named(group):
                        check_depth_param(name, param, group)
                        check_rounded_param(name, param, group)
                if places is None:  # a group of this optimizer's, not one made for a single step
                    self._memory.checked[id(group)] = checked_values(group)
            if group["normalize"]:  # may have been set after the group was added, as rounding
                check_uncut(group)
            if group["rounding"] == "stochastic" and COUNT not in group:
                check_uncut(group)
                for name, param in named(group):
                    check_rounded_param(name, param, group)
                begin_count(group)
        prepared = [
            prepare_step(self._memory, self.state, group, scaling, own, self.backend)
            for group, own in zip(groups, places or places_of(groups), strict=True)
        ]
        for step in prepared:
            step()

    def factors(self, param: Tensor) -> list[Tensor]:
        """The factors w_1, ..., w_L of which `param` is the product, each of its shape and dtype; [param] at depth 1.

        They are the optimiser's state, but for storage "implicit", where they are made on the spot; w_2, ..., w_L are one
        tensor unless storage is "full". Made now if they were not needed before, or if `param` was written to.

        Raises:
            ValueError: `param` is not a parameter of this optimiser.
        """
        for group in self.param_groups:
            if any(param is other for other in group["params"]):
                if group["depth"] == 1:
                    return [param.detach()]
                check_group(group)
                depth = Depth.of(group)
                return depth.factors(param, fitting(self._memory, self.state, group, param, depth))
        raise ValueError(
            f"param must be a parameter of this optimiser; got a tensor of shape {tuple(param.shape)} that is none"
        )

    @torch.no_grad()
    def refactor_(self) -> None:
        """Make the factors of all parameters anew from what they are now, by `init` ("saddle" as "lambda"), momenta 0.

        Implicit balances return to that of `init`. Parameters keep their values, and the state its memory, so that a CUDA graph
        that was captured goes on with it.
        """
        for group in self.param_groups:
            if group["depth"] == 1:
                continue
            check_group(group)
            depth = Depth.of(group)
            for param in group["params"]:
                if not param.requires_grad and param not in self.state:
                    continue
                state = self.state[param]
                old = dict(state)
                state.pop("balance", None)
                depth.create(param, state, momentum=has_momentum(group["betas"]))
                keep_memory(old, state)
                self._memory.note(param, depth)

    def state_dict(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict`, with an entry for every parameter that requires a gradient.

        `torch.distributed.checkpoint` asks for that. Where a parameter has no state, or none but numbers, the entry holds one
        zero under "placeholder", which `load_state_dict` leaves out.
        """
        return with_entries(super().state_dict(), self.param_groups)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.load_state_dict`, but no tensor of the state is narrowed to its parameter's dtype.

        Momenta and factors that were saved in a narrower dtype than this optimizer's own, which is the parameter's or
        `state_dtype`, are widened to it; a factor's compensation is then added to it. All others keep the dtype that they were
        saved with. The compensation of a parameter that is not of 16 bits any more is refused.

        Options that a saved group lacks, and `depth`, `storage`, `init` and `scale`, stay those of this optimizer. Factors that
        were saved under another storage are converted where that is exact: "tied" to "full" always, "full" to "tied" where
        factors 2 to L are equal, "implicit" to both (factors of the saved balance are made of x when next needed). What is not
        pysteep's own in the state, such as a wrapper's entries, is kept as it is, and so is a NaN in a factor.

        Raises:
            ValueError, TypeError: the state dict is of another optimizer; an option is out of its range; depths or shapes
                differ; the conversion is not exact; groups do not match. Nothing has been loaded then.
        """
        if not self._optimizer_load_state_dict_pre_hooks:  # which may make one of anything
            check_is_state_dict(state_dict)
        seen: dict[str, Any] = state_dict

        def see(_: Optimizer, hooked: dict[str, Any]) -> dict[str, Any]:
            nonlocal seen
            seen = converted_state_dict(hooked, self.param_groups)  # what the hooks registered before this one have made of it
            return seen

        handle = self.register_load_state_dict_pre_hook(see)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()
        self._memory.snapshots.clear()
        keep_dtypes(self, seen)

    def _prepare_tracing(self) -> None:
        watch_wrappers(SteepestDescent)
        self._memory = Memory(self)
        allow_tracing()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._built = True
        for group in self.param_groups:
            begin_count(group)
        self._prepare_tracing()


@functools.cache
def _untraced() -> Callable[..., Any]:
    """SteepestDescent._step, run as it is by torch.compile. Not a decorator: it would import the compiler with pysteep."""
    reason = "a step of DTensors cannot be traced: it looks at their local parts"
    untraced: Callable[..., Any] = torch.compiler.disable(SteepestDescent._step, reason=reason)
    return untraced
