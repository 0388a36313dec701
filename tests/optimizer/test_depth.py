"""Depth as an option of SteepestDescent: the same trajectory as explicit factors, and what is refused."""

from __future__ import annotations

import tracemalloc

import pytest
import torch
from torch import nn

import pysteep
from pysteep import SteepestDescent, param_groups
from pysteep._ops.dispatch import extension
from tests.support.cases import BACKENDS, random_values, same_bits

STORAGES = ("full", "tied", "implicit")


def build_net(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 3)).to(dtype)


def data(dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator, dtype=torch.float64).to(dtype)
    return x, (x @ torch.randn(6, 3, generator=generator, dtype=torch.float64).to(dtype)).argmax(1)


def train(net, optimizer, steps, forward=None):
    x, y = data(next(net.parameters()).dtype)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy((forward or net)(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def weights_of(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def explicit_factors(net, depth, **how):
    """The net's weights as leaves that a plain optimiser updates, and the net's forward through their product."""
    optimizer = SteepestDescent(param_groups(net, depth), storage="full", **how)
    factors = {
        name: [w.clone().requires_grad_() for w in optimizer.factors(p)] for name, p in net.named_parameters() if p.ndim == 2
    }

    def products():
        result = {}
        for name, own in factors.items():
            result[name] = own[0]
            for w in own[1:]:
                result[name] = result[name] * w
        return result

    return factors, products, lambda x: torch.func.functional_call(net, products(), (x,))


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_three_ways_to_train_factors_give_one_trajectory(q, depth):
    """Explicit factors under plain SteepestDescent, factorize, and the depth option, full and tied: 500 steps, decay on."""
    how = {"init": "lambda", "scale": 0.9, "q": q}
    step = {"lr": 2e-3, "weight_decay": 0.02, "coupled_weight_decay": 0.01}
    start = weights_of(build_net())
    explicit = build_net()
    factors, products, forward = explicit_factors(explicit, depth, **how)
    leaves = [w for own in factors.values() for w in own] + [p for p in explicit.parameters() if p.ndim == 1]
    train(explicit, SteepestDescent(leaves, q=q, **step), 500, forward)
    with torch.no_grad():
        for name, x in products().items():
            explicit.get_parameter(name).copy_(x)
    results = {}
    for storage in ("full", "tied"):
        net = build_net()
        train(net, SteepestDescent(param_groups(net, depth), storage=storage, **how, **step), 500)
        results[storage] = weights_of(net)
    net = pysteep.factorize(build_net(), depth, **how)
    train(net, SteepestDescent(net.parameters(), q=q, **step), 500)
    results["factorize"] = weights_of(pysteep.collapse(net))
    assert (weights_of(explicit) - start).abs().max() > 0.1, "nothing moved"
    for name, result in results.items():
        torch.testing.assert_close(result, weights_of(explicit), rtol=1e-8, atol=1e-11, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("betas", [(0.9, 0.99), (0.9, 0.9)])
def test_momentum_is_that_of_each_factor(betas):
    how, step = {"init": "identity", "q": 1.5}, {"lr": 1e-3, "weight_decay": 0.02, "betas": betas}
    explicit = build_net()
    factors, products, forward = explicit_factors(explicit, 3, **how)
    leaves = [w for own in factors.values() for w in own] + [p for p in explicit.parameters() if p.ndim == 1]
    train(explicit, SteepestDescent(leaves, q=1.5, **step), 50, forward)
    for storage in ("full", "tied"):
        net = build_net()
        train(net, SteepestDescent(param_groups(net, 3), storage=storage, **how, **step), 50)
        for name, x in products().items():
            torch.testing.assert_close(net.get_parameter(name), nn.Parameter(x.detach()), rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
def test_balance_follows_lemma_4_5(q, storage, decay):
    """| |w_j|^q - |w_1|^q - lambda prod (1 - lr decay)^q | is of the size of lr: ten times less for a tenth of it."""
    errors = []
    for lr in (4e-3, 4e-4):
        net = build_net()
        optimizer = SteepestDescent(
            param_groups(net, 3), lr=lr, q=q, weight_decay=decay, storage=storage, init="lambda", scale=0.7
        )
        steps = round(0.2 / lr)
        train(net, optimizer, steps)
        expected = 0.7**q * (1 - lr * decay) ** (q * steps)
        first, *_, last = optimizer.factors(net[0].weight)
        errors.append((last.abs() ** q - first.abs() ** q - expected).abs().mean().item())
    assert errors[0] < 5 * 4e-3
    assert errors[1] < errors[0] / 5 or errors[1] < 1e-12


@pytest.mark.parametrize("init", ["identity", "balanced", "lambda"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inits_keep_x_and_give_its_factors(dtype, storage, init):
    if storage == "implicit" and init == "identity":
        pytest.skip("refused, see below")
    p = nn.Parameter(random_values((40, 7), torch.float32).to(dtype))
    p.data[0, :3] = 0
    before = p.detach().clone()
    optimizer = SteepestDescent(
        [p], lr=0.1, q=1.5, depth=3, storage=storage, init=init, scale=0.5 if init == "lambda" else None
    )
    factors = optimizer.factors(p)
    assert same_bits(p.detach(), before)
    assert [w.shape for w in factors] == [p.shape] * 3
    product = factors[0].double() * factors[1].double() * factors[2].double()
    torch.testing.assert_close(product, before.double(), rtol=3 * torch.finfo(dtype).eps, atol=1e-9)
    if init == "identity":
        assert torch.equal(factors[0], before)
        assert all(bool((w == 1).all()) for w in factors[1:])
    else:
        balance = 0.5**1.5 if init == "lambda" else 0.0
        size = [w.double().abs() ** 1.5 for w in factors]
        tolerance = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(size[1] - size[0], torch.full_like(size[0], balance), rtol=tolerance, atol=tolerance * 3)


@pytest.mark.parametrize("storage", STORAGES)
def test_saddle_sets_x_to_zero_when_built(storage):
    p = nn.Parameter(torch.randn(9))
    optimizer = SteepestDescent([p], lr=0.1, depth=4, storage=storage, init="saddle", scale=0.5)
    assert p.tolist() == [0.0] * 9
    first, *others = optimizer.factors(p)
    assert first.tolist() == [0.0] * 9
    assert all(w.tolist() == [0.5] * 9 for w in others)
    p.grad = torch.ones(9)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((9,), -0.1 * 0.5**3))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("storage", STORAGES)
def test_every_backend_steps_alike(storage, backend):
    results = []
    for name in (backend, "reference"):
        net = build_net(torch.float32)
        optimizer = SteepestDescent(
            param_groups(net, 3), lr=1e-3, q=1.5, weight_decay=0.1, storage=storage, init="lambda", scale=0.5, backend=name
        )
        train(net, optimizer, 20)
        results.append(weights_of(net))
    torch.testing.assert_close(*results, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize(("storage", "bytes_each"), [("full", 40), ("tied", 8), ("implicit", 0)])
def test_bytes_of_state_per_weight_at_depth_10(storage, bytes_each):
    p = nn.Parameter(torch.randn(100, 100))
    optimizer = SteepestDescent([p], lr=0.1, depth=10, storage=storage, init="balanced")
    p.grad = torch.randn(100, 100)
    optimizer.step()
    own = sum(t.numel() * t.element_size() for t in optimizer.state[p].values())
    assert own == bytes_each * p.numel() + (8 if storage == "implicit" else 0)


@pytest.mark.skipif(extension is None, reason="extension not built")
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("q", [1.0, 1.7])
def test_a_step_allocates_no_temporary_of_a_weights_size(q, storage):
    """Peak bytes of a step, by torch's profiler for tensors and tracemalloc for everything that Python allocates."""
    p = nn.Parameter(torch.randn(1000, 1000))
    optimizer = SteepestDescent([p], lr=1e-3, q=q, depth=10, storage=storage, init="balanced", weight_decay=0.1, backend="cpp")
    p.grad = torch.randn(1000, 1000)
    optimizer.step()
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    allocated = sum(event.cpu_memory_usage for event in profile.events() if event.cpu_memory_usage > 0)
    assert allocated < 4096
    tracemalloc.start()
    optimizer.step()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 18


@pytest.mark.parametrize("storage", ["full", "tied"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
def test_layouts(layout, storage):
    from tests.support.cases import laid_out

    values, gradient = random_values((4, 3, 5, 6), torch.float32), random_values((4, 3, 5, 6), torch.float32)
    results = []
    for at in ("contiguous", layout):
        p = laid_out(values, at).requires_grad_()
        optimizer = SteepestDescent([p], lr=0.01, q=1.5, depth=3, storage=storage, init="lambda", scale=0.5)
        for _ in range(3):
            p.grad = gradient.clone()
            optimizer.step()
        results.append(p.detach().clone())
    assert same_bits(*results)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_step_with_lr_0_and_no_gradient_changes_no_bit(storage):
    """What distributed checkpoints do to create the state."""
    p = nn.Parameter(torch.randn(300))
    before = p.detach().clone()
    optimizer = SteepestDescent([p], lr=torch.tensor(0.0), depth=10, storage=storage, init="balanced", q=1.5)
    p.grad = torch.zeros(300)
    optimizer.step()
    assert same_bits(p.detach(), before)
    assert optimizer.state[p]


@pytest.mark.parametrize("storage", STORAGES)
def test_grad_scaler_and_clipping(storage):
    """An infinity skips the step, factors, balance and all; clipping acts on the gradient of x."""
    p, plain = nn.Parameter(torch.randn(40)), nn.Parameter(torch.zeros(40))
    plain.data.copy_(p.data)
    options = {"lr": 0.01, "q": 1.5, "depth": 3, "storage": storage, "init": "balanced", "weight_decay": 0.1}
    ours, bare = SteepestDescent([p], **options), SteepestDescent([plain], **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    target = torch.randn(40)
    for optimizer, x in ((ours, p), (bare, plain)):
        loss = (x - target).square().sum()
        (scaler.scale(loss) if optimizer is ours else loss).backward()
    scaler.unscale_(ours)
    for x in (p, plain):
        nn.utils.clip_grad_norm_([x], 0.5)
    scaler.step(ours)
    scaler.update()
    bare.step()
    assert same_bits(p.detach(), plain.detach())
    state = {name: t.clone() for name, t in ours.state[p].items()}
    before = p.detach().clone()
    p.grad = torch.full((40,), torch.inf)
    scaler.scale(torch.tensor(1.0))
    scaler.step(ours)
    scaler.update()
    assert same_bits(p.detach(), before)
    assert all(torch.equal(state[name], t) for name, t in ours.state[p].items())


def test_options_of_a_group_and_a_depth_that_changes():
    p, q = nn.Parameter(torch.randn(5)), nn.Parameter(torch.randn(5))
    optimizer = SteepestDescent([{"params": [p], "depth": 2}, {"params": [q]}], lr=0.1)
    for x in (p, q):
        x.grad = torch.ones(5)
    before = q.detach().clone()
    optimizer.step()
    assert torch.equal(q.detach(), before - 0.1)
    assert len(optimizer.factors(p)) == 2
    assert optimizer.factors(q)[0].data_ptr() == q.data_ptr()
    optimizer.param_groups[0]["depth"] = 5
    assert len(optimizer.factors(p)) == 5
    optimizer.step()
    with pytest.raises(ValueError, match="param must be a parameter of this optimiser"):
        optimizer.factors(torch.ones(5))


def test_param_groups_say_what_they_chose(caplog):
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3), nn.LayerNorm(3))
    with caplog.at_level("INFO", logger="pysteep"):
        groups = param_groups(net, 3)
    assert [name for name, _ in groups[0]["params"]] == ["0.weight", "3.weight"]
    assert [group["depth"] for group in groups] == [3, 1]
    assert sum(len(group["params"]) for group in groups) == len(list(net.parameters()))
    assert "depth 3   3.weight" in repr(groups)
    assert "3.weight" in caplog.text
    optimizer = SteepestDescent(groups, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == ["0.weight", "3.weight"]
    assert "depth 3   3.weight" in repr(groups)
    assert [name for name, _ in param_groups(net, 2, match="3.*")[0]["params"]] == ["3.weight"]
    assert param_groups(net, 2, match=lambda _, p: p.ndim == 1)[0]["params"][0][0] == "0.bias"
    with pytest.raises(ValueError, match="match must choose a parameter"):
        param_groups(net, 2, match="9.*")
    with pytest.raises(ValueError, match="depth must be an int from 1 to 64; got 0"):
        param_groups(net, 0)


def parameters():
    return [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": 0}, "depth must be an int from 1 to 64; got 0"),
        ({"depth": 2.0}, "depth must be an int from 1 to 64; got 2.0"),
        ({"depth": True}, "depth must be an int from 1 to 64; got True"),
        ({"depth": 65}, "depth must be an int from 1 to 64; got 65"),
        ({"depth": 2, "storage": "none"}, "storage must be one of full, tied, implicit; got 'none'"),
        ({"depth": 2, "init": "zeros"}, "init must be one of identity, balanced, lambda, saddle; got 'zeros'"),
        ({"depth": 3, "init": "dwf"}, "init must be one of .* got 'dwf'; for random factors use pysteep.factorize"),
        ({"depth": 2, "init": "lambda"}, "scale must be a finite number > 0 with init 'lambda'; got None"),
        ({"depth": 2, "init": "lambda", "scale": -0.1}, "scale must be a finite number > 0 with init 'lambda'; got -0.1"),
        ({"depth": 2, "init": "saddle", "scale": 0.0}, "scale must be a finite number > 0 with init 'saddle'; got 0.0"),
        ({"depth": 2, "scale": 0.1}, "scale must be None with init 'identity'"),
        ({"depth": 2, "normalize": True}, "normalize must be False at depth > 1; got True"),
        (
            {"depth": 2, "storage": "implicit"},
            "init must be balanced, lambda or saddle with storage 'implicit'.*got 'identity'",
        ),
        (
            {"depth": 2, "storage": "implicit", "init": "balanced", "betas": (0.9, 0.9)},
            "betas must be .* with storage 'implicit'",
        ),
        (
            {"depth": 2, "storage": "implicit", "init": "balanced", "coupled_weight_decay": 0.1},
            "coupled_weight_decay must be 0 with storage 'implicit'",
        ),
    ],
    ids=str,
)
def test_options_that_do_not_go_together_are_refused(options, message):
    params = parameters()
    with pytest.raises(ValueError, match=message):
        SteepestDescent(params, lr=0.1, **options)
    groups = [{"params": params[:1], "depth": 2, "init": "saddle", "scale": 0.1}, {"params": params[1:], **options}]
    with pytest.raises(ValueError, match=message):
        SteepestDescent(groups, lr=0.1)
    assert all(p.tolist() == [1.0] * 3 for p in params), "the first group's saddle must wait for the second group's check"
    optimizer = SteepestDescent(params, lr=0.1, depth=2)
    for p in params:
        p.grad = torch.ones(3)
    optimizer.param_groups[0].update(options)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert all(p.tolist() == [1.0] * 3 for p in params)


def test_parameters_that_cannot_have_factors_are_named():
    with pytest.raises(ValueError, match=r"depth must be 1 for param 0, which is torch\.complex64"):
        SteepestDescent([nn.Parameter(torch.ones(3, dtype=torch.complex64))], depth=2)
    named = [("embedding", nn.Parameter(torch.ones(3, dtype=torch.float16)))]
    with pytest.raises(ValueError, match="scale must be a number > 0 in the dtype of embedding"):
        SteepestDescent(named, depth=2, init="lambda", scale=1e-9)
    embedding = nn.Embedding(10, 3, sparse=True)
    optimizer = SteepestDescent(embedding.parameters(), depth=2)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(TypeError, match="gradient 0 must be dense"):
        optimizer.step()
    assert torch.equal(embedding.weight.detach(), before)
