"""torch.compile of the model, of the step and of both: one graph, which a scheduler's lr leaves alone, and the eager bits."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch._dynamo import config
from torch._dynamo.utils import counters
from torch.optim.lr_scheduler import ConstantLR, CosineAnnealingLR, LambdaLR, SequentialLR

from pysteep import SteepestDescent, functional, param_groups
from pysteep._state.depth import Depth
from tests.support.cases import same_bits

CASES = {
    "depth 1": {"betas": (0.0, 0.0)},
    "depth 1, momentum, normalized": {"betas": (0.9, 0.99), "normalize": True},
    "full": {"depth": 3, "storage": "full", "init": "balanced"},
    "full, momentum": {"depth": 3, "storage": "full", "init": "balanced", "betas": (0.9, 0.99)},
    "tied": {"depth": 5, "storage": "tied", "init": "lambda", "scale": 0.7},
    "tied, momentum": {"depth": 5, "storage": "tied", "init": "lambda", "scale": 0.7, "betas": (0.9, 0.99)},
    "implicit": {"depth": 3, "storage": "implicit", "init": "balanced"},
}


@pytest.fixture(autouse=True)
def compiler():
    """Nothing compiled before; a recompile is an error; Tensor.backward() is traced, which is an option of the compiler."""
    torch._dynamo.reset()
    counters.clear()
    with config.patch(error_on_recompile=True, trace_autograd_ops=True):
        yield
    torch._dynamo.reset()


@pytest.fixture
def repairs(monkeypatch):
    """How often x was compared with the product of its factors."""
    calls, repair = [], Depth.repair

    def counted(self, *arguments, **options):
        calls.append(self)
        repair(self, *arguments, **options)

    monkeypatch.setattr(Depth, "repair", counted)
    return calls


def build(case, lr=None, dtype=torch.float32):
    """A net with an unused layer, its optimiser with two groups and lr in a tensor, and what moves lr."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)).to(dtype)
    net.idle = nn.Linear(2, 2)
    options = {"q": 1.5, "weight_decay": 0.1, **CASES[case]}
    if options.get("storage") != "implicit":
        options["coupled_weight_decay"] = 0.05
    depth = options.pop("depth", 1)
    groups = [{"params": group["params"], "depth": group["depth"]} for group in param_groups(net, depth)]
    of_depth = {name: options.pop(name) for name in ("storage", "init", "scale") if name in options}
    groups[0].update(of_depth)
    optimizer = SteepestDescent(groups, lr=torch.tensor(0.05) if lr is None else lr, **options)
    return net, optimizer


def loss_of(net, x, y):
    return (net[2](net[1](net[0](x))) - y).square().mean()


def batch(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 5, generator=generator), torch.randn(4, 3, generator=generator)


def train(net, optimizer, *, step=None, whole=None, steps=4, schedule=True, first=0):
    """`steps` steps by the optimiser, by `step` in its place, or by `whole`, which takes a batch and does it all."""
    scheduler = LambdaLR(optimizer, lambda k: 1 / (1 + k)) if schedule else None
    for k in range(first, first + steps):
        optimizer.zero_grad()
        if whole is not None:
            whole(*batch(k))
        else:
            loss_of(net, *batch(k)).backward()
            (step or optimizer.step)()
        if scheduler is not None:
            scheduler.step()


def assert_same(net, other, optimizer, other_optimizer):
    """Weights, factors, momenta and balances, to the bit."""
    for p, expected in zip(net.parameters(), other.parameters(), strict=True):
        assert same_bits(p.detach(), expected.detach())
        state, right = optimizer.state.get(p, {}), other_optimizer.state.get(expected, {})
        assert state.keys() == right.keys()
        assert all(same_bits(state[name], right[name]) for name in state)


def assert_one_graph():
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


