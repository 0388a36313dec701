"""compare_checkpoints against its definition in float64: on models that are fine-tuned here and on numbers of all kinds."""

from __future__ import annotations

import json
import math
import struct

import pytest
import torch
from safetensors.torch import load_file, save_file

from pysteep import SteepestDescent
from pysteep.diagnostics import _checkpoints, _sign_flips, compare_checkpoints
from tests.support.checkpoint_cases import K, Q, assert_is_defined, drawn, flips, saved

transformers = pytest.importorskip("transformers")

SIZES = {"vocab_size": 23, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 6, "intermediate_size": 50}
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# ---- models ------------------------------------------------------------------------------------------------------------------


def tuned(model, optimizer, steps=5):
    """`model` after some steps on random tokens."""
    model.train()
    for _ in range(steps):
        tokens = torch.randint(SIZES["vocab_size"], (2, 9))
        labels = tokens if model.config.problem_type is None else torch.randint(2, (2,))
        optimizer.zero_grad()
        model(tokens, labels=labels).loss.backward()
        optimizer.step()
    return model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)


def sign_descent(model):
    return SteepestDescent(model.parameters(), lr=3e-3, q=1)


@pytest.mark.parametrize(("build_optimizer", "dtype"), [(adamw, torch.float32), (sign_descent, torch.bfloat16)])
def test_llama_in_shards_with_grouped_queries(build_optimizer, dtype, tmp_path):
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, num_key_value_heads=2)).to(dtype)
    states = []
    for name in ("before", "after"):
        model.save_pretrained(tmp_path / name, max_shard_size="10KB")
        assert len(list((tmp_path / name).glob("*.safetensors"))) > 3
        states.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        tuned(model, build_optimizer(model))
    before, after = states
    result = compare_checkpoints(tmp_path / "before", tmp_path / "after", progress=False)
    pairs = [
        tuple(state[f"model.layers.{i}.self_attn.{role}_proj.weight"] for role in "qk" for state in states) for i in range(3)
    ]
    assert pairs[0][2].shape[0] == pairs[0][0].shape[0] // 3
    assert_is_defined(result, before, after, pairs)
    assert result.flips > 0
    assert result.layers == tuple(f"model.layers.{i}.self_attn" for i in range(3))
    assert result.skipped == {}
    by_index = [tmp_path / name / "model.safetensors.index.json" for name in ("before", "after")]
    assert compare_checkpoints(*by_index, progress=False).flips == result.flips


def test_gpt2_whose_queries_and_keys_are_columns(tmp_path, monkeypatch):
    config = transformers.GPT2Config(
        vocab_size=23, n_embd=36, n_layer=2, n_head=6, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    model.save_pretrained(tmp_path / "before")
    tuned(model, adamw(model)).save_pretrained(tmp_path / "after")
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    pairs = []
    for i in range(2):
        thirds = [state[f"transformer.h.{i}.attn.c_attn.weight"].chunk(3, dim=1) for state in states]
        pairs.append((thirds[0][0], thirds[1][0], thirds[0][1], thirds[1][1]))
    for piece in (_checkpoints.PIECE, 250, 100):  # two rows, and less than one
        monkeypatch.setattr(_checkpoints, "PIECE", piece)
        result = compare_checkpoints(tmp_path / "before", tmp_path / "after", progress=False)
        assert_is_defined(result, *states, pairs)


def test_bert_that_got_a_new_head(tmp_path):
    pretrained = transformers.BertForMaskedLM(transformers.BertConfig(**SIZES))
    pretrained.save_pretrained(tmp_path / "before")
    model = transformers.BertForSequenceClassification.from_pretrained(
        tmp_path / "before", problem_type="single_label_classification"
    )
    tuned(model, adamw(model)).save_pretrained(tmp_path / "after")
    states = [load_file(tmp_path / name / "model.safetensors") for name in ("before", "after")]
    result = compare_checkpoints(tmp_path / "before", tmp_path / "after", progress=False)
    pairs = [
        tuple(state[f"bert.encoder.layer.{i}.attention.self.{role}.weight"] for role in ("query", "key") for state in states)
        for i in range(3)
    ]
    assert_is_defined(result, *states, pairs)
    assert result.skipped["classifier.weight"] == "only in after"
    assert result.skipped["cls.predictions.bias"] == "only in before"
    assert set(result.skipped) == set(states[0]) ^ set(states[1])
    assert "  classifier.weight: only in after" in str(result).splitlines()


# ---- numbers -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second", DTYPES, ids=str)
@pytest.mark.parametrize("first", DTYPES, ids=str)
def test_all_dtypes_and_pairs_of_them(first, second, tmp_path, monkeypatch):
    shapes = {Q.format(0): (7, 13), K.format(0): (3, 13), "bias": (5,), "scale": (), "empty": (0, 3), "x": (3, 1, 41)}
    before, after = ({name: drawn(shape, dtype) for name, shape in shapes.items()} for dtype in (first, second))
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    pair = (before[Q.format(0)], after[Q.format(0)], before[K.format(0)], after[K.format(0)])
    for piece in (_checkpoints.PIECE, 10):
        monkeypatch.setattr(_checkpoints, "PIECE", piece)
        result = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False)
        assert_is_defined(result, before, after, [pair])
        assert result.non_finite == {}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_that_are_not_finite_are_counted_by_tensor_and_nan_has_no_sign(dtype, tmp_path):
    before, after = (
        {Q.format(0): drawn((40, 9), dtype), K.format(0): drawn((4, 9), dtype), "x": drawn((999,), dtype, finite=False)}
        for _ in range(2)
    )
    after[Q.format(0)][3, 4] = math.inf
    save_file(before, tmp_path / "a.safetensors")
    save_file(after, tmp_path / "b.safetensors")
    result = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False)
    assert result.flips == sum(flips(before[name], after[name]) for name in before)
    counts = [int((~state["x"].isfinite()).sum()) for state in (before, after)]
    assert result.non_finite == {Q.format(0): (0, 1), "x": tuple(counts)}
    assert result.mean_delta_l1 == result.mean_delta_l2 == math.inf
    assert f"  x: {counts[0]} before, {counts[1]} after" in str(result).splitlines()


