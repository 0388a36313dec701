"""Which tensors of a model are the query and key matrices of its attention layers, by their names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

SEPARATE = (
    ("q_proj.weight", "k_proj.weight"),  # Llama, Mistral, Qwen, OPT, CLIP, BART
    ("query.weight", "key.weight"),  # BERT, RoBERTa, ViT
    ("q.weight", "k.weight"),  # T5
    ("q_lin.weight", "k_lin.weight"),  # DistilBERT
    ("query_proj.weight", "key_proj.weight"),  # DeBERTa
    ("wq.weight", "wk.weight"),  # Llama as Meta stores it
    ("to_q.weight", "to_k.weight"),  # diffusers
    ("linear_q.weight", "linear_k.weight"),  # Conformer
    ("q_proj_weight", "k_proj_weight"),  # torch.nn.MultiheadAttention with kdim or vdim
)
"""How names of a query and its key end, after the layer's name and a dot."""

THIRDS = {
    "in_proj_weight": 0,  # torch.nn.MultiheadAttention
    "c_attn.weight": 1,  # GPT-2, stored [in, out]
    "attn.qkv.weight": 0,  # timm, DINOv2, the image towers of Qwen-VL and GLM
    "Wqkv.weight": 0,  # ModernBERT, MPT
}
"""Names of queries, keys and values in one matrix, in this order and of equal sizes, and the dimension along which they lie.

Others, such as query_key_value (GPT-NeoX, BLOOM, Falcon) and qkv_proj (Phi-3, but also CodeGen and MiniMax), are stored head by
head in some models and in other orders in others, which neither name nor shape tells."""

FUSED = re.compile(r"(^|[._])(query_key_value|in_proj_weight|c_attn\.weight|w?qkv(_proj|_linear)?\.weight)", re.IGNORECASE)


class Part(NamedTuple):
    """Entries `begin` to `end` along dimension `dim` of a named tensor."""

    name: str
    dim: int
    begin: int
    end: int


class Pair(NamedTuple):
    """The query and key matrix of a layer, such as "model.layers.0.self_attn"; "" where the model itself is the layer."""

    layer: str
    query: Part
    key: Part


def attention_pairs(shapes: Mapping[str, Sequence[int]]) -> list[Pair]:
    """The query and key matrices among tensors of these names and shapes, in the order of the layers, without biases.

    With grouped queries the key has fewer rows than the query.
    """
    pairs = []
    for name, shape in shapes.items():
        for query, key in SEPARATE:
            layer = _before(name, query)
            other = name.removesuffix(query) + key
            if layer is not None and len(shape) >= 2 and len(shapes.get(other, ())) >= 2:
                pairs.append(Pair(layer, whole(name, shape), whole(other, shapes[other])))
        for fused, dim in THIRDS.items():
            layer = _before(name, fused)
            if layer is not None and len(shape) == 2 and shape[dim] == 3 * shape[1 - dim]:
                third = shape[1 - dim]
                pairs.append(Pair(layer, Part(name, dim, 0, third), Part(name, dim, third, 2 * third)))
    return sorted(pairs, key=lambda pair: _natural(pair.layer))


def fused_without_pair(shapes: Mapping[str, Sequence[int]]) -> list[str]:
    """Names of matrices that seem to hold a query and a key of which `attention_pairs` does not know the places."""
    known = {part.name for pair in attention_pairs(shapes) for part in (pair.query, pair.key)}
    return [name for name, shape in shapes.items() if len(shape) >= 2 and name not in known and FUSED.search(name)]


def whole(name: str, shape: Sequence[int]) -> Part:
    """All of a tensor."""
    return Part(name, 0, 0, shape[0])


def _before(name: str, ending: str) -> str | None:
    """What comes before `ending` and a dot; "" where nothing does, None where `name` ends otherwise."""
    if name == ending:
        return ""
    return name.removesuffix("." + ending) if name.endswith("." + ending) else None


def _natural(layer: str) -> list[tuple[int, str]]:
    """Sorts "layers.10" behind "layers.9"."""
    return [(int(piece), "") if piece.isdecimal() else (-1, piece) for piece in re.split(r"(\d+)", layer)]
