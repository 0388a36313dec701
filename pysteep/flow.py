"""Diagonal networks x = w_1 * ... * w_L trained by steepest descent or Adam, many runs in one call [Sec. 5, App. F, App. I].

    from pysteep import flow
    problem = flow.regression(k=80, n=100, support=5, seed=range(32))
    result = flow.simulate(problem, q=1, depth=[[2], [10]], lr=1e-4, steps=1_000_000)    # 2 x 32 runs
    result.distance[-1]                                                                  # squared, to the truth: [2, 32]

Every option that may differ between runs is an array, and all are broadcast against each other and the problem's own batch.
A run's numbers do not depend on the other runs, on the number of threads, or on what is recorded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike
from tqdm import tqdm

from ._flow_arguments import Array, betas_of, check_choice, check_not_empty, device_of, integer, integers, numbers, records
from ._numbers import check_flags, is_finite
from ._ops.dispatch import BackendName, choose
from .kernels.reference.factor_step import integer_power

__all__ = ["Problem", "Result", "classification", "regression", "simulate"]

Loss = Literal["mse", "exponential"]
Reduction = Literal["mean", "sum"]
Optimizer = Literal["steepest", "adam"]
Dtype = Literal["float32", "float64"]
LOSSES, REDUCTIONS, OPTIMIZERS = get_args(Loss), get_args(Reduction), get_args(Optimizer)
SECONDS = 0.2  # between two looks at the keyboard

# ---- problems ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Problem:
    """Rows Z to which x is fitted: predictions Z x.

    Args:
        Z: [*batch, k, n].
        y: [*batch, k].
        loss: "mse", mean (Z x - y)^2, with gradient 2/k Z^T (Z x - y); or "exponential", mean exp(-y Z x), whose exponent is
            cut off where exp overflows.
        reduction: "mean" over the rows of a batch or "sum". Against decay of the gradient (`coupled_weight_decay`) a sum weighs
            k times as much.
        truth: [*batch, n], what the rows were made of, if that is known.

    Raises:
        ValueError: shapes that do not go together, k or n of 0, numbers that are not finite, an unknown loss or reduction.
    """

    Z: Array
    y: Array
    loss: Loss = "mse"
    reduction: Reduction = "mean"
    truth: Array | None = None

    def __post_init__(self) -> None:
        for name in ("Z", "y", "truth"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, numbers(f"Problem: {name}", getattr(self, name)))
        if self.Z.ndim < 2 or 0 in self.Z.shape:
            raise ValueError(f"Problem: Z must have shape (*batch, k, n) with no size of 0; got {self.Z.shape}")
        if self.y.shape != self.Z.shape[:-1]:
            raise ValueError(f"Problem: y must have Z's shape without the last, {self.Z.shape[:-1]}; got {self.y.shape}")
        expected = (*self.batch, self.n)
        if self.truth is not None and self.truth.shape != expected:
            raise ValueError(f"Problem: truth must have shape {expected}; got {self.truth.shape}")
        check_choice("Problem: loss", self.loss, LOSSES)
        check_choice("Problem: reduction", self.reduction, REDUCTIONS)

    @property
    def k(self) -> int:
        """Rows."""
        return int(self.Z.shape[-2])

    @property
    def n(self) -> int:
        """Coordinates of x."""
        return int(self.Z.shape[-1])

    @property
    def batch(self) -> tuple[int, ...]:
        """Shape of the problems."""
        return tuple(self.Z.shape[:-2])

    def value(self, x: ArrayLike) -> Array:
        """The loss over all rows at x [..., *batch, n], in float64: [..., *batch]."""
        predictions = np.matmul(self.Z, np.asarray(x, np.float64)[..., None])[..., 0]
        with np.errstate(over="ignore"):
            terms = (predictions - self.y) ** 2 if self.loss == "mse" else np.exp(-self.y * predictions)
        return np.asarray(terms.mean(-1) if self.reduction == "mean" else terms.sum(-1))


def regression(k: int = 80, n: int = 100, support: int = 5, seed: ArrayLike = 0, *, reduction: Reduction = "mean") -> Problem:
    """The paper's regression: Z_il ~ N(0, 1), truth (1, ..., 1, 0, ..., 0) with `support` ones, y = Z truth [Sec. 5, App. I].

    Args:
        seed: of numpy's default generator; an array of them makes a batch of problems.

    Raises:
        ValueError: sizes < 1, more ones than coordinates, or a negative seed.
    """
    return _drawn("regression", k, n, support, seed, "mse", reduction)


def classification(
    k: int = 80, n: int = 100, support: int = 2, seed: ArrayLike = 0, *, reduction: Reduction = "mean"
) -> Problem:
    """The paper's classification: as `regression`, with y = sign(Z truth) and the exponential loss [App. F]."""
    return _drawn("classification", k, n, support, seed, "exponential", reduction)


