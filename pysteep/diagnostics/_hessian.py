"""Hessian-vector products of a model's loss over batches, exact, of a model that is left as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import Parameter
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .._selection import Match
from ..factorize import _factorized
from ..functional import factor_product
from ..optim import SteepestDescent

LOSS_RTOL = 1e-3
"""How far two passes over the same data may lie apart: some GPU sums differ from call to call, other data differ by more."""

Array = np.ndarray[Any, np.dtype[Any]]


class Variables(NamedTuple):
    """What the loss is differentiated by: copies of parameters, or the factors of which a parameter is the product.

    Args:
        names: of the tensors.
        tensors: leaves of autograd.
        of: for each parameter, the tensors that it is made of: itself, or its factors.
    """

    names: list[str]
    tensors: list[Tensor]
    of: dict[str, list[Tensor]]


def variables_of(model: nn.Module, params: Match, space: str, optimizer: SteepestDescent | None) -> Variables:
    """The chosen parameters of `model` as variables. Arguments and errors: `hessian_spectrum`."""
    chosen, factorized = _chosen(model, params)
    variables = Variables([], [], {})
    for name, parameter in chosen:
        parts = [parameter.detach()] if optimizer is None else _factors(optimizer, name, parameter)
        variables.of[name] = [part.clone().requires_grad_() for part in parts]
        variables.tensors.extend(variables.of[name])
        variables.names.extend([name] if len(parts) == 1 else [f"{name}.factor_{i}" for i in range(1, len(parts) + 1)])
    if space == "factors" and not factorized and len(variables.tensors) == len(chosen):
        raise ValueError(
            "space must be 'weights' for parameters without factors: call pysteep.factorize, or pass a SteepestDescent of "
            "depth > 1 as optimizer"
        )
    return variables


def _chosen(model: nn.Module, params: Match) -> tuple[list[tuple[str, Parameter]], bool]:
    """The chosen parameters, each once, and whether factors of `factorize` are among them."""
    called: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        called.setdefault(id(parameter), []).append(name)
    factors = set()
    for weight in _factorized(model):
        for factor in weight.factors:
            called[id(factor)] = [place.name for place in weight.places]
            factors.add(id(factor))
    chosen = [(name, p) for name, p in model.named_parameters() if _is_meant(params, called[id(p)], p)]
    if not any(parameter.numel() for _, parameter in chosen if not is_lazy(parameter)):
        meant = "those that require a gradient" if params is None else repr(params)
        raise ValueError(f"params must choose a parameter; {meant}: the model has none")
    for name, parameter in chosen:
        _check(name, parameter)
    return chosen, any(id(parameter) in factors for _, parameter in chosen)


def _is_meant(params: Match, names: Sequence[str], parameter: Parameter) -> bool:
    if params is None:
        return parameter.requires_grad
    if isinstance(params, str):
        return any(fnmatchcase(name, params) for name in names)
    return any(params(name, parameter) for name in names)


def _check(name: str, parameter: Parameter) -> None:
    if is_lazy(parameter):
        raise ValueError(f"{name} must have a shape; it is uninitialised: call the model once before")
    if parameter.layout != torch.strided or is_traceable_wrapper_subclass(parameter):
        kind = parameter.layout if parameter.layout != torch.strided else type(parameter).__name__
        raise TypeError(f"{name} must be dense and hold its own memory; got a {kind}")
    if parameter.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64; got {parameter.dtype}: call model.float() before")


def _factors(optimizer: SteepestDescent, name: str, parameter: Parameter) -> list[Tensor]:
    try:
        return optimizer.factors(parameter)
    except ValueError as error:
        if any(parameter is held for group in optimizer.param_groups for held in group["params"]):
            raise
        raise ValueError(f"optimizer must hold all that params chooses; it does not hold {name}") from error


class Hessian:
    """The Hessian of a loss, of which only products with vectors are made.

    Args: as of `hessian_spectrum`; `seed` is that of dropout.

    Raises:
        ValueError, TypeError: `data` or what `loss_fn` gives is not as asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        data: Any,
        variables: Variables,
        reduction: str,
        seed: int,
    ) -> None:
        if isinstance(data, Iterator):
            raise TypeError(
                f"data must give its batches again for each product: a DataLoader or a list; got {type(data).__name__}"
            )
        if not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise TypeError(f"data must be a DataLoader, a list of batches or one batch; got {type(data).__name__}")
        self._data = [data] if _is_batch(data) else data
        self._evaluation = _Evaluation(model, loss_fn)
        self._variables, self._reduction, self._seed = variables, reduction, seed
        frozen = {name: p.detach() for name, p in model.named_parameters() if name not in variables.of}
        self._fixed_tensors = {f"model.{name}": tensor for name, tensor in frozen.items()}
        self._buffers = {f"model.{name}": buffer for name, buffer in model.named_buffers()}
        self._device = variables.tensors[0].device
        self._gpus = sorted({t.device.index for t in variables.tensors if t.device.type == "cuda"})
        self._sizes = [t.numel() for t in variables.tensors]
        self.dimension = sum(self._sizes)
        self.dtype = np.result_type(*(torch.empty(0, dtype=t.dtype, device="cpu").numpy().dtype for t in variables.tensors))
        self.loss = self._pass(None)[0]

    def product(self, vector: Array) -> Array:
        """H v, of `dtype`, for v in float64, both of `dimension` numbers."""
        pieces = torch.from_numpy(vector).split(self._sizes)
        directions = [p.reshape(t.shape).to(t.device, t.dtype) for p, t in zip(pieces, self._variables.tensors, strict=True)]
        loss, result = self._pass(directions)
        if not math.isclose(loss, self.loss, rel_tol=LOSS_RTOL):
            raise ValueError(
                f"data, model and loss_fn must give the same loss in each pass; got {self.loss:.9g}, then {loss:.9g}"
            )
        finite = [bool(piece.isfinite().all()) for piece in result.split(self._sizes)]
        if not all(finite):
            names = ", ".join(name for name, good in zip(self._variables.names, finite, strict=True) if not good)
            raise ValueError(f"loss_fn must be twice differentiable; its second derivatives are not finite in {names}")
        return result.numpy().astype(self.dtype)

    def _pass(self, directions: list[Tensor] | None) -> tuple[float, Tensor]:
        """The loss over all batches, and H times `directions` if there are any."""
        total, loss, weights = torch.zeros(self.dimension, dtype=torch.float64, device="cpu"), 0.0, 0.0
        with self._same_random_numbers(), sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            for i, batch in enumerate(self._data):
                moved = _to(_checked(batch, i), self._device)
                weight = float(_samples(moved)) if self._reduction == "mean" else 1.0
                of_batch, products = functional_call(
                    self._evaluation, self._tensors(), (moved, i, self._variables.tensors, directions)
                )
                loss, weights = loss + weight * of_batch, weights + weight
                for piece, product in zip(total.split(self._sizes), products, strict=False):
                    piece.add_(product.reshape(-1).cpu().double(), alpha=weight)
        if weights == 0:
            raise ValueError("data must hold a batch; it holds none")
        scale = weights if self._reduction == "mean" else 1.0
        return loss / scale, total / scale

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of the model, of which a call may write to the buffers."""
        made = {
            f"model.{name}": parts[0] if len(parts) == 1 else factor_product(parts)
            for name, parts in self._variables.of.items()
        }
        return {**self._fixed_tensors, **made, **{name: buffer.clone() for name, buffer in self._buffers.items()}}

    @contextmanager
    def _same_random_numbers(self) -> Iterator[None]:
        """All passes draw the same dropout masks, so that there is one Hessian; the caller's generators stay as they are."""
        with torch.random.fork_rng(self._gpus, device_type="cuda"):
            torch.default_generator.manual_seed(self._seed)
            for index in self._gpus:
                torch.cuda.default_generators[index].manual_seed(self._seed)
            yield


