"""factorize and back: initialisations, training, checkpoints, ties, and what torch does with parametrized modules."""

from __future__ import annotations

import copy
import io
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import weight_norm

import pysteep
from pysteep import check_optimizer, collapse, dense_state_dict, factorize, load_dense_state_dict
from pysteep._initial import INITS, initial_factors
from tests.cases import DTYPES, random_values, same_bits
from tests.tolerances import EPS

RULES = {
    "identity": {},
    "balanced": {},
    "lambda": {"scale": 0.3, "q": 1.5},
    "saddle": {"scale": 0.1},
    "dwf": {},
    "variance": {},
}
EXACT = ("identity", "balanced", "lambda")


def build_net() -> nn.Sequential:
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 5))
    return net.to(memory_format=torch.channels_last)


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 1, 6, 6, generator=generator), torch.randint(0, 5, (8,), generator=generator)


def train(net, optimizer, steps):
    losses = []
    for seed in range(steps):
        x, y = batch(seed % 4)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def factors_of(module, attribute="weight"):
    return list(module.parametrizations[attribute].parameters())


def assert_same(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def product(factors):
    result = factors[0].double()
    for w in factors[1:]:
        result = result * w.double()
    return result


@pytest.mark.parametrize("depth", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("init", EXACT)
def test_initial_factors_multiply_to_the_weight(init, dtype, depth):
    x = random_values((40, 50), dtype, wide=dtype != torch.float16)
    x.view(-1)[:6] = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1.0])
    factors = initial_factors(x, depth, init, **RULES[init])
    assert len(factors) == depth
    assert all(w.dtype == dtype and w.shape == x.shape for w in factors)
    got = pysteep.functional.factor_product(factors)
    if init == "identity":
        assert same_bits(got, x)
        return
    finite = x.isfinite()
    assert same_bits(got[~finite], x[~finite])
    exact = x[finite].double()
    info = torch.finfo(dtype)
    # w_1 is rounded once; the others are what it was computed for. A small w_1 of float16 has fewer digits.
    slack = (2 * EPS[dtype] + 2 * depth * EPS[torch.float32]) * exact.abs() + info.smallest_normal * 2 * info.eps * 0.5
    largest = product(factors[1:])[finite].clamp(min=1.0) if depth > 1 else 1.0
    assert bool(((got[finite].double() - exact).abs() <= slack * largest).all())
    assert torch.equal(got.signbit()[~x.isnan()], x.signbit()[~x.isnan()])
    if init == "balanced" and depth > 1:
        root = exact.abs() ** (1 / depth)
        for w in factors:
            rtol = 2 * depth * EPS[dtype] + 16 * EPS[torch.float64]  # a power has errors of its own
            torch.testing.assert_close(w[finite].double().abs(), root, rtol=rtol, atol=2 * info.smallest_normal)


@pytest.mark.parametrize("q", [1.0, 1.5, 2.0])
@pytest.mark.parametrize("depth", [2, 3, 10])
def test_lambda_is_balanced(depth, q):
    x, scale = torch.randn(1000, dtype=torch.float64), 0.3
    x[:10] = 0.0
    first, *rest = initial_factors(x, depth, "lambda", scale, q)
    assert all(torch.equal(w, rest[0]) for w in rest)
    torch.testing.assert_close(rest[0] ** q - first.abs() ** q, torch.full_like(x, scale**q))
    torch.testing.assert_close(rest[0][:10], torch.full((10,), scale, dtype=torch.float64))


def test_large_weights_are_made_in_pieces_and_in_their_own_layout(monkeypatch):
    monkeypatch.setattr(pysteep._initial, "PIECE", 1000)
    x = torch.randn(5, 777).t()
    for init in INITS:
        for w in initial_factors(x, 2, init, **RULES[init]):
            assert w.stride() == x.stride()
    assert torch.equal(*(initial_factors(x, 3, "balanced")[1:]))
    first, rest = initial_factors(x, 5, "lambda", 0.3, tied=True)
    every = initial_factors(x, 5, "lambda", 0.3)
    assert torch.equal(first, every[0])
    assert all(torch.equal(rest, w) for w in every[1:])
    assert len(initial_factors(x, 1, "saddle", 0.3, tied=True)) == 1
    part = torch.randn(6, 8)[:, ::2]
    assert all(w.is_contiguous() for w in initial_factors(part, 3, "balanced"))
    with pytest.raises(ValueError, match="init must be one of identity, balanced, lambda, saddle for tied factors; got 'dwf'"):
        initial_factors(x, 3, "dwf", tied=True)