def _drawn(name: str, k: int, n: int, support: int, seed: ArrayLike, loss: Loss, reduction: Reduction) -> Problem:
    k, n, support = (integer(f"{name}: {argument}", size, 1) for argument, size in (("k", k), ("n", n), ("support", support)))
    if support > n:
        raise ValueError(f"{name}: support must be at most n = {n}; got {support}")
    seeds = integers(f"{name}: seed", seed, 0)
    check_not_empty(f"{name}: seed", seeds)
    Z = np.empty((*seeds.shape, k, n))
    for at in np.ndindex(seeds.shape):
        Z[at] = np.random.default_rng(int(seeds[at])).standard_normal((k, n))
    truth = np.zeros((*seeds.shape, n))
    truth[..., :support] = 1
    y = np.matmul(Z, truth[..., None])[..., 0]
    return Problem(Z, np.sign(y) if loss == "exponential" else y, loss, reduction, truth)


# ---- results -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What `simulate` recorded. Arrays over time begin with one entry for each of `steps`, then the batch of runs.

    Attributes:
        steps: [records], how many steps had been taken.
        x: [*batch, n], the product at the last record.
        first, rest: [*batch, n], the factors w_1 and w_2 = ... = w_L there; at depth 1 `rest` is all ones.
        trajectory: [records, *batch, n], x.
        loss: [records, *batch], over all rows.
        distance: [records, *batch], squared L2, to the problem's truth; None without one.
        balance: [records, *batch, n], |w_2|^q - |w_1|^q; NaN at depth 1.
        predicted_balance: [records, *batch], scale^q prod (1 - lr weight_decay)^q [Lemma 4.5].
        diverged: [*batch], whether a run has numbers that are not finite; the others are not touched by it.
        settings: the arguments, as arrays over the batch or plain values.
        interrupted: whether the runs were stopped (Ctrl-C) before their last step.
    """

    steps: Array
    x: Array
    first: Array
    rest: Array
    trajectory: Array
    loss: Array
    distance: Array | None
    balance: Array
    predicted_balance: Array
    diverged: Array
    settings: dict[str, Any]
    interrupted: bool = False

    @property
    def time(self) -> Array:
        """[records, *batch], lr times steps: the time of the flow that the steps follow."""
        steps = self.steps.reshape(-1, *(1,) * self.settings["lr"].ndim)
        return np.asarray(self.settings["lr"] * steps)

    def escape_time(self, share: float = 0.5) -> Array:
        """[*batch], the time of the first record with a loss at or below `share` of the first one's; inf without one."""
        below = self.loss <= share * self.loss[0]
        first = np.argmax(below, 0)
        times = np.take_along_axis(self.time, first[None], 0)[0]
        return np.where(below.any(0), times, np.inf)

    def save(self, path: str | Path) -> None:
        """Write everything to an .npz file that `load` reads; a name without .npz gets it, in both."""
        arrays: dict[str, Any] = {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        settings = {name: value for name, value in self.settings.items() if isinstance(value, np.ndarray)}
        plain = {name: value for name, value in self.settings.items() if name not in settings}
        text = json.dumps({"settings": plain, "interrupted": self.interrupted})
        arrays |= {f"settings.{name}": value for name, value in settings.items()}
        np.savez(_npz("save", path), **arrays, plain=np.array(text))

    @classmethod
    def load(cls, path: str | Path) -> Result:
        """Read what `save` wrote; ValueError if that is not what the file holds."""
        whole = _npz("load", path)
        try:
            with np.load(whole) as file:
                plain = json.loads(str(file["plain"]))
                prefix = "settings."
                settings = {name.removeprefix(prefix): file[name] for name in file.files if name.startswith(prefix)}
                arrays = {field.name: file[field.name] for field in dataclasses.fields(cls) if field.name in file.files}
            arrays.setdefault("distance", None)
            return cls(**arrays, settings={**settings, **plain["settings"]}, interrupted=plain["interrupted"])
        except _NO_RESULT as error:
            reason = error.args[0] if error.args else type(error).__name__
            raise ValueError(
                f"Result.load: path must be of a file that Result.save wrote; got {str(whole)!r}: {reason}"
            ) from error


# What numpy and json raise of files of other kinds, cut off or without an entry.
_NO_RESULT = (AttributeError, EOFError, LookupError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)


def _npz(name: str, path: str | Path) -> Path:
    """The name that numpy.savez gives a file."""
    if not isinstance(path, (str, os.PathLike)) or not isinstance(text := os.fspath(path), str):
        raise TypeError(f"Result.{name}: path must be a str or a pathlib.Path; got {path!r}")
    if Path(text).name in ("", "..") or text.endswith(("/", os.sep)):
        raise ValueError(f"Result.{name}: path must end in the name of a file; got {path!r}")
    return Path(text if text.endswith(".npz") else f"{text}.npz")


# ---- runs --------------------------------------------------------------------------------------------------------------------


def simulate(
    problem: Problem,
    *,
    q: ArrayLike = 1.0,
    depth: ArrayLike = 2,
    scale: ArrayLike = 0.1,
    lr: ArrayLike,
    steps: int,
    weight_decay: ArrayLike = 0.0,
    coupled_weight_decay: ArrayLike = 0.0,
    batch_size: int | None = None,
    optimizer: Optimizer = "steepest",
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    seed: ArrayLike = 0,
    record: int | Sequence[int] = 100,
    dtype: Dtype = "float64",
    device: str | torch.device = "cpu",
    backend: BackendName | None = None,
    progress: bool = True,
) -> Result:
    """Train diagonal networks from the saddle w_1 = 0, w_2 = ... = w_L = scale.

    Args:
        problem: what x is fitted to.
        q: in [1, 2]: sign descent to gradient descent. Adam does not use it, but for the balance.
        depth: L, from 1 to 64; x = w_1 at 1.
        scale: > 0, of all factors but the first.
        lr: >= 0.
        steps: >= 0.
        weight_decay: >= 0, decoupled: factors decay beside the step.
        coupled_weight_decay: >= 0, added to the gradient of a factor, times it.
        batch_size: rows of a step, drawn with replacement; None: all rows.
        optimizer: "steepest" or "adam".
        betas: Adam's, in [0, 1).
        epsilon: Adam's, > 0. Beside a deep saddle gradients are smaller than torch's default, which then rules the step.
        seed: of the draws, >= 0; equal draws on every backend.
        record: so many records at equal distances after the one at the start; or the steps to record, beside the last.
        dtype: "float64" or "float32", of the runs. Records are float64.
        device: where the runs live: "cpu", or "cuda" where torch sees a GPU and the extension was built with CUDA. There a
            block of the GPU keeps a run in its shared memory: n up to some thousands.
        backend: "cpp", "numba", "cuda" or "reference"; None picks.
        progress: whether to show a bar.

    Returns:
        The records. After Ctrl-C those made so far.

    Raises:
        TypeError, ValueError: an argument of another kind or out of its range, or shapes that do not broadcast.
    """
    if not isinstance(problem, Problem):
        raise TypeError(f"simulate: problem must be a pysteep.flow.Problem; got {type(problem).__name__}")
    settings: dict[str, Any] = {
        "q": numbers("simulate: q", q, 1, 2),
        "depth": integers("simulate: depth", depth, 1, 64),
        "scale": numbers("simulate: scale", scale, 0, above=True),
        "lr": numbers("simulate: lr", lr, 0),
        "weight_decay": numbers("simulate: weight_decay", weight_decay, 0),
        "coupled_weight_decay": numbers("simulate: coupled_weight_decay", coupled_weight_decay, 0),
        "seed": integers("simulate: seed", seed, 0),
    }
    for name, array in settings.items():
        check_not_empty(f"simulate: {name}", array)
    check_choice("simulate: optimizer", optimizer, OPTIMIZERS)
    check_choice("simulate: dtype", dtype, ("float64", "float32"))
    if batch_size is not None:
        batch_size = integer("simulate: batch_size", batch_size, 1, " or None")
    betas = betas_of(betas)
    if not is_finite(epsilon) or epsilon <= 0:
        raise ValueError(f"simulate: epsilon must be a finite number > 0; got {epsilon!r}")
    check_flags(progress=progress)
    at = records(steps, record)
    where = device_of(device)
    shapes = {"problem": problem.batch, **{name: value.shape for name, value in settings.items()}}
    try:
        batch = np.broadcast_shapes(*shapes.values())
    except ValueError:
        raise ValueError(f"simulate: all batches must broadcast against each other; got {shapes}") from None
    settings = {name: np.broadcast_to(value, batch).copy() for name, value in settings.items()}
    real = torch.float64 if dtype == "float64" else torch.float32
    runs = _Runs(problem, batch, settings, batch_size, optimizer, betas, epsilon, real, where, backend)
    recorded, interrupted = _train(runs, at, progress)
    plain = {
        "batch_size": batch_size,
        "optimizer": optimizer,
        "betas": list(betas),
        "epsilon": epsilon,
        "dtype": dtype,
        "loss": problem.loss,
        "reduction": problem.reduction,
    }
    return runs.result(at[: len(recorded)], recorded, {**settings, **plain}, interrupted)


class _Runs:
    """Runs as a home takes them: a flat batch."""

    def __init__(
        self,
        problem: Problem,
        batch: tuple[int, ...],
        settings: dict[str, Any],
        batch_size: int | None,
        optimizer: str,
        betas: tuple[float, float],
        epsilon: float,
        dtype: torch.dtype,
        device: torch.device,
        backend: str | None,
    ) -> None:
        self.home = choose(backend, device, "diagonal_flow").home("diagonal_flow")
        self.problem, self.batch, self.dtype = problem, batch, dtype
        count, n = int(np.prod(batch)), problem.n
        of_problem = np.broadcast_to(np.arange(int(np.prod(problem.batch))).reshape(problem.batch), batch).reshape(-1)
        order = np.argsort(of_problem, kind="stable")  # runs on one problem side by side: a home may share its data out
        self.place = np.argsort(order)  # where the runs of the batch are
        numbers = {name: torch.from_numpy(value.reshape(-1)[order]).to(device) for name, value in settings.items()}
        scale = numbers.pop("scale")
        self.options: dict[str, Any] = {
            **numbers,
            "problem": torch.from_numpy(of_problem[order]).to(device),
            "batch_size": batch_size or 0,
            "loss": problem.loss,
            "reduction": problem.reduction,
            "betas": betas,
            "epsilon": epsilon,
        }
        self.first = torch.zeros(count, n, dtype=dtype, device=device)
        self.rest = torch.where(numbers["depth"] > 1, scale, 1.0)[:, None].to(dtype).repeat(1, n)
        self.moments = torch.zeros(4, count, n, dtype=dtype, device=device) if optimizer == "adam" else None
        self.Z = torch.from_numpy(problem.Z).reshape(-1, problem.k, n).to(device, dtype).contiguous()
        self.y = torch.from_numpy(problem.y).reshape(-1, problem.k).to(device, dtype).contiguous()

    def advance(self, begin: int, end: int) -> None:
        self.home.diagonal_flow(self.first, self.rest, self.moments, self.Z, self.y, **self.options, begin=begin, end=end)

    def factors(self) -> tuple[Array, Array]:
        """Copies of w_1 and r in float64, [*batch, n]."""
        first, rest = (f.double().cpu().numpy()[self.place].reshape(*self.batch, -1) for f in (self.first, self.rest))
        return first, rest

    def result(
        self, steps: Array, factors: Sequence[tuple[Array, Array]], settings: dict[str, Any], interrupted: bool
    ) -> Result:
        first, rest = (np.stack(role) for role in zip(*factors, strict=True))
        q, depth, lr, decay = (settings[name] for name in ("q", "depth", "lr", "weight_decay"))
        with np.errstate(all="ignore"):
            x = first * _integer_powers(rest, depth - 1)
            balance = np.abs(rest) ** q[..., None] - np.abs(first) ** q[..., None]
            balance[:, depth == 1] = np.nan
            kept = np.abs(1 - lr * decay) ** (q * steps.reshape(-1, *(1,) * q.ndim))
            loss = self.problem.value(x)
            distance = None if self.problem.truth is None else ((x - self.problem.truth) ** 2).sum(-1)
        return Result(
            steps=steps,
            x=x[-1],
            first=first[-1],
            rest=rest[-1],
            trajectory=x,
            loss=loss,
            distance=distance,
            balance=balance,
            predicted_balance=settings["scale"] ** q * kept,
            diverged=np.asarray(~np.isfinite(first[-1] + rest[-1]).all(-1)),
            settings=settings,
            interrupted=interrupted,
        )


def _integer_powers(rest: Array, exponents: Array) -> Array:
    """rest^exponent of [records, *batch, n], as the runs form it: the same bits wherever a number lies in memory."""
    result = np.empty_like(rest)
    for exponent in np.unique(exponents):
        of_these = exponents == exponent
        result[:, of_these] = integer_power(torch.from_numpy(rest[:, of_these]), int(exponent)).numpy()
    return result


def _train(runs: _Runs, at: Array, progress: bool) -> tuple[list[tuple[Array, Array]], bool]:
    """The factors at the steps `at`, and whether Ctrl-C ended the runs before the last."""
    # Of a first look at the clock.
    recorded, done, piece = [], 0, max(1, int(2e7 / (len(runs.first) * runs.problem.k * runs.problem.n)))
    with tqdm(total=int(at[-1]), unit="step", disable=not progress) as bar:
        try:
            for step in map(int, at):
                while done < step:
                    taken, begun = min(piece, step - done), time.perf_counter()
                    runs.advance(done, done + taken)
                    done += taken
                    bar.update(taken)
                    piece = max(1, int(taken * min(4.0, SECONDS / (time.perf_counter() - begun))))
                recorded.append(runs.factors())
        except KeyboardInterrupt:
            return recorded or [runs.factors()], True
    return recorded, False
