"""pysteep.flow: problems, batches of runs, records, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pysteep import flow


def simulate(problem, **options):
    return flow.simulate(problem, **{"lr": 1e-3, "steps": 100, "progress": False, **options})


def test_problems_are_the_papers():
    problem = flow.regression(300, 100, 5, seed=[3, 4])
    assert problem.Z.shape == (2, 300, 100)
    assert problem.batch == (2,)
    assert problem.truth.sum() == 10
    assert abs(problem.Z.mean()) < 0.02
    assert abs(problem.Z.std() - 1) < 0.02
    np.testing.assert_allclose(problem.y, (problem.Z @ problem.truth[..., None])[..., 0])
    assert np.array_equal(problem.Z[1], flow.regression(300, 100, 5, seed=4).Z)
    signs = flow.classification(seed=9)
    assert set(np.unique(signs.y)) == {-1.0, 1.0}
    assert signs.loss == "exponential"
    assert np.array_equal(signs.Z, flow.regression(seed=9).Z)


def test_losses_and_what_a_mean_is():
    problem = flow.Problem(np.array([[1.0, 2.0], [0.0, 1.0]]), np.array([1.0, -1.0]))
    x = np.array([1.0, 1.0])
    assert problem.value(x) == (2.0**2 + 2.0**2) / 2
    assert flow.Problem(problem.Z, problem.y, reduction="sum").value(x) == 8
    assert flow.Problem(problem.Z, problem.y, "exponential").value(x) == (np.exp(-3) + np.exp(1)) / 2


def test_everything_broadcasts():
    problem = flow.regression(8, 10, 2, seed=range(3))
    result = simulate(problem, q=np.array([1.0, 1.5])[:, None, None], depth=[[1], [2], [3], [5]], lr=[1e-3, 2e-3, 3e-3])
    assert result.x.shape == (2, 4, 3, 10)
    assert result.trajectory.shape == (101, 2, 4, 3, 10)
    assert result.loss.shape == result.distance.shape == result.predicted_balance.shape == result.time.shape == (101, 2, 4, 3)
    one = simulate(flow.Problem(problem.Z[2], problem.y[2]), q=1.5, depth=3, lr=3e-3)
    assert np.array_equal(one.x, result.x[1, 2, 2])
    assert one.distance is None


def test_records():
    problem = flow.regression(8, 10, 2)
    result = simulate(problem, record=4)
    assert list(result.steps) == [0, 25, 50, 75, 100]
    assert not result.trajectory[0].any()
    np.testing.assert_allclose(result.loss[-1], problem.value(result.x))
    np.testing.assert_allclose(result.distance, ((result.trajectory - problem.truth) ** 2).sum(-1))
    assert list(simulate(problem, record=[7, 0, 7]).steps) == [0, 7, 100]
    assert list(simulate(problem, steps=3).steps) == [0, 1, 2, 3]
    assert list(simulate(problem, steps=0).steps) == [0]
    tensor = torch.tensor(2e-3)
    assert simulate(problem, lr=tensor).settings["lr"] == pytest.approx(2e-3)


def test_balance_follows_its_prediction():
    """Lemma 4.5 to first order in lr: the distance falls with it."""
    problem = flow.regression(40, 50, 3)
    distances = []
    for lr in (1e-2, 1e-3, 1e-4):
        steps = round(2 / lr)
        result = simulate(problem, q=1.5, depth=[2, 3], scale=0.4, lr=lr, steps=steps, weight_decay=0.3)
        distances.append(np.abs(result.balance - result.predicted_balance[..., None]).max(0).max(-1))
        assert result.predicted_balance[-1] == pytest.approx(0.4**1.5 * np.exp(-1.5 * 0.6), rel=0.01)
    assert (distances[0] > 4 * distances[1]).all()
    assert (distances[1] > 4 * distances[2]).all()


def test_sign_flow_escapes_the_saddle_before_gradient_flow():
    """Fig. 1 in small: k = 300, L = 3."""
    problem = flow.regression(300, 100, 5, seed=range(2))
    result = simulate(problem, q=[[1.0], [1.5], [2.0]], depth=3, lr=1e-3, steps=20_000, record=2000)
    escaped = result.escape_time()
    assert (escaped[0] < escaped[1]).all()
    assert (escaped[1] < escaped[2]).all()


def test_files(tmp_path):
    result = simulate(flow.regression(8, 10, 2, seed=[0, 1]), q=[[1.0], [2.0]], batch_size=3)
    result.save(tmp_path / "runs.npz")
    again = flow.Result.load(tmp_path / "runs.npz")
    for name, value in vars(result).items():
        if name == "settings":
            assert value.keys() == again.settings.keys()
            for key in value:
                assert np.array_equal(value[key], again.settings[key]), key
        else:
            assert np.array_equal(value, getattr(again, name), equal_nan=name == "balance"), name
    without = simulate(flow.Problem(np.eye(2), np.ones(2)))
    without.save(tmp_path / "other.npz")
    assert flow.Result.load(tmp_path / "other.npz").distance is None


def test_ctrl_c_returns_what_was_done(monkeypatch):
    problem, advance, calls = flow.regression(8, 10, 2), flow._Runs.advance, []

    def interrupted(runs, begin, end):
        if end > 50:
            raise KeyboardInterrupt
        calls.append((begin, end))
        advance(runs, begin, end)

    whole = simulate(problem, record=10)
    monkeypatch.setattr(flow._Runs, "advance", interrupted)
    result = simulate(problem, record=10)
    assert result.interrupted
    assert not whole.interrupted
    assert list(result.steps) == [0, 10, 20, 30, 40, 50]
    assert np.array_equal(result.x, whole.trajectory[5])
    assert calls[-1][1] == 50


BAD = [
    ({"q": 0.9}, r"q must be a number in \[1, 2\]; got 0.9"),
    ({"q": [1.0, 2.5]}, r"q must be a number in \[1, 2\]; got 2.5"),
    ({"depth": 0}, r"depth must be an integer from 1 to 64; got 0"),
    ({"scale": 0.0}, "scale must be a finite number > 0; got 0.0"),
    ({"lr": -1.0}, "lr must be a finite number >= 0; got -1.0"),
    ({"lr": float("nan")}, "lr must be a finite number >= 0; got nan"),
    ({"weight_decay": -1}, "weight_decay must be a finite number >= 0; got -1.0"),
    ({"seed": -1}, "seed must be an integer from 0 to 2\\^63 - 1; got -1"),
    ({"steps": -1}, "steps must be an integer >= 0; got -1"),
    ({"steps": 1.5}, "steps must be an integer >= 0; got 1.5"),
    ({"batch_size": 0}, "batch_size must be an integer >= 1 or None; got 0"),
    ({"optimizer": "sgd"}, "optimizer must be one of 'steepest', 'adam'; got 'sgd'"),
    ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\); got \(0.9, 1.0\)"),
    ({"epsilon": 0.0}, "epsilon must be a finite number > 0; got 0.0"),
    ({"dtype": "bfloat16"}, "dtype must be one of 'float64', 'float32'; got 'bfloat16'"),
    ({"record": [101]}, r"record must be an integer from 0 to 100; got 101"),
    ({"record": 0}, "record must be an integer >= 1 or a sequence of steps; got 0"),
    ({"q": [1.0, 2.0], "depth": [1, 2, 3]}, r"all batches must broadcast against each other; got .*'depth': \(3,\)"),
    ({"backend": "cuda"}, "backend 'cuda' cannot serve here"),
    ({"q": []}, r"q must be a number or an array with an element; got an array of shape \(0,\)"),
    ({"depth": []}, "depth must be a number or an array with an element"),
    ({"lr": np.ones((2, 0))}, r"lr must be a number or an array with an element; got an array of shape \(2, 0\)"),
    ({"seed": []}, "seed must be a number or an array with an element"),
    ({"epsilon": [1e-8]}, r"epsilon must be a finite number > 0; got \[1e-08\]"),
    ({"lr": float("inf")}, "lr must be a finite number >= 0; got inf"),
    ({"betas": ("0", "0")}, r"betas must be two numbers in \[0, 1\)"),
    ({"steps": True}, "steps must be an integer >= 0; got True"),
    ({"batch_size": True}, "batch_size must be an integer >= 1 or None; got True"),
    ({"progress": "no"}, "progress must be True or False; got 'no'"),
    ({"lr": torch.tensor(0.1, requires_grad=True)}, r"lr must not require a gradient, .*: pass lr.detach\(\)"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[str(options) for options, _ in BAD])
def test_bad_options_are_named(options, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        simulate(flow.regression(4, 5, 1), **options)


@pytest.mark.parametrize("name", ["q", "lr", "scale", "weight_decay", "depth", "seed"])
def test_numbers_must_be_numbers(name):
    for wrong in (True, "1", [True], [1, True], [[1, 2], (2, True)], None):
        with pytest.raises(TypeError, match=f"{name} must be an? "):
            simulate(flow.regression(4, 5, 1), **{name: wrong})


def test_integers_of_numpy_are_integers():
    problem = flow.regression(np.int64(4), np.int32(5), np.uint8(1), seed=np.int64(3))
    options = {"depth": 3, "steps": 20, "batch_size": 2, "record": 4, "seed": 7}
    expected = simulate(problem, **options)
    result = simulate(problem, **{name: np.int64(value) for name, value in options.items()})
    assert np.array_equal(result.trajectory, expected.trajectory)
    assert result.settings["batch_size"] == 2
    with pytest.raises(ValueError, match=r"regression: seed must be a number or an array with an element"):
        flow.regression(4, 5, 1, seed=[])


@pytest.mark.parametrize("name", ["x", "x.npz", "x.y"])
def test_save_and_load_take_the_same_path(tmp_path, name):
    result = simulate(flow.regression(4, 5, 1), batch_size=np.int64(2))
    result.save(tmp_path / name)
    assert np.array_equal(flow.Result.load(tmp_path / name).trajectory, result.trajectory)
    result.save(str(tmp_path / name))
    assert np.array_equal(flow.Result.load(str(tmp_path / name)).x, result.x)


def test_bad_problems_are_named():
    with pytest.raises(TypeError, match=r"depth must be an integer or an array of integers; got 2\.5"):
        simulate(flow.regression(4, 5, 1), depth=2.5)
    with pytest.raises(TypeError, match=r"problem must be a pysteep\.flow\.Problem; got ndarray"):
        simulate(np.eye(3))
    with pytest.raises(TypeError, match="q must be a number or an array of numbers; got 'one'"):
        simulate(flow.regression(4, 5, 1), q="one")
    for Z, y, message in (
        (np.ones((0, 3)), np.ones(0), r"Z must have shape \(\*batch, k, n\) with no size of 0; got \(0, 3\)"),
        (np.ones((2, 0)), np.ones(2), r"no size of 0; got \(2, 0\)"),
        (np.ones((2, 3)), np.ones(3), r"y must have Z's shape without the last, \(2,\); got \(3,\)"),
        (np.full((2, 3), np.nan), np.ones(2), "Z must be a finite number; got nan"),
    ):
        with pytest.raises(ValueError, match=message):
            flow.Problem(Z, y)
    with pytest.raises(ValueError, match="loss must be one of 'mse', 'exponential'; got 'hinge'"):
        flow.Problem(np.eye(2), np.ones(2), loss="hinge")
    with pytest.raises(ValueError, match=r"truth must have shape \(2,\); got \(3,\)"):
        flow.Problem(np.eye(2), np.ones(2), truth=np.ones(3))
    with pytest.raises(ValueError, match="k must be an integer >= 1; got 0"):
        flow.regression(0, 3, 1)
    with pytest.raises(ValueError, match="support must be at most n = 3; got 4"):
        flow.regression(2, 3, 4)


def one_run(**options):
    return flow.simulate(flow.regression(3, 4, 1), lr=0.01, steps=2, record=1, progress=False, **options)


@pytest.mark.parametrize(
    "device",
    ["meta", "fast", "cuda:1000", None, 1.5, *(() if torch.cuda.is_available() else ("cuda", torch.device("cuda", 0)))],
    ids=str,
)
def test_devices_that_hold_no_runs_are_refused_by_name(device):
    with pytest.raises(ValueError, match=r"^simulate: device must be 'cpu' or a GPU's .*; got ") as raised:
        one_run(device=device)
    assert f"got {device!r}: " in str(raised.value)


def test_tensors_that_cannot_be_read_are_refused_by_name():
    with pytest.raises(TypeError, match=r"^simulate: lr must be dense \(torch.strided\); got torch.sparse_coo: call .to_dense"):
        flow.simulate(flow.regression(3, 4, 1), lr=torch.ones(2).to_sparse(), steps=2)
    with pytest.raises(TypeError, match=r"^Problem: Z must hold its own memory; got one on meta that has none"):
        flow.Problem(torch.ones(3, 4, device="meta"), torch.ones(3))


@pytest.mark.parametrize("name", ["save", "load"])
def test_paths_that_name_no_file_are_refused(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = one_run().save if name == "save" else flow.Result.load
    for path in (None, 3, b"runs", [1]):
        with pytest.raises(TypeError, match=rf"^Result.{name}: path must be a str or a pathlib.Path; got "):
            call(path)
    for path in ("", Path(), ".", "..", "runs/"):
        with pytest.raises(ValueError, match=rf"^Result.{name}: path must end in the name of a file; got "):
            call(path)
    assert not list(tmp_path.iterdir())


def test_files_that_hold_no_result_are_refused_by_path(tmp_path):
    one_run().save(tmp_path / "whole.npz")
    whole = (tmp_path / "whole.npz").read_bytes()
    np.savez(tmp_path / "other.npz", x=np.ones(3))
    np.savez(tmp_path / "less.npz", plain=np.array('{"settings": {}, "interrupted": false}'), x=np.ones(3))
    np.savez(tmp_path / "list.npz", plain=np.array("[]"))
    np.savez(tmp_path / "objects.npz", plain=np.array([None]))
    np.save(tmp_path / "array.npy", np.ones(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", whole[: len(whole) // 2])):
        (tmp_path / f"{name}.npz").write_bytes(content)
    for path in sorted(tmp_path.iterdir()):
        if path.name == "whole.npz":
            continue
        with pytest.raises(
            ValueError, match=r"^Result.load: path must be of a file that Result.save wrote; got .*\.npz'"
        ) as raised:
            flow.Result.load(path)
        assert str(path) in str(raised.value)
    with pytest.raises(FileNotFoundError, match="missing"):
        flow.Result.load(tmp_path / "missing")
