"""What depth adds to an optimiser: the factors of each parameter as its state, or one balance, and what keeps them fitting it.

The parameter x is the truth. Factors are made of it when first needed, and where x is no longer their product, because somebody
wrote to it, they are made anew.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .._ops.options import is_capturing
from ..kernels.reference.factor_step import product_of
from ..kernels.reference.mirror_step import balanced_factors
from ..kernels.reference.rounding import SIXTEEN, widen_compensated
from ..kernels.reference.steepest_step import compute_dtype
from .initial import PIECE, initial_factors
from .rounding import add_compensation, int16_of
from .sharding import equal, like, local

Storage = Literal["full", "tied", "implicit"]
Init = Literal["identity", "balanced", "lambda", "saddle"]
STORAGES: tuple[Storage, ...] = get_args(Storage)
ROLES = ("factor", "momentum", "compensation")  # of state that is stored for each factor
INITS: tuple[Init, ...] = get_args(Init)
STAGGER_BYTES, STAGGERED_BYTES, PAGE_BYTES = 320, 1 << 20, 4096  # from one tensor to the next; of a tensor; of memory

State = dict[str, Any]

_OWN = re.compile(r"(factor|momentum|compensation)_(\d+|rest)")


def role_of(name: str) -> str | None:
    """What an entry of a parameter's state is to an optimizer here; None of what is a wrapper's or somebody else's."""
    if name in ("momentum", "compensation", "balance"):
        return name
    found = _OWN.fullmatch(name)
    return found and found[1]


