"""Arguments that no caller should give, each of which must raise or work, never crash: run by test_hostile.py in a process.

`python -m tests.support.hostile_cases BACKEND` prints each case's name before it runs it: the last one is that which ended a
process that died. What went wrong otherwise follows the name.
"""

from __future__ import annotations

import functools
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.masked import masked_tensor

from pysteep import SteepestDescent, functional
from pysteep._ops.dispatch import extension
from tests.support.cases import same_bits

CASES: dict[str, Callable[[str], None]] = {}
PRIVATE: dict[str, Callable[[], None]] = {}
N = 100


def case(function: Callable[[str], None]) -> Callable[[str], None]:
    CASES[function.__name__] = function
    return function


def private(function: Callable[[], None]) -> Callable[[], None]:
    PRIVATE[function.__name__] = function
    return function


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(*(shape or (N,)), dtype=dtype)


def balance(value: float = 0.1) -> Tensor:
    return torch.tensor(value, dtype=torch.float64)


def freed(tensor: Tensor) -> Tensor:
    tensor.untyped_storage().resize_(0)
    return tensor


def steps(x: Any, g: Any, backend: str, **changes: Any) -> dict[str, Callable[[], None]]:
    """Each op that takes a weight and its gradient."""
    options = {"lr": 0.1, "backend": backend, **changes}
    plain = functools.partial(functional.steepest_step, **options)
    return {
        "plain": lambda: plain([x], [g]),
        "momentum": lambda: plain([x], [g], [ones()], betas=(0.9, 0.9)),
        "full": lambda: functional.factor_step([x], [g], [[ones(), ones(), ones()]], depth=3, **options),
        "tied": lambda: functional.factor_step([x], [g], [[ones(), ones()]], depth=3, **options),
        "implicit": lambda: functional.mirror_step([x], [g], [balance()], depth=3, **options),
    }


def refused(bad: Callable[[], Any], errors: Any, message: str, backend: str) -> None:
    """As a weight and as a gradient, beside a good tensor that must not have been written."""
    for role in ("weight", "gradient"):
        for name in ("plain", "full", "implicit"):
            x, g = (bad(), ones()) if role == "weight" else (ones(), bad())
            before = None if role == "weight" else x.clone()
            with pytest.raises(errors, match=message):
                steps(x, g, backend)[name]()
            assert before is None or torch.equal(x, before), name


@case
def freed_storage(backend: str) -> None:
    refused(lambda: freed(ones()), TypeError, "must hold its own memory", backend)
    for own in ([freed(ones()), ones()], [ones(), freed(ones())]):
        with pytest.raises(TypeError, match=r"factor . of param 0 must hold its own memory"):
            functional.factor_step([ones()], [ones()], [own], depth=2, lr=0.1, backend=backend)
        with pytest.raises(TypeError, match=r"momentum . of param 0 must hold its own memory"):
            functional.factor_step(
                [ones()], [ones()], [[ones(), ones()]], [own], depth=2, lr=0.1, betas=(0.9, 0.9), backend=backend
            )
        with pytest.raises(TypeError, match="must hold their own memory"):
            functional.factor_product(own, backend=backend)
    with pytest.raises(TypeError, match="momentum 0 must hold its own memory"):
        functional.steepest_step([ones()], [ones()], [freed(ones())], lr=0.1, betas=(0.9, 0.9), backend=backend)
    for number in ("lr", "grad_scale", "found_inf"):
        with pytest.raises(RuntimeError, match="not allocated"):
            steps(ones(), ones(), backend, **{number: freed(torch.tensor(1.0))})["plain"]()


@case
def freed_layouts(backend: str) -> None:
    for bad in (freed(ones(8, 7).t()), freed(ones(7, 16)[:, ::2])):
        for x, g in ((bad, ones(7, 8)), (ones(7, 8), bad)):
            with pytest.raises(TypeError, match="must hold its own memory"):
                functional.steepest_step([x], [g], lr=0.1, backend=backend)


