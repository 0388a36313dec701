"""Masks of plain parameters: a bool buffer beside each, and hooks of its module that keep the masked coordinates at 0.

torch.nn.utils.prune renames `weight` to `weight_orig` and does not go together with parametrizations: here the parameter keeps
its name and stays the object that an optimiser trains.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils.parametrize import is_parametrized

from .._selection import check_model
from ..factorize import _MASKED


def buffer_name(attribute: str) -> str:
    return f"{attribute}_mask"


def mask_of(module: nn.Module, attribute: str) -> Tensor | None:
    """The mask of a parameter, True where it is kept; None without one."""
    return module._buffers[buffer_name(attribute)] if attribute in attributes(module) else None


def attributes(module: nn.Module) -> tuple[str, ...]:
    """The names of the module's own parameters that have a mask."""
    result: tuple[str, ...] = module.__dict__.get(_MASKED, ())
    return result


def add_mask(model: nn.Module, module: nn.Module, attribute: str, mask: Tensor) -> None:
    """Mask `module.attribute` also in `model`, of which it is a part."""
    module.register_buffer(buffer_name(attribute), mask)
    setattr(module, _MASKED, (*(name for name in attributes(module) if name != attribute), attribute))
    if hold not in module._state_dict_pre_hooks.values():
        module.register_state_dict_pre_hook(hold)
        module.register_load_state_dict_post_hook(hold)
    # Of the model too, as some weights are used without a call of their module, such as nn.MultiheadAttention.out_proj's.
    for owner in (module, model):
        if hold not in owner._forward_pre_hooks.values():
            owner.register_forward_pre_hook(hold)
    hold(module)


def drop_masks(model: nn.Module) -> None:
    """Undo `add_mask` everywhere in `model`; what is 0 stays so."""
    check_model(model)
    hold(model)
    for module in model.modules():
        for attribute in attributes(module):
            del module._buffers[buffer_name(attribute)]
            for key, hook in [*(_hooks(module._parameters[attribute]).items())]:
                if isinstance(hook, _MaskGradient):
                    del _hooks(module._parameters[attribute])[key]
        module.__dict__.pop(_MASKED, None)
        hooked: list[dict[int, Any]] = [
            module._forward_pre_hooks,
            module._state_dict_pre_hooks,
            module._load_state_dict_post_hooks,
        ]
        for hooks in hooked:
            for key in [key for key, hook in hooks.items() if hook is hold]:
                del hooks[key]


@torch.no_grad()
def hold(module: nn.Module, *_: Any) -> None:
    """Set masked coordinates of all parameters in `module` to 0; the hook of a forward pass, of saving and of loading.

    An optimiser's momentum or an average of weights may have moved them. Written through `.data`, so that two forward passes
    before one backward pass, and the factors of pysteep.SteepestDescent, see no new version of the parameter.
    """
    for child in module.modules():
        for attribute in attributes(child):
            if is_parametrized(child, attribute):
                raise RuntimeError(
                    f"{attribute} of {type(child).__name__} has a mask that its parametrization does not know: parametrize "
                    "first, then prune_"
                )
            parameter, mask = child._parameters.get(attribute), mask_of(child, attribute)
            if parameter is None or mask is None:
                continue
            clear(parameter.data, mask)
            hooks = _hooks(parameter).values()
            if parameter.requires_grad and not any(isinstance(hook, _MaskGradient) and hook.is_alive() for hook in hooks):
                parameter.register_hook(_MaskGradient(child, attribute))


class _MaskGradient:
    """Hook of a parameter: its gradient is 0 where it is masked. A copy of the parameter has none until `hold` finds it."""

    __torch_unserializable__ = True  # torch.save says nothing of it

    def __init__(self, module: nn.Module, attribute: str) -> None:
        self.module, self.attribute = weakref.ref(module), attribute

    def is_alive(self) -> bool:
        return self.module() is not None

    def __call__(self, gradient: Tensor) -> Tensor:
        module = self.module()
        mask = None if module is None else mask_of(module, self.attribute)
        return gradient if mask is None else masked(gradient, mask)


def _hooks(parameter: Parameter | None) -> dict[int, Any]:
    return getattr(parameter, "_backward_hooks", None) or {}


@torch.no_grad()
def clear(tensor: Tensor, mask: Tensor) -> None:
    """Set the tensor to 0 where it is masked, NaN too; by its bits, ten times as fast on a CPU as masked_fill_."""
    if tensor.is_complex():
        tensor, mask = torch.view_as_real(tensor), mask.unsqueeze(-1)
    bits = _BITS[tensor.element_size()]
    tensor.view(bits).bitwise_and_(mask.to(bits).neg_())


_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def masked(gradient: Tensor, mask: Tensor) -> Tensor:
    """The gradient with 0, also in the place of NaN, where it is masked; sparse ones stay sparse."""
    if not gradient.is_sparse:
        return torch.where(mask, gradient, 0)
    entries = gradient.coalesce()
    indices = entries.indices()
    values = torch.where(mask[tuple(indices)], entries.values(), 0)
    return torch.sparse_coo_tensor(indices, values, gradient.shape, is_coalesced=True, check_invariants=False)