@dataclass(frozen=True)
class Depth:
    """The options of one parameter group: pysteep.SteepestDescent says what they mean."""

    depth: int
    storage: str
    init: str
    scale: float | None
    q: float
    compensated: bool
    state_dtype: torch.dtype | None

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Depth:
        own = {name: group[name] for name in ("depth", "storage", "init", "scale", "q", "state_dtype")}
        return cls(**own, compensated=group["rounding"] == "compensated")

    @property
    def tied(self) -> bool:
        return self.storage == "tied"

    def keys(self, role: str) -> list[str]:
        """The names in the state of what is stored for a role, "factor", "momentum" or "compensation"."""
        if self.tied:
            return [f"{role}_1", f"{role}_rest"]
        return [f"{role}_{k}" for k in range(1, self.depth + 1)]

    def witness(self, state: State) -> Tensor:
        """What every step writes to as often as to the parameter, and nobody else writes to."""
        found: Tensor = state["balance" if self.storage == "implicit" else self.keys("factor")[0]]
        return found

    def is_in(self, state: State) -> bool:
        """Whether the state is that of this depth and storage."""
        if self.storage == "implicit":
            return "balance" in state
        keys = self.keys("factor")
        return keys[-1] in state and f"factor_{self.depth + 1}" not in state

    def is_alike(self, other: Depth) -> bool:
        """Whether factors of the other are factors of this."""
        return (self.depth, self.storage) == (other.depth, other.storage)

    def balance(self) -> float:
        """lambda, where one number holds for all coordinates."""
        return 0.0 if self.scale is None else self.scale**self.q

    def create(self, param: Tensor, state: State, *, momentum: bool) -> None:
        """State made of x alone; momenta start at 0. A balance that was loaded for another storage is kept."""
        check_not_captured(param)
        loaded = state.get("balance")
        for name in [*state]:
            if role_of(name):
                del state[name]
        if self.storage == "implicit":
            kept = self.balance() if loaded is None else loaded
            state["balance"] = torch.as_tensor(kept, dtype=torch.float64, device=param.device)
            self.add_compensations(param, state)
            return
        factors = self._fresh(local(param), loaded)
        if self.storage == "full" and param.device.type == "cpu":
            _stagger(factors)
        state.update(zip(self.keys("factor"), [like(param, w) for w in factors], strict=True))
        self.add_compensations(param, state)
        if momentum:
            self.add_momentum(param, state)

    def add_momentum(self, param: Tensor, state: State) -> None:
        for name in self.keys("momentum"):
            if name not in state:
                check_not_captured(param)
                state[name] = zeros(param, self.state_dtype)

    def add_compensations(self, param: Tensor, state: State) -> None:
        """Of factors, or at storage "implicit" of x, where these are of 16 bits."""
        if not self.compensated:
            return
        names = ["compensation"] if self.storage == "implicit" else self.keys("compensation")
        rounded = [param] if self.storage == "implicit" else [state[name] for name in self.keys("factor")]
        for name, tensor in zip(names, rounded, strict=True):
            add_compensation(param, state, name, tensor)

    def check_shapes(self, name: str, param: Tensor, state: State) -> None:
        """Raise ValueError unless what is stored for the factors has the parameter's shape."""
        shape = local(param).shape
        for key in (*self.keys("factor"), *self.keys("momentum")):
            if key in state and local(state[key]).shape != shape:
                raise ValueError(
                    f"{name} must have the shape {tuple(local(state[key]).shape)} of its {key}; got {tuple(shape)}. "
                    f"Where its data was replaced by others, remove its entry from optimizer.state"
                )

    def widen(self, param: Tensor, state: State) -> bool:
        """As `widen`, for all that is stored for the factors; whether anything was narrower than asked."""
        names = [name for role in ("factor", "momentum") for name in self.keys(role) if name in state]
        return widen(param, state, names, self.state_dtype)

    def compensations(self, state: State) -> list[Tensor | None]:
        """Of the factors that are stored, as the ops take them."""
        return [int16_of(state, name) for name in self.keys("compensation")]

    def _values(self, state: State) -> list[Tensor]:
        """The factors that are stored, with their compensations."""
        stored = [local(state[name]) for name in self.keys("factor")]
        return [
            w if low is None else widen_compensated(w, low) for w, low in zip(stored, self.compensations(state), strict=True)
        ]

    def _fresh(self, param: Tensor, balance: Tensor | None = None) -> list[Tensor]:
        param = param.to(dtype_of_state(param, self.state_dtype))
        if balance is not None and float(balance) > 0:
            return initial_factors(param, self.depth, "lambda", float(balance) ** (1 / self.q), self.q, tied=self.tied)
        init = "balanced" if balance is not None else "lambda" if self.init == "saddle" else self.init
        return initial_factors(param, self.depth, init, self.scale, self.q, tied=self.tied)

    @torch.no_grad()
    def repair(self, param: Tensor, state: State, *, roundings: bool) -> bool:
        """Make the factors anew in those coordinates where x is not their product; momenta start again there.

        Returns whether there was any.

        With `roundings` x may be their product as another storage rounds it, or as a narrower parameter held it.
        """
        if self.storage == "implicit":
            return False
        check_not_captured(param)
        param, stored = local(param), [local(state[name]) for name in self.keys("factor")]
        changed = self._changed(param, self._values(state), roundings)
        if not changed.any():
            return False
        for old, new in zip(stored, self._fresh(param), strict=True):
            old.copy_(torch.where(changed, new.to(old.dtype), old))
        for name in self.keys("momentum"):
            if name in state:
                local(state[name]).masked_fill_(changed, 0.0)
        for low in self.compensations(state):
            if low is not None:
                low.masked_fill_(changed, 0)
        return True

    def is_dead(self, param: Tensor, state: State) -> bool:
        """Whether most of a parameter on a CPU is exactly 0 and new factors of it are too, which then have no gradient.

        On a GPU the host would have to wait to know.
        """
        if param.device.type != "cpu":
            return False
        fresh = "lambda" if self.init == "saddle" else self.init
        balance = state["balance"] if self.storage == "implicit" else 0.0 if fresh == "balanced" else None
        x = local(param)
        return balance is not None and float(balance) == 0 and 2 * int((x == 0).sum()) > x.numel()

    def _changed(self, param: Tensor, stored: list[Tensor], roundings: bool) -> Tensor:
        """Where x is not the product of the stored factors, as the kernels round it. NaN equals NaN."""
        changed = torch.empty(param.shape, dtype=torch.bool, device=param.device)
        rows = max(1, PIECE // max(1, param[:1].numel())) if param.ndim else 1
        parts = [t.split(rows) if t.ndim else (t,) for t in (changed, param, *stored)]
        compute = compute_dtype(param.dtype)
        held_in = [param.dtype, *(d for d in (*SIXTEEN, torch.float32) if d != param.dtype and holds(param.dtype, d))]
        for mask, x, *factors in zip(*parts, strict=True):
            product = product_of([w.to(compute) for w in factors], self.depth).to(x.dtype)
            if roundings:  # a NaN that was loaded stays
                fits = product.isnan()
                for dtype in held_in:
                    narrow = x.to(dtype)
                    fits |= torch.isclose(product.to(dtype), narrow, rtol=self._slack(dtype), atol=0) & (narrow == x)
                mask.copy_(~fits)
            else:
                mask.copy_(~((product == x) | (product.isnan() & x.isnan())))
        return changed

    def _slack(self, dtype: torch.dtype) -> float:
        """How far from each other two roundings to `dtype` of one product can be, relative to it."""
        compute = compute_dtype(dtype)
        return 2 * self.depth * torch.finfo(compute).eps + (torch.finfo(dtype).eps if dtype != compute else 0.0)

    @torch.no_grad()
    def factors(self, param: Tensor, state: State) -> list[Tensor]:
        """w_1, ..., w_L; tied ones are the same tensor, implicit ones are made for the occasion."""
        if self.storage == "implicit":
            made = balanced_factors(local(param).detach(), self.q, self.depth, state["balance"])
            first, rest = (like(param, w.to(param.dtype)) for w in made)
            return [first, *[rest] * (self.depth - 1)]
        stored = [state[name] for name in self.keys("factor")]
        return [stored[0], *[stored[1]] * (self.depth - 1)] if self.tied else stored


def dtype_of_state(param: Tensor, state_dtype: torch.dtype | None) -> torch.dtype:
    """Of a parameter's momenta and factors; `state_dtype` is that of parameters of 16 bits."""
    return state_dtype if state_dtype is not None and param.dtype in SIXTEEN else param.dtype


def holds(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether `dtype` has every number of the other."""
    return dtype == other or torch.promote_types(dtype, other) == dtype


def widen(param: Tensor, state: State, names: Iterable[str], state_dtype: torch.dtype | None) -> bool:
    """Give those momenta and factors of a parameter that do not hold all of the dtype asked for one that does.

    So it is with the state of a parameter that was narrower. What compensates a factor is added to it and dropped.

    Returns whether there was any.
    """
    wanted, found = dtype_of_state(param, state_dtype), False
    for name in names:
        if holds(state[name].dtype, wanted):
            continue
        check_not_captured(param)
        value, low = local(state[name]), None
        if name.startswith("factor"):
            compensation = name.replace("factor", "compensation")
            low = int16_of(state, compensation)
            state.pop(compensation, None)
        wide = torch.promote_types(value.dtype, wanted)
        state[name] = like(param, (value if low is None else widen_compensated(value, low)).to(wide))
        found = True
    return found


def zeros(param: Tensor, state_dtype: torch.dtype | None) -> Tensor:
    """State of a parameter's shape and layout, distributed as it is."""
    dtype = dtype_of_state(param, state_dtype)
    return like(param, torch.zeros_like(local(param), dtype=dtype, memory_format=torch.preserve_format))


def momentum_of(param: Tensor, state: State, state_dtype: torch.dtype | None) -> Tensor:
    """That of a parameter of depth 1, made or widened as needed."""
    if "momentum" not in state:
        check_not_captured(param)
        state["momentum"] = zeros(param, state_dtype)
    widen(param, state, ["momentum"], state_dtype)
    momentum: Tensor = state["momentum"]
    return momentum


def compensation_of(param: Tensor, state: State) -> Tensor | None:
    """That of a parameter of depth 1 and 16 bits, made as needed."""
    add_compensation(param, state, "compensation", param)
    return int16_of(state, "compensation")


def check_not_captured(param: Tensor) -> None:
    """Raise RuntimeError while a CUDA graph is captured, which would do at each replay what is done once."""
    if is_capturing(param.device):
        raise RuntimeError(
            "a parameter has no state yet, or was written to since its last step, when a CUDA graph is captured: "
            "take a step before the capture"
        )


def keep_memory(old: State, state: State) -> None:
    """Have new state lie where the old did, if it fits: a CUDA graph that was captured goes on with it."""
    for name, new in state.items():
        place = old.get(name)
        if isinstance(place, Tensor) and isinstance(new, Tensor) and _layout(place) == _layout(new):
            state[name] = place.copy_(new)


def _layout(tensor: Tensor) -> tuple[object, ...]:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _stagger(tensors: list[Tensor]) -> None:
    """Move large tensors to different places within their pages, each still at a cache line's start and alone in its memory.

    The allocator often puts each at the same place. A core that reads one line of each of ten then needs ten lines of the same
    set of its first-level cache, which holds eight: 14 to 30 % of a step's time at depth 10.
    """
    for k, tensor in enumerate(tensors):
        if tensor.numel() * tensor.element_size() < STAGGERED_BYTES:
            continue
        size = tensor.element_size()
        memory = torch.empty(tensor.numel() + PAGE_BYTES // size, dtype=tensor.dtype, device=tensor.device)
        offset = ((k + 1) * STAGGER_BYTES - memory.data_ptr()) % PAGE_BYTES // size
        tensors[k] = memory.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor)


def converted(saved: State, depth: Depth, name: str) -> State:
    """The saved state of one parameter, of whatever storage, as `depth` stores it; ValueError where that is not exact.

    set_optimizer_state_dict adds what it is given to a new state of this storage: what is saved under another one counts then.
    """
    numbered_keys = [key for key in saved if _OWN.fullmatch(key)]
    result = {key: value for key, value in saved.items() if key not in numbered_keys and key != "balance"}
    if "balance" in saved and (depth.storage != "implicit" or not numbered_keys):
        return {**result, "balance": saved["balance"]}
    for role in ROLES:
        found = [key for key in numbered_keys if role_of(key) == role]
        if not found:
            continue
        if depth.storage == "implicit":
            raise ValueError(f"state_dict holds the factors of {name}: storage must be 'full' or 'tied'; got 'implicit'")
        numbered = [key for key in found if key != f"{role}_rest"]
        tied = len(numbered) < len(found) and (len(numbered) <= 1 or not depth.tied)
        keys = [f"{role}_1", f"{role}_rest"] if tied else [f"{role}_{k + 1}" for k in range(len(numbered))]
        values: list[Any] = [saved.get(key) for key in keys]
        if not all(isinstance(value, Tensor) for value in values):
            raise ValueError(f"state_dict must hold the {role}s of {name} as {', '.join(depth.keys(role))}; got {[*saved]}")
        if tied:
            values += [values[1].clone() for _ in range(depth.depth - 2) if not depth.tied]
        elif len(values) != depth.depth:
            raise ValueError(f"state_dict holds {len(values)} {role}s of {name}; its depth is {depth.depth}")
        if depth.tied:
            if not all(equal(values[1], other) for other in values[2:]):
                raise ValueError(
                    f"state_dict holds {role}s 2 to {depth.depth} of {name} that differ: storage must be 'full'; got 'tied'"
                )
            values = values[:2]
        result.update(zip(depth.keys(role), values, strict=True))
    return result
