"""prune_: masked weights are 0 in every forward pass and state dict, whatever trains the model."""

from __future__ import annotations

import copy

import pytest
import torch
from lion_pytorch import Lion
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from pysteep import SteepestDescent, collapse, dense_state_dict, factorize, param_groups
from pysteep.diagnostics import prune_, remove_masks, sparsity_report
from tests.support.cases import random_values
from tests.support.factorized import batch, build_net, train
from tests.support.pruned import WEIGHTS, assert_held, seen_in_forward

PLAIN = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "lion": lambda p: Lion(p, lr=1e-2, weight_decay=0.1),
    "steepest": lambda p: SteepestDescent(p, lr=1e-2, q=1.5, betas=(0.9, 0.99)),
}


def small(net, threshold, depth):
    return [net[i].weight.detach().abs() > threshold**depth for i in (0, 4)]


@pytest.mark.parametrize("gives_optimizer", [False, True])
@pytest.mark.parametrize("name", PLAIN)
def test_zeros_survive_training(name, gives_optimizer):
    net = build_net()
    optimizer = PLAIN[name](net.parameters())
    train(net, optimizer, 3)
    masks, before = small(net, 0.1, 1), [net[i].weight.detach().clone() for i in (0, 4)]
    others = {k: v.clone() for k, v in net.state_dict().items() if k not in WEIGHTS}
    report = prune_(net, 0.1, optimizer=optimizer if gives_optimizer else None)
    assert report.zeros.tolist() == [int((~mask).sum()) for mask in masks]
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    state = net.state_dict()
    assert all(torch.equal(state[k], v) for k, v in others.items())
    seen = seen_in_forward(net)
    train(net, optimizer, 20)
    if gives_optimizer:
        assert not net[4].weight[~masks[1]].any()
        assert not net[0].weight.grad[~masks[0]].any()
    assert_held(net, seen, masks, before)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("q", [1.0, 1.7, 2.0])
@pytest.mark.parametrize("init", ["identity", "balanced", "lambda"])
@pytest.mark.parametrize("storage", ["full", "tied"])
def test_zeros_survive_training_at_depth(storage, init, q, coupled):
    check_depth(storage, init, q, coupled)


@pytest.mark.parametrize("q", [1.0, 1.7, 2.0])
@pytest.mark.parametrize("init", ["balanced", "lambda"])
def test_zeros_survive_training_at_implicit_depth(init, q):
    check_depth("implicit", init, q, False)


def check_depth(storage, init, q, coupled):
    net = build_net()
    options = {} if storage == "implicit" else {"betas": (0.9, 0.99)}
    options |= {"coupled_weight_decay" if coupled else "weight_decay": 0.1}
    options |= {"scale": 0.5} if init == "lambda" else {}
    optimizer = SteepestDescent(param_groups(net, 3), lr=1e-2, q=q, storage=storage, init=init, **options)
    train(net, optimizer, 3)
    weights = [net[i].weight for i in (0, 4)]
    masks, before = small(net, 0.4, 3), [w.detach().clone() for w in weights]
    state = [{k: v.clone() for k, v in optimizer.state[w].items()} for w in weights]
    report = prune_(net, 0.4, optimizer=optimizer)
    assert report.depths.tolist() == [3, 3]
    assert all(0 < mask.sum() < mask.numel() for mask in masks)
    for w in weights:
        optimizer.factors(w)
    for w, mask, old in zip(weights, masks, state, strict=True):
        assert all(torch.equal(v[mask], old[k][mask]) if v.ndim else v == old[k] for k, v in optimizer.state[w].items())
    seen = seen_in_forward(net)
    train(net, optimizer, 20)
    assert all(not w[~mask].any() for w, mask in zip(weights, masks, strict=True))
    assert_held(net, seen, masks, before)


