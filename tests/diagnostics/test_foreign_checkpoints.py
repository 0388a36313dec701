"""Checkpoints of strangers: an index that leads outside its folder, older formats, tensors that are not numbers in a row.

What cannot be compared is refused, or listed, in one line that names the file; no file decides how much memory is taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pysteep.__main__ import main
from pysteep.diagnostics import compare_checkpoints
from pysteep.diagnostics._checkpoint_files import open_checkpoint
from tests.support.checkpoint_cases import assert_is_defined, drawn, saved


def refused(path: Path, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        compare_checkpoints(path, path, pickled=True)
    assert main(["compare", "--pickled", str(path), str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("pysteep compare: ")
    assert output.err.count("\n") == 1


# ---- an index ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "pytorch_model.bin.index.json"])
@pytest.mark.parametrize(
    "shard",
    [
        "../secret.safetensors",
        "sub/../../secret.safetensors",
        "{root}/secret.safetensors",
        "..\\secret.safetensors",
        "C:\\secret.safetensors",
        "C:secret.safetensors",
        "\\\\host\\share\\secret.safetensors",
        "",
        ".",
        "secret\0.safetensors",
        "model.safetensors.index.json",
        "two\nlines/../x.safetensors",
    ],
)
def test_shards_stay_inside_the_folder_of_their_index(shard, name, tmp_path, capsys):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    saved(tmp_path / "secret.safetensors", w=torch.ones(3))
    index = folder / name
    index.write_text(json.dumps({"weight_map": {"w": shard.format(root=tmp_path)}}))
    refused(index, f"{name} must name files of tensors inside its own folder; got ", capsys)
    refused(folder, f"{name} must name files of tensors inside its own folder; got ", capsys)


def test_shards_may_be_links_as_in_a_cache_and_lie_in_folders_below(tmp_path):
    (tmp_path / "blobs").mkdir()
    folder = tmp_path / "snapshots" / "main"
    (folder / "below").mkdir(parents=True)
    saved(tmp_path / "blobs" / "0.safetensors", w=torch.ones(3))
    saved(folder / "below" / "b.safetensors", v=torch.ones(4))
    (folder / "a..b.safetensors").symlink_to(Path("../../blobs/0.safetensors"))
    index = {"weight_map": {"w": "a..b.safetensors", "v": "below/b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert compare_checkpoints(folder, folder, progress=False).weights == 7


@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"weight_map": ' * 200_000,
        '{"weight_map": ["a.safetensors"]}',
        '{"weight_map": "a.safetensors"}',
        '{"weight_map": {"w": ["a.safetensors"]}}',
        '{"weight_map": {"w": null}}',
        '{"weight_map": {"w": ' + "9" * 9999 + "}}",
        '{"weight_map": {"w": "a.safetensors", "w": "b.safetensors"}}',
        '{"weight_map": {}',
        "[]",
        "\0",
        "\ufeff{}",
    ],
)
def test_an_index_of_something_else_is_named(text, tmp_path, capsys):
    (tmp_path / "i.json").write_text(text, encoding="utf-8")
    refused(tmp_path / "i.json", "i.json must be an index of shards", capsys)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes")
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors", "model.bin"])
def test_a_pipe_is_not_waited_for(name, tmp_path, capsys):
    os.mkfifo(tmp_path / name)
    refused(tmp_path / name, f"there is no file .*{name}", capsys)
    refused(tmp_path, f"there is no file .*{name}", capsys)


def test_a_folder_by_the_name_of_a_file_is_named(tmp_path, capsys):
    (tmp_path / "model.safetensors").mkdir()
    refused(tmp_path, "there is no file .*model.safetensors", capsys)


# ---- a header ----------------------------------------------------------------------------------------------------------------


def header(text: str, *, length: int | None = None, data: bytes = bytes(8)) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text.encode() + data


def entry(shape: list[int], begin: int, end: int) -> str:
    return json.dumps({"dtype": "F32", "shape": shape, "data_offsets": [begin, end]})


@pytest.mark.parametrize(
    "content",
    [
        header("{}", length=1 << 63),
        header("{}", length=90_000_000),
        header("[" * 200_000),
        header('{"w": ' + entry([2], 0, 9) + "}"),
        header('{"w": ' + entry([2], 8, 16) + "}"),
        header('{"w": ' + entry([1 << 40, 1 << 40], 0, 8) + "}"),
        header('{"w": ' + entry([2], 0, 8) + ', "v": ' + entry([2], 0, 8) + "}"),
        header('{"w": ' + entry([2], 0, 8) + ', "w": ' + entry([1], 0, 4) + "}"),
        header('{"w": ' + entry([-2], 0, 8) + "}"),
    ],
    ids=["2^63", "beyond the end", "brackets", "odd offsets", "out of range", "2^80", "overlap", "twice", "negative"],
)
def test_a_header_that_does_not_fit_its_file_is_named(content, tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(content)
    refused(tmp_path / "m.safetensors", "m.safetensors must be a whole safetensors file; ", capsys)


# ---- pickled tensors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zipped", [True, False])
def test_both_formats_of_torch_are_read(zipped, tmp_path):
    states = [{"w": drawn((5, 7), torch.float32), "v": drawn((6,), torch.bfloat16), "n": torch.arange(3)} for _ in range(2)]
    for name, state in zip("ab", states, strict=True):
        tied = {**state, "tied": state["w"], "row": state["w"][1]}
        torch.save(tied, tmp_path / f"{name}.pt", _use_new_zipfile_serialization=zipped)
    result = compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", pickled=True, progress=False)
    assert result.skipped == {"n": "strided, int64", "tied": "the same memory as w"}
    before, after = ({"w": state["w"], "v": state["v"], "row": state["w"][1]} for state in states)
    assert_is_defined(result, before, after, [])


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "negative": lambda x: torch.complex(x, x).conj().imag,
    "negative columns": lambda x: torch.complex(x, x).conj().imag.transpose(0, 2),
    "transposed": lambda x: x.permute(2, 0, 1),
    "every second": lambda x: x[:, ::2, 1:],
    "flat": lambda x: x.reshape(-1)[3::5],
    "one number": lambda x: x[1, 2, 3],
    "nothing": lambda x: x[:, :0].transpose(0, 2),
}


@pytest.mark.parametrize("view", VIEWS)
def test_views_are_read_in_their_order_in_pieces(view, tmp_path):
    tensor = VIEWS[view](torch.randn(5, 6, 7))
    torch.save({"w": tensor}, tmp_path / "a.pt")
    stored = open_checkpoint("before", tmp_path / "a.pt", pickled=True).tensors["w"]
    flat = tensor.resolve_neg().contiguous().view(-1).view(torch.int32)
    assert stored.shape == tensor.shape
    for begin in range(tensor.numel()):
        for end in range(begin + 1, tensor.numel() + 1, 4):
            assert stored.read(begin, end).view("i4").tolist() == flat[begin:end].tolist()


def test_what_has_no_numbers_of_its_own_is_listed_with_the_reason(tmp_path, capsys):
    odd: dict[str, Any] = {
        "meta": torch.ones(3, device="meta"),
        "expanded": torch.ones(256).expand(1 << 32, 256),
        "sparse": torch.eye(3).to_sparse(),
        "quantized": torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "complex": torch.ones(3, dtype=torch.complex64),
        "float8": torch.ones(3).to(torch.float8_e4m3fn),
        "bool": torch.ones(3, dtype=torch.bool),
        "inner": {"w": torch.ones(3)},
        "none": None,
    }
    path = tmp_path / "a.pt"
    torch.save({"w": torch.ones(3), "scalar": torch.tensor(1.0), "empty": torch.ones(0), **odd}, path)
    result = compare_checkpoints(path, path, pickled=True, progress=False)
    assert result.weights == 4
    assert result.skipped == {
        "meta": "no numbers, on device meta",
        "expanded": "expanded, 256 numbers stand for 1,099,511,627,776",
        "sparse": "sparse_coo, float32",
        "quantized": "strided, qint8",
        "complex": "strided, complex64",
        "float8": "strided, float8_e4m3fn",
        "bool": "strided, bool",
        "inner": "no tensor but dict",
        "none": "no tensor but NoneType",
    }
    for name, value in odd.items():
        torch.save({name: value}, path)
        message = (
            "share weights of one name and shape in float16, bfloat16, float32, float64; none of the 1 in both is compared: "
        )
        refused(path, f"{message}{name}: {result.skipped[name]}", capsys)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kept", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_pickle_is_named(kept, zipped, tmp_path, capsys):
    path = tmp_path / "a.pt"
    torch.save({f"w{i}": torch.ones(100) for i in range(9)}, path, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
    refused(path, "a.pt must be tensors saved by torch.save; ", capsys)


def test_names_are_text_or_numbers(tmp_path, capsys):
    torch.save({("a", "b"): torch.ones(3)}, tmp_path / "a.pt")
    refused(tmp_path / "a.pt", "a.pt must be a state dict, tensors by name; got a name that is a tuple", capsys)


LIMITED = """
import resource, sys
import torch
from pysteep.__main__ import main
torch.set_num_threads(1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (700 << 20),) * 2)
sys.exit(main(["compare", "--pickled", *sys.argv[1:]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="no /proc")
def test_memory_is_bounded_whatever_a_file_claims(tmp_path):
    claimed = tmp_path / "claimed.pt"
    torch.save({"w": torch.ones(1000)}, claimed, _use_new_zipfile_serialization=False)
    little = claimed.read_bytes()
    claimed.write_bytes(little.replace(b"M\xe8\x03N", b"\x8a\x06\0\0\0\0\0\x01N", 1))  # the size of the storage: 2^40
    assert claimed.read_bytes() != little
    expanded = tmp_path / "expanded.pt"
    torch.save({"v": torch.ones(3), "w": torch.ones(256).expand(1 << 32, 256)}, expanded)
    command = [sys.executable, "-c", LIMITED]
    results = {path: subprocess.run([*command, path, path], capture_output=True, timeout=100) for path in (claimed, expanded)}
    assert results[claimed].returncode == 2
    assert b"claimed.pt must be tensors saved by torch.save" in results[claimed].stderr
    assert results[claimed].stderr.count(b"\n") == 1
    assert results[expanded].returncode == 0, results[expanded].stderr
    assert b"w: expanded, 256 numbers stand for" in results[expanded].stdout
