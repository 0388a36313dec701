"""factorize: weights as products of factors that any optimiser trains, and the way back."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList, is_parametrized, register_parametrization
from torch.optim import Optimizer

from ._ops.factor_product import check_factors
from ._selection import HOW_TO_TAKE_THEM, Match, Place, check_model, choices, held_by_others, is_meant, trainable
from ._state.initial import PRESERVING, RANDOM, Init, check_initial, check_weight, initial_factors
from .functional import factor_product

logger = logging.getLogger("pysteep")

__all__ = ["FactorProduct", "check_optimizer", "collapse", "dense_state_dict", "factorize", "load_dense_state_dict"]


class FactorProduct(nn.Module):
    """x = w_1 * ... * w_L as a parametrization of torch, made by `factorize`; `right_inverse` gives the factors of a new x.

    Args:
        depth: L.
        init: rule of the factors, as of `factorize`. A new x gets factors that multiply to it: "saddle" makes them as "lambda",
            "dwf" and "variance" as "balanced".
        scale: s of "lambda" and "saddle".
        q: the power of the balance of "lambda".
        order: names of the parameters that the module had, in their order.
        first: the factors that `right_inverse` gives when it is called first, whatever x is.
    """

    def __init__(
        self, depth: int, init: str, scale: float | None, q: float, order: tuple[str, ...], first: list[Tensor] | None = None
    ) -> None:
        super().__init__()
        self.depth, self.init, self.scale, self.q, self.order = depth, init, scale, q, order
        self._first = first
        self.mask: Tensor | None
        self.register_buffer("mask", None)  # pysteep.diagnostics.prune_: where x is kept

    def forward(self, *factors: Tensor) -> Tensor:
        """x."""
        x = factor_product(factors)
        return x if self.mask is None else torch.where(self.mask, x, 0)

    def right_inverse(self, x: Tensor) -> list[Tensor]:
        """w_1, ..., w_L for a new x of any shape."""
        if self._first is not None:
            first, self._first = self._first, None
            return first
        rule = self.init if self.init in PRESERVING else "balanced" if self.init in RANDOM else "lambda"
        return initial_factors(x, self.depth, rule, self.scale, self.q)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"depth={self.depth}, init={self.init!r}" + ("" if self.scale is None else f", scale={self.scale}, q={self.q}")


def factorize(
    model: nn.Module,
    depth: int,
    init: Init = "identity",
    *,
    scale: float | None = None,
    q: float = 1.0,
    match: Match = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    r"""Make weights of `model` products of `depth` factors, x = w_1 * ... * w_L elementwise, in place.

    Each chosen weight stays readable under its name and its factors become the parameters, by `torch.nn.utils.parametrize`:
    build the optimiser afterwards. For training with `pysteep.SteepestDescent` alone, its depth option does the same on a plain
    model.

    ============  =====================================================================================  ==================
    init          factors                                                                                product
    ============  =====================================================================================  ==================
    "identity"    w_1 = x, all others 1                                                                  x, bit for bit
    "balanced"    \|w_i\| = \|x\|^(1/L), the sign on w_1: balance 0                                      x up to rounding
    "lambda"      \|w_j\|^q - \|w_1\|^q = s^q for j >= 2, the sign on w_1; w_j = s where x = 0           x up to rounding
    "saddle"      w_1 = 0, all others s                                                                  0
    "dwf"         random, of deep weight factorization                                                   random, narrower
    "variance"    random, of the same kind                                                               random
    ============  =====================================================================================  ==================

    "dwf" draws each factor from a normal distribution of deviation std(x)^(1/L), cut to magnitudes between 0.003^(1/L) and
    min(1, (2 std(x))^(1/L)). The cut takes from the deviation of the product: for std(x) = 0.05 it is 0.65, 0.54, 0.48 and 0.39
    of std(x) at L = 2, 3, 4 and 10. "variance" cuts at 0.06^(1/L) and 2^(1/L) times std(x)^(1/L), then multiplies all factors
    by one number, so that the product's variance is that of x at any depth.

    Args:
        model: any module; its parameters are real and floating, on any device.
        depth: L, from 1 to 64.
        init: a row of the table.
        scale: s > 0, with "lambda" and "saddle" only.
        q: from 1 to 2, the power of the optimiser; only "lambda" uses it.
        match: which weights. None: `weight` of every nn.Linear, Bilinear, Conv, ConvTranspose, Embedding and EmbeddingBag. A
            shell-style pattern such as "encoder.*": those of them whose full name fits. A function (name, parameter) -> bool:
            any parameters. A tied weight stays tied and must be chosen in all its places. A frozen weight (requires_grad=False)
            is left as it is, and named in the log. What torch.nn.utils.prune and the old weight_norm and spectral_norm compute
            a weight from is left out by None and patterns, and a warning of the logger "pysteep" names it.
        generator: for "dwf" and "variance", on the device of the weights.

    Returns:
        `model`.

    Raises:
        ValueError, TypeError: an argument is not as above; nothing but frozen weights or nothing at all was chosen, or a tied
            weight in some of its places only; a chosen weight is parametrized already, or sparse, complex, uninitialised.
            Nothing has been changed then.

    Source: Definition 4.6 and Appendix J of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026);
    "dwf": "Deep Weight Factorization: Sparse Learning Through the Lens of Artificial Symmetries" (Kolb et al., ICLR 2025).
    """
    depth = check_initial(depth, init, scale, q)
    _check_not_parametrized(model, match)
    chosen, frozen = trainable(choices(model, match), match)
    if frozen:
        logger.info("factorize leaves frozen weights as they are: %s", ", ".join(frozen))
    for parameter, places in chosen:
        for place in places:
            _check_place(parameter, place)
        check_weight(places[0].name, parameter, init, scale)
    if held := held_by_others(model, match):
        logger.warning("factorize leaves out %s, from which other tools compute weights: %s", ", ".join(held), HOW_TO_TAKE_THEM)
    for choice in chosen:
        first = initial_factors(choice.parameter, depth, init, scale, q, generator)
        factors: list[Parameter] = []
        for module, attribute, _ in choice.places:
            parametrization = _register(module, attribute, FactorProduct(depth, init, scale, q, _order(module), first))
            factors = factors or _factors(parametrization)
            for i, factor in enumerate(factors):
                setattr(parametrization, f"original{i}", factor)
        _remember(choice.parameter, choice.places[0].name)
    return model


def collapse(model: nn.Module) -> nn.Module:
    """Make every factorised weight of `model` an ordinary parameter again, in place: the products, bit for bit.

    Names, order and requires_grad are those from before `factorize`, and tied weights are tied. The parameters are new: an
    optimiser has to be built anew. A model without factorised weights is left as it is.

    Returns:
        `model`.

    Raises:
        ValueError: other parametrizations were registered on top of a factorised weight.
    """
    factorized = _factorized(model)
    for module, dense in _dense(factorized).items():
        _put(module, dense)
    for weight in factorized:
        for factor, name in zip(weight.factors, weight.factor_names(), strict=True):
            _remember(factor, name)
    return model


def dense_state_dict(model: nn.Module) -> dict[str, Any]:
    """What `model.state_dict()` would be without `factorize`: the same keys in the same order, a product for each weight.

    Raises:
        ValueError: other parametrizations were registered on top of a factorised weight.
    """
    with _plain(model):
        return model.state_dict()


def load_dense_state_dict(model: nn.Module, state_dict: Mapping[str, Any], strict: bool = True) -> Any:
    """Load a checkpoint of the model without `factorize`, such as a pretrained one or a `dense_state_dict`.

    Each weight that it holds gets new factors, written into the parameters that an optimiser already has. They multiply to it:
    those of the init that was given to `factorize`, but "lambda" in the place of "saddle" and "balanced" in the place of "dwf"
    and "variance". How the old factors were balanced is not in such a checkpoint; `model.state_dict()` has it.

    Args:
        model: the factorised model.
        state_dict: tensors by the names that the weights have without `factorize`.
        strict: as of `torch.nn.Module.load_state_dict`.

    Returns:
        The missing and unexpected keys, as `torch.nn.Module.load_state_dict`.

    Raises:
        RuntimeError: keys or shapes do not fit, as `torch.nn.Module.load_state_dict`; no factor has been changed then.
        ValueError: other parametrizations were registered on top of a factorised weight.
    """
    with _plain(model) as dense:
        before = {weight: _identity(weight) for weights in dense.values() for weight in weights.values()}
        keys = model.load_state_dict(state_dict, strict=strict)
        after = {(module, attribute): module._parameters[attribute] for module in dense for attribute in dense[module]}
    for places, rule, factors in _factorized(model):
        module, attribute, _ = places[0]
        loaded = after[module, attribute]
        if loaded is not None and _identity(loaded) != before.get(loaded):
            with torch.no_grad():
                for factor, new in zip(factors, rule.right_inverse(loaded), strict=True):
                    factor.copy_(new)
    return keys


def check_optimizer(model: nn.Module, optimizer: Optimizer) -> None:
    """Check that `optimizer` trains the parameters that `model` has now, not those from before `factorize` or `collapse`.

    Args:
        model: the model, or an nn.ModuleList of all the modules that the optimiser is for.
        optimizer: any optimiser.

    Raises:
        ValueError: it holds parameters that `model` does not own, or lacks factors that require a gradient; names them.
        TypeError: `model` is no module, or `optimizer` has no parameter groups.
    """
    check_model(model)
    if not hasattr(optimizer, "param_groups"):  # a wrapper of one may be no Optimizer
        raise TypeError(f"optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}")
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    owned = {id(parameter) for parameter in model.parameters()}
    orphans = []
    for group in optimizer.param_groups:
        names = group.get("param_names") or [None] * len(group["params"])
        for parameter, name in zip(group["params"], names, strict=True):
            if id(parameter) not in owned:
                orphans.append(getattr(parameter, _NAME, None) or name or f"one of shape {tuple(parameter.shape)}")
    lacking = [
        name
        for weight in _factorized(model)
        for factor, name in zip(weight.factors, weight.factor_names(), strict=True)
        if factor.requires_grad and id(factor) not in held
    ]
    found = []
    if orphans:
        found.append(f"it holds parameters that the model does not own: {', '.join(orphans)}")
    if lacking:
        found.append(f"it lacks factors: {', '.join(lacking)}")
    if found:
        raise ValueError(f"optimizer must be built after factorize or collapse; {'; '.join(found)}")


_NAME = "_pysteep_name"  # what a parameter was called in the model that has replaced it
_MASKED = "_pysteep_masked"  # of a module: its plain parameters that pysteep.diagnostics.prune_ keeps at 0


def _remember(parameter: Parameter, name: str) -> None:
    setattr(parameter, _NAME, name)


class _Factorized(NamedTuple):
    """A factorised weight: where it is, more than once if it is tied, and what it is made of."""

    places: list[Place]
    rule: FactorProduct
    factors: list[Parameter]

    def factor_names(self) -> list[str]:
        """What the factors are called in `model.state_dict()`."""
        name, attribute = self.places[0].name, self.places[0].attribute
        prefix = f"{name.removesuffix(attribute)}parametrizations.{attribute}"
        return [f"{prefix}.original{i}" for i in range(len(self.factors))]


def _factorized(model: nn.Module) -> list[_Factorized]:
    """All factorised weights of `model`."""
    found: dict[tuple[int, ...], _Factorized] = {}
    for name, module, attribute, parametrization in _parametrized(model):
        rule = parametrization[0]
        if isinstance(rule, FactorProduct):
            if len(parametrization) > 1:
                above = type(parametrization[1]).__name__
                raise ValueError(f"{name} must have no parametrization on top of its factors; got {above}: remove it first")
            factors = _factors(parametrization)
            weight = found.setdefault(tuple(map(id, factors)), _Factorized([], rule, factors))
            weight.places.append(Place(module, attribute, name))
    return list(found.values())


def _parametrized(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, ParametrizationList]]:
    check_model(model)
    for prefix, module in model.named_modules():
        if is_parametrized(module):
            for attribute, parametrization in _lists(module).items():
                yield (f"{prefix}.{attribute}" if prefix else attribute), module, attribute, parametrization


def _lists(module: nn.Module) -> dict[str, ParametrizationList]:
    lists: Any = module.parametrizations
    return dict(lists.items())


def _identity(tensor: Tensor) -> tuple[int, int]:
    """What changes when somebody writes to the tensor or gives it other memory."""
    return tensor._version, tensor.data_ptr()


def _factors(parametrization: ParametrizationList) -> list[Parameter]:
    return [getattr(parametrization, f"original{i}") for i in range(parametrization.ntensors)]


def _order(module: nn.Module) -> tuple[str, ...]:
    """The parameters that `module` has, or had before any was factorised."""
    rules = [parametrization[0] for parametrization in _lists(module).values()] if is_parametrized(module) else []
    return next((rule.order for rule in rules if isinstance(rule, FactorProduct)), tuple(module._parameters))


def _register(module: nn.Module, attribute: str, rule: FactorProduct) -> ParametrizationList:
    if is_parametrized(module):
        module.__class__ = _without(type(module), ())
    register_parametrization(module, attribute, rule)
    return _lists(module)[attribute]


def _check_not_parametrized(model: nn.Module, match: Match) -> None:
    for name, module, attribute, parametrization in _parametrized(model):
        parameter = next(parametrization.parameters(), None)
        if parameter is not None and is_meant(Place(module, attribute, name), match, parameter):
            by = type(parametrization[0]).__name__
            raise ValueError(f"{name} must be a plain parameter; it is parametrized by {by} already")


def _check_place(parameter: Parameter, place: Place) -> None:
    if isinstance(place.module, ParametrizationList):
        raise ValueError(f"{place.name} must be a plain parameter; it belongs to a parametrization")
    if place.attribute in place.module.__dict__.get(_MASKED, ()):
        raise ValueError(
            f"{place.name} must not be pruned yet; it has a mask: prune after factorize (pysteep.diagnostics.remove_masks)"
        )
    if is_lazy(parameter):
        raise ValueError(f"{place.name} must have a shape; it is uninitialised: call the model once before")
    try:
        check_factors([parameter])
    except TypeError as error:
        raise TypeError(str(error).replace("factor 0", place.name)) from None
    if getattr(place.module, "max_norm", None) is not None:
        raise ValueError(f"{place.name} must be of an embedding with max_norm=None, as that writes to the weight")


@torch.no_grad()
def _dense(factorized: list[_Factorized]) -> dict[nn.Module, dict[str, Parameter]]:
    """The factorised weights of each module as parameters, tied ones as one."""
    result: dict[nn.Module, dict[str, Parameter]] = {}
    for places, rule, factors in factorized:
        dense = Parameter(rule(*factors), requires_grad=any(factor.requires_grad for factor in factors))
        for place in places:
            result.setdefault(place.module, {})[place.attribute] = dense
    return result


def _put(module: nn.Module, dense: dict[str, Parameter]) -> None:
    """Give `module` these parameters in the place of their factors; the dicts that hold the factors are left as they are."""
    lists = _lists(module)
    order = _order(module)
    kept = {attribute: parametrization for attribute, parametrization in lists.items() if attribute not in dense}
    parameters = {**module._parameters, **dense}
    modules = {name: child for name, child in module._modules.items() if name != "parametrizations"}
    if kept:
        modules["parametrizations"] = nn.ModuleDict(kept)
    place = {name: i for i, name in enumerate(order)}
    module.__dict__["_parameters"] = dict(sorted(parameters.items(), key=lambda item: place.get(item[0], len(place))))
    module.__dict__["_modules"] = modules
    module.__class__ = _without(type(module), dense) if kept else type(module).__bases__[0]


def _without(cls: type, attributes: Any) -> type:
    """A new class without these properties. That of a parametrized module is also its deep copies': it must not be changed."""
    left_out = {*attributes, "__dict__", "__weakref__"}
    return type(cls.__name__, cls.__bases__, {name: value for name, value in vars(cls).items() if name not in left_out})


@contextmanager
def _plain(model: nn.Module) -> Iterator[dict[nn.Module, dict[str, Parameter]]]:
    """`model` with products as parameters in the place of the factors: torch saves and loads it as it does a plain one."""
    dense = _dense(_factorized(model))
    before = {module: (type(module), module._parameters, module._modules) for module in dense}
    for module, weights in dense.items():
        _put(module, weights)
    try:
        yield dense
    finally:
        for module, (cls, parameters, modules) in before.items():
            module.__class__ = cls
            module.__dict__.update(_parameters=parameters, _modules=modules)
