"""Factorised modules saved, loaded, copied, assigned to, and with one weight at two places."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from pysteep import check_optimizer, collapse, dense_state_dict, factorize, load_dense_state_dict
from pysteep._state.initial import INITS
from tests.support.factorized import RULES, assert_same, batch, build_net, factors_of, train


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
