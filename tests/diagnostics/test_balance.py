"""Balance of factors: reports against a float64 definition, and Lemma 4.5 against factors that are trained explicitly."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from lion_pytorch import Lion
from torch import nn

from pysteep import SteepestDescent, factorize
from pysteep.diagnostics import BalanceMonitor, balance_report
from tests.support.factorized import build_net, train

# No coordinate crosses 0: there w_1 would jump to and fro under sign descent, and the others go on, which the flow does not.
TARGET = torch.tensor([0.9, -0.4, 0.3, 0.2, 1.5, -0.7, 0.2], dtype=torch.float64)
START = torch.tensor([0.4, -0.6, 0.1, 0.5, 0.8, -0.9, 0.7], dtype=torch.float64)


def balances(factors, q):
    """|w_j|^q - |w_1|^q of all j >= 2 and coordinates, in float64."""
    first, *others = (w.detach().double().abs() ** q for w in factors)
    return torch.stack([w - first for w in others])


def explicit(factors, q, lr, steps, decay, coupled):
    """Factors of 1/2 |x - TARGET|^2 by the definition: every one follows its own gradient."""
    factors = [w.clone() for w in factors]
    for _ in range(steps):
        x = torch.stack(factors).prod(0)
        steepest = []
        for i, w in enumerate(factors):
            others = torch.stack([v for j, v in enumerate(factors) if j != i]).prod(0)
            g = (x - TARGET) * others + coupled * w
            steepest.append(g.sign() * g.abs() ** (q - 1))
        factors = [w - lr * u - lr * decay * w for w, u in zip(factors, steepest, strict=True)]
    return factors


def watched(lr, steps, **options):
    """A monitor of an optimiser after so many steps, and the factors before and after."""
    p = nn.Parameter(START.clone())
    optimizer = SteepestDescent([p], lr=lr, **options)
    with BalanceMonitor(optimizer, every=steps) as monitor:
        before = [w.clone() for w in optimizer.factors(p)]
        for _ in range(steps):
            p.grad = p.detach() - TARGET
            optimizer.step()
    return monitor, before, optimizer.factors(p)


@pytest.mark.parametrize("depth", [2, 3, 10])
@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("storage", ["full", "tied", "implicit"])
def test_lemma_holds_to_first_order_under_decoupled_decay(storage, q, depth):
    distances = []
    for lr, steps in ((1e-2, 40), (1e-3, 400)):
        monitor, before, after = watched(
            lr, steps, q=q, depth=depth, storage=storage, init="lambda", scale=0.6, weight_decay=0.5
        )
        first, last = monitor.history
        expected = balances(before, q) * (1 - lr * 0.5) ** (q * steps)
        assert (first.step, last.step) == (0, steps)
        assert first.mean == first.predicted == pytest.approx(float(balances(before, q).mean()), rel=1e-12)
        assert first.distance == pytest.approx(0, abs=1e-12)
        assert last.predicted == pytest.approx(float(expected.mean()), rel=1e-9)
        assert last.mean == pytest.approx(float(balances(after, q).mean()), rel=1e-9)
        assert last.distance == pytest.approx(float((balances(after, q) - expected).abs().mean()), rel=1e-6, abs=1e-12)
        if storage != "implicit":
            trained = explicit(before, q, lr, steps, 0.5, 0.0)
            torch.testing.assert_close(balances(after, q), balances(trained, q), rtol=1e-9, atol=1e-9)
        distances.append(last.distance)
    coarse, fine = distances
    assert fine < coarse / 8 + 1e-12
    assert coarse < 1e-3


@pytest.mark.parametrize("depth", [2, 10])
def test_coupled_decay_breaks_the_lemma_at_q_1_but_not_at_q_2(depth):
    options = {"depth": depth, "storage": "full", "coupled_weight_decay": 0.5}
    distance = {}
    for q in (1.0, 2.0):
        monitor, before, after = watched(1e-3, 800, q=q, **options)
        trained = explicit(before, q, 1e-3, 800, 0.0, 0.5)
        torch.testing.assert_close(balances(after, q), balances(trained, q), rtol=1e-6, atol=1e-6)
        distance[q] = monitor.history[-1].distance
    assert distance[1.0] > 0.1
    assert distance[2.0] < 1e-4
    assert watched(1e-3, 800, q=1.0, depth=depth, weight_decay=0.5)[0].history[-1].distance < 1e-9


MODEL_OPTIMIZERS = {
    "adamw": (lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.1), 1.0, 0.1),
    "adam": (lambda p: torch.optim.Adam(p, lr=1e-3, weight_decay=0.1), 1.0, 0.0),
    "lion": (lambda p: Lion(p, lr=1e-3, weight_decay=0.1), 1.0, 0.1),
    "sgd": (lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1), 2.0, 0.1),
    "sgd, other power": (lambda p: torch.optim.SGD(p, lr=1e-3, weight_decay=0.1), 1.5, 0.0),
    "steepest": (lambda p: SteepestDescent(p, lr=1e-3, q=1.5, weight_decay=0.1), None, 0.1),
    "steepest, q = 2": (lambda p: SteepestDescent(p, lr=1e-3, q=2.0, coupled_weight_decay=0.1), None, 0.1),
}


@pytest.mark.parametrize("name", MODEL_OPTIMIZERS)
def test_factorised_models_under_any_optimizer(name):
    build, q, decay = MODEL_OPTIMIZERS[name]
    net = factorize(build_net(), 3, "dwf")
    optimizer = build(net.parameters())
    power = optimizer.param_groups[0].get("q", q)
    factors = list(net[4].parametrizations.weight.parameters())
    first = balances(factors, power)
    records = []
    monitor = BalanceMonitor(optimizer, net, q, every=2, on_record=records.append)
    train(net, optimizer, 5)
    monitor.remove()
    train(net, optimizer, 1)
    assert records == monitor.history
    assert [(r.step, r.name) for r in records] == [(s, n) for s in (0, 2, 4) for n in ("0.weight", "4.weight")]
    expected = first.float().double() * (1 - 1e-3 * decay) ** (power * 4)
    assert records[-1].predicted == pytest.approx(float(expected.mean()), rel=1e-6)
    assert monitor.step == 5


def test_distance_of_a_model_is_that_of_its_coordinates():
    net = factorize(build_net(), 3, "dwf")
    optimizer = SteepestDescent(net.parameters(), lr=1e-2, q=1.5, weight_decay=0.3)
    factors = list(net[4].parametrizations.weight.parameters())
    first = balances(factors, 1.5)
    with BalanceMonitor(optimizer, net) as monitor, BalanceMonitor(optimizer, net, coordinates=False) as means:
        train(net, optimizer, 3)
    now = balances(factors, 1.5)
    expected = first * (1 - 3e-3) ** (1.5 * 3)
    record = monitor.history[-1]
    assert record.mean == pytest.approx(float(now.mean()), rel=1e-12)
    assert record.distance == pytest.approx(float((now - expected).abs().mean()), rel=1e-4)
    assert means.history[-1][:4] == record[:4]
    assert math.isnan(means.history[-1].distance)


@pytest.mark.parametrize("kind", [float, lambda lr: torch.tensor(lr, dtype=torch.float64)])
def test_learning_rates_and_decay_are_read_at_each_step(kind):
    p = nn.Parameter(START.clone())
    optimizer = SteepestDescent([p], lr=kind(0.1), depth=2, weight_decay=1.0)
    group = optimizer.param_groups[0]
    optimizer.register_step_post_hook(lambda *_: group.__setitem__("lr", group["lr"] / 2))
    monitor = BalanceMonitor(optimizer)
    kept = 1.0
    for lr, decay in ((0.1, 1.0), (0.05, 2.0), (0.025, 0.0), (0.0125, 3.0)):
        group["weight_decay"] = decay
        p.grad = torch.randn(7, dtype=torch.float64)
        optimizer.step()
        kept *= 1 - lr * decay
    assert monitor.history[-1].predicted == pytest.approx(monitor.history[0].mean * kept, rel=1e-9)


def test_groups_of_a_loaded_optimizer_are_the_ones_that_are_read():
    p = nn.Parameter(START.clone())
    optimizer = SteepestDescent([p], lr=0.1, depth=2, weight_decay=1.0)
    monitor = BalanceMonitor(optimizer)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.2
    p.grad = torch.randn(7, dtype=torch.float64)
    optimizer.step()
    assert monitor.history[-1].predicted == pytest.approx(monitor.history[0].mean * 0.8, rel=1e-9)


def test_steps_that_are_not_taken_do_not_decay():
    p, unused = nn.Parameter(START.clone()), nn.Parameter(START.clone())
    optimizer = SteepestDescent([p, unused], lr=0.1, depth=2, weight_decay=1.0)
    monitor = BalanceMonitor(optimizer)
    for found in (1.0, 0.0, 1.0):
        p.grad = torch.randn(7, dtype=torch.float64)
        optimizer.found_inf = torch.full((1,), found)
        optimizer.step()
    first, first_unused, *_, last, last_unused = monitor.history
    assert last.predicted == pytest.approx(first.mean * 0.9, rel=1e-9)
    assert last.distance < 1e-9
    assert last_unused.predicted == last_unused.mean == first_unused.mean


def test_gradients_that_a_closure_makes_count():
    p = nn.Parameter(START.clone())
    optimizer = SteepestDescent([p], lr=0.1, depth=2, weight_decay=1.0)
    monitor = BalanceMonitor(optimizer)

    def closure():
        p.grad = torch.randn(7, dtype=torch.float64)

    optimizer.step(closure)
    assert monitor.history[-1].predicted == pytest.approx(monitor.history[0].mean * 0.9, rel=1e-9)


@pytest.mark.parametrize("storage", ["full", "tied", "implicit"])
def test_watching_changes_nothing(storage):
    def trained(watch):
        net = build_net()
        scale = {"init": "lambda", "scale": 0.5} if storage == "implicit" else {"betas": (0.9, 0.99)}
        optimizer = SteepestDescent(net.parameters(), lr=1e-2, depth=3, storage=storage, weight_decay=0.1, **scale)
        if watch:
            BalanceMonitor(optimizer)
        train(net, optimizer, 5)
        if watch:
            balance_report(optimizer)
        train(net, optimizer, 2)
        return net.state_dict()

    expected = trained(False)
    assert all(torch.equal(value, expected[key]) for key, value in trained(True).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("q", [1.0, 1.7, 2.0])
@pytest.mark.parametrize("storage", ["full", "tied"])
def test_report_of_an_optimizer(storage, q, dtype):
    a, b = nn.Parameter(torch.randn(5, 3, 2, 2, dtype=dtype)), nn.Parameter(torch.randn(()))
    a.data = a.data.to(memory_format=torch.channels_last)
    groups = [{"params": [("a", a)], "depth": 4}, {"params": [("b", b)], "depth": 1}]
    optimizer = SteepestDescent(groups, lr=0.1, q=q, storage=storage)
    a.grad, before = torch.randn_like(a), a.detach().clone()
    report = balance_report(optimizer)
    assert torch.equal(a.detach(), before)
    for expected in (balances([before, *[torch.ones_like(before)] * 3], q), None):
        (layer,) = report.layers
        expected = balances(optimizer.factors(a), q) if expected is None else expected
        assert layer[:3] == ("a", 4, q)
        assert layer.mean == pytest.approx(float(expected.mean()), rel=1e-12, abs=1e-14)
        assert (layer.lowest, layer.highest) == pytest.approx((float(expected.min()), float(expected.max())), rel=1e-12)
        assert layer.mean_absolute == pytest.approx(float(expected.abs().mean()), rel=1e-12)
        optimizer.step()
        report = balance_report(optimizer)
    assert report.pairs == ()
    assert "mean |balance|" in str(report)


def test_report_of_a_model():
    net = nn.ModuleDict({"attention": nn.MultiheadAttention(6, 2), "out": nn.Linear(6, 4), "empty": nn.Embedding(0, 3)})
    factorize(net, 3, "dwf", match="out*")
    factorize(net, 2, match="empty*")
    with torch.no_grad():
        net["out"].parametrizations.weight.original1[0, 0] = torch.nan
    state = copy.deepcopy(net.state_dict())
    for q in (1.0, 1.5):
        report = balance_report(net, q)
        out, empty = report.layers
        assert (out.name, out.depth, out.q) == ("out.weight", 3, q)
        assert all(math.isnan(number) for number in (*out[3:], *empty[3:]))
        (pair,) = report.pairs
        query, key, _ = net["attention"].in_proj_weight.detach().double().abs().pow(q).chunk(3)
        assert (pair.layer, pair.q) == ("attention", q)
        assert (pair.first, pair.second) == pytest.approx((float(query.sum()), float(key.sum())), rel=1e-12)
        assert pair.difference == pytest.approx(abs(float(query.sum() - key.sum())), rel=1e-9)
    named = balance_report(net, 2.0, [("out.weight", "attention.out_proj.weight")])
    norms = [float((w.detach().double() ** 2).sum()) for w in (net["out"].weight, net["attention"].out_proj.weight)]
    assert math.isnan(norms[0])
    assert math.isnan(named.pairs[0].first)
    assert named.pairs[0].second == pytest.approx(norms[1], rel=1e-12)
    assert balance_report(net, pairs=None).pairs == ()
    assert "out.weight, attention.out_proj.weight" in str(named)
    assert all(torch.equal(value.nan_to_num(), state[key].nan_to_num()) for key, value in net.state_dict().items())


def test_a_weight_of_many_pieces(monkeypatch):
    from pysteep.diagnostics import _balance

    monkeypatch.setattr(_balance, "PIECE", 16)
    net = factorize(nn.Linear(9, 7), 3, "dwf")
    factors = list(net.parametrizations.weight.parameters())
    expected = balances(factors, 1.0)
    (layer,) = balance_report(net).layers
    assert layer[3:] == pytest.approx(
        [float(f) for f in (expected.mean(), expected.min(), expected.max(), expected.abs().mean())]
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    monitor = BalanceMonitor(optimizer, net, 1.0)
    net(torch.randn(2, 9)).sum().backward()
    optimizer.step()
    assert monitor.history[-1].distance == pytest.approx(float((balances(factors, 1.0) - expected).abs().mean()), rel=1e-4)


def test_bad_arguments_are_named():
    net, plain = factorize(build_net(), 2), build_net()
    optimizer = SteepestDescent(plain.parameters(), depth=2)
    flat = SteepestDescent(plain.parameters())
    with pytest.raises(TypeError, match=r"source must be a model or a pysteep\.SteepestDescent; got AdamW"):
        balance_report(torch.optim.AdamW(plain.parameters()))
    with pytest.raises(ValueError, match=r"q must be a number in \[1, 2\]; got 3"):
        balance_report(net, 3)
    with pytest.raises(ValueError, match=r"q and pairs must be left out for an optimizer; got q=1\.0"):
        balance_report(optimizer, 1.0)
    with pytest.raises(ValueError, match="source must train a parameter at depth > 1"):
        balance_report(flat)
    with pytest.raises(ValueError, match="source must have factorised weights of depth > 1 or pairs of matrices"):
        balance_report(plain)
    with pytest.raises(ValueError, match=r"pairs must be 'auto', None or a list of .*; got 'all'"):
        balance_report(plain, pairs="all")
    with pytest.raises(ValueError, match=r"pairs must name matrices of the model; it has none called '4\.bias'"):
        balance_report(plain, pairs=[("4.weight", "4.bias")])
    with pytest.raises(ValueError, match=r"pairs must be 'auto', None or a list of .*; got 'ab' in it"):
        balance_report(plain, pairs=["ab"])
    with pytest.raises(ValueError, match="every must be an int >= 1; got 0"):
        BalanceMonitor(optimizer, every=0)
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got Sequential"):
        BalanceMonitor(net)
    with pytest.raises(ValueError, match="optimizer must be a SteepestDescent with a parameter at depth > 1"):
        BalanceMonitor(flat)
    with pytest.raises(ValueError, match=r"q must be None for SteepestDescent, whose groups have it; got 1\.0"):
        BalanceMonitor(optimizer, q=1.0)
    with pytest.raises(ValueError, match=r"q must be a number in \[1, 2\]; got None"):
        BalanceMonitor(torch.optim.AdamW(net.parameters()), net)
    with pytest.raises(ValueError, match="optimizer must be built after factorize"):
        BalanceMonitor(torch.optim.AdamW(plain.parameters()), net, 1.0)
    with pytest.raises(ValueError, match="model must have factorised weights of depth > 1; it has none"):
        BalanceMonitor(torch.optim.AdamW(plain.parameters()), plain, 1.0)
    split = [{"params": [p]} for p in net.parameters()]
    with pytest.raises(ValueError, match=r"the factors of 0\.weight must be in one group of optimizer"):
        BalanceMonitor(torch.optim.AdamW(split), net, 1.0)