def test_zeros_of_a_saddle_hold_where_momentum_would_move_them():
    p = nn.Linear(40, 30, bias=False)
    optimizer = SteepestDescent(p.parameters(), lr=1e-2, depth=2, betas=(0.9, 0.99), init="saddle", scale=0.5)
    p.weight.grad = torch.randn_like(p.weight)
    optimizer.step()
    with torch.no_grad():
        optimizer.factors(p.weight)[0][0].zero_()
        p.weight[0].zero_()
    assert optimizer.state[p.weight]["momentum_1"][0].any()
    prune_(p, 0, optimizer=optimizer)
    before = p.weight.detach().clone()
    for _ in range(3):
        p.weight.grad = None
        p(torch.randn(3, 40)).sum().backward()
        optimizer.step()
        assert not p.weight[0].any()
    assert bool((p.weight != before)[1:].any())


@pytest.mark.parametrize("build", [PLAIN["sgd"], PLAIN["adamw"]])
@pytest.mark.parametrize("init", ["identity", "balanced", "dwf"])
def test_zeros_of_factorised_weights_survive_training_and_collapse(init, build):
    net = factorize(build_net(), 3, init)
    optimizer = build(net.parameters())
    train(net, optimizer, 3)
    masks, before = small(net, 0.4, 3), [net[i].weight.detach().clone() for i in (0, 4)]
    report = prune_(net, 0.4)
    assert not net[4].parametrizations.weight.original0[~masks[1]].any()
    assert report.zeros.tolist() == [int((~mask).sum()) for mask in masks]
    seen = seen_in_forward(net)
    train(net, optimizer, 20)
    for i, mask in zip((0, 4), masks, strict=True):
        factors = list(net[i].parametrizations.weight.parameters())
        assert all(not factor.grad[~mask].any() for factor in factors)
    assert net[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert_held(net, seen, masks, before)
    dense = dense_state_dict(net)
    assert list(dense) == list(build_net().state_dict())
    state = net.state_dict()
    collapse(net)
    assert all(torch.equal(net.state_dict()[k], v) for k, v in dense.items())
    prune_(net, masks=state)
    assert torch.equal(net[4].weight_mask, masks[1])


def test_unmasked_training_is_as_without_masks():
    """An all-true mask changes nothing, bit for bit."""
    results = []
    for masked in (False, True):
        net = build_net()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
        if masked:
            prune_(net, masks={f"{name}_mask": torch.ones_like(net.state_dict()[name]).bool() for name in WEIGHTS})
        train(net, optimizer, 5)
        results.append({k: v for k, v in net.state_dict().items() if not k.endswith("_mask")})
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_pruning_again_adds_to_the_masks_and_removing_keeps_the_zeros():
    for deep in (1, 2):
        net = build_net() if deep == 1 else factorize(build_net(), 2, "balanced")
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        train(net, optimizer, 2)
        prune_(net, 0.05 ** (1 / deep))
        first = net[4].weight != 0
        prune_(net, 0.02 ** (1 / deep))
        assert torch.equal(net[4].weight != 0, first)
        prune_(net, 0.1 ** (1 / deep), match="4.*")
        second = net[4].weight != 0
        assert second.sum() < first.sum()
        assert bool((first | ~second).all())
        train(net, optimizer, 2)
        assert remove_masks(net) is net
        assert torch.equal(net[4].weight != 0, second)
        assert not any(key.endswith("mask") for key in net.state_dict())
        assert not any(net[i]._forward_pre_hooks or net[i]._state_dict_pre_hooks for i in (0, 4))
        assert not net._forward_pre_hooks
        train(net, torch.optim.AdamW(net.parameters(), lr=0.1), 3)
        assert net[4].weight.all()
        prune_(net, 0.05)


def test_biases_and_norms_are_left_alone_unless_asked():
    net = build_net()
    prune_(net, 1e9)
    assert sorted(key for key in net.state_dict() if key.endswith("_mask")) == ["0.weight_mask", "4.weight_mask"]
    assert net[0].bias.all()
    assert net[1].weight.all()
    prune_(net, 1e9, match=lambda name, _: name == "4.bias")
    train(net, torch.optim.SGD(net.parameters(), lr=0.1), 2)
    assert not net[4].bias.any()
    assert net[0].bias.all()


def test_nan_is_kept_and_what_is_0_already_is_held():
    net = nn.Linear(5, 3)
    with torch.no_grad():
        net.weight.copy_(torch.tensor([0.0, -0.0, torch.nan, 1e-30, -2.0]).expand(3, 5))
    report = prune_(net, 0.0)
    assert net.weight_mask.tolist() == [[False, False, True, True, True]] * 3
    assert (report.zeros.tolist(), report.nans.tolist()) == ([6], [3])


def test_tied_weights_stay_tied_and_held_through_either_place():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    net[1].weight = net[0].weight
    prune_(net, 0.5)
    assert net[1].weight is net[0].weight
    mask = net[0].weight_mask
    with torch.no_grad():
        net[0].weight.add_(1)
    net[1](torch.ones(1, 4)).sum().backward()
    assert torch.equal(net[0].weight != 0, mask)
    assert torch.equal(net[0].weight.grad != 0, mask)
    twin = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    twin[1].weight = twin[0].weight
    prune_(twin, masks=net.state_dict())
    twin.load_state_dict(net.state_dict())
    assert torch.equal(twin[1].weight, net[0].weight)
    factorize(remove_masks(net), 2)
    prune_(net, 1.0)
    kept = net[0].weight != 0
    assert torch.equal(net[1].weight != 0, kept)
    train_on = torch.optim.AdamW(net.parameters(), lr=0.1)
    net[1](net[0](torch.tensor([1, 2]))).sum().backward()
    train_on.step()
    assert not net[1].weight[~kept].any()
    assert not net[0].weight[~kept].any()


def test_weights_that_are_used_without_their_module_are_held():
    attention = nn.MultiheadAttention(8, 2)
    prune_(attention, 0.1)
    mask = attention.out_proj.weight_mask
    with torch.no_grad():
        attention.out_proj.weight.add_(1)
    x = torch.randn(3, 1, 8)
    attention(x, x, x)[0].sum().backward()
    assert not attention.out_proj.weight[~mask].any()
    assert not attention.out_proj.weight.grad[~mask].any()


def test_frozen_and_sparse_and_low_precision_weights():
    frozen = nn.Linear(6, 5)
    frozen.weight.requires_grad_(False)
    prune_(frozen, 0.2)
    frozen.weight.requires_grad_(True)
    frozen(torch.ones(1, 6)).sum().backward()
    assert torch.equal(frozen.weight.grad != 0, frozen.weight_mask)

    table = nn.Embedding(9, 4, sparse=True)
    prune_(table, 0.5)
    table(torch.tensor([3, 3, 5])).sum().backward()
    expected = torch.zeros(9, 4)
    expected[3], expected[5] = 2, 1
    assert table.weight.grad.is_sparse
    assert torch.equal(table.weight.grad.to_dense(), expected * table.weight_mask)

    low = nn.Linear(6, 5, dtype=torch.bfloat16)
    prune_(low, 0.2)
    optimizer = torch.optim.SGD(low.parameters(), lr=0.1, momentum=0.9)
    low(torch.full((1, 6), torch.inf, dtype=torch.bfloat16)).sum().backward()  # 0 * inf
    assert low.weight.grad.dtype == torch.bfloat16
    optimizer.step()
    assert not low.weight[~low.weight_mask].any()


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128]
)
def test_special_values_become_0_in_every_dtype(dtype):
    net = nn.Linear(7, 5, dtype=dtype)
    mask = torch.rand(7, 5).t() > 0.5
    net.weight.data = random_values((7, 5), dtype, special=True).t()  # not contiguous
    before = net.weight.detach().clone()
    version = net.weight._version
    prune_(net, masks={"weight_mask": mask})
    assert net.weight._version > version
    expected = torch.where(mask, before, 0)
    assert torch.equal(net.weight.detach().nan_to_num(), expected.nan_to_num())
    assert torch.equal(net.weight.isnan(), expected.isnan())