def test_many_blocks_and_pieces_in_any_number_of_threads_give_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(_checkpoints, "PIECE", 200_003)
    shapes = {Q.format(0): (1001, 501), K.format(0): (99, 501)}
    states, paths = [], [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        states.append({name: drawn(shape, torch.bfloat16) for name, shape in shapes.items()})
        save_file(states[-1], path)
    assert _sign_flips.BLOCK * 8 < 2 * 200_003  # bytes: a piece has more than one block
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(compare_checkpoints(*paths, progress=False))
    finally:
        torch.set_num_threads(threads)
    pair = tuple(state[name] for name in shapes for state in states)
    assert_is_defined(results[0], *states, [pair])
    for result in results:
        assert result.flips == results[0].flips
        assert result.delta_l1 == results[0].delta_l1
        assert result.delta_l2 == results[0].delta_l2


@pytest.mark.parametrize("padding", range(1, 9))
def test_tensors_at_odd_places_of_the_file(padding, tmp_path):
    states, paths = [], [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in paths:
        state = {"odd": drawn((3,), torch.bfloat16), "x": drawn((101,), torch.float32), "y": drawn((33,), torch.float64)}
        header, data = {}, b""
        for name, tensor in state.items():
            raw = tensor.view(torch.uint8).numpy().tobytes()
            dtype = {2: "BF16", 4: "F32", 8: "F64"}[tensor.itemsize]
            header[name] = {"dtype": dtype, "shape": [len(tensor)], "data_offsets": [len(data), len(data) + len(raw)]}
            data += raw
        text = json.dumps(header).encode() + b" " * padding
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        states.append(state)
    assert_is_defined(compare_checkpoints(*paths, progress=False), *states, [])


def test_columns_of_table_3(tmp_path):
    """By hand: two layers, one of which comes closer to balance."""
    before = {Q.format(0): [[1, -2], [3, 0]], K.format(0): [[1, 1]], Q.format(1): [[1, 1]], K.format(1): [[1, 2]], "b": [1, 1]}
    after = {Q.format(0): [[-1, 2], [1, 1]], K.format(0): [[-1, 2]], Q.format(1): [[1, 1]], K.format(1): [[1, 3]], "b": [1, 0]}
    for name, state in (("a", before), ("b", after)):
        save_file({key: torch.tensor(value).float() for key, value in state.items()}, tmp_path / f"{name}.safetensors")
    result = compare_checkpoints(tmp_path / "a.safetensors", tmp_path / "b.safetensors", progress=False)
    # L1 of layer 0: |6 - 2| = 4 before, |5 - 3| = 2 after; of layer 1: |2 - 3| = 1, |2 - 4| = 2.
    assert result.delta_l1.tolist() == [-2, 1]
    # L2: |14 - 2| = 12, |7 - 5| = 2; |2 - 5| = 3, |2 - 10| = 8.
    assert result.delta_l2.tolist() == [-10, 5]
    assert (result.mean_delta_l1, result.mean_delta_l2) == (-0.5, -2.5)
    assert (result.below_zero_l1, result.below_zero_l2) == (50, 50)
    assert result.query_percent == pytest.approx(100 * 2 / 6)
    assert result.key_percent == pytest.approx(100 * 1 / 4)
    assert result.total_percent == pytest.approx(100 * 3 / 12)
    assert str(result).splitlines()[-1].split() == ["33.33", "25.00", "25.00", "-0.5", "50", "-2.5", "50"]


# ---- what is compared --------------------------------------------------------------------------------------------------------


def test_what_cannot_be_compared_is_listed_with_its_reason(tmp_path):
    shared = {"w": torch.ones(3)}
    a = saved(tmp_path / "a.safetensors", **shared, ids=torch.arange(3), head=torch.ones(2, 3), left=torch.ones(1))
    b = saved(tmp_path / "b.safetensors", **shared, ids=torch.arange(3), head=torch.ones(4, 3), right=torch.ones(1))
    result = compare_checkpoints(a, b, progress=False)
    assert result.skipped == {
        "ids": "dtype I64",
        "head": "shape [2, 3] before, [4, 3] after",
        "left": "only in before",
        "right": "only in after",
    }
    assert (result.tensors, result.weights) == (1, 3)


def test_without_pairs_the_flips_of_all_weights_are_left(tmp_path):
    a = saved(tmp_path / "a.safetensors", **{"query_key_value.weight": torch.tensor([[1.0, -1.0], [1.0, 0.0]])})
    b = saved(tmp_path / "b.safetensors", **{"query_key_value.weight": torch.tensor([[-1.0, -1.0], [1.0, 1.0]])})
    result = compare_checkpoints(a, b, progress=False)
    assert result.total_percent == 25
    assert result.unpaired == ("query_key_value.weight",)
    columns = ("query_percent", "key_percent", "mean_delta_l1", "mean_delta_l2", "below_zero_l1", "below_zero_l2")
    assert all(math.isnan(getattr(result, column)) for column in columns)
    assert "pass pairs" in str(result)
    assert "nan" not in str(result)
    assert "  query_key_value.weight" in str(result).splitlines()


def test_pairs_that_were_asked_for(tmp_path):
    states = [
        {name: drawn((5, 7), torch.float32) for name in ("l.0.left.weight", "l.0.right.weight", "l.1.right")} for _ in "ab"
    ]
    paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path, state in zip(paths, states, strict=True):
        save_file(state, path)
    names = [("l.0.left.weight", "l.0.right.weight"), ("l.1.right", "l.0.right.weight")]
    result = compare_checkpoints(*paths, names, progress=False)
    pairs = [tuple(state[name] for name in pair for state in states) for pair in names]
    assert_is_defined(result, *states, pairs)
    assert result.layers == ("l.0", "l.1")


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ([("w", "v")], "'v' is in neither"),
        ([("w", "head")], "'head' is shape"),
        ([("w", "b")], r"'b' has shape \[3\]"),
        ([("w",)], r"got \('w',\)"),
        (["wv"], "got 'wv'"),
        ("all", "got 'all'"),
    ],
)
def test_pairs_that_do_not_exist_are_named(pairs, message, tmp_path):
    a = saved(tmp_path / "a.safetensors", w=torch.ones(2, 2), b=torch.ones(3), head=torch.ones(2, 2))
    b = saved(tmp_path / "b.safetensors", w=torch.ones(2, 2), b=torch.ones(3), head=torch.ones(3, 2))
    with pytest.raises(ValueError, match=f"^pairs must .*{message}"):
        compare_checkpoints(a, b, pairs, progress=False)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({"v": torch.ones(3)}, "they begin with w and v"),
        ({}, "they begin with w and nothing"),
        ({"w": torch.ones(4)}, r"none of the 1 in both is compared: w: shape \[3\] before, \[4\] after"),
        ({"w": torch.ones(3, dtype=torch.int8)}, "none of the 1 in both is compared: w: dtype I8"),
        ({"w": torch.ones(3, dtype=torch.int32), "v": torch.ones(3)}, "w: dtype I32"),
        ({"w": torch.ones(3).to(torch.float8_e4m3fn)}, "w: dtype F8_E4M3"),
    ],
)
def test_nothing_in_common_is_an_error(other, reason, tmp_path):
    a, b = saved(tmp_path / "a.safetensors", w=torch.ones(3)), saved(tmp_path / "b.safetensors", **other)
    with pytest.raises(ValueError, match=f"before and after must share weights.*{reason}"):
        compare_checkpoints(a, b, progress=False)


def test_weights_without_numbers_are_no_weights(tmp_path):
    a = saved(tmp_path / "a.safetensors", w=torch.ones(0))
    with pytest.raises(ValueError, match="w: no numbers"):
        compare_checkpoints(a, a, progress=False)