@case
def freed_balance(backend: str) -> None:
    x = ones()
    with pytest.raises(TypeError, match="balance 0 must hold its own memory"):
        functional.mirror_step([x], [ones()], [freed(balance())], depth=2, lr=0.1, backend=backend)
    assert torch.equal(x, ones())


@case
def freed_parameter_and_state(backend: str) -> None:
    for options, name in (({"betas": (0.9, 0.9)}, "momentum"), ({"depth": 3}, "factor_rest")):
        p = nn.Parameter(ones())
        optimizer = SteepestDescent([p], **options, backend=backend)
        p.grad = ones()
        optimizer.step()
        before = p.detach().clone()
        kept = optimizer.state[p][name]
        optimizer.state[p][name] = freed(kept.clone())
        with pytest.raises(TypeError, match="must hold its own memory"):
            optimizer.step()
        assert torch.equal(p, before)
        optimizer.state[p][name] = kept
        freed(p.data)
        with pytest.raises((TypeError, RuntimeError), match=r"must hold its own memory|out of bounds"):
            optimizer.step()


@case
def stand_ins(backend: str) -> None:
    """Tensors that are something else: zeros of forward-mode differentiation, masked, functionalised, fake, batched ones."""
    if backend != "reference":
        refused(lambda: masked_tensor(ones(), ones().bool()), (TypeError, RuntimeError), "memory|subclass", backend)
    refused(lambda: torch._efficientzerotensor(N), TypeError, "must hold its own memory", backend)
    with FakeTensorMode():
        fake, fake_balance = ones(), balance()
        for step in steps(fake, ones(), backend).values():
            with pytest.raises(TypeError, match="must hold its own memory; got a FakeTensor"):
                step()
    refused(lambda: fake, TypeError, "must hold its own memory; got a FakeTensor", backend)
    with pytest.raises(TypeError, match="balance 0 must hold its own memory"):
        functional.mirror_step([ones()], [ones()], [fake_balance], depth=2, lr=0.1, backend=backend)

    def stepped(name: str) -> Callable[[Tensor], Tensor]:
        def run(w: Tensor) -> Tensor:
            steps(w, w.clone(), backend)[name]()
            return w.sum()

        return run

    for name in ("plain", "full", "implicit"):
        for transform in (torch.func.functionalize, torch.func.grad):
            with pytest.raises((TypeError, RuntimeError)):
                transform(stepped(name))(ones())
        with pytest.raises((TypeError, RuntimeError)):
            torch.func.vmap(stepped(name))(ones(3, N))


@case
def zeros_of_forward_mode(backend: str) -> None:
    """A product takes them: they are tangents and gradients like others."""
    zero = torch._efficientzerotensor(N)
    assert torch.equal(functional.factor_product([ones(), zero], backend=backend), torch.zeros(N))
    a, b = torch.randn(N), torch.randn(N)
    product = functools.partial(functional.factor_product, backend=backend)
    _, tangent = torch.func.jvp(lambda u, v: product([u, v]), (a, b), (ones(), zero))
    assert torch.equal(tangent, b)


@case
def other_layouts_and_dtypes(backend: str) -> None:
    bad: dict[str, Callable[[], Tensor]] = {
        "coo": lambda: ones().to_sparse(),
        "csr": lambda: ones(10, 10).to_sparse_csr(),
        "mkldnn": lambda: ones().to_mkldnn(),
        "jagged": lambda: torch.nested.nested_tensor([ones(2), ones(3)], layout=torch.jagged),
        "int64": lambda: ones(N, dtype=torch.int64),
        "bool": lambda: ones(N, dtype=torch.bool),
        "uint8": lambda: ones(N, dtype=torch.uint8),
        "float8": lambda: ones().to(torch.float8_e4m3fn),
        "quantised": lambda: torch.quantize_per_tensor(ones(), 0.1, 0, torch.qint8),
    }
    for make in bad.values():
        refused(make, (TypeError, ValueError), "must be|must have", backend)
        with pytest.raises(TypeError, match="factor 0 must be"):
            functional.factor_product([make(), make()], backend=backend)
    refused(lambda: torch.nested.nested_tensor([ones(2), ones(3)]), (TypeError, RuntimeError), "Nested|must be", backend)


