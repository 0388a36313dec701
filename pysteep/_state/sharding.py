"""Parameters that torch shards over processes as DTensors (FSDP2, tensor parallelism): a step works on their local shards.

Every rule here is elementwise, so a shard of the result is the result of the shards; only `normalize` needs the other ranks.
torch.distributed.tensor is not imported here: where nobody else did, no tensor is a DTensor.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Hashable, Sequence
from math import prod
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.nn import Parameter

from .._ops import steepest_step
from .._ops.dispatch import extension
from .._ops.options import StepOptions

if extension is not None:
    from .._ops.native.tensors import plain_gradients

_PLAIN = frozenset((Tensor, Parameter))
_LOCAL, _SPEC = attrgetter("_local_tensor"), attrgetter("_spec")
_VERSION, _NBYTES = attrgetter("_version"), attrgetter("nbytes")

Sum = Callable[[], Tensor]

LAYOUTS = 64
_first_elements: dict[tuple[int, int], tuple[list[Any], list[int]]] = {}
"""What `first_elements` told of lists of specs, of at most LAYOUTS, by the id of the first: the list keeps it alive."""


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor. Asked for each parameter at each step, most of which are of a plain type: hence first."""
    if type(tensor) in _PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a DTensor that this process holds, of the same memory; any other tensor itself."""
    if type(tensor) in _PLAIN:
        return tensor
    shard: Tensor = getattr(tensor, "_local_tensor", tensor)  # asked for thousands of times a step: no isinstance
    return shard


class Gradients(NamedTuple):
    """Those of parameters.

    Attributes:
        plain: known to be no subclass's, nor the parameters.
        complete: known to be all there.
    """

    tensors: Sequence[Tensor | None]
    plain: bool = False
    complete: bool = False


def gradients_of(params: list[Tensor]) -> Gradients:
    """Their `.grad`, None of a parameter that requires none, whatever is left in it: a frozen one is not stepped.

    Of DTensors, which do not override it, without looking for an override: half of the time of reading it.
    """
    if extension is not None:
        found = plain_gradients(params)
        if found is not None:
            return Gradients(found[0], True, found[1])
    if not params or not is_sharded(params[0]):
        return Gradients(list(map(gradient_of, params)))
    with torch._C.DisableTorchFunctionSubclass():
        return Gradients(list(map(gradient_of, params)))


def gradient_of(param: Tensor) -> Tensor | None:
    """The gradient with which a step moves a parameter."""
    return param.grad if param.requires_grad else None


def like(param: Tensor, shard: Tensor) -> Tensor:
    """What belongs to the local part of a parameter, in its own dtype, as a DTensor that is distributed as the parameter is.

    Of the shard's memory, which may have further dimensions. Where the parameter is no DTensor, `shard` itself.
    """
    if not is_sharded(param):
        return shard
    spec: Any = _SPEC(param)
    further = shard.shape[param.ndim :]
    if further or shard.dtype != spec.tensor_meta.dtype:
        strides = (*(stride * further.numel() for stride in param.stride()), *torch.empty(further, device="meta").stride())
        meta = spec.tensor_meta._replace(shape=torch.Size((*param.shape, *further)), stride=strides, dtype=shard.dtype)
        spec = dataclasses.replace(spec, tensor_meta=meta)
    # DTensor.from_local would move what CPU offloading keeps beside its mesh's devices.
    result: Tensor = sys.modules["torch.distributed.tensor"].DTensor(shard, spec, requires_grad=False)
    return result


def mark(param: Tensor) -> tuple[int, int, int]:
    """What changes when somebody writes to the parameter, or to a DTensor's shard, by an operation: version, address, bytes.

    The last two tell that it was given other memory.
    """
    if type(param) in _PLAIN:
        return param._version, param.data_ptr(), param.nbytes
    shard = local(param)
    return param._version + shard._version, shard.data_ptr(), shard.nbytes


def marks(params: list[Tensor], *, plain: bool) -> list[tuple[int, int, int]]:
    """`mark` of each; `plain` as `gradients_of` told."""
    if not plain:
        return list(map(mark, params))
    return list(zip(map(_VERSION, params), map(Tensor.data_ptr, params), map(_NBYTES, params), strict=True))


def check_consecutive(name: str, param: Tensor) -> None:
    """Raise ValueError unless this process holds elements of the parameter that follow one another in the whole of it."""
    if not is_sharded(param):
        return
    placements, shard, cuts = _SPEC(param).placements, _LOCAL(param), _row_cuts(_SPEC(param))
    if cuts is None:
        raise ValueError(
            f"rounding must not be 'stochastic' for {name}, whose elements a rank does not hold in one piece: {placements}; "
            f"Replicate and Shard(0) do, over any number of mesh dimensions"
        )
    axes = zip(param.shape, shard.stride(), param.stride(), strict=True)
    alike = all(own == whole for size, own, whole in axes if size > 1)
    if shard.numel() and not (alike and (not cuts or param.stride(0) * param.shape[0] == param.numel())):
        raise ValueError(
            f"rounding must not be 'stochastic' for {name}, whose elements a rank holds in another order than the whole: "
            f"strides {shard.stride()} of {param.stride()}; those of contiguous tensors do"
        )


def _row_cuts(spec: Any) -> tuple[int, ...] | None:
    """The mesh dimensions over which rows are cut, in the order of the cuts; None where a rank's elements are not one piece.

    FSDP2 cuts what a tensor-parallel Shard(0) left into rows again, and calls that a _StridedShard(0) of as many parts as were
    there: it comes after those cuts, which stand to its right.
    """
    sizes, cuts = spec.mesh.shape, list[int]()
    for dim, placement in reversed([*enumerate(spec.placements)]):
        if placement.is_replicate() or sizes[dim] == 1:
            continue
        kind = type(placement).__name__
        if kind not in ("Shard", "_StridedShard") or placement.dim != 0:
            return None
        parts = placement.split_factor if kind == "_StridedShard" else 1
        before = next((i for i in range(len(cuts) + 1) if prod(sizes[cut] for cut in cuts[:i]) == parts), None)
        if before is None:
            return None
        cuts.insert(before, dim)
    return tuple(cuts)


def first_elements(params: Sequence[Tensor]) -> Sequence[int]:
    """The place in each whole parameter of the first element that this process holds; `check_consecutive` allows them."""
    if _PLAIN.issuperset(map(type, params)):
        return [0] * len(params)
    try:
        specs = list(map(_SPEC, params))
    except AttributeError:  # not all of them are DTensors
        specs = [_SPEC(param) if is_sharded(param) else None for param in params]
    key = (id(specs[0]), len(specs))
    known = _first_elements.get(key)
    if known is None or known[0] != specs:  # the objects of the last step are found equal without a look into them
        if len(_first_elements) >= LAYOUTS:
            _first_elements.clear()
        known = _first_elements[key] = (specs, [0 if spec is None else _first_element(spec) for spec in specs])
    return known[1]


def _first_element(spec: Any) -> int:
    cuts, shape, coordinate = _row_cuts(spec), spec.tensor_meta.shape, spec.mesh.get_coordinate()
    if not cuts or coordinate is None:  # the process is not in the mesh: it holds nothing
        return 0
    begin, end = 0, shape[0]
    for dim in cuts:  # as torch.chunk
        rows = -(-(end - begin) // spec.mesh.shape[dim])
        begin = min(begin + coordinate[dim] * rows, end)
        end = min(begin + rows, end)
    return int(begin * prod(shape[1:]))


def check_placements(name: str, param: Tensor) -> None:
    """Raise ValueError that names a DTensor whose ranks hold terms of its elements rather than the elements."""
    if is_sharded(param) and any(placement.is_partial() for placement in _SPEC(param).placements):
        raise ValueError(f"{name} must be placed by Shard or Replicate; got {_SPEC(param).placements}")


def shards(
    params: list[Tensor], grads: Sequence[Tensor | None], momenta: list[Tensor]
) -> tuple[list[Tensor], Sequence[Tensor | None], list[Tensor]]:
    """The lists with each DTensor replaced by the local part; as they are where no parameter is a DTensor.

    Raises:
        TypeError, ValueError: a DTensor's gradient is none, or is on another mesh.
    """
    if not params or (type(params[0]) in _PLAIN and set(map(type, params)) <= _PLAIN):
        return params, grads, momenta
    try:
        if list(map(_SPEC, params)) == list(map(_SPEC, grads)):  # FSDP2's are the same objects: compared in a microsecond
            parts = list(map(_LOCAL, grads))
            if set(map(type, parts)) <= _PLAIN:
                return list(map(_LOCAL, params)), parts, list(map(_LOCAL, momenta))
    except AttributeError:  # not all of them are DTensors
        pass
    own = [
        None if grad is None else gradient(i, param, grad) for i, (param, grad) in enumerate(zip(params, grads, strict=True))
    ]
    return list(map(local, params)), own, list(map(local, momenta))


@torch.no_grad()
def gradient(i: int, param: Tensor, grad: Tensor) -> Tensor:
    """The local part of the gradient of parameter `i`, distributed as the parameter is. Any other tensor's gradient itself.

    Tensor parallel layers may leave a gradient whose ranks hold terms of it; they are summed here, as torch's optimisers do.
    """
    if not is_sharded(param):
        return grad
    if not is_sharded(grad):
        raise TypeError(f"gradient {i} must be a DTensor, as param {i} is; got a {type(grad).__name__}")
    given: Any = grad
    spec, own = _SPEC(given), _SPEC(param)
    if spec.mesh != own.mesh:
        raise ValueError(f"gradient {i} must be on its param's mesh {own.mesh}; got {spec.mesh}")
    if spec.placements != own.placements:
        given = given.redistribute(own.mesh, own.placements)
    shard = given.to_local()
    arrived: Tensor = shard.wait() if hasattr(shard, "wait") else shard  # from a collective that is still under way
    return arrived


def whole(number: Any) -> Any:
    """A number that ranks may hold in terms, such as the found_inf of a gradient scaler; anything else as it is."""
    return number if number is None or not is_sharded(number) else number.full_tensor()


def written_to(params: Sequence[Tensor]) -> None:
    """Count a write to DTensors whose shards were written to: autograd looks at their versions, not at those of the shards."""
    increment_version([param for param in params if type(param) not in _PLAIN])


def power_sum_over_ranks(
    params: list[Tensor],
    weights: list[Tensor],
    gradients: Sequence[Tensor | None],
    momenta: list[Tensor],
    options: StepOptions,
    *,
    compensations: Sequence[Tensor | None],
    **others: Any,
) -> Sum:
    """The power sum of `normalize` over all elements of the parameters, each element once, whoever holds it.

    All ranks must call it with the same parameters, also those that hold nothing of them.
    """
    kinds: dict[Hashable, list[int]] = {}
    for i, param in enumerate(params):
        kinds.setdefault(_sharded_by(param), []).append(i)
    sums: list[tuple[Any, Sum]] = [
        (
            kind,
            steepest_step.power_sum(
                [weights[i] for i in indices],
                [gradients[i] for i in indices],
                [momenta[i] for i in indices] if momenta else [],
                [compensations[i] for i in indices] if compensations else [],
                options,
                **others,
            ),
        )
        for kind, indices in kinds.items()
    ]

    def total() -> Tensor:
        values = []
        for (mesh, dims), part in sums:
            value = part()
            for dim in dims:
                value = value.to(mesh.device_type)
                torch.distributed.all_reduce(value, group=mesh.get_group(dim))
            values.append(value)
        return torch.stack([value.to(values[0].device) for value in values]).sum()

    return total


def _sharded_by(param: Tensor) -> tuple[Any, tuple[int, ...]]:
    """The mesh of a DTensor and the dimensions of it over which its elements are spread; none for what each rank has whole."""
    if not is_sharded(param):
        return None, ()
    spec = _SPEC(param)
    dims = tuple(dim for dim, placement in enumerate(spec.placements) if not placement.is_replicate())
    return (spec.mesh, dims) if dims else (None, ())


def equal(a: Tensor, b: Tensor) -> bool:
    """torch.equal of two tensors that are distributed alike: all ranks learn whether it holds on all of them."""
    same = torch.equal(local(a), local(b))
    if not is_sharded(a):
        return same
    mesh = _SPEC(a).mesh
    verdict = torch.tensor(int(same), device=mesh.device_type)
    for group in mesh.get_all_groups():
        torch.distributed.all_reduce(verdict, torch.distributed.ReduceOp.MIN, group=group)
    return bool(verdict)


def placed(name: str, param: Tensor, state: dict[str, Any]) -> dict[str, Any]:
    """The loaded state of a parameter with its momenta and factors distributed as the parameter: this rank's part of full ones.

    Shapes are checked already.

    Raises:
        ValueError: a tensor is distributed in another way.
    """
    return {key: _placed(f"{key} of {name}", param, value) if key != "balance" else value for key, value in state.items()}


def _placed(name: str, param: Tensor, value: Any) -> Any:
    if not isinstance(value, Tensor) or (type(param) in _PLAIN and not is_sharded(value)):
        return value
    if not is_sharded(param):
        gather = "torch.distributed.checkpoint.state_dict gathers it with full_state_dict=True"
        raise ValueError(f"state_dict must hold {name} whole, as its param is no DTensor; {gather}")
    spec = _SPEC(param)
    if not is_sharded(value):
        whole = sys.modules["torch.distributed.tensor"].distribute_tensor(
            value.to(param.device), spec.mesh, spec.placements, src_data_rank=None
        )
        return like(param, local(whole).clone())
    if (_SPEC(value).mesh, _SPEC(value).placements) != (spec.mesh, spec.placements):
        allowed = f"as its param is: {spec.placements} on {spec.mesh}"
        raise ValueError(f"{name} must be distributed {allowed}; got {_SPEC(value).placements} on {_SPEC(value).mesh}")
    return value