def test_a_gradient_from_before_does_not_move_pruned_weights():
    net = build_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net(batch()[0]).sum().backward()
    prune_(net, 0.1)
    optimizer.step()
    assert not net[4].weight[~net[4].weight_mask].any()


def test_conversions_keep_masks():
    net = build_net()
    prune_(net, 0.1)
    net.double()
    assert net[4].weight_mask.dtype == torch.bool
    net(batch()[0].double()).sum().backward()
    assert not net[4].weight.grad[~net[4].weight_mask].any()


def test_optimizer_state_of_pruned_scalars_keeps_what_is_no_momentum():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.size = nn.Parameter(torch.tensor(0.01))

        def forward(self, x):
            return self.size * x

    net = Scale()
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.tensor(2.0)).backward()
    optimizer.step()
    prune_(net, 0.1, match=lambda *_: True, optimizer=optimizer)
    state = optimizer.state[net.size]
    assert [float(state[k]) for k in ("step", "exp_avg", "exp_avg_sq")] == [1, 0, 0]
    assert net.size_mask.shape == ()


def test_eager_compiled_model_holds_zeros():
    net = build_net()
    prune_(net, 0.1)
    compiled = torch.compile(net, backend="eager")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        with torch.no_grad():
            net[4].weight.add_(0.1)
        optimizer.zero_grad()
        compiled(batch()[0]).sum().backward()
        assert torch.equal(net[4].weight != 0, net[4].weight_mask)
        assert not net[4].weight.grad[~net[4].weight_mask].any()
        optimizer.step()