@case
def no_tensors(backend: str) -> None:
    for bad in (None, 1.0, "x", [1.0], np.ones(N, np.float32)):
        for name in ("plain", "momentum", "full", "tied", "implicit"):
            with pytest.raises(TypeError, match="param 0 must be a torch"):
                steps(bad, ones(), backend)[name]()
            if bad is not None:
                with pytest.raises(TypeError, match="gradient 0 must be a torch"):
                    steps(ones(), bad, backend)[name]()
        with pytest.raises(TypeError, match="factor 1 of param 0 must be a torch"):
            functional.factor_step([ones()], [ones()], [[bad, ones()]], depth=2, lr=0.1, backend=backend)
        with pytest.raises(TypeError, match="balance 0 must be a torch"):
            functional.mirror_step([ones()], [ones()], [bad], depth=2, lr=0.1, backend=backend)
        with pytest.raises(TypeError, match="factor 1 must be a torch"):
            functional.factor_product([ones(), bad], backend=backend)


@case
def lists_of_other_lengths(backend: str) -> None:
    w = ones()
    three = [w, w.clone(), w.clone()]
    for grads in ([], [w.clone()], [w.clone()] * 4):
        for call in (
            lambda grads: functional.steepest_step(three, grads, lr=0.1, backend=backend),
            lambda grads: functional.factor_step(three, grads, [[w, w]] * 3, depth=2, lr=0.1, backend=backend),
            lambda grads: functional.mirror_step(three, grads, [balance()] * 3, depth=2, lr=0.1, backend=backend),
        ):
            with pytest.raises(ValueError, match="grads must hold one entry for each of the 3 params"):
                call(grads)
    for factors in ([], [[w, w]], [[w, w], [w, w], []], [[w, w], [w, w], [w]], [[w, w, w]] * 3, [[]] * 3):
        with pytest.raises(ValueError, match="factors"):
            functional.factor_step(three, three, factors, depth=2, lr=0.1, backend=backend)
    for momenta in ([], [[w, w]] * 2, [[w], [w], [w]], [[w, w, w]] * 3):
        with pytest.raises(ValueError, match="momenta"):
            functional.factor_step(three, three, [[w, w]] * 3, momenta, depth=2, lr=0.1, betas=(0.9, 0.9), backend=backend)
    for balances in ([], [balance()], [balance()] * 4):
        with pytest.raises(ValueError, match="balances must hold one entry"):
            functional.mirror_step(three, three, balances, depth=2, lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="factors must hold 1 to 64"):
        functional.factor_product([w] * 65, backend=backend)
    assert torch.equal(w, ones())


@case
def shapes_dtypes_and_devices_that_differ(backend: str) -> None:
    for bad in (ones(N + 1), ones(N - 1), ones(N, 1), ones(1), torch.tensor(1.0), ones(0)):
        refused_gradient = steps(ones(), bad, backend)
        for name in ("plain", "momentum", "full", "tied", "implicit"):
            with pytest.raises(ValueError, match="gradient 0 must have its param's shape"):
                refused_gradient[name]()
        with pytest.raises(ValueError, match="factor 1 must have factor 0's shape"):
            functional.factor_product([ones(), bad], backend=backend)
        with pytest.raises(ValueError, match="factor 2 of param 0 must have its param's shape"):
            functional.factor_step([ones()], [ones()], [[ones(), bad]], depth=2, lr=0.1, backend=backend)
    for name in ("plain", "momentum", "full", "tied", "implicit"):
        with pytest.raises(ValueError, match="gradient 0 must be on its param's device"):
            steps(ones(), torch.ones(N, device="meta"), backend)[name]()


