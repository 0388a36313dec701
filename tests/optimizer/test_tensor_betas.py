"""betas in tensors: the steps of the numbers that they hold, which whoever owns the tensors may change between steps."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from pysteep import SteepestDescent, functional
from tests.support.cases import EXACT_QS, cpu_homes, home_of, numbers_by_address, options, random_values, same_bits

HOMES = cpu_homes()
SIZES = (0, 1, 7, 513)
PAIRS = {
    "float32": lambda: (torch.tensor(0.9), torch.tensor(0.99)),
    "float64, one element": lambda: (torch.tensor([0.9], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)),
    "number and bfloat16": lambda: (0.1, torch.tensor(0.7).bfloat16()),
    "tensor and number": lambda: (torch.tensor(0.7, dtype=torch.float64), 0.0),
    "zeros": lambda: (torch.tensor(0.0), torch.tensor(0.0)),
}
# Factors stored and depth; no factors at depth 1. Of depth 4 two factors and their momenta are as many tensors as four factors.
KINDS = {"depth 1": (0, 1), "full": (3, 3), "tied": (2, 4)}
OPTIMIZERS = {
    "depth 1": {},
    "depth 1, normalized": {"normalize": True},
    "full": {"depth": 3, "storage": "full", "init": "balanced"},
    "tied": {"depth": 4},
}

pytestmark = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")


def case(home, of_kernel, quick=None):
    """numba compiles a kernel for each, and reads betas before it."""
    marks = [pytest.mark.slow] if home == "numba" and of_kernel != quick else []
    return pytest.param(home, of_kernel, marks=marks, id=f"{home}-{of_kernel}")


def numbers_in(betas):
    return tuple(map(float, betas))


def tensors(stored, dtype):
    """Weights, gradients, factors, momenta, as a step takes them."""
    torch.manual_seed(5)
    weights, gradients = ([random_values((n,), dtype) for n in SIZES] for _ in range(2))
    if not stored:
        return weights, gradients, [random_values((n,), dtype) for n in SIZES]
    return weights, gradients, *([[random_values((n,), dtype) for _ in range(stored)] for n in SIZES] for _ in range(2))


def stepped(home, kind, dtype, step):
    """All tensors after a step."""
    stored, depth = KINDS[kind]
    given = tensors(stored, dtype)
    with home_of(home) as backend:
        if stored:
            functional.factor_step(*given, depth=depth, **step, backend=backend)
        else:
            functional.steepest_step(*given, **step, backend=backend)
    return [t for role in given for own in role for t in (own if isinstance(own, list) else [own])]


def check(home, kind, dtype, q, betas, **more):
    """With tensors as with their numbers, whether they are read by the host or by the home; at exact q as the reference."""
    step = options(q=q, **more)
    expected = stepped(home, kind, dtype, step | {"betas": numbers_in(betas) if any(numbers_in(betas)) else (0.0, 1e-300)})
    found = stepped(home, kind, dtype, step | {"betas": betas})
    assert all(map(same_bits, found, expected))
    with numbers_by_address():
        found = stepped(home, kind, dtype, step | {"betas": betas, "lr": torch.tensor(step["lr"], dtype=torch.float64)})
    assert all(map(same_bits, found, expected))
    if q in EXACT_QS and not more:
        assert all(map(same_bits, found, stepped("reference", kind, dtype, step | {"betas": betas})))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("home", "q"), [case(home, q, 1.7) for home in HOMES for q in (1.0, 1.5, 1.7, 2.0)])
def test_a_step_with_tensors_is_that_of_their_numbers(home, kind, q):
    for betas in PAIRS.values():
        check(home, kind, torch.float32, q, betas())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("home", "dtype"), [case(home, dtype) for home in HOMES for dtype in (torch.bfloat16, torch.float64)])
def test_in_other_dtypes(home, kind, dtype):
    """1 - beta is formed in float64 and rounded once, to float64 for such weights."""
    check(home, kind, dtype, 1.5, PAIRS["float64, one element"]())


@pytest.mark.parametrize("home", HOMES)
def test_normalized(home):
    check(home, "depth 1", torch.float32, 1.7, PAIRS["tensor and number"](), normalize=True)


def build(case, betas, lr=0.05, **more):
    torch.manual_seed(2)
    params = [nn.Parameter(torch.randn(5, 7)), nn.Parameter(torch.randn(3))]
    options = {"q": 1.5, "weight_decay": 0.1, "coupled_weight_decay": 0.05, **OPTIMIZERS[case], **more}
    return params, SteepestDescent(params, lr=lr, betas=betas, **options)


def train(params, optimizer, steps, step=None, between=lambda _: None):
    for k in steps:
        for p in params:
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(k))
        (step or optimizer.step)()
        between(k)


def assert_same(params, optimizer, others, other_optimizer):
    for p, other in zip(params, others, strict=True):
        state, right = optimizer.state[p], other_optimizer.state[other]
        assert same_bits(p.detach(), other.detach())
        assert state.keys() == right.keys()
        assert any(name.startswith("momentum") for name in state)
        assert all(same_bits(state[name], right[name]) for name in state)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_an_optimizer_follows_its_tensors(case):
    """From 0 on, which a number would take for no momentum; a tensor stays what it is."""
    betas = torch.tensor(0.0), torch.tensor(0.0, dtype=torch.float64)
    params, optimizer = build(case, betas)
    others, by_hand = build(case, (0.0, 1e-300))

    def move(k):
        betas[0].fill_(0.1 * k)
        betas[1].fill_(0.2 * k)
        by_hand.param_groups[0]["betas"] = numbers_in(betas) if k else (0.0, 1e-300)

    for k in range(4):
        train(params, optimizer, [k])
        train(others, by_hand, [k])
        move(k)
    assert optimizer.param_groups[0]["betas"][0] is betas[0]
    assert_same(params, optimizer, others, by_hand)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_state_dict_and_a_copy_hold_them(case):
    """The values, in tensors of their own."""
    params, optimizer = build(case, (torch.tensor(0.7), torch.tensor(0.9, dtype=torch.float64)))
    train(params, optimizer, range(2))
    file = io.BytesIO()
    torch.save((params, optimizer.state_dict()), file)
    copied = copy.deepcopy((params, optimizer))
    file.seek(0)
    saved, state = torch.load(file, weights_only=False)
    others, loaded = build(case, (0.0, 0.5))
    with torch.no_grad():
        for other, value in zip(others, saved, strict=True):
            other.copy_(value)
    loaded.load_state_dict(state)
    optimizer.param_groups[0]["betas"][0].fill_(0.3)
    assert numbers_in(loaded.param_groups[0]["betas"]) == numbers_in((torch.tensor(0.7), 0.9))
    for of in (copied[1], loaded):
        of.param_groups[0]["betas"][0].fill_(0.3)
    for own, of in ((params, optimizer), (others, loaded), copied):
        train(own, of, range(2, 4))
    assert_same(params, optimizer, others, loaded)
    assert_same(params, optimizer, *copied)


@pytest.mark.parametrize("case", OPTIMIZERS)
def test_a_checkpoints_first_step_leaves_no_trace(case):
    """torch.distributed.checkpoint makes state by a step at lr = 0 with gradients of 0."""
    params, optimizer = build(case, (torch.tensor(0.7), torch.tensor(0.9)), lr=torch.tensor(0.0))
    before = copy.deepcopy(params)
    for p in params:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for p, old in zip(params, before, strict=True):
        momenta = [t for name, t in optimizer.state[p].items() if name.startswith("momentum")]
        assert momenta
        assert not any(bool(t.any()) for t in momenta)
        assert same_bits(p.detach(), old.detach())


# ---- compiled ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler():
    """Nothing compiled before; a recompile is an error."""
    torch._dynamo.reset()
    counters.clear()
    with config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.usefixtures("compiler")
def test_one_graph_whatever_they_hold(case, backend):
    """Also where another tensor comes in their place, as OneCycleLR writes it."""
    runs = []
    for compiled in (False, True):
        betas = torch.tensor(0.5), torch.tensor(0.9)
        params, optimizer = build(case, betas, lr=torch.tensor(0.05))
        step = torch.compile(optimizer.step, fullgraph=True, backend=backend) if compiled else None

        def move(k, betas=betas, group=optimizer.param_groups[0]):
            betas[1].fill_(0.9 - 0.1 * k)
            group["betas"] = torch.tensor(0.5 + 0.1 * k), betas[1]

        train(params, optimizer, range(4), step, move)
        runs.append((params, optimizer))
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]
    assert_same(*runs[0], *runs[1])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # it looks for the step that it wraps
@pytest.mark.parametrize("scheduler", [OneCycleLR, CyclicLR])
@pytest.mark.usefixtures("compiler")
def test_a_scheduler_of_tensors_compiles_once(scheduler):
    runs = []
    for compiled in (False, True):
        params, optimizer = build("tied", (torch.tensor(0.5), torch.tensor(0.9)), lr=torch.tensor(0.05))
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        momenta = {"base_momentum": torch.tensor(0.8), "max_momentum": torch.tensor(0.95)}
        if scheduler is OneCycleLR:
            moving = OneCycleLR(optimizer, 0.1, total_steps=9, **momenta)
        else:
            moving = CyclicLR(optimizer, 0.01, 0.1, 3, **momenta)
        train(params, optimizer, range(6), step, lambda _, moving=moving: moving.step())
        runs.append((params, optimizer))
    assert counters["stats"]["unique_graphs"] == 1
    assert isinstance(optimizer.param_groups[0]["betas"][0], torch.Tensor)
    assert_same(*runs[0], *runs[1])


@pytest.mark.parametrize("case", OPTIMIZERS)
@pytest.mark.usefixtures("compiler")
def test_a_compiled_step_names_a_bad_one(case):
    """Its value is looked at when the step runs, before anything is written."""
    betas = torch.tensor(0.5), torch.tensor(0.9)
    params, optimizer = build(case, betas, lr=torch.tensor(0.05))
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    train(params, optimizer, range(2), step)
    before = copy.deepcopy(params)
    betas[1].fill_(1.0)
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\).*got \(tensor\(0\.5000\), tensor\(1\.\)\)"):
        step()
    assert all(same_bits(p.detach(), old.detach()) for p, old in zip(params, before, strict=True))


# ---- refused -----------------------------------------------------------------------------------------------------------------


def test_storage_implicit_refuses_them():
    params = [nn.Parameter(torch.ones(3))]
    message = (
        r"betas must be \(0\.0, 0\.0\) with storage 'implicit', whose factors have no momentum; got \(tensor\(0\.\), 0\.0\)"
    )
    with pytest.raises(ValueError, match=message):
        SteepestDescent(params, depth=3, storage="implicit", init="balanced", betas=(torch.tensor(0.0), 0.0))


@pytest.mark.parametrize("step", ["steepest_step", "factor_step"])
def test_functional_steps_want_momenta_and_name_bad_tensors(step):
    w, g = torch.ones(3), torch.ones(3)
    factors = ([[torch.ones(3), torch.ones(3)]],) if step == "factor_step" else ()
    depth = {"depth": 2} if factors else {}
    take = getattr(functional, step)
    with pytest.raises(ValueError, match=r"momenta must be one .* with betas \(tensor\(0\.\), 0\.0\)"):
        take([w], [g], *factors, lr=0.1, betas=(torch.tensor(0.0), 0.0), **depth)
    with pytest.raises(ValueError, match=r"betas must be two numbers in \[0, 1\), or .*got \(0\.5, tensor\(2\.\)\)"):
        take([w], [g], *factors, lr=0.1, betas=(0.5, torch.tensor(2.0)), **depth)
    assert w.tolist() == [1.0, 1.0, 1.0]
