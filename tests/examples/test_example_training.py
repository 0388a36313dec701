"""What the deep-network examples train with: their data, checkpoints, processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "examples"


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def write_cifar(folder: Path, per_file: int) -> tuple[np.ndarray, np.ndarray]:
    """Files as CIFAR-10's own Python version has them; returns all images and labels."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, per_file, 3072), dtype=np.uint8), rng.integers(0, 10, (6, per_file))
    for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        content = {
            b"data": images[i],
            b"labels": labels[i].tolist(),
            b"batch_label": b"...",
            b"filenames": [b"x.png"] * per_file,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return images, labels


def test_cifar_is_read_from_its_own_files(tmp_path):
    from image_data import load

    images, labels = write_cifar(tmp_path / "cifar-10-batches-py", per_file=11)
    data = load(tmp_path, batch=8, seed=0, rank=0, world=1)
    assert (data.name, data.channels, data.classes, len(data.train)) == ("CIFAR-10", 3, 10, 6)
    (test, test_labels), *rest = data.test
    assert not rest
    assert test_labels.tolist() == labels[5].tolist()
    pixels = images[:5].reshape(-1, 3, 1024) / 255
    mean, std = pixels.mean((0, 2)), pixels.std((0, 2), ddof=1)
    expected = (images[5].reshape(-1, 3, 1024) / 255 - mean[:, None]) / std[:, None]
    np.testing.assert_allclose(test.reshape(-1, 3, 1024), expected, atol=1e-5)


def test_a_pickle_that_would_run_something_is_not_read(tmp_path):
    from image_data import load

    write_cifar(tmp_path / "cifar-10-batches-py", per_file=2)
    (tmp_path / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(subprocess.run))
    with pytest.raises(pickle.UnpicklingError, match=r"subprocess\.run"):
        load(tmp_path, batch=8, seed=0, rank=0, world=1)


def test_processes_share_each_batch_without_overlap():
    from image_data import digits

    alone, first, second = (list(digits(64, 3, rank, world).train) for rank, world in ((0, 1), (0, 2), (1, 2)))
    assert len(alone) == len(first) == len(second)
    for (images, labels), (a, x), (b, y) in zip(alone, first, second, strict=True):
        assert torch.equal(images[0::2], a)
        assert torch.equal(images[1::2], b)
        assert torch.equal(labels, torch.stack([x, y], 1).flatten())


class Killed(Exception):
    pass


@pytest.mark.parametrize("method", range(4))
def test_a_killed_run_goes_on_as_if_it_had_not_been(method, tmp_path):
    from image_data import digits
    from sparse_resnet import METHODS, Work
    from training import Recipe, start, train

    def run(checkpoint: Path | None, steps: int | None = None) -> tuple[list[dict[str, float]], list[torch.Tensor]]:
        torch.manual_seed(0)
        data, left = digits(512, 0, 0, 1, size=8), iter(range(steps or 10**6))
        net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        optimizer = Work(METHODS[method], 3, 0.01, 0).build(net, 1e-2)

        def advance() -> None:
            if next(left, None) is None:
                raise Killed

        def record(net: nn.Module) -> dict[str, float]:
            return {"l1": sum(float(param.detach().abs().sum()) for param in net.parameters())}

        records = train(net, optimizer, data.train, Recipe(3, None, checkpoint), start(), record, advance)
        return records, [param.detach().clone() for param in net.parameters()]

    records, params = run(None)
    with pytest.raises(Killed):
        run(tmp_path / "run.pt", steps=3)  # two steps are an epoch
    resumed_records, resumed = run(tmp_path / "run.pt")
    assert resumed_records == records
    assert all(map(torch.equal, resumed, params))


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    from image_data import digits
    from training import Recipe, start, train

    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    optimizer, data = torch.optim.SGD(net.parameters(), lr=0.1), digits(128, 0, 0, 1, size=8)
    train(net, optimizer, data.train, Recipe(1, None, tmp_path / "run.pt", "lr 0.1"), start())
    with pytest.raises(SystemExit, match=r"made with lr 0\.1, 1 epochs.*this run has lr 0\.2"):
        train(net, optimizer, data.train, Recipe(1, None, tmp_path / "run.pt", "lr 0.2"), start())


def test_resnet_50_gets_depth_and_takes_a_step():
    from resnet import MODELS
    from sparse_resnet import METHODS, Work

    import pysteep

    net = MODELS["resnet50"](3, 1000)
    assert sum(param.numel() for param in net.parameters()) == 25_557_032
    weights = [param for _, param in pysteep.param_groups(net, 2)[0]["params"]]
    assert len(weights) == 54  # 53 convolutions and the head
    optimizer = Work(METHODS[3], 2, 0.1, 0).build(net, 1e-3)
    before = weights[0].detach().clone()
    net(torch.randn(2, 3, 64, 64)).logsumexp(1).sum().backward()
    optimizer.step()
    assert bool((weights[0] != before).any())
    assert all(bool(weight.isfinite().all()) for weight in weights)


@pytest.mark.slow
def test_two_processes_train_in_bfloat16(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    options = ["--quick", "--depths", "2", "--decays", "0.1", "--epochs", "1"]
    script = [str(FOLDER / "sparse_resnet.py"), *options, "--amp", "bfloat16", "--output", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # for each process a core
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "sparse_resnet.md").read_text().splitlines()) == 6


@pytest.mark.slow
def test_bert_from_a_folder_is_fine_tuned_on_mrpc_files(tmp_path):
    """As GLUE has them: quotation marks are text, and the first line begins with a byte-order mark."""
    import transformers
    from finetune_bert import tiny_tokenizer
    from paraphrases import Pair, made, mrpc

    pairs = [Pair('the "old king', "the ancient ruler", True), *made(40, 0)]
    for name in ("train.tsv", "dev.tsv"):
        rows = ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String"]
        rows += [f"{int(pair.same)}\t{i}\t{i}\t{pair.first}\t{pair.second}" for i, pair in enumerate(pairs)]
        (tmp_path / name).write_text("\n".join(rows) + "\n", encoding="utf-8-sig")
    assert mrpc(tmp_path) == (pairs, pairs)
    with pytest.raises(SystemExit, match="--data must be a folder with MRPC's"):
        mrpc(tmp_path / "elsewhere")
    tokenizer = tiny_tokenizer()
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.BertConfig(vocab_size=len(tokenizer), **sizes)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    options = ["--quick", "-k", "2", "--model", str(tmp_path / "bert"), "--data", str(tmp_path), "--output", str(tmp_path)]
    done = subprocess.run([sys.executable, str(FOLDER / "finetune_bert.py"), *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bert on MRPC" in (tmp_path / "finetune_bert.md").read_text()
