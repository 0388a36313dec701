"""Bad input gets an error that names the argument, the value and what is allowed, before anything is written."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import pysteep
from pysteep import SteepestDescent
from tests.support.cases import BACKENDS

BAD_OPTIONS = [
    ({"q": 0.9}, "q must be"),
    ({"q": 2.1}, "q must be"),
    ({"q": float("nan")}, "q must be"),
    ({"q": "1"}, "q must be"),
    ({"lr": -1e-3}, "lr must be"),
    ({"lr": float("nan")}, "lr must be"),
    ({"lr": torch.tensor([1.0, 2.0])}, "lr must be"),
    ({"lr": torch.tensor(-1.0)}, "lr must be"),
    ({"betas": (0.9, 1.0)}, "betas must be"),
    ({"betas": (-0.1, 0.9)}, "betas must be"),
    ({"betas": 0.9}, "betas must be"),
    ({"betas": torch.tensor([0.9, 0.99])}, "betas must be two numbers in"),
    ({"betas": (torch.tensor(1.0), 0.9)}, r"betas must be two numbers in \[0, 1\), or .* got \(tensor\(1\.\), 0\.9\)"),
    ({"betas": (0.9, torch.tensor(-0.1))}, "betas must be"),
    ({"betas": (torch.tensor(float("nan")), 0.9)}, "betas must be"),
    ({"betas": (torch.tensor([0.9, 0.9]), 0.9)}, "betas must be"),
    ({"betas": (0.9, torch.tensor(0))}, "betas must be"),
    ({"betas": (0.9, torch.tensor(0.5j))}, "betas must be"),
    ({"weight_decay": -1.0}, "^weight_decay must be"),
    ({"coupled_weight_decay": float("inf")}, "coupled_weight_decay must be"),
    ({"lr": float("inf")}, "lr must be a finite number >= 0; got inf"),
    ({"lr": torch.tensor(float("inf"))}, r"lr must be a finite number >= 0; got tensor\(inf\)"),
    ({"lr": True}, "lr must be a finite number >= 0; got True"),
    ({"lr": "0.1"}, "lr must be a finite number >= 0; got '0.1'"),
    ({"q": True}, r"q must be a number in \[1, 2\].*; got True"),
    ({"betas": ("0", "0")}, r"betas must be two numbers in \[0, 1\)"),
    ({"betas": (False, 0.5)}, r"betas must be two numbers in \[0, 1\)"),
    ({"weight_decay": True}, "^weight_decay must be a finite number >= 0; got True"),
    ({"coupled_weight_decay": "0"}, "coupled_weight_decay must be a finite number >= 0; got '0'"),
    ({"normalize": "no"}, "normalize must be True or False; got 'no'"),
    ({"maximize": 1}, "maximize must be True or False; got 1"),
    ({"depth": True}, "depth must be an int from 1 to 64; got True"),
    ({"depth": "2"}, "depth must be an int from 1 to 64; got '2'"),
    ({"depth": 2.0}, "depth must be an int from 1 to 64; got 2.0"),
    ({"seed": True}, r"seed must be an int from 0 to 2\^64 - 1; got True"),
    ({"seed": "1"}, r"seed must be an int from 0 to 2\^64 - 1; got '1'"),
    ({"backend": "fast"}, "backend must be one of cuda, triton, cpp, numba, reference"),
]


@pytest.mark.parametrize(("bad", "message"), BAD_OPTIONS, ids=str)
def test_bad_options_are_named(bad, message):
    p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=message):
        SteepestDescent([p], **bad)
    if "backend" in bad:
        return
    optimizer = SteepestDescent([p])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **bad})
    assert len(optimizer.param_groups) == 1
    p.grad = torch.ones(3)
    optimizer.param_groups[0].update(bad)  # as a scheduler would
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert p.tolist() == [1.0, 1.0, 1.0]


def test_a_bad_group_stops_the_others_before_they_are_written():
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="gradient 0 must be dense"):
        SteepestDescent([{"params": [good]}, {"params": [bad]}]).step()
    assert good.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_bad_tensors_are_named_and_nothing_is_written(backend):
    good, bad = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    good.grad, bad.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(TypeError, match="gradient 1 must be dense"):
        SteepestDescent([good, bad], backend=backend).step()
    assert good.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(TypeError, match=r"param 0 must be float16.*got torch.int64"):
        SteepestDescent([torch.ones(3, dtype=torch.int64)], backend=backend)
    step = pysteep.functional.steepest_step
    w = torch.ones(3)
    for grads, error, message in (
        ([torch.ones(4)], ValueError, "gradient 0 must have its param's shape"),
        ([torch.ones(3, device="meta")], ValueError, "gradient 0 must be on its param's device"),
        ([torch.ones(3, dtype=torch.complex64)], TypeError, "gradient 0 must be complex if and only if"),
        ([torch.ones(3, dtype=torch.int32)], TypeError, "gradient 0 must be float16"),
        ([1.0], TypeError, "gradient 0 must be a torch.Tensor; got 1.0"),
        ([], ValueError, "grads must hold one entry"),
    ):
        with pytest.raises(error, match=message):
            step([w], grads, lr=0.1, backend=backend)
    with FakeTensorMode(), pytest.raises(TypeError, match="param 0 must hold its own memory; got a FakeTensor"):
        step([torch.ones(3)], [torch.ones(3)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="momenta must be one tensor a param"):
        step([w], [torch.ones(3)], lr=0.1, betas=(0.9, 0.9), backend=backend)
    with pytest.raises(ValueError, match="momenta must be None or empty"):
        step([w], [torch.ones(3)], [torch.ones(3)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="must not share memory"):
        step([torch.ones(1).expand(3)], [torch.ones(3)], lr=0.1, backend=backend)
    with pytest.raises(ValueError, match="must not share memory"):
        step([torch.ones(8).as_strided((3, 3), (1, 2))], [torch.ones(3, 3)], lr=0.1, backend=backend)
    assert w.tolist() == [1.0, 1.0, 1.0]


def test_integers_of_numpy_are_integers():
    nets = [nn.Linear(3, 2, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    for net, kind in zip(nets, (int, np.int64), strict=True):
        groups = pysteep.param_groups(net, depth=kind(3))
        assert [type(group["depth"]) for group in groups] == [int]
        optimizer = SteepestDescent(groups, lr=kind(1) / 10, seed=kind(4))
        added = [("added", nn.Parameter(torch.ones(2)))]
        optimizer.add_param_group({"params": added, "depth": kind(2), "seed": kind(5)})
        assert [(type(g["depth"]), type(g["seed"])) for g in optimizer.param_groups] == [(int, int)] * 2
        net.weight.grad = torch.ones(2, 3)
        optimizer.step()
        optimizer.param_groups[1]["depth"] = kind(1)
        optimizer.step()
        net(torch.ones(3))
    assert torch.equal(nets[0].weight, nets[1].weight)
    model = pysteep.factorize(nn.Linear(2, 2), np.int32(3))
    assert len(list(model.parametrizations["weight"].parameters())) == 3


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, np.longdouble, Fraction])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.filterwarnings("error")
def test_numbers_of_other_kinds_are_the_floats_that_they_hold(backend, kind):
    """NumPy would compare and compute in their own type."""

    def stepped(number):
        numbers = {"lr": number(0.1), "q": number(1.3), "weight_decay": number(0.3)}
        direction = {"betas": (number(0.9), number(0.8)), "coupled_weight_decay": number(0.2)}
        found = [[torch.linspace(-1, 2, 7) for _ in range(3)] for _ in range(3)]
        gradient = torch.linspace(0.3, 0.7, 7)
        calls = pysteep.functional
        for normalize in (False, True):
            w, m, _ = found[0]
            calls.steepest_step([w], [gradient], [m], **numbers, **direction, normalize=normalize, backend=backend)
        w, *factors = found[1]
        momenta = [torch.zeros(7) for _ in factors]
        calls.factor_step([w], [gradient], [factors], [momenta], depth=2, **numbers, **direction, backend=backend)
        balances = [torch.tensor(0.1, dtype=torch.float64)]
        calls.mirror_step([found[2][0]], [gradient], balances, depth=3, **numbers, backend=backend)
        p = nn.Parameter(torch.ones(7))
        p.grad = gradient
        options = {**numbers, **direction, "backend": backend}
        SteepestDescent([p], **options).step(total_norm=number(2.0), max_norm=number(0.1))
        return [*found[0], *found[1], *found[2], *balances, p.detach()]

    expected = stepped(lambda value: float(kind(value)))
    assert all(map(torch.equal, stepped(kind), expected))


@pytest.mark.filterwarnings("error")
def test_numbers_of_other_kinds_at_the_ends_of_their_range():
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    for number in (np.float16("inf"), np.float32("nan"), np.float32(-1.0), np.longdouble("1e4000"), 10**400, Fraction(10**400)):
        for name in ("lr", "weight_decay", "coupled_weight_decay"):
            with pytest.raises(ValueError, match=f"^{name} must be a finite number >= 0; got "):
                SteepestDescent([p], **{name: number})
        with pytest.raises(ValueError, match=r"^scale must be a finite number > 0 with init 'saddle'; got "):
            SteepestDescent([p], depth=2, init="saddle", scale=number)
        with pytest.raises(ValueError, match=r"^thresholds must be finite numbers >= 0; got "):
            pysteep.diagnostics.sparsity_report(nn.Linear(2, 2), thresholds=(number,))
    for norms, name in (((10**400, 1.0), "total_norm"), ((1.0, 10**400), "max_norm")):
        with pytest.raises(ValueError, match=f"^{name} must be a number"):
            SteepestDescent([p]).step(total_norm=norms[0], max_norm=norms[1])
    w = torch.ones(3, dtype=torch.bfloat16)
    pysteep.functional.steepest_step([w], [w.clone()], lr=0.1, rounding="stochastic", step=np.float16(3))


def test_integers_of_numpy_in_functions():
    functional = pysteep.functional
    for kind in (int, np.int64):
        w, factors = torch.ones(4), [torch.ones(4) for _ in range(2)]
        functional.factor_step([w], [torch.ones(4)], [factors], depth=kind(3), lr=0.1, seed=kind(1), step=kind(2))
        functional.mirror_step([w], [torch.ones(4)], [torch.ones(1, dtype=torch.float64)], depth=kind(3), lr=0.1)
        words = pysteep.vote.pack_signs(torch.ones(4), phase=kind(1))
        assert pysteep.vote.count_votes(words[None], kind(4)).tolist() == [1.0] * 4


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: pysteep.functional.steepest_step([w], [w], lr=True), "lr must be a finite number >= 0; got True"),
        (lambda w: pysteep.functional.steepest_step([w], [w], lr=0.1, maximize="yes"), "maximize must be True or False"),
        (lambda w: pysteep.functional.steepest_step([w], [w], lr=0.1, normalize=1), "normalize must be True or False; got 1"),
        (lambda w: pysteep.functional.steepest_step([w], [w], lr=0.1, step="1"), "step must be a whole number from 0 to"),
        (lambda w: pysteep.functional.steepest_step([w], [w], lr=0.1, seed=1.0), "seed must be an int from 0 to"),
        (lambda w: pysteep.functional.factor_step([w], [w], [[w, w]], depth=True, lr=0.1), "depth must be an int from"),
        (
            lambda w: pysteep.functional.mirror_step([w], [w], [w], depth="3", lr=0.1),
            "depth must be an int from 2 to 64; got '3'",
        ),
        (lambda _: pysteep.factorize(nn.Linear(2, 2), True), "depth must be an int from 1 to 64; got True"),
        (lambda _: pysteep.factorize(nn.Linear(2, 2), 2, "lambda", scale=True), "scale must be a finite number > 0"),
        (lambda _: pysteep.param_groups(nn.Linear(2, 2), "3"), "depth must be an int from 1 to 64; got '3'"),
        (lambda w: SteepestDescent([w]).step(total_norm=1.0, max_norm=True), "max_norm must be a number > 0; got True"),
        (lambda w: SteepestDescent([w]).step(total_norm=1.0, max_norm="1"), "max_norm must be a number > 0; got '1'"),
        (lambda w: SteepestDescent([w]).step(total_norm="1", max_norm=1.0), "total_norm must be a number or a tensor"),
        (lambda _: pysteep.vote.count_votes(torch.zeros(1, 1, dtype=torch.uint8), True), "numel must be an int from 0 to"),
        (lambda _: pysteep.diagnostics.sparsity_report(nn.Linear(2, 2), [True]), "thresholds must be finite numbers >= 0"),
    ],
)
def test_true_and_strings_are_no_numbers(call, message):
    w = torch.ones(3)
    with pytest.raises(ValueError, match=message):
        call(w)
    assert w.tolist() == [1.0] * 3


NET = nn.Linear(3, 2)
OF_NET = SteepestDescent(NET.parameters(), depth=2)
DIAGNOSTICS = pysteep.diagnostics


@pytest.mark.parametrize(
    "call",
    [
        lambda model: pysteep.param_groups(model, 3),
        lambda model: pysteep.factorize(model, 3),
        pysteep.collapse,
        pysteep.dense_state_dict,
        lambda model: pysteep.load_dense_state_dict(model, {}),
        lambda model: pysteep.check_optimizer(model, OF_NET),
        lambda model: pysteep.gradient_release(model, OF_NET),
        lambda model: pysteep.vote.set_majority_vote(model),
        DIAGNOSTICS.sparsity_report,
        lambda model: DIAGNOSTICS.prune_(model, 0.1),
        lambda model: DIAGNOSTICS.prune_(model, masks={}),
        DIAGNOSTICS.remove_masks,
        lambda model: DIAGNOSTICS.BalanceMonitor(OF_NET, model),
        lambda model: DIAGNOSTICS.hessian_spectrum(model, len, []),
    ],
)
def test_what_is_no_model_is_named(call):
    for given, kind in (("x", "str"), (NET.parameters(), "generator")):
        with pytest.raises(TypeError, match=f"model must be a torch.nn.Module; got {kind}"):
            call(given)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OF_NET.step(3), "closure must be a function; got 3"),
        (
            lambda: DIAGNOSTICS.hessian_spectrum(NET, 3, [(torch.ones(2, 3), torch.ones(2, 2))], k=1),
            "loss_fn must be a function",
        ),
        (lambda: DIAGNOSTICS.sparsity_report(NET, evaluate=3), "evaluate must be a function; got 3"),
        (lambda: DIAGNOSTICS.BalanceMonitor(OF_NET, on_record=3), "on_record must be a function; got 3"),
        (lambda: pysteep.check_optimizer(NET, 3), "optimizer must be a torch.optim.Optimizer; got int"),
    ],
)
def test_what_is_no_function_is_named(call, message):
    with pytest.raises(TypeError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda f, w: f.steepest_step(w, [w], lr=0.1), "params"),
        (lambda f, w: f.steepest_step([w], w, lr=0.1), "grads"),
        (lambda f, w: f.steepest_step([w], [w], w, lr=0.1, betas=(0.9, 0.9)), "momenta"),
        (lambda f, w: f.steepest_step([w], [w], lr=0.1, rounding="compensated", compensations=w), "compensations"),
        (lambda f, w: f.factor_step(w, [w], [[w, w]], depth=2, lr=0.1), "params"),
        (lambda f, w: f.factor_step([w], w, [[w, w]], depth=2, lr=0.1), "grads"),
        (lambda f, w: f.factor_step([w], [w], [w], depth=2, lr=0.1), "factors of param 0"),
        (lambda f, w: f.factor_step([w], [w], [[w, w]], [w], depth=2, lr=0.1, betas=(0.9, 0.9)), "momenta of param 0"),
        (lambda f, w: f.mirror_step(w, [w], [w], depth=2, lr=0.1), "params"),
        (lambda f, w: f.mirror_step([w], [w], w, depth=2, lr=0.1), "balances"),
    ],
)
def test_one_tensor_is_no_sequence_of_them(call, name):
    w = torch.ones(2, 3)
    with pytest.raises(TypeError, match=f"^{name} must be a sequence of tensors; got one torch.Tensor"):
        call(pysteep.functional, w)
    assert w.eq(1).all()


def test_factors_are_a_sequence_for_each_param():
    w = torch.ones(2, 3)
    with pytest.raises(TypeError, match=r"factors must hold a sequence .* for each param; got one torch\.Tensor"):
        pysteep.functional.factor_step([w], [w], w, depth=2, lr=0.1)


@pytest.mark.parametrize("storage", ["tied", "implicit"])
def test_a_parameter_made_in_inference_mode_has_no_depth(storage):
    with torch.inference_mode():
        p = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match=r"depth must be 1 for weight, which was made in torch.inference_mode\(\)"):
        SteepestDescent([("weight", p)], lr=0.1, depth=2, storage=storage, init="balanced")
    optimizer = SteepestDescent([p], lr=0.1, betas=(0.9, 0.99))
    for _ in range(2):
        p.grad = torch.ones(3)
        optimizer.step()


def test_options_that_a_parameter_cannot_have_are_refused_between_steps():
    """As when the group is added; nothing is written."""
    cases = [
        (torch.tensor([0.5 + 2j, -1 - 1j]), {"depth": 3}, "depth must be 1 for param 0, which is torch.complex64"),
        (torch.ones(3), {"depth": 3, "init": "lambda", "scale": 1e300}, "scale must be a number > 0 in the dtype of param 0"),
        (torch.ones(3, dtype=torch.float64), {"state_dtype": torch.float32}, "state_dtype must be None for param 0"),
    ]
    for value, change, message in cases:
        param = torch.nn.Parameter(value)
        optimizer = SteepestDescent([param], lr=1e-3)
        param.grad = torch.ones_like(value)
        optimizer.step()
        before = param.detach().clone()
        optimizer.param_groups[0] |= change
        for _ in range(2):
            with pytest.raises(ValueError, match=message):
                optimizer.step()
        assert torch.equal(param.detach(), before)


def test_a_scale_that_depth_1_has_no_use_for():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = SteepestDescent([param], lr=1e-3, scale=[0.1])
    param.grad = torch.ones(3)
    optimizer.step()
    assert torch.equal(param.detach(), torch.full((3,), 1 - 1e-3))


def test_a_norm_is_not_negative():
    optimizer = SteepestDescent([torch.nn.Parameter(torch.ones(3))], lr=1e-3)
    with pytest.raises(ValueError, match="total_norm must be >= 0"):
        optimizer.step(total_norm=-4.0, max_norm=1.0)
