"""What hypothesis draws for test_fuzz.py: parameter groups, tensors and what happens to them. An option is one line here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.support.cases import DTYPES, GENERAL_QS, LAYOUTS, laid_out, random_values

RATES = (0.0, 1e-3, 0.01, 0.05, torch.tensor(0.01), torch.tensor([0.05], dtype=torch.float64))
NORMS = (0.5, 30.0, torch.tensor(1e3))  # of gradients that are clipped to 1

OPTIONS: dict[str, st.SearchStrategy[Any]] = {
    "lr": st.sampled_from(RATES),
    "q": st.sampled_from((1.0, 1.0, 1.5, 2.0, *GENERAL_QS)),
    "betas": st.sampled_from(((0.0, 0.0), (0.0, 0.0), (0.9, 0.99), (0.9, 0.9), (0.0, 0.5), (0.5, 0.0))),
    "weight_decay": st.sampled_from((0.0, 0.3, 3)),
    "coupled_weight_decay": st.sampled_from((0.0, 0.1)),
    "normalize": st.sampled_from((False, False, True)),
    "maximize": st.booleans(),
    "depth": st.sampled_from((1, 1, 2, 3, 5)),
    "storage": st.sampled_from(("full", "tied", "implicit")),
    "init": st.sampled_from(("identity", "balanced", "lambda", "saddle")),
    "scale": st.sampled_from((0.5, 1.25)),
    "rounding": st.sampled_from(("nearest", "stochastic", "compensated")),
    "seed": st.sampled_from((0, 7, 2**32, 2**64 - 1)),
    "state_dtype": st.sampled_from((None, None, torch.float32)),
}

# Values that no option takes; None where the option means something by it.
BAD_OPTIONS: dict[str, tuple[Any, ...]] = {
    "lr": (-1.0, float("nan"), float("inf"), "1", None, torch.ones(2), torch.tensor(-1.0), torch.tensor(1)),
    "q": (0.99, 2.01, float("nan"), "1", None),
    "betas": ((0.9, 1.0), (-0.1, 0.9), 0.9, (0.9,), (float("nan"), 0.9), ("a", "b"), None),
    "weight_decay": (-1.0, float("nan"), float("inf"), "1", None),
    "coupled_weight_decay": (-1.0, float("nan"), float("inf"), "1", None),
    "depth": (0, -1, 65, 2.0, True, "2", None),
    "storage": ("half", "", None, 1),
    "init": ("zero", "dwf", "variance", None, 1),
    "scale": (0.0, -1.0, float("nan"), float("inf"), "1"),
    "rounding": ("up", "", None, 1),
    "seed": (-1, 1.5, 2**64, True, "0", None),
    "state_dtype": (torch.bfloat16, torch.float64, torch.int16, "float32", 32),
}


def compatible(options: dict[str, Any]) -> dict[str, Any]:
    """The options with those changed that do not go with the others."""
    changed = dict(options)
    if changed["depth"] == 1:
        changed |= {"storage": "tied", "init": "identity"}
    else:
        changed |= {"normalize": False}
        if changed["storage"] == "implicit":
            changed |= {"betas": (0.0, 0.0), "coupled_weight_decay": 0.0}
            changed["init"] = "balanced" if changed["init"] == "identity" else changed["init"]
    if changed["init"] not in ("lambda", "saddle"):
        changed["scale"] = None
    return changed


group_options = st.fixed_dictionaries(OPTIONS).map(compatible)
narrow_options = group_options.map(lambda options: options | {"q": 1.0 if options["q"] <= 1.5 else 1.25})

sizes = st.one_of(
    st.just(()),
    st.sampled_from(((0,), (3, 0, 2), (1,), (511,), (513,), (1100,))),
    st.tuples(*[st.integers(1, 5)] * 4),
)


@dataclass(frozen=True)
class Described:
    """A parameter: what makes the same tensor whenever it is asked for."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    layout: str
    gradient_layout: str
    gradient_dtype: torch.dtype | None
    values: str

    def draw(self, layout: str, dtype: torch.dtype) -> Tensor:
        """New random values in memory of that layout."""
        values = random_values(self.shape, dtype, wide=self.values == "wide", special=self.values == "special")
        if len(self.shape) == 4:
            return laid_out(values, layout)
        if len(self.shape) == 1 and layout in ("strided", "sliced", "unaligned"):
            owner = torch.full((2 * values.numel() + 1,), 7.0, dtype=dtype)
            return (owner[1::2] if layout == "strided" else owner[1 : values.numel() + 1]).copy_(values)
        return values

    def value(self) -> Tensor:
        return self.draw(self.layout, self.dtype)

    def gradient(self) -> Tensor:
        return self.draw(self.gradient_layout, self.gradient_dtype or self.dtype)


def parameters(dtypes: tuple[torch.dtype, ...] = DTYPES, mixed: bool = True) -> st.SearchStrategy[Described]:
    return st.builds(
        Described,
        shape=sizes,
        dtype=st.sampled_from(dtypes),
        layout=st.sampled_from(LAYOUTS),
        gradient_layout=st.sampled_from(LAYOUTS),
        gradient_dtype=st.sampled_from((None, None, None, *DTYPES)) if mixed else st.none(),
        values=st.sampled_from(("plain", "plain", "wide", "special")),
    )


Group = tuple[dict[str, Any], list[Described]]


def fitting(group: Group) -> Group:
    """The group without float64 parameters where these do not go with its options."""
    options, described = group
    if options["state_dtype"] is None:
        return group
    return options, [replace(one, dtype=torch.float32) if one.dtype == torch.float64 else one for one in described]


def groups(
    options: st.SearchStrategy[dict[str, Any]], params: st.SearchStrategy[Described], most: int
) -> st.SearchStrategy[Group]:
    return st.tuples(options, st.lists(params, min_size=1, max_size=most)).map(fitting)


@dataclass(frozen=True)
class Action:
    """One thing that happens: `name` a method of test_fuzz.Run, `number` what chooses among its variants."""

    name: str
    number: int


# What happens, as often as it is written.
ACTIONS = ("step", "step", "step", "step", "reload", "write", "set_lr", "add_group", "refactor", "change_option")

actions = st.lists(st.builds(Action, st.sampled_from(ACTIONS), st.integers(0, 1 << 16)), min_size=1, max_size=6)


@dataclass(frozen=True)
class Case:
    home: str
    groups: list[Group]
    actions: list[Action]
    seed: int


def cases(homes: list[str], *, narrow: bool = False) -> st.SearchStrategy[Case]:
    """`narrow`: of few dtypes and powers, for a home that compiles for each."""
    params = parameters((torch.float32, torch.bfloat16), mixed=False) if narrow else parameters()
    group = groups(narrow_options if narrow else group_options, params, 3)
    return st.builds(
        Case,
        home=st.sampled_from(homes),
        groups=st.lists(group, min_size=2, max_size=3),  # the last one joins later
        actions=actions,
        seed=st.integers(0, 1 << 32),
    )


bad_option = st.sampled_from([(name, value) for name, values in BAD_OPTIONS.items() for value in values])