class _Evaluation(nn.Module):
    """Derivatives are taken inside the call: `loss_fn` may look at the model, and checkpointed layers run again in backward."""

    def __init__(self, model: nn.Module, loss_fn: Callable[[Any, Any], Tensor]) -> None:
        super().__init__()
        self.model, self.loss_fn = model, loss_fn

    def forward(
        self, batch: Any, index: int, variables: list[Tensor], directions: list[Tensor] | None
    ) -> tuple[float, Sequence[Tensor]]:
        if isinstance(batch, Mapping):
            loss = self.loss_fn(self.model(**batch), batch)
        else:
            loss = self.loss_fn(self.model(batch[0]), batch[1])
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"loss_fn must return a tensor of one number; got {got}")
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(f"loss_fn must give finite losses; got {value} for batch {index}")
        if directions is None:
            return value, ()
        if not loss.requires_grad:
            raise ValueError("loss_fn must depend on the parameters; what it returned requires no gradient")
        gradients = torch.autograd.grad(loss.reshape(()), variables, create_graph=True, materialize_grads=True)
        curved = [(g, d) for g, d in zip(gradients, directions, strict=True) if g.requires_grad]
        if not curved:
            return value, ()
        return value, torch.autograd.grad([g for g, _ in curved], variables, [d for _, d in curved], materialize_grads=True)


def _is_batch(data: Any) -> bool:
    """Whether `data` is one batch, not several."""
    return isinstance(data, Mapping) or (isinstance(data, list | tuple) and len(data) == 2 and isinstance(data[1], Tensor))


def _checked(batch: Any, index: int) -> Any:
    if isinstance(batch, Mapping) or (isinstance(batch, list | tuple) and len(batch) == 2):
        return batch
    raise TypeError(f"data must give pairs (inputs, targets) or mappings; batch {index} is a {type(batch).__name__}")


def _samples(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of its targets, or of a mapping's first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else (batch[1], batch[0])
    return next((value.shape[0] for value in values if isinstance(value, Tensor) and value.ndim), 1)


def _to(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _to(item, device) for key, item in value.items()}
    if isinstance(value, list | tuple):
        moved = [_to(item, device) for item in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    return value
