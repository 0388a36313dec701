"""Setting small weights to 0 for good: masks that survive training, saving and loading."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .._selection import Match, Place
from ..factorize import FactorProduct, _factorized, _lists, _plain
from ._masks import add_mask, attributes, buffer_name, clear, drop_masks, mask_of, masked
from ._sparsity import SparsityReport, check_threshold, dense_weights, sparsity_report

__all__ = ["prune_", "remove_masks"]


def prune_(
    model: nn.Module,
    threshold: float | None = None,
    *,
    masks: Mapping[str, Any] | None = None,
    match: Match = None,
    optimizer: Optimizer | None = None,
    depth: int | None = None,
) -> SparsityReport:
    """Set the weights below a threshold on the size of a factor to 0 and keep them there, in place.

    A coordinate x of depth L is pruned where |x| <= threshold^L. It is exactly 0 from then on in every forward pass and every
    state dict, whatever trains the model, and gets no gradient. Pruning again adds to the masks; 0 holds what is 0 already.

    Parameters keep their names and identity. Beside each there is a bool buffer `<name>_mask`, True where the weight is kept,
    which `state_dict` saves and `load_state_dict` loads and applies. A new model gets the masks first:

    >>> prune_(model, masks=state_dict)
    >>> model.load_state_dict(state_dict)

    The product of a factorised weight (`pysteep.factorize`) is masked, by a buffer of its FactorProduct; `dense_state_dict`
    and `collapse` give its zeros but not the mask: `prune_(model, 0)` after `collapse`, or masks=, with the state dict from
    before it, holds them.

    A copy (copy.deepcopy, pickle) is pruned alike. Between a step and the next forward pass, a weight may be off 0 by an
    optimiser's old momentum if `optimizer` was not given. `model` has to be called as a whole, or the modules that own the
    weights. Prune before torch.compile, the module and not its compiled form.

    Args:
        model: any module.
        threshold: t >= 0.
        masks: instead of a threshold: a state dict with the masks of a pruned model, or bool tensors by such names
            ("fc.weight_mask"), True where the weight is kept.
        match: which weights. None: `weight` of every nn.Linear, Bilinear, Conv, ConvTranspose, Embedding and EmbeddingBag, so
            no bias and no normalisation. A shell-style pattern such as "encoder.*": those of them whose full name fits. A
            function (name, parameter) -> bool: any parameters. Not with `masks`, which name them.
        optimizer: trains the model. Depths are read from a pysteep.SteepestDescent; of any, momenta of pruned coordinates
            become 0. All others of its state are kept.
        depth: L of the weights that are not factorised, where no optimiser says it; None: 1.

    Returns:
        What `sparsity_report` says of the chosen weights now.

    Raises:
        ValueError, TypeError: an argument is not as above; a parameter is uninitialised, or a chosen one of integers or not
            dense, or its module has another attribute of the mask's name. Nothing has been changed then.

    Source: Section 4 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    if (threshold is None) == (masks is None):
        given = None if masks is None else type(masks).__name__
        raise ValueError(f"one of threshold and masks must be given; got threshold={threshold!r} and masks={given}")
    if threshold is None:
        if match is not None or depth is not None:
            raise ValueError(f"match and depth must be None where masks are given; got {match!r} and {depth!r}")
        pruned = _named(model, masks or {}, optimizer)
    else:
        limit = check_threshold("threshold", threshold)
        with dense_weights(model, match, optimizer, depth) as weights:
            pruned = [_Pruned(weight.places, ~weight.small(limit)) for weight in weights]
    for places, _ in pruned:
        for place in places:
            _check_free(place)
    first_factors = {(place.module, place.attribute): w.factors[0] for w in _factorized(model) for place in w.places}
    for places, kept in pruned:
        first_factor = first_factors.get((places[0].module, places[0].attribute))
        if first_factor is None:
            _mask_parameter(model, places, kept, optimizer)
        else:
            _mask_product(places, kept, first_factor)
    names = {place.name for places, _ in pruned for place in places}
    thresholds = () if threshold is None else (threshold,)
    return sparsity_report(model, thresholds, match=lambda name, _: name in names, optimizer=optimizer, depth=depth)


def remove_masks(model: nn.Module) -> nn.Module:
    """Undo what `prune_` added to `model`, in place: weights that are 0 stay so, until they are trained again.

    Returns:
        `model`.
    """
    drop_masks(model)
    for weight in _factorized(model):
        for rule in _rules(weight.places):
            if rule.mask is not None:
                clear(weight.factors[0], rule.mask)
                rule.mask = None
    return model


class _Pruned(NamedTuple):
    """A weight, where it is and where it is kept."""

    places: list[Place]
    kept: Tensor


def _named(model: nn.Module, masks: Mapping[str, Any], optimizer: Optimizer | None) -> list[_Pruned]:
    """The weights whose masks these are, of whichever kind the weight was."""

    def find(name: str) -> Any:
        prefix, dot, attribute = name.rpartition(".")
        plain = buffer_name(name)
        return masks.get(plain, masks.get(f"{prefix}{dot}parametrizations.{attribute}.0.mask"))

    with _plain(model):
        names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    if all(find(name) is None for name in names):
        such = ", ".join(buffer_name(name) for name in names[:2])
        raise ValueError(f"masks must name a parameter of the model, as in {such}; got {', '.join(masks)}")
    with dense_weights(model, lambda name, _: find(name) is not None, optimizer) as weights:
        result = []
        for name, places, value, _ in weights:
            mask = find(name)
            if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.shape != value.shape:
                got = f"{mask.dtype} {tuple(mask.shape)}" if isinstance(mask, Tensor) else repr(mask)
                raise ValueError(f"the mask of {name} must be a bool tensor of shape {tuple(value.shape)}; got {got}")
            result.append(_Pruned(places, torch.empty_like(value, dtype=torch.bool).copy_(mask)))
        return result


def _check_free(place: Place) -> None:
    buffer = buffer_name(place.attribute)
    if place.attribute not in attributes(place.module) and hasattr(place.module, buffer):
        kind = type(place.module).__name__
        raise ValueError(f"{place.name} must be of a module without an attribute {buffer}; {kind} has one already")


def _mask_parameter(model: nn.Module, places: list[Place], kept: Tensor, optimizer: Optimizer | None) -> None:
    parameter, before = places[0].module._parameters[places[0].attribute], mask_of(*places[0][:2])
    assert parameter is not None
    mask = kept if before is None else kept & before
    for place in places:
        add_mask(model, place.module, place.attribute, mask)
    clear(parameter, mask)  # not through .data: pysteep.SteepestDescent has to see it
    if parameter.grad is not None:
        parameter.grad = masked(parameter.grad, mask)
    state = {} if optimizer is None else optimizer.state.get(parameter, {})
    for name, value in state.items():
        is_alike = isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()) and value.shape == mask.shape
        if is_alike and not name.startswith(_NO_MOMENTA):
            clear(value, mask)


_NO_MOMENTA = ("step", "factor", "balance")  # what else a state may hold of a parameter's shape


def _mask_product(places: list[Place], kept: Tensor, first_factor: Tensor) -> None:
    rules = _rules(places)
    mask = kept if rules[0].mask is None else kept & rules[0].mask
    for rule in rules:
        rule.mask = mask
    clear(first_factor, mask)


def _rules(places: list[Place]) -> list[FactorProduct]:
    lists: list[Any] = [_lists(place.module)[place.attribute] for place in places]
    return [parametrization[0] for parametrization in lists]
