"""Checkpoints as files: what compare_checkpoints opens and refuses, how much of them it holds, and its command."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pysteep.__main__ import main
from pysteep.diagnostics import compare_checkpoints
from tests.support.checkpoint_cases import K, Q, assert_is_defined, drawn, saved


def index(folder: Path, **shards: str) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    return path


def no_folder(folder: Path) -> Path:
    return folder / "nowhere"


def empty_folder(folder: Path) -> Path:
    return folder


def missing_shard(folder: Path) -> Path:
    return index(folder, w="model-2.safetensors")


def shard_without_its_tensor(folder: Path) -> Path:
    saved(folder / "model-1.safetensors", v=torch.ones(3))
    return index(folder, w="model-1.safetensors").parent


def no_index(folder: Path) -> Path:
    (folder / "config.json").write_text('{"weight_map": 3}')
    return folder / "config.json"


def truncated(folder: Path) -> Path:
    path = saved(folder / "model.safetensors", w=torch.ones(300))
    path.write_bytes(path.read_bytes()[:-1])
    return path


def empty_file(folder: Path) -> Path:
    (folder / "model.safetensors").touch()
    return folder


def pointer(folder: Path) -> Path:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    return folder


def several(folder: Path) -> Path:
    saved(folder / "one.safetensors", w=torch.ones(3))
    return saved(folder / "two.safetensors", w=torch.ones(3)).parent


def other_ending(folder: Path) -> Path:
    (folder / "model.gguf").touch()
    return folder / "model.gguf"


def pickled_file(folder: Path) -> Path:
    torch.save({"w": torch.ones(3)}, folder / "model.pt")
    return folder / "model.pt"


def pickled_folder(folder: Path) -> Path:
    return pickled_file(folder).rename(folder / "pytorch_model.bin").parent


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_folder, "after must be .*nowhere"),
        (empty_folder, "after must be a folder with a checkpoint; {folder} has no"),
        (missing_shard, "there is no file {folder}/model-2.safetensors"),
        (shard_without_its_tensor, "{folder}/model-1.safetensors must hold w"),
        (no_index, "{folder}/config.json must be an index"),
        (truncated, "{folder}/model.safetensors must be a whole"),
        (empty_file, "{folder}/model.safetensors must be a whole"),
        (pointer, "{folder}/model.safetensors must be a whole"),
        (several, "name one of one.safetensors, two.safetensors"),
        (other_ending, "after must end in .safetensors"),
        (pickled_file, "{folder}/model.pt: pass pickled=True"),
        (pickled_folder, "{folder} holds pytorch_model.bin: pass pickled=True"),
    ],
)
def test_files_that_cannot_be_read_are_named(make, message, tmp_path, capsys):
    good = saved(tmp_path / "good.safetensors", w=torch.ones(3))
    folder = tmp_path / "after"
    folder.mkdir()
    path = make(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message.format(folder=folder)):
        compare_checkpoints(good, path)
    assert main(["compare", str(good), str(path)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("pysteep compare: ")
    assert output.err.count("\n") == 1


class Thief:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


def test_pickled_checkpoints_are_read_if_asked_for_and_tied_weights_once(tmp_path):
    states = [{"w": drawn((5, 7), torch.float32).t(), "ids": torch.arange(3), "epoch": 3} for _ in range(2)]
    for name, state in zip("ab", states, strict=True):
        torch.save({**state, "tied": state["w"]}, tmp_path / f"{name}.pt")
    result = compare_checkpoints(tmp_path / "a.pt", tmp_path / "b.pt", pickled=True, progress=False)
    assert_is_defined(result, {"w": states[0]["w"]}, {"w": states[1]["w"]}, [])
    assert result.skipped == {"ids": "strided, int64", "epoch": "no tensor but int", "tied": "the same memory as w"}


def test_pickled_and_safetensors_in_shards_compare_to_each_other(tmp_path):
    state = {Q.format(0): drawn((6, 7), torch.float32), K.format(0): drawn((4, 7), torch.float32)}
    for number, (name, tensor) in enumerate(state.items()):
        torch.save({name: tensor}, tmp_path / f"pytorch_model-{number}.bin")
    shards = {name: f"pytorch_model-{number}.bin" for number, name in enumerate(state)}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": shards}))
    after = {name: -tensor for name, tensor in state.items()}
    save_file(after, tmp_path / "after.safetensors")
    before = tmp_path / "pytorch_model.bin.index.json"
    result = compare_checkpoints(before, tmp_path / "after.safetensors", pickled=True, progress=False)
    assert_is_defined(result, state, after, [(state[Q.format(0)], after[Q.format(0)], state[K.format(0)], after[K.format(0)])])


def test_no_code_of_a_pickle_runs(tmp_path):
    trace = tmp_path / "trace"
    torch.save({"w": Thief(trace)}, tmp_path / "a.pt")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Thief(trace)))
    for name in ("a.pt", "b.pth"):
        with pytest.raises(ValueError, match=rf"{tmp_path / name} must be tensors saved by torch.save; .*weights_only"):
            compare_checkpoints(tmp_path / name, tmp_path / name, pickled=True)
    assert not trace.exists()


@pytest.mark.parametrize("value", [[torch.ones(3)], torch.ones(3)], ids=["list", "tensor"])
def test_a_pickle_of_something_else_is_refused(value, tmp_path):
    torch.save(value, tmp_path / "a.pt")
    with pytest.raises(ValueError, match="must be a state dict"):
        compare_checkpoints(tmp_path / "a.pt", tmp_path / "a.pt", pickled=True)


# ---- the command -------------------------------------------------------------------------------------------------------------


def test_the_command_prints_the_comparison(tmp_path):
    a = saved(tmp_path / "a.safetensors", left=torch.ones(2, 2), right=torch.ones(2, 2))
    b = saved(tmp_path / "b.safetensors", left=-torch.ones(2, 2), right=torch.ones(2, 2))
    command = [sys.executable, "-m", "pysteep", "compare", a, b, "--pairs", "left", "right"]
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100)
    assert (finished.returncode, finished.stderr) == (0, "")
    assert finished.stdout == str(compare_checkpoints(a, b, [("left", "right")], progress=False)) + "\n"


def test_the_command_reads_pickles_only_if_told(tmp_path, capsys):
    torch.save({"w": torch.ones(3)}, tmp_path / "a.pt")
    command = ["compare", str(tmp_path / "a.pt"), str(tmp_path / "a.pt")]
    assert main(command) == 2
    assert main([*command, "--pickled"]) == 0
    assert "3 in 1 tensors" in capsys.readouterr().out


def test_progress_is_silent_where_it_is_not_wanted(tmp_path, capsys):
    path = saved(tmp_path / "a.safetensors", w=torch.ones(3))
    compare_checkpoints(path, path, progress=False)
    assert capsys.readouterr() == ("", "")
    compare_checkpoints(path, path)
    assert "24.0/24.0" in capsys.readouterr().err


MEMORY = """
import resource, sys
from pysteep.diagnostics import compare_checkpoints
small, large = sys.argv[1:]
compare_checkpoints(small, small, progress=False)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
compare_checkpoints(large, large, progress=False)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_memory_does_not_grow_with_the_model(tmp_path):
    small = saved(tmp_path / "small.safetensors", **{Q.format(0): torch.ones(9, 9), K.format(0): torch.ones(9, 9)})
    layers = {name.format(i): torch.randn(4096, 4096) for i in range(6) for name in (Q, K)}
    large = saved(tmp_path / "large.safetensors", **layers)
    assert large.stat().st_size > 800e6
    command = [sys.executable, "-c", MEMORY, small, large]
    finished = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=100, env={"OMP_NUM_THREADS": "2"})
    assert finished.returncode == 0, finished.stderr
    assert float(finished.stdout) < 200  # MiB: two files, two threads, pieces of 32


@pytest.mark.slow
@pytest.mark.parametrize("given", [True, False])
def test_the_example_writes_table_3_and_a_picture(given, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    arguments: list[str | Path] = ["--quick", "--output", tmp_path / "results"]
    if given:
        for name in ("before", "after"):
            layers = {name.format(i): torch.randn(8, 8) for i in range(3) for name in (Q, K)}
            arguments.append(saved(tmp_path / f"{name}.safetensors", **layers))
    example = Path(__file__).parents[2] / "examples" / "qk_balance.py"
    finished = subprocess.run([sys.executable, example, *arguments], capture_output=True, encoding="utf-8", timeout=100)
    assert finished.returncode == 0, finished.stderr
    lines = (tmp_path / "results" / "qk_balance.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert {len(row) for row in rows} == {8}
    assert len(rows) == (5 if given else 7)
    assert "nan" not in "".join(lines)
    assert ("randomly initialised" in lines[-1]) == (not given)
    assert image.imread(tmp_path / "results" / "qk_balance.png").std() > 0.02