@case
def meta_tensors(backend: str) -> None:
    meta = torch.ones(N, device="meta")
    for name in ("plain",):
        if backend == "reference":
            steps(meta, meta.clone(), backend)[name]()  # it serves any device, and this one computes nothing
        else:
            with pytest.raises(RuntimeError, match="not meta ones"):
                steps(meta, meta.clone(), backend)[name]()


@case
def shared_memory_within_a_tensor(backend: str) -> None:
    for make in (
        lambda: torch.ones(1).expand(N),
        lambda: torch.ones(N + 1).as_strided((N, 2), (1, 1)),
        lambda: torch.ones(N).as_strided((2, N), (0, 1)),
        lambda: torch.ones(1).expand(2**40),
    ):
        for name in ("plain", "full", "implicit"):
            x = make()
            g = torch.ones(1).expand(x.shape)
            operands: dict[str, Callable[[], None]] = {
                "plain": lambda x=x, g=g: functional.steepest_step([x], [g], lr=0.1, backend=backend),
                "full": lambda x=x, g=g: functional.factor_step([x], [g], [[x, x]], depth=2, lr=0.1, backend=backend),
                "implicit": lambda x=x, g=g: functional.mirror_step([x], [g], [balance()], depth=2, lr=0.1, backend=backend),
            }
            with pytest.raises(ValueError, match="must not share memory"):
                operands[name]()
    for name in ("plain", "full", "tied", "implicit"):  # a gradient is only read
        x, y = ones(), ones()
        steps(x, torch.ones(1).expand(N), backend)[name]()
        steps(y, ones(), backend)[name]()
        assert same_bits(x, y)


@case
def sizes_that_overflow(backend: str) -> None:
    """No elements, though the product of the other sizes is no int64."""
    x = torch.empty(0).as_strided((0, 2**62, 2**62), (1, 1, 1))
    for name in ("plain", "full", "implicit"):
        own = {"plain": {}, "full": {"factors": [[x, x]], "depth": 2}, "implicit": {"balances": [balance()], "depth": 2}}[name]
        op = {"plain": "steepest_step", "full": "factor_step", "implicit": "mirror_step"}[name]
        getattr(functional, op)([x, ones()], [x, None], lr=0.1, backend=backend, **_beside(own))
    p = nn.Parameter(x)
    for options in ({}, {"depth": 3, "betas": (0.9, 0.9)}, {"depth": 3, "storage": "implicit", "init": "balanced"}):
        p.grad = x
        SteepestDescent([p], **options, backend=backend).step()
    with pytest.raises(RuntimeError):
        functional.factor_product([torch.ones(1).expand(2**45)] * 2, backend=backend)  # no machine has the memory


def _beside(own: dict[str, Any]) -> dict[str, Any]:
    """The same for a second weight."""
    second = {"factors": [ones(), ones()], "balances": balance()}
    return {name: [*value, second[name]] if name in second else value for name, value in own.items()}


