"""param_groups on models whose weights other tools hold: pruned, parametrized, normed, adapted; parameters without a kernel."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from pysteep import SteepestDescent, factorize, param_groups


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3))


def depths(groups) -> dict[str, int]:
    return {name: group["depth"] for group in groups for name, _ in group["params"]}


@pytest.mark.parametrize("match", [None, "0.*", "0.weight", "0.weight_orig"])
def test_a_weight_under_prune_has_depth(match):
    model = net()
    prune.l1_unstructured(model[0], "weight", 0.4)
    groups = param_groups(model, depth=3, match=match)
    assert depths(groups)["0.weight_orig"] == 3
    assert depths(groups)["2.weight"] == (3 if match is None else 1)
    optimizer = SteepestDescent(groups, lr=0.1, init="balanced")
    model(torch.ones(2, 5)).sum().backward()
    optimizer.step()
    model(torch.ones(2, 5))  # whose hook computes the weight
    assert torch.equal(model[0].weight != 0, model[0].weight_mask.bool())


@pytest.mark.parametrize(
    ("held", "names"),
    [
        (lambda model: spectral_norm(model[0]), ["0.weight_orig"]),
        (
            lambda model: parametrizations.weight_norm(model[0]),
            ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"],
        ),
        (lambda model: parametrizations.orthogonal(model[0]), ["0.parametrizations.weight.original"]),
        (lambda model: factorize(model, 2, match="0.weight"), [f"0.parametrizations.weight.original{i}" for i in (0, 1)]),
    ],
    ids=["spectral_norm", "weight_norm", "orthogonal", "factorize"],
)
def test_what_weights_are_computed_from_is_named(held, names, caplog):
    model = net()
    held(model)
    with caplog.at_level(logging.WARNING, "pysteep"):
        groups = param_groups(model, depth=3)
    assert [depths(groups)[name] for name in names] == [1] * len(names)
    assert f"depth 1 for {', '.join(names)}, from which weights are computed" in caplog.text
    caplog.clear()
    chosen = param_groups(model, depth=3, match=lambda name, _: name in names)
    assert [depths(chosen)[name] for name in names] == [3] * len(names)
    assert not caplog.text


def test_adapters_beside_frozen_weights():
    """As PEFT's LoRA: the base is frozen, the two maps of the adapter train."""

    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base_layer = nn.Linear(5, 7).requires_grad_(False)
            self.lora_A, self.lora_B = nn.Linear(5, 2, bias=False), nn.Linear(2, 7, bias=False)

    groups = param_groups(Adapted(), depth=3)
    assert depths(groups) == {
        "lora_A.weight": 3,
        "lora_B.weight": 3,
        "base_layer.weight": 1,
        "base_layer.bias": 1,
    }
    assert repr(groups).count("frozen") == 2


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("depth", [1, 3])
def test_a_dtype_without_a_kernel_is_refused_when_the_optimizer_is_built(dtype, depth):
    bad = nn.Parameter(torch.ones(4).to(dtype), requires_grad=False)
    good = nn.Parameter(torch.ones(4))
    with pytest.raises(TypeError, match=rf"scale must be float16, bfloat16, float32, float64 or complex; got {dtype}"):
        SteepestDescent([("weight", good), ("scale", bad)], lr=0.1, depth=depth, init="saddle", scale=0.1)
    assert torch.equal(good, torch.ones(4))