@pytest.mark.parametrize(("depth", "share"), [(2, 0.65), (3, 0.54), (4, 0.48), (10, 0.39)])
def test_random_initialisations(depth, share):
    """What deep weight factorization loses of the deviation, and what "variance" does not."""
    x = 0.05 * torch.randn(400, 500) + 0.01
    factors = initial_factors(x, depth, "dwf")
    assert product(factors).std().item() == pytest.approx(share * x.std().item(), rel=0.02)
    sizes = torch.stack(factors).abs()
    assert sizes.min() >= 0.003 ** (1 / depth) * 0.9999
    assert sizes.max() <= (2 * x.std()) ** (1 / depth) * 1.0001
    assert abs(torch.stack(factors).sign().mean().item()) < 0.01
    for weight in (x, x.bfloat16(), 0.001 * x, torch.randn(7)):
        got = product(initial_factors(weight, depth, "variance")).var(correction=0)
        assert got.item() == pytest.approx(weight.double().var(correction=0).item(), rel=2 * depth * EPS[weight.dtype])


def test_random_initialisations_follow_the_generator():
    x = torch.randn(100)
    a, b = (initial_factors(x, 3, "dwf", generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert all(map(torch.equal, a, b))
    assert not torch.equal(a[0], a[1])


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
@pytest.mark.parametrize("init", INITS)
def test_factorize_and_collapse(init, depth):
    net, (x, _) = build_net(), batch()
    plain, state, before = net(x), {k: v.clone() for k, v in net.state_dict().items()}, dict(net.named_parameters())
    net[4].weight.requires_grad_(False)
    assert factorize(net, depth, init, **RULES[init]) is net
    assert isinstance(net[0], nn.Conv2d)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert [f.requires_grad for f in factors_of(net[4])] == [False] * depth
    net.load_state_dict({k: v for k, v in state.items() if k.startswith("1.")}, strict=False)  # running statistics
    out = net(x)
    if init == "identity":
        assert torch.equal(out, plain)
    elif init in EXACT:
        torch.testing.assert_close(out, plain)
    elif init == "saddle":
        assert not net[4].weight.any()
    net.eval()
    out = net(x)
    assert collapse(net) is net
    assert torch.equal(net(x), out)
    assert (type(net[0]), type(net[4])) == (nn.Conv2d, nn.Linear)
    assert list(net.state_dict()) == list(state)
    assert [name for name, _ in net.named_parameters()] == list(before)
    assert [p.requires_grad for p in net.parameters()] == [p.requires_grad for p in before.values()]
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert collapse(net) is net
    pickle = io.BytesIO()
    torch.save(net, pickle)


def test_what_is_chosen():
    net = nn.Sequential(
        nn.Embedding(5, 4),
        nn.LayerNorm(4),
        nn.ConvTranspose1d(4, 4, 1),
        nn.Bilinear(4, 4, 4),
        nn.Conv3d(1, 1, 1),
        nn.LSTM(4, 4),
    )

    def chosen(match=None):
        factorize(copy.deepcopy(net), 2, match=match)
        return [name for name, _ in pysteep._selection.selected(net, match)]

    assert chosen() == ["0.weight", "2.weight", "3.weight", "4.weight"]
    assert chosen("[03]*") == ["0.weight", "3.weight"]
    assert chosen(lambda name, parameter: parameter.ndim == 1 and "bias" in name) == [
        "1.bias", "2.bias", "3.bias", "4.bias", "5.bias_ih_l0", "5.bias_hh_l0",
    ]  # fmt: skip
    with pytest.raises(ValueError, match=r"match must choose a parameter; '\*\.bias' chooses none"):
        chosen("*.bias")
    with pytest.raises(ValueError, match="match must choose a parameter; None chooses none"):
        factorize(nn.LayerNorm(3), 2)
    with pytest.raises(TypeError, match="match must be a shell-style pattern, a function"):
        factorize(net, 2, match=3)


@pytest.mark.parametrize("attributes", [("weight",), ("weight", "bias"), ("weight_ih_l0", "bias_hh_l0")])
def test_any_parameters_of_one_module(attributes):
    """A recurrent module reads its weights through a list of its own."""
    module = nn.LSTM(3, 4) if "bias_hh_l0" in attributes else nn.Linear(3, 4)
    x, names = torch.randn(2, 3), [name for name, _ in module.named_parameters()]

    def out():
        result = module(x)
        return result[0] if isinstance(result, tuple) else result

    before = out()
    for attribute in attributes:
        factorize(module, 3, match=lambda name, _, attribute=attribute: name == attribute)
    assert torch.equal(out(), before)
    with torch.no_grad():
        factors_of(module, attributes[0])[2].mul_(2)
    changed = out()
    assert not torch.equal(changed, before)
    collapse(module)
    assert torch.equal(out(), changed)
    assert [name for name, _ in module.named_parameters()] == names


BAD = [
    ({"depth": 0}, ValueError, "depth must be an int from 1 to 64; got 0"),
    ({"depth": 65}, ValueError, "depth must be an int from 1 to 64; got 65"),
    ({"depth": 2.0}, ValueError, r"depth must be an int from 1 to 64; got 2\.0"),
    ({"depth": True}, ValueError, "depth must be an int from 1 to 64; got True"),
    ({"init": "zero"}, ValueError, "init must be one of identity, balanced, lambda, saddle, dwf, variance; got 'zero'"),
    ({"init": "lambda"}, ValueError, "scale must be a finite number > 0 with init 'lambda'; got None"),
    ({"init": "saddle", "scale": 0.0}, ValueError, r"scale must be a finite number > 0 with init 'saddle'; got 0\.0"),
    ({"init": "saddle", "scale": float("inf")}, ValueError, "scale must be a finite number > 0 with init 'saddle'; got inf"),
    (
        {"init": "saddle", "scale": 1e-60},
        ValueError,
        "scale must be a number > 0 in the dtype of 0.weight, torch.float32; 1e-60",
    ),
    ({"scale": 0.1}, ValueError, r"scale must be None with init 'identity', which has none; got 0\.1"),
    ({"q": 2.5}, ValueError, r"q must be a number in \[1, 2\]; got 2\.5"),
    ({"match": "encoder.*"}, ValueError, "'encoder.*' chooses none"),
]


@pytest.mark.parametrize(("bad", "error", "message"), BAD, ids=[str(case[0]) for case in BAD])
def test_bad_arguments_are_named_and_nothing_is_changed(bad, error, message):
    net = build_net()
    state = net.state_dict()
    with pytest.raises(error, match=message):
        factorize(net, **{"depth": 2, **bad})
    assert_same(net.state_dict(), state)


def test_unfit_weights_are_named_and_nothing_is_changed():
    def refused(module, error, message, init="identity", **options):
        net = nn.Sequential(nn.Linear(2, 2), module)
        before = list(net.state_dict())
        with pytest.raises(error, match=message):
            factorize(net, 2, init, **options)
        assert list(net.state_dict()) == before
        assert not parametrize.is_parametrized(net[0])

    refused(nn.Linear(2, 2, dtype=torch.complex64), TypeError, r"1\.weight must be float16.*; got torch\.complex64")
    refused(nn.LazyLinear(2), ValueError, r"1\.weight must have a shape; it is uninitialised")
    refused(nn.Embedding(2, 2, max_norm=1.0), ValueError, r"1\.weight must be of an embedding with max_norm=None")
    refused(weight_norm(nn.Linear(2, 2)), ValueError, r"1\.weight must be a plain parameter; it is parametrized by _WeightNorm")
    constant = nn.Linear(2, 2)
    nn.init.ones_(constant.weight)
    for init in ("dwf", "variance"):
        refused(constant, ValueError, rf"init '{init}' needs a weight of standard deviation above .*; 1\.weight has 0\.0", init)
    small = nn.Linear(50, 50)
    nn.init.normal_(small.weight, std=1e-3)
    refused(small, ValueError, r"init 'dwf' needs a weight of standard deviation above 0\.0015; 1\.weight has", "dwf")
    inside = "parametrizations.weight.original0"
    refused(
        weight_norm(nn.Linear(2, 2)), ValueError, "it belongs to a parametrization", match=lambda name, _: name.endswith(inside)
    )


def test_a_factorised_weight_is_not_factorised_again():
    net = factorize(build_net(), 2, match="0.*")
    for match in (None, "0.*", lambda name, _: name == "0.weight"):
        with pytest.raises(ValueError, match=r"0\.weight must be a plain parameter; it is parametrized by FactorProduct"):
            factorize(net, 3, match=match)
    factorize(net, 3, match="4.*")
    assert [len(factors_of(net[i])) for i in (0, 4)] == [2, 3]


def hand_written(factors, biases, x):
    """The same net as a function of explicit products."""
    hidden = torch.tanh(x @ (factors[0] * factors[1] * factors[2]).T + biases[0])
    return hidden @ (factors[3] * factors[4] * factors[5]).T + biases[1]


def test_gradients_and_hessian_vector_products_are_those_of_a_product_by_hand():
    torch.manual_seed(2)
    net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    factorize(net, 3, "lambda", scale=0.5)
    x, y = torch.randn(10, 4, dtype=torch.float64), torch.randint(0, 3, (10,))
    factors = (*factors_of(net[0]), *factors_of(net[2]))
    with torch.no_grad():
        for w in factors:
            w[torch.rand(w.shape) < 0.2] = 0.0  # where two are, a product by division would fail
    names = [name for name, p in net.named_parameters() if any(p is f for f in factors)]
    biases = [net[0].bias, net[2].bias]

    def loss(*tensors):
        out = torch.func.functional_call(net, dict(zip(names, tensors, strict=True)), (x,))
        return nn.functional.cross_entropy(out, y)

    def by_hand(*tensors):
        return nn.functional.cross_entropy(hand_written(tensors, biases, x), y)

    expected = torch.autograd.grad(by_hand(*factors), factors, create_graph=True)
    got = torch.autograd.grad(nn.functional.cross_entropy(net(x), y), factors, create_graph=True)
    torch.testing.assert_close(got, expected)
    v = tuple(torch.randn_like(w) for w in factors)
    expected = torch.autograd.grad(expected, factors, v)
    torch.testing.assert_close(torch.autograd.grad(got, factors, v), expected)
    torch.testing.assert_close(torch.autograd.functional.vhp(loss, factors, v)[1], expected)
    detached = tuple(w.detach() for w in factors)
    every = tuple(range(len(factors)))
    torch.testing.assert_close(torch.func.jvp(torch.func.grad(loss, every), detached, v)[1], expected)


@pytest.mark.parametrize("init", ["identity", "balanced", "lambda", "variance"])
@pytest.mark.parametrize(
    "build",
    [lambda p: torch.optim.Adam(p, lr=0.01), lambda p: pysteep.SteepestDescent(p, lr=0.02, q=1.25)],
    ids=["Adam", "ours"],
)
def test_trains(build, init):
    net = factorize(build_net(), 3, init, **RULES[init])
    optimizer = build(net.parameters())
    check_optimizer(net, optimizer)
    losses = train(net, optimizer, 60)
    assert sum(losses[-4:]) < 0.8 * sum(losses[:4])  # one round over the batches
    assert all(torch.isfinite(p).all() for p in net.parameters())


def test_steps_are_those_of_factors_by_hand():
    """SGD on a factorised linear map, and on leaves that are multiplied by hand."""
    net = factorize(nn.Linear(7, 3, bias=False), 3, "lambda", scale=0.7)
    by_hand = [w.detach().clone().requires_grad_() for w in factors_of(net)]
    ours = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01)
    theirs = torch.optim.SGD(by_hand, lr=0.1, momentum=0.9, weight_decay=0.01)
    for _ in range(20):
        x = torch.randn(5, 7)
        for optimizer, out in ((ours, net(x)), (theirs, x @ (by_hand[0] * by_hand[1] * by_hand[2]).T)):
            optimizer.zero_grad()
            out.square().mean().backward()
            optimizer.step()
    torch.testing.assert_close([w.detach() for w in factors_of(net)], [w.detach() for w in by_hand])


def test_autocast_compile_and_a_cache():
    net, (x, y) = factorize(build_net(), 3, "balanced"), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
        assert out.dtype == torch.bfloat16
        nn.functional.cross_entropy(out, y).backward()
    assert all(f.grad.dtype == torch.float32 and f.grad.any() for f in factors_of(net[0]))
    net.eval()
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    for _ in range(3):  # reading a checkpoint must not cost a compilation
        torch.testing.assert_close(compiled(x), net(x))
        dense_state_dict(net)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    with parametrize.cached():
        assert net[0].weight is net[0].weight


def test_sparse_gradients_of_an_embedding():
    module = factorize(nn.Embedding(10, 3, sparse=True), 2, "balanced")
    module(torch.tensor([1, 1, 4])).sum().backward()
    first, second = factors_of(module)
    count = torch.zeros(10, 1)
    count[1], count[4] = 2.0, 1.0
    assert torch.equal(first.grad, count * second)
    assert torch.equal(second.grad, count * first)


@pytest.mark.parametrize("init", INITS)
def test_dense_checkpoints(init):
    """The plain model's own checkpoint: same keys, same order, and back into another factorised model."""
    plain = build_net()
    net = factorize(copy.deepcopy(plain), 3, init, **RULES[init])
    train(net, torch.optim.SGD(net.parameters(), lr=0.01), 3)
    state = dense_state_dict(net)
    assert list(state) == list(plain.state_dict())
    assert not any(t.requires_grad for t in state.values())
    plain.load_state_dict(state)
    x = batch(7)[0]
    assert torch.equal(plain.eval()(x), net.eval()(x))
    other = factorize(build_net(), 3, init, **RULES[init])
    optimizer = torch.optim.SGD(other.parameters(), lr=0.01)
    before = {name: t.data_ptr() for name, t in other.named_parameters()}
    assert not load_dense_state_dict(other, state).missing_keys
    check_optimizer(other, optimizer)
    assert {name: t.data_ptr() for name, t in other.named_parameters()} == before
    for key, value in dense_state_dict(other).items():
        if init == "identity":
            assert torch.equal(value, state[key])
        else:
            torch.testing.assert_close(value, state[key])
    assert_same(dense_state_dict(plain), plain.state_dict())  # a plain model has a dense checkpoint, too


def test_loading_makes_factors_anew_only_of_what_was_loaded():
    net = factorize(build_net(), 3)
    with torch.no_grad():
        factors_of(net[0])[1].mul_(2)
        factors_of(net[4])[1].mul_(2)
    weight = torch.randn(5, 64)
    keys = load_dense_state_dict(net, {"4.weight": weight, "else": torch.ones(2)}, strict=False)
    assert "0.weight" in keys.missing_keys
    assert keys.unexpected_keys == ["else"]
    assert torch.equal(factors_of(net[0])[1], torch.full((4, 1, 3, 3), 2.0))
    assert torch.equal(factors_of(net[4])[0], weight)
    assert torch.equal(factors_of(net[4])[1], torch.ones(5, 64))
    before = copy.deepcopy(net.state_dict())
    for bad in ({"4.weight": weight}, {**dense_state_dict(net), "0.weight": torch.ones(2, 2)}):
        with pytest.raises(RuntimeError, match=r"0\.weight"):
            load_dense_state_dict(net, bad)
        assert_same(net.state_dict(), before)
    assert isinstance(net[0].weight, torch.Tensor)
    assert net[0].weight.requires_grad


def test_loading_with_swapped_tensors():
    net, state = factorize(build_net(), 3), build_net().state_dict()
    state["0.weight"] = torch.randn(4, 1, 3, 3)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        load_dense_state_dict(net, state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert_same(dense_state_dict(net), state)


def test_assignment_makes_new_factors():
    net = factorize(nn.Linear(4, 3), 3, "balanced")
    kept, value = factors_of(net), torch.randn(3, 4)
    net.weight = value
    torch.testing.assert_close(net.weight.detach(), value)
    assert all(a is b for a, b in zip(kept, factors_of(net), strict=True))


def test_copies_and_checkpoints_of_factors():
    """torch refuses to pickle a parametrized module; a deep copy shares its class with the original."""
    net = factorize(build_net(), 3, "lambda", scale=0.2)
    twin, x = copy.deepcopy(net), batch()[0]
    for w in twin.parameters():
        with torch.no_grad():
            w.add_(0.1)
    other = factorize(build_net(), 3)
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(x), net.eval()(x))
    assert torch.equal(net(x), collapse(copy.deepcopy(net))(x))
    factorize(twin, 2, match=lambda name, _: name == "4.bias")
    collapse(twin)
    assert type(twin[4]) is nn.Linear
    assert torch.equal(other(x), net(x))
    assert isinstance(net[4].bias, nn.Parameter)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        torch.save(net, io.BytesIO())


def test_beside_other_parametrizations():
    module = weight_norm(nn.Linear(4, 3))
    x = torch.randn(2, 4)
    before, names = module(x), list(module.state_dict())
    factorize(module, 2, match=lambda name, _: name == "bias")
    twin = copy.deepcopy(module)
    assert torch.equal(module(x), before)
    assert sorted(dense_state_dict(module)) == sorted(names)
    collapse(module)
    assert torch.equal(module(x), before)
    assert list(module.state_dict()) == names
    assert torch.equal(twin(x), before)
    twin = factorize(nn.Linear(4, 3), 2)
    weight_norm(twin)
    for function in (collapse, dense_state_dict):
        with pytest.raises(ValueError, match="weight must have no parametrization on top of its factors; got _WeightNorm"):
            function(twin)


class Tied(nn.Module):
    """A language model whose output layer is its embedding, as GPT-2's."""

    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(11, 6)
        self.block = nn.Linear(6, 6)
        self.lm_head = nn.Linear(6, 11, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of the next token."""
        return self.lm_head(torch.relu(self.block(self.wte(tokens))))


def check_tied(model, run, first, second):
    """Factorise, train, save, load, copy and collapse `model`; the weights of its modules `first` and `second` stay one."""
    before, names, state = run(model).detach(), [n for n, _ in model.named_parameters()], list(model.state_dict())
    a, b = model.get_submodule(first), model.get_submodule(second)
    factorize(model, 3)
    assert all(f is g for f, g in zip(factors_of(a), factors_of(b), strict=True))
    assert torch.equal(run(model), before)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    check_optimizer(model, optimizer)
    for _ in range(3):
        optimizer.zero_grad()
        run(model).square().mean().backward()
        optimizer.step()
    after = run(model).detach()
    assert not torch.equal(after, before)
    dense = dense_state_dict(model)
    assert list(dense) == state
    assert dense[f"{first}.weight"].data_ptr() == dense[f"{second}.weight"].data_ptr()
    load_dense_state_dict(model, dense)
    assert torch.equal(run(model), after)
    partly = {key: value for key, value in dense.items() if key != f"{second}.weight"}
    load_dense_state_dict(model, {**partly, f"{first}.weight": torch.zeros_like(dense[f"{first}.weight"])}, strict=False)
    assert not b.weight.any()
    load_dense_state_dict(model, dense)
    twin = copy.deepcopy(model)
    assert all(map(lambda f, g: f is g, factors_of(twin.get_submodule(first)), factors_of(twin.get_submodule(second))))
    collapse(model)
    assert a.weight is b.weight
    assert torch.equal(run(model), after)
    assert torch.equal(run(twin), after)
    assert [n for n, _ in model.named_parameters()] == names


def test_tied_weights_stay_tied():
    tokens = torch.randint(0, 11, (2, 5))
    check_tied(Tied(), lambda model: model(tokens), "wte", "lm_head")


def test_tied_weights_of_gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=8, vocab_size=13, n_positions=16)
    config._attn_implementation = "eager"
    model, tokens = transformers.GPT2LMHeadModel(config).eval(), torch.randint(0, 13, (2, 5))
    check_tied(model, lambda model: model(tokens).logits, "transformer.wte", "lm_head")


def test_a_part_of_a_tied_weight_is_refused():
    model = Tied()
    message = r"match must choose all places of a tied parameter or none; .* wte\.weight but not lm_head\.weight"
    with pytest.raises(ValueError, match=message):
        factorize(model, 2, match="wte.*")
    assert not parametrize.is_parametrized(model.wte)
    factorize(model, 2, match="block.*")
    shared = nn.Linear(3, 3)
    net = factorize(nn.Sequential(shared, nn.ReLU(), shared), 2, match="2.*")  # one place by two names
    assert len(factors_of(net[0])) == 2
    assert list(dense_state_dict(net)) == ["0.weight", "0.bias", "2.weight", "2.bias"]


def test_check_optimizer_names_what_is_lost():
    net = build_net()
    early = torch.optim.Adam(net.parameters())
    named = torch.optim.Adam(list(net.named_parameters()))
    check_optimizer(net, early)
    factorize(net, 2)
    lost = r"does not own: 0\.weight, 4\.weight; it lacks factors: 0\.parametrizations\.weight\.original0, 0\..*original1, 4\."
    for optimizer in (early, named):
        with pytest.raises(ValueError, match=lost):
            check_optimizer(net, optimizer)
    factors = torch.optim.SGD(net.parameters(), lr=0.1)
    check_optimizer(net, factors)
    collapse(net)
    with pytest.raises(ValueError, match=r"does not own: 0\.parametrizations\.weight\.original0, .*original1$"):
        check_optimizer(net, factors)
    frozen = factorize(build_net(), 2)
    for w in factors_of(frozen[0]):
        w.requires_grad_(False)
    check_optimizer(frozen, torch.optim.SGD([p for p in frozen.parameters() if p.requires_grad], lr=0.1))
    stray = [{"params": [nn.Parameter(torch.ones(2, 3))]}, {"params": list(net.parameters())}]
    with pytest.raises(ValueError, match=r"does not own: one of shape \(2, 3\)$"):
        check_optimizer(net, torch.optim.SGD(stray, lr=0.1))
    check_optimizer(nn.ModuleList([net, frozen]), torch.optim.SGD([*net.parameters(), *frozen.parameters()], lr=0.1))


def test_order_dtype_and_meta():
    """Modules with more than weight and bias; a model in half precision; one without memory yet."""
    module = nn.MultiheadAttention(8, 2)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    factorize(module, 2, match=lambda name, _: name in ("in_proj_weight", "out_proj.weight"))
    assert_same(dense_state_dict(module), state)
    assert_same(collapse(module).state_dict(), state)
    half = factorize(nn.Linear(8, 8), 3, "balanced").to(torch.bfloat16)
    assert half.weight.dtype == torch.bfloat16
    assert all(f.dtype == torch.bfloat16 for f in factors_of(half))
    meta = factorize(nn.Linear(4, 3, device="meta"), 3, "lambda", scale=0.1)
    meta.to_empty(device="cpu")
    state = nn.Linear(4, 3).state_dict()
    load_dense_state_dict(meta, state)
    torch.testing.assert_close(dict(dense_state_dict(meta)), dict(state))
    assert SimpleNamespace(**vars(meta.parametrizations.weight[0])).init == "lambda"