# ---- the model ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["depth 1, momentum, normalized", "tied, momentum", "implicit"])
def test_a_compiled_model_trains_as_the_plain_one(case):
    (plain, ours), (compiled, theirs) = build(case), build(case)
    forward = torch.compile(lambda x, y: loss_of(compiled, x, y), fullgraph=True, backend="aot_eager")
    train(plain, ours)
    for k in range(4):
        theirs.zero_grad()
        forward(*batch(k)).backward()
        theirs.step()
        theirs.param_groups[0]["lr"].fill_(0.05 / (k + 2))
    assert_one_graph()
    for p, expected in zip(compiled.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


# ---- the step ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_is_the_eager_one(case, backend):
    """The first on an optimiser without state, the others at another lr each: one graph."""
    (plain, ours), (net, optimizer) = build(case), build(case)
    train(plain, ours)
    train(net, optimizer, step=torch.compile(optimizer.step, fullgraph=True, backend=backend))
    assert_one_graph()
    assert_same(net, plain, optimizer, ours)


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_scheduler_attached_after_the_first_compiled_step_keeps_the_graph(rounding):
    """It adds a key of its own to every group."""
    param = nn.Parameter(torch.ones(5).bfloat16())
    optimizer = SteepestDescent([param], lr=torch.tensor(0.25), rounding=rounding)
    step = torch.compile(optimizer.step, fullgraph=True, backend="eager")
    for _ in range(2):
        param.grad = torch.ones_like(param)
        step()
        ConstantLR(optimizer, factor=1.0)
    assert_one_graph()
    assert param.tolist() == [0.5] * 5


@pytest.mark.parametrize("case", CASES)
def test_forward_backward_and_step_in_one_graph(case):
    (plain, ours), (net, optimizer) = build(case), build(case)

    step = optimizer.step  # before a scheduler wraps it in a function that the compiler refuses to trace

    @torch.compile(fullgraph=True, backend="eager")
    def whole(x, y):
        loss_of(net, x, y).backward()
        step()

    train(plain, ours)
    train(net, optimizer, whole=whole)
    assert_one_graph()
    assert_same(net, plain, optimizer, ours)


@pytest.mark.parametrize("case", ["depth 1", "tied, momentum", "implicit"])
def test_forward_backward_and_step_in_one_functional_graph(case):
    """As the compiler's own backends see it; its derivatives may round otherwise."""
    (plain, ours), (net, optimizer) = build(case), build(case)

    step = optimizer.step

    @torch.compile(fullgraph=True, backend="aot_eager")
    def whole(x, y):
        loss_of(net, x, y).backward()
        step()

    train(plain, ours)
    train(net, optimizer, whole=whole)
    assert_one_graph()
    for p, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("make", [lambda o: CosineAnnealingLR(o, 5), lambda o: SequentialLR(
    o, [LambdaLR(o, lambda k: (k + 1) / 3), CosineAnnealingLR(o, 4)], [2])], ids=["cosine", "sequence"])  # fmt: skip
def test_schedulers_fill_the_tensor(make):
    (plain, ours), (net, optimizer) = build("tied"), build("tied")
    rate = optimizer.param_groups[0]["lr"]
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    schedulers = make(ours), make(optimizer)
    for k in range(5):
        train(plain, ours, steps=1, schedule=False, first=k)
        train(net, optimizer, step=step, steps=1, schedule=False, first=k)
        for scheduler in schedulers:
            scheduler.step()
    assert optimizer.param_groups[0]["lr"] is rate
    assert_one_graph()
    assert_same(net, plain, optimizer, ours)


@pytest.mark.parametrize("case", ["depth 1, momentum, normalized", "tied, momentum", "implicit"])
@config.patch(error_on_recompile=False)
def test_an_lr_that_is_no_tensor_is_compiled_in(case):
    """As for torch's own optimisers: one more graph for each new value, but the right steps."""
    (plain, ours), (net, optimizer) = build(case, lr=0.05), build(case, lr=0.05)
    train(plain, ours)
    train(net, optimizer, step=torch.compile(optimizer.step, fullgraph=True, backend="eager"))
    assert counters["stats"]["unique_graphs"] == 4
    assert_same(net, plain, optimizer, ours)


def test_a_closure_and_hooks():
    (plain, ours), (net, optimizer) = build("tied"), build("tied")
    ran = torch.zeros(())
    for k in range(2):
        for own, of in ((plain, ours), (net, optimizer)):
            of.zero_grad()
            loss_of(own, *batch(k)).backward()

    def closure():
        return torch.ones(2).sum()

    optimizer.register_step_post_hook(lambda *_: ran.add_(1))
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        ours.step()
        assert step(closure).item() == 2.0
    assert ran.item() == 3
    assert_same(net, plain, optimizer, ours)


def test_a_compiled_step_refuses_what_the_eager_one_refuses():
    net, optimizer = build("tied")
    loss_of(net, *batch(0)).backward()
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    step()
    before = copy.deepcopy(net.state_dict())
    optimizer.param_groups[0]["lr"].fill_(-0.1)
    with pytest.raises(ValueError, match=r"lr must be a finite number >= 0; got tensor\(-0\.1"):
        step()
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# ---- writes from outside -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def prune(net):
    net[0].weight[::2] *= 0.5
    net[2].weight[1, 3] = 0.0


@pytest.mark.parametrize("mode", ["step", "step without grad", "whole"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", ["full, momentum", "tied"])
def test_writes_from_outside_are_noticed(case, backend, mode, repairs):
    """In the step after them and in no other; also in the eager step that follows a compiled one, and the other way round."""
    (plain, ours), (net, optimizer) = build(case), build(case)

    def whole(x, y):
        loss_of(net, x, y).backward()
        optimizer.step()

    compiled = torch.compile(whole if mode == "whole" else optimizer.step, fullgraph=True, backend=backend)

    def step(own, of, k):
        of.zero_grad()
        repairs.clear()
        if own is net and mode == "whole":
            compiled(*batch(k))
            return
        loss_of(own, *batch(k)).backward()
        with torch.set_grad_enabled(mode == "step"):
            (compiled if own is net and k != 5 else of.step)()

    counts = []
    for k in range(8):
        if k in (2, 3, 5, 7):
            prune(plain)
            prune(net)
        step(plain, ours, k)
        step(net, optimizer, k)
        counts.append(len(repairs))
        if mode == "whole":
            for p, expected in zip(net.parameters(), plain.parameters(), strict=True):
                torch.testing.assert_close(p, expected)
        else:
            assert_same(net, plain, optimizer, ours)
    assert [counts[k] for k in (1, 4)] == [0, 0], "steps that follow nothing but a compiled step"
    assert [counts[k] for k in (2, 3, 5, 7)] == [2] * 4
    assert_one_graph()


def test_what_a_compiled_function_writes_itself_is_not_noticed():
    """The compiler joins such a write with the step's own. So prune, clamp or average outside of it, or call `refactor_`."""
    p, q = nn.Parameter(torch.rand(9) + 1), nn.Parameter(torch.ones(9))
    q.data.copy_(p.data)
    ours, plain = (SteepestDescent([x], lr=0.1, depth=3, init="balanced") for x in (p, q))
    p.grad, q.grad = torch.ones(9), torch.ones(9)

    @torch.compile(fullgraph=True, backend="aot_eager")
    @torch.no_grad()
    def step_and_halve():
        ours.step()
        p.mul_(0.5)

    for _ in range(2):
        step_and_halve()
        plain.step()
    assert torch.equal(p, q * 0.5), "the second step follows the factors, whose product the first half was not"
    ours.refactor_()
    torch.testing.assert_close(torch.stack(ours.factors(p)).prod(0), p.detach())


def test_lr_0_changes_no_bit_and_the_next_write_is_noticed():
    net, optimizer = build("full, momentum")
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    loss_of(net, *batch(0)).backward()
    step()
    before = copy.deepcopy(net.state_dict())
    optimizer.param_groups[0]["lr"].fill_(0.0)
    step()
    assert all(same_bits(value, before[name]) for name, value in net.state_dict().items())
    prune(net)
    before = copy.deepcopy(net.state_dict())
    step()
    assert all(same_bits(value, before[name]) for name, value in net.state_dict().items())
    product = torch.stack(optimizer.factors(net[0].weight)).prod(0)
    torch.testing.assert_close(product, net[0].weight.detach())


@pytest.mark.parametrize("case", ["tied, momentum"])
@config.patch(error_on_recompile=False)
def test_a_loaded_checkpoint_and_a_refactored_parameter(case):
    (plain, ours), (net, optimizer) = build(case), build(case)
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager")
    train(plain, ours, steps=2, schedule=False)
    train(net, optimizer, step=step, steps=2, schedule=False)
    for own, of in ((plain, ours), (net, optimizer)):
        weights, state = copy.deepcopy(own.state_dict()), copy.deepcopy(of.state_dict())
        train(own, of, step=step if own is net else None, steps=2, schedule=False)
        own.load_state_dict(weights)
        of.load_state_dict(state)
        train(own, of, step=step if own is net else None, steps=2, schedule=False)
        of.refactor_()
        train(own, of, step=step if own is net else None, steps=2, schedule=False)
    assert_same(net, plain, optimizer, ours)


# ---- the ops -----------------------------------------------------------------------------------------------------------------


def directions(beta1=0.0, beta2=0.0, tensor=None):
    """What every step but that of storage "implicit" takes."""
    return {"beta1_tensor": tensor, "beta1": beta1, "beta2_tensor": tensor, "beta2": beta2, "coupled_weight_decay": 0.1}


def rates(**more):
    """What every step takes."""
    return {
        "lr_tensor": torch.tensor(0.1), "lr": 0.0, "q": 1.5, "weight_decay": 0.1, "maximize": True,
        "grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0), "backend": None, "rounding": "nearest",
        "seed": -1, "step_tensor": torch.tensor(3.0), "step": 0.0, "streams": [0, 1], **more,
    }  # fmt: skip


@pytest.mark.parametrize("momentum", [False, True, "betas in tensors"])
@pytest.mark.parametrize("of_optimizer", [False, True])
def test_schema_and_fake_of_factor_step(of_optimizer, momentum):
    weights = [torch.randn(7, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
    betas = (0.9, 0.99) if momentum else (0.0, 0.0)
    optimizer = SteepestDescent(weights, depth=5, q=1.5, betas=betas)
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer.step()
    names = [name for role in ("factor", "momentum") if momentum or role == "factor" for name in (f"{role}_1", f"{role}_rest")]
    stored = [optimizer.state[w][name] for name in names for w in weights]
    of = {"optimizer": optimizer._memory.number if of_optimizer else 0, "group": 0, "used": [0, 1] if of_optimizer else []}
    tensor = torch.tensor(0.9) if momentum == "betas in tensors" else None
    options = rates(depth=5, **directions(*betas, tensor), **of)
    arguments = (weights, [w.grad for w in weights], stored[:4], stored[4:], [])
    with torch.no_grad():
        torch.library.opcheck(torch.ops.pysteep.factor_step.default, arguments, options)


@pytest.mark.parametrize("op", ["steepest_step", "factor_step", "mirror_step"])
def test_no_cuda_graph_of_the_compiler_holds_a_step(op):
    """It would step a parameter that was frozen since."""
    assert torch.Tag.cudagraph_unsafe in getattr(torch.ops.pysteep, op).default.tags


def test_schema_and_fake_of_mirror_step():
    weights = [torch.randn(7, requires_grad=True), torch.randn(3, 2, requires_grad=True)]
    balances = [torch.tensor(0.5, dtype=torch.float64), torch.tensor(0.0, dtype=torch.float64)]
    arguments = (weights, [torch.randn(7), torch.randn(3, 2)], balances, [])
    with torch.no_grad():
        torch.library.opcheck(torch.ops.pysteep.mirror_step.default, arguments, rates(depth=3))


def test_schema_and_fake_of_steps_with_compensations():
    weights = [torch.randn(7).bfloat16().requires_grad_(), torch.randn(3, 2, requires_grad=True)]
    gradients, low = [torch.randn(7).bfloat16(), torch.randn(3, 2)], [torch.zeros(7, dtype=torch.int16)]
    plain = rates(normalize=False, **directions(), rounding="compensated")
    balances = [torch.tensor(0.5, dtype=torch.float64) for _ in weights]
    with torch.no_grad():
        torch.library.opcheck(torch.ops.pysteep.steepest_step.default, (weights, gradients, [], low), plain)
        options = rates(depth=3, rounding="compensated")
        torch.library.opcheck(torch.ops.pysteep.mirror_step.default, (weights, gradients, balances, low), options)


@pytest.mark.parametrize("rounding", ["stochastic", "compensated"])
@pytest.mark.parametrize("case", CASES)
def test_a_compiled_step_rounds_as_the_eager_one(case, rounding):
    """One graph for steps whose random numbers differ; the clipping coefficient is part of it."""
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.rand(9, 5).bfloat16()), nn.Parameter(torch.rand(11))]
        options = {"q": 1.5, "weight_decay": 0.1, "rounding": rounding, "seed": 2**63 + 1, **CASES[case]}
        optimizer = SteepestDescent(params, lr=torch.tensor(0.01), **options)
        step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
        for k in range(4):
            optimizer.param_groups[0]["lr"].fill_(0.01 / (k + 1))
            for p in params:
                p.grad = torch.randn(p.shape).to(p.dtype)
            step(total_norm=torch.nn.utils.get_total_norm([p.grad for p in params]), max_norm=1.0)
        runs.append((params, [optimizer.state[p] for p in params], optimizer.param_groups[0].get("rounding_step")))
    assert_one_graph()
    (eager, states, count), (params, other_states, other_count) = runs
    assert all(map(same_bits, eager, params))
    assert count == other_count
    for state, other in zip(states, other_states, strict=True):
        assert state.keys() == other.keys()
        assert all(torch.equal(state[name], other[name]) for name in state)


def test_functional_steps_compile():
    def factor(w, g, factors, momenta, lr):
        grads, betas = [g, None], (0.9, 0.99)
        functional.factor_step([w, w + 1], grads, [factors] * 2, [momenta] * 2, depth=4, lr=lr, q=1.5, betas=betas)

    def mirror(w, g, balance, lr):
        functional.mirror_step([w], [g], [balance], depth=4, lr=lr, q=1.5, weight_decay=0.1)

    w, g, lr = torch.randn(9), torch.randn(9), torch.tensor(0.1)
    stored = [torch.rand(9) for _ in range(2)], [torch.randn(9) for _ in range(2)]
    for function, arguments in ((factor, (w, g, *stored, lr)), (mirror, (w, g, torch.tensor(0.3, dtype=torch.float64), lr))):
        expected, given = copy.deepcopy(arguments), copy.deepcopy(arguments)
        function(*expected)
        torch.compile(function, fullgraph=True, backend="aot_eager")(*given)
        assert not same_bits(given[0], w)
        assert same_bits(given[0], expected[0])


# ---- inductor ----------------------------------------------------------------------------------------------------------------


def check_inductor(case, mode=None):
    (plain, ours), (net, optimizer) = build(case), build(case)
    step = torch.compile(optimizer.step, fullgraph=True, mode=mode)
    for k in range(5):
        if k in (2, 4):
            prune(plain)
            prune(net)
        train(plain, ours, steps=1, schedule=False, first=k)
        train(net, optimizer, step=step, steps=1, schedule=False, first=k)
        for of in (ours, optimizer):
            of.param_groups[0]["lr"].fill_(0.04 / (k + 1))
    assert_one_graph()
    assert_same(net, plain, optimizer, ours)


def test_inductor():
    check_inductor("tied, momentum")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("case", CASES)
def test_inductor_of_every_step(case, mode):
    check_inductor(case, mode)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_inductor_of_forward_backward_and_step(case):
    (plain, ours), (net, optimizer) = build(case), build(case)

    step = optimizer.step

    @torch.compile(fullgraph=True)
    def whole(x, y):
        loss_of(net, x, y).backward()
        step()

    train(plain, ours, steps=2, schedule=False)
    train(net, optimizer, whole=whole, steps=2, schedule=False)
    for own in (plain, net):
        prune(own)
    train(plain, ours, first=2)
    train(net, optimizer, whole=whole, first=2)
    assert_one_graph()
    for p, expected in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, expected)
