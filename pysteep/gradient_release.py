"""The optimiser's step inside the backward pass: each gradient is used and freed as it comes; they never exist all at once."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ._selection import check_model
from ._state.rounding import places_of
from .optim import SteepestDescent


def gradient_release(model: nn.Module, optimizer: SteepestDescent) -> GradientRelease:
    """Let `backward()` step each parameter as soon as its gradient is whole, and free the gradient at once.

    >>> release = pysteep.gradient_release(model, optimizer)
    >>> for x, y in batches:
    ...     loss_of(model(x), y).backward()  # steps the parameters
    ...     optimizer.step()  # ends the step
    ...     scheduler.step()

    The training loop stays as it is, and so do its results, bit for bit. `optimizer.step()` ends the step: it is due between
    two backward passes over a parameter, and steps and frees what gradients are left, such as those of parameters that were
    frozen, or not yet in the optimiser, when this function was called. A parameter that is used several times in a graph is
    stepped once, with the whole sum. The options of a group are read at each step, so schedulers act as ever. Several backward
    passes make one step with `accumulating()`:

    >>> with release.accumulating():
    ...     loss_of(model(x1), y1).backward()
    >>> loss_of(model(x2), y2).backward()  # steps with the sum
    >>> optimizer.step()

    Under FSDP2 (`fully_shard` first, then the optimiser) the step follows each reduce-scatter, with the averaged gradient.

    Nothing that needs all gradients before the first step is possible: no `normalize`, no clipping by the norm of all gradients
    (`torch.nn.utils.clip_grad_norm_` finds none and reports 0: leave it out; Trainer's `max_grad_norm` must be 0), no
    GradScaler (bfloat16 needs none). A second backward pass through the same graph (`retain_graph=True`) meets weights that
    have changed, and torch says so. With reentrant checkpointing a parameter that is used in two segments gets two gradients,
    which is an error here: use `use_reentrant=False`.

    Args:
        model: the module that is called, in whatever torch.distributed wraps it.
        optimizer: of parameters of `model`.

    Returns:
        The handle, which removes the hooks again; as a context manager, at its end.

    Raises:
        TypeError: `optimizer` is no SteepestDescent, or `model` no module.
        ValueError: `optimizer` is released already, has parameters that are not the model's, or a group with `normalize`.
        RuntimeError: `model` is or holds a DistributedDataParallel or FullyShardedDataParallel. When DistributedDataParallel
            wraps it later, its next forward pass raises.

    `backward()` raises RuntimeError at a second gradient of a parameter before `step()`, and ValueError if `normalize` was
    turned on. `step()` raises RuntimeError for a closure, `total_norm`, `max_norm` and GradScaler.
    """
    return GradientRelease(model, optimizer)


class GradientRelease:
    """What `pysteep.gradient_release` returns."""

    def __init__(self, model: nn.Module, optimizer: SteepestDescent) -> None:
        """See `pysteep.gradient_release`."""
        self._names = _checked(model, optimizer)
        self._optimizer = optimizer
        self._stepped: set[Tensor] = set()
        self._accumulating = False
        self._place_of = {
            param: (index, i) for index, group in enumerate(optimizer.param_groups) for i, param in enumerate(group["params"])
        }
        self._handles = [
            *(param.register_post_accumulate_grad_hook(self._step) for param in self._place_of if param.requires_grad),
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
            model.register_forward_hook(_check_not_inside_ddp, prepend=True),  # before that of replicate(), which ends there
        ]
        _RELEASED.add(optimizer)

    @contextmanager
    def accumulating(self) -> Iterator[None]:
        """Inside, backward passes add up gradients and step nothing."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Take the hooks away: `optimizer.step()` steps all parameters again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        _RELEASED.discard(self._optimizer)

    def __enter__(self) -> GradientRelease:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def _step(self, param: Tensor) -> None:
        if self._accumulating:
            return
        name = self._names[param]
        if param in self._stepped:
            raise RuntimeError(
                f"{name} got a second gradient before optimizer.step(): call it after each backward pass, or let gradients add "
                "up inside accumulating()"
            )
        groups, (index, i) = self._optimizer.param_groups, self._place_of[param]
        _check_normalize(groups[index])
        try:
            group = {**groups[index], "params": [param], "param_names": [name]}
            self._optimizer._step_groups([group], places=[[places_of(groups)[index][i]]])
        except Exception as error:
            error.add_note(f"while {name} was stepped in the backward pass, as the only parameter")
            raise
        self._stepped.add(param)
        param.grad = None

    def _before_step(self, optimizer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(optimizer, "found_inf", None) is not None or getattr(optimizer, "grad_scale", None) is not None:
            raise RuntimeError(
                "GradScaler cannot be used with gradient_release, which steps with scaled gradients before all are there. "
                "Train in bfloat16 or float32 without it, or remove() the release"
            )
        given = dict(zip(("closure", "total_norm", "max_norm"), args[1:], strict=False)) | kwargs
        for name, value in given.items():
            if value is not None:
                raise RuntimeError(
                    f"step() takes no {name} with gradient_release, under which backward() steps: call backward() and then "
                    "step() alone, or remove() the release"
                )

    def _after_step(self, optimizer: Any, *_: object) -> None:
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = None
        self._stepped.clear()


_RELEASED: WeakSet[SteepestDescent] = WeakSet()


def _checked(model: nn.Module, optimizer: SteepestDescent) -> dict[Tensor, str]:
    """The names of the parameters, where all can be released."""
    check_model(model)
    if not isinstance(optimizer, SteepestDescent):
        raise TypeError(f"optimizer must be a pysteep.SteepestDescent; got a {type(optimizer).__name__}")
    if optimizer in _RELEASED:
        raise ValueError("optimizer must not be released already: remove() that release first")
    names: dict[Tensor, str] = {param: name for name, param in model.named_parameters()}
    for group in optimizer.param_groups:
        _check_normalize(group)
        for param in group["params"]:
            if param not in names:
                raise ValueError(
                    f"optimizer must have parameters of model alone; got one of shape {tuple(param.shape)} that is not in it"
                )
    # Not imported for the question: a model that is wrapped by it has brought it along.
    fsdp = getattr(sys.modules.get("torch.distributed.fsdp"), "FullyShardedDataParallel", DistributedDataParallel)
    for name, module in model.named_modules():
        if isinstance(module, (DistributedDataParallel, fsdp)):
            raise RuntimeError(_UNREDUCED.format(f"model{'.' * bool(name)}{name}", type(module).__name__))
    return names


def _check_normalize(group: dict[str, Any]) -> None:
    if group["normalize"]:
        raise ValueError("normalize must be False with gradient_release: it needs all gradients of a group first; got True")


def _check_not_inside_ddp(model: nn.Module, *_: object) -> None:
    """A forward hook. Not a method: a copy of the model must not bring a copy of the optimiser along."""
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is None:
        return
    wrapped = set(wrapper.parameters())  # torch may still name a wrapper whose forward pass failed, around another model
    if any(param in wrapped for param in model.parameters()):
        raise RuntimeError(_UNREDUCED.format("model", type(wrapper).__name__))


_UNREDUCED = (
    "{} is wrapped by {}, under which a gradient is not yet averaged over processes when gradient_release sees it: "
    "shard the model by torch.distributed.fsdp.fully_shard instead, or train without gradient_release"
)