def test_bad_arguments_are_named_and_nothing_is_changed():
    net = build_net()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match="one of threshold and masks must be given; got threshold=None and masks=None"):
        prune_(net)
    with pytest.raises(ValueError, match=r"one of threshold and masks must be given; got threshold=0\.1 and masks=dict"):
        prune_(net, 0.1, masks={})
    with pytest.raises(ValueError, match=r"threshold must be a finite number >= 0; got -1"):
        prune_(net, -1)
    with pytest.raises(
        ValueError, match=r"masks must name a parameter of the model, as in 0\.weight_mask, 0\.bias_mask; got 0\.bias"
    ):
        prune_(net, masks={"0.bias": torch.ones(4)})
    with pytest.raises(ValueError, match=r"the mask of 4\.weight must be a bool tensor of shape \(5, 64\); got torch.float32"):
        prune_(net, masks={"0.weight_mask": net[0].weight != 0, "4.weight_mask": net[4].weight})
    with pytest.raises(ValueError, match="match and depth must be None where masks are given; got '4' and None"):
        prune_(net, masks=before, match="4")
    net[4].register_buffer("weight_mask", None)
    with pytest.raises(ValueError, match=r"4\.weight must be of a module without an attribute weight_mask; Linear has one"):
        prune_(net, 0.1)
    del net[4].weight_mask
    state = net.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[k], before[k]) for k in before)
    assert not net[0]._forward_pre_hooks
    prune_(net, 0.1)
    with pytest.raises(ValueError, match=r"0\.weight must not be pruned yet; .*remove_masks"):
        factorize(net, 2)


def test_a_parametrization_on_top_of_a_mask_is_noticed():
    net = build_net()
    prune_(net, 0.1)
    weight_norm(net[4])
    with pytest.raises(RuntimeError, match="weight of ParametrizedLinear has a mask that its parametrization does not know"):
        net(batch()[0])


def test_report_is_of_the_pruned_weights():
    net = build_net()
    expected = sparsity_report(net, (0.1,), match="4.*")
    report = prune_(net, 0.1, match="4.*")
    assert (report.names, report.below.tolist()) == (("4.weight",), expected.below.tolist())
    assert report.zeros.tolist() == expected.below[:, 0].tolist()