@case
def addresses_that_no_element_is_aligned_to(backend: str) -> None:
    """A byte too far in a buffer, as of a file's header: the same bits as anywhere else."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        for offset in (1, 3):
            count = 1031
            memory = [bytearray(count * dtype.itemsize + offset + 1) for _ in range(4)]
            x, g, a, b = (torch.frombuffer(m, dtype=dtype, offset=offset, count=count) for m in memory)
            assert x.data_ptr() % dtype.itemsize
            for t in (x, g, a, b):
                t.copy_(torch.randn(count))
            lam = balance()
            for step in ("steepest", "factor", "mirror"):
                twins = [t.clone() for t in (x, g, a, b)]
                for x_, g_, a_, b_ in ((x, g, a, b), twins):
                    options = {"lr": 0.1, "q": 1.25, "weight_decay": 0.1, "backend": backend}
                    if step == "steepest":
                        functional.steepest_step([x_], [g_], [a_], betas=(0.9, 0.99), **options)
                    elif step == "factor":
                        functional.factor_step([x_], [g_], [[a_, b_]], depth=3, **options)
                    else:
                        functional.mirror_step([x_], [g_], [lam.clone()], depth=3, **options)
                assert all(map(same_bits, (x, g, a, b), twins)), (dtype, offset, step)
            assert same_bits(
                functional.factor_product([a, b], backend=backend),
                functional.factor_product([a.clone(), b.clone()], backend=backend),
            )
            assert all(m[0] == 0 and m[-1] == 0 for m in memory)


@case
def numbers_that_are_none(backend: str) -> None:
    w = ones()
    huge = 10**400
    bad: list[dict[str, Any]] = [
        *({"lr": v} for v in (float("nan"), -1.0, huge, "x", None, torch.ones(2), torch.ones(0), torch.tensor(1))),
        *({"lr": torch.tensor(v)} for v in (float("nan"), -1.0)),
        *({"q": v} for v in (float("nan"), 0.5, huge, "x", None)),
        *({"weight_decay": v} for v in (float("nan"), float("inf"), huge, "x", None)),
        *({"grad_scale": v} for v in (torch.ones(2), "x")),
        *({"found_inf": v} for v in (torch.ones(2), "x")),
    ]
    for options in bad:
        for step in steps(w, ones(), backend, **options).values():
            with pytest.raises((TypeError, ValueError)):
                step()
    for betas in (0.9, (0.9,), (0.9, 0.9, 0.9), (0.9, 1.0), (float("nan"), 0.9), "ab", None):
        with pytest.raises(ValueError, match="betas must be two numbers"):
            functional.steepest_step([w], [ones()], lr=0.1, betas=betas, backend=backend)
    for depth in (0, -1, 65, 2.0, "2", None, True, 2**63, huge):
        with pytest.raises(ValueError, match="depth must be"):
            functional.mirror_step([w], [ones()], [balance()], depth=depth, lr=0.1, backend=backend)
        with pytest.raises(ValueError, match=r"depth must be|factors of param 0 must be"):
            functional.factor_step([w], [ones()], [[w, w, w]], depth=depth, lr=0.1, backend=backend)
        with pytest.raises(ValueError, match="depth must be"):
            SteepestDescent([nn.Parameter(w)], depth=depth, backend=backend)
    for depth in (2**31, 2**63, huge):
        with pytest.raises(ValueError, match="depth must be an int from 2 to"):
            functional.factor_step([w], [ones()], [[w, w]], depth=depth, lr=0.1, backend=backend)
    for unknown in ("gpu", 3):
        with pytest.raises(ValueError, match="backend must be one of"):
            functional.steepest_step([w], [ones()], lr=0.1, backend=unknown)
    assert torch.equal(w, ones())


@case
def greatest_tied_depth(backend: str) -> None:
    x, first, rest = ones(), ones(), ones()
    functional.factor_step([x], [-ones()], [[first, rest]], depth=2**31 - 1, lr=2.0**-31, backend=backend)
    assert bool(x.isfinite().all())


@case
def subclasses_and_views(backend: str) -> None:
    class Plain(Tensor):
        pass

    for wrap in (
        lambda t: t.as_subclass(Plain),
        nn.Parameter,
        torch._lazy_clone,
        lambda t: torch.stack([t, -t], 1).view(torch.complex64)[:, 0].real,
        lambda t: torch.stack([t, -t], 1).view(torch.complex64)[:, 0].conj().imag,
    ):
        for name in ("plain", "full", "implicit"):
            values, g = torch.randn(N), torch.randn(N)
            with torch.no_grad():
                x, expected = wrap(values), values.clone()
            steps(x, wrap(g), backend)[name]()
            steps(expected, g, backend)[name]()
            assert same_bits(x.detach().resolve_neg(), expected), name


@case
def inference_tensors(backend: str) -> None:
    for name in ("plain", "full", "implicit"):
        x = ones()
        steps(x, ones(), backend)[name]()
        with torch.inference_mode():
            inside = ones()
            steps(inside, ones(), backend)[name]()
        assert same_bits(x, inside)


# ---- what the extension's own module is given: its lists, codes and sizes are checked, its addresses taken on trust


def csrc_tensors(**changes: Any) -> Any:
    lists = {"roles": [[0], [0]], "numel": [0], "dtypes": [2, 2], "on_cuda": False, "device_index": 0} | changes
    return extension.Tensors(*lists.values())


def csrc_options(**changes: Any) -> Any:
    numbers = {"q": 1.0, "beta1": 0.0, "beta2": 0.0, "weight_decay": 0.0, "coupled": 0.0, "maximize": False}
    scalars = {"lr": 0.1, "step_scale": 1.0, "grad_scale": 1.0, "found_inf": 0.0}
    return extension.SteepestOptions(*(numbers | scalars | changes).values())


@private
def csrc_lists_of_tensors() -> None:
    for changes in (
        {"roles": []},
        {"dtypes": []},
        {"dtypes": [2]},
        {"dtypes": [2, 2, 2]},
        {"dtypes": [2, 5]},
        {"dtypes": [2, -1]},
        {"numel": [-1]},
        {"numel": []},
        {"numel": [0, 0]},
        {"roles": [[0], []]},
        {"roles": [[0], [0, 0]]},
    ):
        with pytest.raises(ValueError, match=r"pysteep\._csrc"):
            csrc_tensors(**changes)
    for changes in ({"roles": 3}, {"roles": [["a"], [0]]}, {"roles": [[2**70], [0]]}, {"numel": None}):
        with pytest.raises(TypeError):
            csrc_tensors(**changes)
    api = Tensor.__dlpack_c_exchange_api__
    with pytest.raises(ValueError, match="a list of weights"):
        extension.flat_tensors(api, Tensor, [], 0)
    with pytest.raises(TypeError):
        extension.flat_tensors(None, Tensor, [[ones()]], 0)
    for lists in ([[ones()], []], [[1], [2]], [[None], [ones()]], [[ones()], [ones(3)]]):
        assert extension.flat_tensors(api, Tensor, lists, 0) is None


@private
def csrc_plain_gradients() -> None:
    parameter, bare, frozen = nn.Parameter(ones()), nn.Parameter(ones()), nn.Parameter(ones())
    parameter.grad, frozen.grad = ones(), ones()
    frozen.requires_grad_(False)
    of = functools.partial(extension.plain_gradients, Tensor, nn.Parameter)
    gradients = functools.partial(of, Tensor.grad, Tensor.requires_grad)
    assert gradients([parameter])[0][0] is parameter.grad
    assert gradients([parameter])[1] is True
    assert gradients([bare]) == gradients([frozen]) == ([None], False)
    assert gradients([]) == ([], True)
    of_a_subclass = ones().as_subclass(type("Subclass", (Tensor,), {}))
    for params in ([parameter, of_a_subclass], [None], [3, parameter], [nn.Parameter]):
        assert gradients(params) is None
    for grad in (None, 3, "grad"):
        with pytest.raises(ValueError, match="attribute of a type"):
            of(grad, Tensor.requires_grad, [parameter])
        with pytest.raises(ValueError, match="attribute of a type"):
            of(Tensor.grad, grad, [parameter])
    for params in (None, (parameter,), parameter):
        with pytest.raises(TypeError):
            gradients(params)
    with pytest.raises(TypeError):
        gradients(dict.keys, [parameter])


@private
def csrc_steps() -> None:
    one, two, four = csrc_tensors(roles=[[0]], dtypes=[2]), csrc_tensors(), csrc_tensors(roles=[[0]] * 4, dtypes=[2] * 4)
    options, nearest = csrc_options(), extension.Rounding(0, 0, 0.0, [], [])
    narrow = csrc_tensors(roles=[[0]] * 3, dtypes=[1, 1, 4])
    for suffix in ("_cpu", "_cuda_on_host") if extension.cuda_architectures() else ("_cpu",):
        for op in ("steepest_step", "steepest_power_sum"):
            with pytest.raises(ValueError, match="weights and gradients"):
                getattr(extension, op + suffix)(one, options, nearest)
        step = getattr(extension, "steepest_step" + suffix)
        for tensors, rounding in (
            (two, extension.Rounding(1, 0, 0.0, [], [0])),
            (two, extension.Rounding(1, 0, 0.0, [0], [])),
            (two, extension.Rounding(2, 0, 0.0, [], [])),
            (two, extension.Rounding(3, 0, 0.0, [], [])),
            (csrc_tensors(roles=[[0]] * 3, dtypes=[1, 1, 1]), extension.Rounding(2, 0, 0.0, [], [])),
            (narrow, nearest),
        ):
            with pytest.raises(ValueError, match=r"pysteep\._csrc"):
                step(tensors, options, rounding)
        step = getattr(extension, "factor_step" + suffix)
        for tensors, stored, depth in (
            (four, 0, 0),
            (four, -1, -1),
            (four, 3, 3),
            (two, 2, 2),
            (four, 2, 1),
            (four, 65, 65),
            (one, 2, 2),
        ):
            with pytest.raises(ValueError, match=r"pysteep\._csrc"):
                step(tensors, stored, depth, options, nearest)
        step = getattr(extension, "mirror_step" + suffix)
        for tensors, balances, depth in ((one, [0], 2), (two, [], 2), (two, [0, 0], 2), (two, [0], 1), (two, [0], 65)):
            with pytest.raises(ValueError, match=r"pysteep\._csrc"):
                step(tensors, balances, depth, options, nearest)
    for code in (-1, 0, 1, 4):
        with pytest.raises(ValueError, match="a number's dtype code"):
            csrc_options(lr=(0, code))
    with pytest.raises(TypeError):
        csrc_options(lr="x")


@private
def csrc_products_and_flows() -> None:
    for arguments in (
        (-1, 2, [0], [], 0, 0, []),
        (0, 4, [0], [], 0, 0, []),
        (0, 2, [], [], 0, 0, []),
        (0, 2, [0] * 65, [], 0, 0, []),
        (0, 2, [0, 0], [0], 0, 0, []),
        (0, 2, [0, 0], [], 0, 0, [0]),
    ):
        with pytest.raises(ValueError, match=r"pysteep\._csrc"):
            extension.Product(*arguments)
    good: dict[str, Any] = {
        "sizes": (0, 1, 1),
        "tensors": [0] * 5,
        "of_runs": [0] * 7,
        "batch_size": 0,
        "loss": 0,
        "mean": True,
        "adam": (0.0, 0.0, 0.0),
        "dtype": 2,
    }
    for changes in ({"sizes": (-1, 1, 1)}, {"sizes": (0, 1, -1)}, {"batch_size": -1}, {"loss": 2}, {"dtype": 0}):
        with pytest.raises(ValueError, match=r"pysteep\._csrc"):
            extension.DiagonalFlows(*(good | changes).values())
    for changes in ({"sizes": (1, 1)}, {"tensors": [0] * 4}, {"of_runs": [0] * 8}, {"adam": ()}):
        with pytest.raises(TypeError):
            extension.DiagonalFlows(*(good | changes).values())
    with pytest.raises(ValueError, match="select_isa"):
        extension.select_isa("avx1024")


def main(backend: str) -> int:
    warnings.simplefilter("ignore")
    failures = 0
    runs = PRIVATE if backend == "csrc" else {name: functools.partial(run, backend) for name, run in CASES.items()}
    for name, run in runs.items():
        print(name, flush=True)
        try:
            run()
        except (Exception, pytest.fail.Exception):
            failures += 1
            traceback.print_exc(file=sys.stdout)
    return failures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]) != 0)
