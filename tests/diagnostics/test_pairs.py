"""Query and key matrices by name: of real models, where without either of them attention looks nowhere in particular."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pysteep.diagnostics._pairs import Part, attention_pairs, fused_without_pair

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 23, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 20}
EAGER = {"attn_implementation": "eager"}


def llama():
    config = transformers.LlamaConfig(**SIZES, **EAGER, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def bert():
    return transformers.BertForMaskedLM(transformers.BertConfig(**SIZES, **EAGER))


def distilbert():
    config = transformers.DistilBertConfig(vocab_size=23, dim=24, n_layers=2, n_heads=4, hidden_dim=20, **EAGER)
    return transformers.DistilBertForMaskedLM(config)


def gpt2():
    config = transformers.GPT2Config(vocab_size=23, n_embd=24, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0, **EAGER)
    return transformers.GPT2LMHeadModel(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=23, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, ffn_dim=20, word_embed_proj_dim=24, **EAGER
    )
    return transformers.OPTForCausalLM(config)


def modernbert():
    config = transformers.ModernBertConfig(**SIZES, **EAGER, pad_token_id=0, global_attn_every_n_layers=1)
    return transformers.ModernBertForMaskedLM(config)


def attentions(model: nn.Module) -> list[torch.Tensor]:
    tokens = torch.arange(1, 15).reshape(2, 7)
    with torch.no_grad():
        return list(model.eval()(tokens, output_attentions=True).attentions)


def is_even(attention: torch.Tensor) -> bool:
    """Whether every token looks at all tokens that it may look at alike."""
    allowed = attention > 0
    return torch.allclose(attention, allowed / allowed.sum(-1, keepdim=True), atol=1e-6)


@pytest.mark.parametrize("build", [llama, bert, distilbert, gpt2, opt, modernbert])
@pytest.mark.parametrize("role", ["query", "key"])
def test_a_layer_without_its_part_attends_evenly(build, role):
    model = build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.zero_() if name.endswith("bias") else parameter.mul_(20 if parameter.ndim == 2 else 1)
    weights = model.state_dict()
    pairs = attention_pairs({name: weight.shape for name, weight in weights.items()})
    assert len(pairs) == 2
    for number, pair in enumerate(pairs):
        assert not is_even(attentions(model)[number])
        part: Part = getattr(pair, role)
        weights[part.name].narrow(part.dim, part.begin, part.end - part.begin).zero_()
        assert is_even(attentions(model)[number])


@pytest.mark.parametrize("kdim", [None, 10])
def test_multihead_attention_of_torch(kdim):
    attention = nn.MultiheadAttention(6, 2, kdim=kdim, bias=False, batch_first=True)
    weights = attention.state_dict()
    (pair,) = attention_pairs({name: weight.shape for name, weight in weights.items()})
    assert pair.layer == ""
    weights[pair.key.name].narrow(pair.key.dim, pair.key.begin, pair.key.end - pair.key.begin).zero_()
    looked_at = attention(torch.randn(1, 3, 6), torch.randn(1, 4, kdim or 6), torch.randn(1, 4, 6))[1]
    torch.testing.assert_close(looked_at, torch.full((1, 3, 4), 0.25))


@pytest.mark.parametrize(
    ("query", "key"),
    [
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.k.weight"),
        ("layers.0.attention.wq.weight", "layers.0.attention.wk.weight"),
        ("deberta.0.query_proj.weight", "deberta.0.key_proj.weight"),
        ("up.attn1.to_q.weight", "up.attn1.to_k.weight"),
        ("encoder.layers.0.self_attn.linear_q.weight", "encoder.layers.0.self_attn.linear_k.weight"),
        ("q_proj.weight", "k_proj.weight"),
    ],
)
def test_names_of_other_styles(query, key):
    (pair,) = attention_pairs({"head.weight": (3, 4), key: (2, 4), query: (6, 4)})
    assert pair.query == Part(query, 0, 0, 6)
    assert pair.key == Part(key, 0, 0, 2)
    assert pair.layer == query.rpartition(".weight")[0].rpartition(".")[0]


def test_layers_come_in_their_order():
    shapes = {f"layers.{i}.{role}_proj.weight": (4, 4) for i in (10, 2, 0) for role in "kq"}
    assert [pair.layer for pair in attention_pairs(shapes)] == ["layers.0", "layers.2", "layers.10"]


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"a.q_proj.weight": (4, 4)},
        {"a.q_proj.weight": (4, 4), "b.k_proj.weight": (4, 4)},
        {"a.q_proj.bias": (4,), "a.k_proj.bias": (4,)},
        {"a.q_proj.weight": (4,), "a.k_proj.weight": (4,)},
        {"a.pos_query_proj.weight": (4, 4), "a.pos_key_proj.weight": (4, 4)},
        {"a.q_proj.lora_A.weight": (4, 4), "a.k_proj.lora_A.weight": (4, 4)},
    ],
)
def test_what_is_no_pair_is_none(shapes):
    assert attention_pairs(shapes) == []
    assert fused_without_pair(shapes) == []


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("gpt_neox.layers.0.attention.query_key_value.weight", (12, 4)),  # heads one after the other
        ("model.layers.0.self_attn.qkv_proj.weight", (12, 4)),  # Phi-3's order and MiniMax's
        ("transformer.h.0.attn.c_attn.weight", (12, 4)),  # of GPT-BigCode
        ("transformer.h.0.crossattention.c_attn.weight", (4, 8)),  # key and value
        ("blocks.0.attn.Wqkv.weight", (8, 4)),  # grouped queries
        ("blocks.0.attn.qkv.weight", (12, 4, 1)),
    ],
)
def test_a_fused_matrix_of_unknown_order_is_named_not_cut(name, shape):
    shapes = {name: shape, name.replace("weight", "bias"): shape[:1], "mlp.weight": (12, 4)}
    assert attention_pairs(shapes) == []
    assert fused_without_pair(shapes) == [name]
