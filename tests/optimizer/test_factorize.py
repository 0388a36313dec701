"""factorize and collapse: what is chosen and refused, training, and what torch does with parametrized modules."""

from __future__ import annotations

import copy
import io
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune, spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import weight_norm

import pysteep
from pysteep import check_optimizer, collapse, dense_state_dict, factorize, load_dense_state_dict
from pysteep._state.initial import INITS
from tests.support.factorized import EXACT, RULES, assert_same, batch, build_net, factors_of, train


@pytest.mark.parametrize("depth", [1, 2, 3, 10])
@pytest.mark.parametrize("init", INITS)
def test_factorize_and_collapse(init, depth):
    net, (x, _) = build_net(), batch()
    plain, state, before = net(x), {k: v.clone() for k, v in net.state_dict().items()}, dict(net.named_parameters())
    net[4].weight.requires_grad_(False)
    assert factorize(net, depth, init, **RULES[init]) is net
    assert isinstance(net[0], nn.Conv2d)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert type(net[4]) is nn.Linear  # it is left as it is
    assert torch.equal(net[4].weight, state["4.weight"])
    net.load_state_dict({k: v for k, v in state.items() if k.startswith("1.")}, strict=False)  # running statistics
    out = net(x)
    if init == "identity":
        assert torch.equal(out, plain)
    elif init in EXACT:
        torch.testing.assert_close(out, plain)
    elif init == "saddle":
        assert not net[0].weight.any()
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
        return [choice.places[0].name for choice in pysteep._selection.choices(net, match)]

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


HELD = {
    "prune": (lambda module: prune.l1_unstructured(module, "weight", 0.4), ["weight_orig"]),
    "spectral_norm": (spectral_norm, ["weight_orig"]),
    "weight_norm": (old_weight_norm, ["weight_g", "weight_v"]),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(("hold", "attributes"), HELD.values(), ids=HELD)
def test_what_old_hooks_compute_a_weight_from_is_left_out_by_name(hold, attributes, caplog):
    net, other = (nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3)) for _ in range(2))
    hold(net[0])
    hold(other[0])
    names = [f"0.{attribute}" for attribute in attributes]
    with caplog.at_level(logging.WARNING, "pysteep"):
        factorize(other, 2, match="1.*")
        assert not caplog.text
        for match in ("0.weight", "0.*", names[0]):
            with pytest.raises(ValueError, match=f"chooses none, as other tools compute these weights from .*{names[0]}"):
                factorize(net, 2, match=match)
        factorize(net, 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"factorize leaves out {', '.join(names)}, from which other tools compute weights" in caplog.text
    assert not parametrize.is_parametrized(net[0])
    assert parametrize.is_parametrized(net[1])


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(("hold", "attributes"), HELD.values(), ids=HELD)
def test_a_function_chooses_what_old_hooks_hold(hold, attributes, caplog):
    net = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    hold(net[0])
    with caplog.at_level(logging.WARNING, "pysteep"):
        factorize(net, 2, match=lambda name, _: name.endswith(attributes[-1]))
    assert not caplog.text
    net(torch.ones(2, 5)).sum().backward()
    assert all(factor.grad is not None for factor in net[0].parametrizations[attributes[-1]].parameters())
    collapse(net)
    net(torch.ones(2, 5))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    ("hold", "error"), [(HELD["prune"][0], TypeError), (spectral_norm, KeyError), (old_weight_norm, KeyError)]
)
def test_old_hooks_raise_on_a_factorized_weight(hold, error):
    """As docs/factorize.md says."""
    module = factorize(nn.Linear(5, 7), 2)
    before = list(module.state_dict())
    with pytest.raises(error):
        hold(module)
    assert list(module.state_dict()) == before
