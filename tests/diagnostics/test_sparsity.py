"""sparsity_report: counts against a float64 definition, thresholds by depth, and the curve of an evaluation."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

from pysteep import SteepestDescent, collapse, factorize, param_groups
from pysteep.diagnostics import prune_, sparsity_report
from tests.support.cases import random_values, same_bits
from tests.support.factorized import build_net, train

THRESHOLDS = (0.3, 0.0, 0.01, 1.0)


def count(x, threshold):
    """How many of x have |x| <= threshold, one after the other."""
    return sum(abs(v) <= threshold for v in x.detach().flatten().to(torch.complex128).tolist())


def with_special_values(net):
    for p in net.parameters():
        p.data = random_values(p.shape, p.dtype, wide=True, special=True)
    return net


@pytest.mark.parametrize("depth", [1, 2, 10])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64])
def test_counts_are_those_of_the_definition(dtype, depth):
    net = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.Linear(7, 11, dtype=dtype), nn.Embedding(13, 3))
    with_special_values(net)
    with torch.no_grad():
        net[2].weight[0, :6] = torch.tensor([0.3, -0.3, 0.09, 0.3**10, 1e-4, -0.0])  # on the thresholds, as the dtype rounds
    net[0].to(memory_format=torch.channels_last)
    report = sparsity_report(net, THRESHOLDS, depth=depth)
    weights = [net[0].weight, net[2].weight, net[3].weight]
    assert report.names == ("0.weight", "2.weight", "3.weight")
    assert report.thresholds.tolist() == sorted(THRESHOLDS)
    assert report.cutoffs.tolist() == [[np.float64(t) ** depth for t in sorted(THRESHOLDS)]] * 3
    assert report.below.tolist() == [[count(w, t) for t in report.cutoffs[0]] for w in weights]
    assert report.zeros.tolist() == [int((w == 0).sum()) for w in weights]
    assert report.nans.tolist() == [int(w.isnan().sum()) for w in weights]
    assert report.sizes.tolist() == [w.numel() for w in weights]
    assert report.left_out == sum(p.numel() for p in net.parameters()) - report.sizes.sum()
    np.testing.assert_allclose(report.share, report.below.sum(0) / report.sizes.sum())
    np.testing.assert_allclose(report.compression * (1 - report.share), 1)


def test_depths_are_those_of_factors_and_of_the_optimizer():
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 2))
    factorize(net, 3, match="0.*")
    factorize(net, 2, match="1.*")
    deep = [net[2].weight, *net[1].parametrizations.parameters()]
    groups = [{"params": deep, "depth": 4}, {"params": [net[3].weight]}]
    optimizer = SteepestDescent(groups)
    assert sparsity_report(net, optimizer=optimizer).depths.tolist() == [3, 8, 4, 1]
    assert sparsity_report(net, depth=5).depths.tolist() == [3, 2, 5, 5]
    assert sparsity_report(net).depths.tolist() == [3, 2, 1, 1]
    assert sparsity_report(net, optimizer=torch.optim.SGD(net.parameters())).depths.tolist() == [3, 2, 1, 1]
    assert sparsity_report(collapse(net), depth=3).depths.tolist() == [3] * 4


def test_factorised_weights_count_as_products_and_change_nothing():
    net = factorize(build_net(), 3, "dwf")
    product = net[4].weight.detach().clone()
    state = copy.deepcopy(net.state_dict())
    report = sparsity_report(net, (0.3,))
    assert report.names == ("0.weight", "4.weight")
    assert report.below[1, 0] == count(product, 0.3**3)
    assert report.left_out == 4 + 4 + 4 + 5
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), state.values(), strict=True))


def test_tied_weights_count_once_and_are_zeroed_in_all_places():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False))
    net[1].weight = net[0].weight
    seen = []

    def evaluate(model):
        seen.append(model[1].weight.detach().clone())
        return float(model(torch.tensor([2])).abs().sum())

    report = sparsity_report(net, (0.0, 9.0), evaluate=evaluate)
    assert (report.names, report.sizes.tolist()) == (("0.weight",), [24])
    assert not seen[1].any()
    assert report.scores[0] > 0 == report.scores[1]


@pytest.mark.parametrize("factorized", [False, True])
def test_curve_is_of_the_weights_above_each_threshold(factorized):
    net = with_special_values(build_net().double())
    plain = [net[i].weight.detach().clone() for i in (0, 4)]
    if factorized:
        factorize(net, 2)
    depth = 2

    def evaluate(model):
        assert not torch.is_grad_enabled()
        assert model is net
        return float(sum(torch.nansum(model[i].weight.clamp(-1e3, 1e3)) for i in (0, 4)))

    report = sparsity_report(net, (0.5, 0.02), depth=None if factorized else depth, evaluate=evaluate)
    for score, t in zip(report.scores, (0.02, 0.5), strict=True):
        assert score == float(sum(torch.nansum(torch.where(w.abs() <= t**depth, 0, w).clamp(-1e3, 1e3)) for w in plain))
    for i, before in zip((0, 4), plain, strict=True):
        assert same_bits(net[i].weight.detach(), before)


@pytest.mark.parametrize("raises", [False, True])
@pytest.mark.parametrize("storage", ["full", "tied", "implicit"])
def test_training_goes_on_as_if_no_report_had_been_made(storage, raises):
    def trained(with_report):
        net = build_net()
        init = {"init": "lambda", "scale": 0.5} if storage == "implicit" else {"betas": (0.9, 0.99)}
        optimizer = SteepestDescent(param_groups(net, 3), lr=1e-2, q=1.7, storage=storage, **init)
        train(net, optimizer, 3)
        if with_report:
            before = copy.deepcopy(net.state_dict())

            def evaluate(model):
                if raises and not model[4].weight.any():
                    raise KeyboardInterrupt
                return 0.0

            try:
                report = sparsity_report(net, (0.0, 0.3, 10.0), optimizer=optimizer, evaluate=evaluate)
                assert report.depths.tolist() == [3, 3]
            except KeyboardInterrupt:
                assert raises
            assert all(same_bits(a, before[k]) for k, a in net.state_dict().items() if a.is_floating_point())
        train(net, optimizer, 3)
        return net.state_dict(), optimizer.state_dict()["state"]

    (weights, state), (expected_weights, expected_state) = trained(True), trained(False)
    assert all(torch.equal(weights[k], expected_weights[k]) for k in weights)
    assert all(torch.equal(state[i][k], expected_state[i][k]) for i in state for k in state[i])


def test_masked_weights_count_as_zeros_where_momentum_has_moved_them():
    net = build_net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    train(net, optimizer, 2)
    zeros = prune_(net, 0.1).zeros
    train(net, optimizer, 1)
    assert sparsity_report(net).zeros.tolist() == zeros.tolist()


def test_everything_below_gives_infinite_compression_and_empty_weights_no_share():
    net = nn.Sequential(nn.Linear(3, 2, bias=False), nn.Embedding(0, 2), nn.PReLU())
    report = sparsity_report(net, (100.0,))
    assert report.compression.tolist() == [np.inf]
    assert np.isnan(report.shares[1, 0])
    assert report.left_out == 1
    scalar = sparsity_report(net, (100.0,), match=lambda name, _: name == "2.weight")
    assert scalar.below.tolist() == [[1]]


def test_table_has_thresholds_and_cutoffs():
    net = nn.Sequential(nn.Linear(10, 10, bias=False), nn.LayerNorm(10))
    with torch.no_grad():
        net[0].weight.copy_(torch.arange(100.0).view(10, 10) / 100)
        net[0].weight[0, 1] = torch.nan
    text = str(sparsity_report(net, (0.0, 0.5), depth=2, evaluate=lambda _: 0.25))
    assert text.splitlines() == [
        "weight       L  size  zeros  NaN      t = 0        t = 0.5",
        "0.weight     2   100      1    1  (0) 1.00%  (0.25) 25.00%",
        "all              100      1    1      1.00%         25.00%",
        "compression                            1.01          1.333",
        "score                                  0.25           0.25",
        "Shares of |x| <= t^L (in brackets). Parameters left out: 20",
    ]


def test_bad_arguments_are_named():
    net = build_net()
    with pytest.raises(ValueError, match=r"thresholds must be finite numbers >= 0; got -0\.1"):
        sparsity_report(net, (0.1, -0.1))
    with pytest.raises(ValueError, match="thresholds must be finite numbers >= 0; got nan"):
        sparsity_report(net, (float("nan"),))
    with pytest.raises(TypeError, match=r"thresholds must be a sequence of numbers; got 0\.1"):
        sparsity_report(net, 0.1)
    with pytest.raises(ValueError, match="depth must be an int from 1 to 64; got 0"):
        sparsity_report(net, depth=0)
    with pytest.raises(ValueError, match="depth must be None where optimizer is given"):
        sparsity_report(net, depth=2, optimizer=torch.optim.SGD(net.parameters()))
    with pytest.raises(TypeError, match=r"optimizer must be a torch\.optim\.Optimizer; got Sequential"):
        sparsity_report(net, optimizer=net)
    with pytest.raises(ValueError, match="match must choose a parameter"):
        sparsity_report(nn.Sequential())
    with pytest.raises(ValueError, match=r"0\.weight must hold numbers; it is uninitialised"):
        sparsity_report(nn.Sequential(nn.LazyLinear(3)))
    integers = nn.Linear(2, 2)
    integers.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"weight must be floating or complex and dense .*; got torch\.int8"):
        sparsity_report(integers)


def test_25_million_weights():
    """161 tensors, as of ResNet-50. How long that takes is a bar: bench/bars/diagnostics.py."""
    net = nn.Sequential(*(nn.Linear(400, 388, bias=False) for _ in range(161)))
    report = sparsity_report(net)
    assert report.sizes.sum() == 161 * 400 * 388
    assert report.zeros.sum() == sum(int((layer.weight == 0).sum()) for layer in net)
