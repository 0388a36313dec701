"""What fine-tuning changed between two checkpoints: sign flips, and the balance of queries and keys [App. H, Table 3]."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import nan, prod
from os import PathLike, fspath
from typing import NamedTuple

import numpy as np
import torch

from ._checkpoint_files import FLOATS, Array, Checkpoint, Stored, open_checkpoint
from ._pairs import Pair, Part, attention_pairs, fused_without_pair, whole
from ._sign_flips import Tally, tally

PIECE = 1 << 23  # numbers that a thread takes at a time


@dataclass(frozen=True)
class CheckpointComparison:
    r"""What `compare_checkpoints` found; `str()` and `print` give it as a table.

    With Q and K the matrices of a layer's queries and keys, of shape [heads * head size, width] each,

    .. math::
        \Delta_{L_q} = \big| \|Q_{after}\|_q^q - \|K_{after}\|_q^q \big| - \big| \|Q_{before}\|_q^q - \|K_{before}\|_q^q \big|

    is below 0 where the layer came closer to balance.

    Attributes:
        before, after: the paths.
        layers: names, such as "model.layers.0.self_attn"; empty if no pair was found.
        delta_l1, delta_l2: [layers], Delta for q = 1 and 2, of sums in float64.
        query_flips, key_flips: [layers], how many weights changed between positive and negative; 0 and NaN have no sign.
        query_weights, key_weights: [layers], of how many.
        flips, weights: the same of all compared tensors together.
        tensors: how many were compared.
        non_finite: infinities and NaN, (before, after), of each tensor that has any.
        skipped: names of what was not compared, and why.
        unpaired: names of compared tensors with a query and a key inside, of which the places are not known.
    """

    before: str
    after: str
    layers: tuple[str, ...]
    delta_l1: Array
    delta_l2: Array
    query_flips: Array
    key_flips: Array
    query_weights: Array
    key_weights: Array
    flips: int
    weights: int
    tensors: int
    non_finite: dict[str, tuple[int, int]]
    skipped: dict[str, str]
    unpaired: tuple[str, ...]

    @property
    def query_percent(self) -> float:
        """Sign flips in the queries of all layers, in % of their weights. Like all below, NaN without layers."""
        return _percent(self.query_flips.sum(), self.query_weights.sum())

    @property
    def key_percent(self) -> float:
        """Sign flips in the keys of all layers, in % of their weights."""
        return _percent(self.key_flips.sum(), self.key_weights.sum())

    @property
    def total_percent(self) -> float:
        """Sign flips in all compared tensors, in % of their weights."""
        return _percent(self.flips, self.weights)

    @property
    def mean_delta_l1(self) -> float:
        """Mean of `delta_l1` over the layers."""
        return _mean(self.delta_l1)

    @property
    def mean_delta_l2(self) -> float:
        """Mean of `delta_l2` over the layers."""
        return _mean(self.delta_l2)

    @property
    def below_zero_l1(self) -> float:
        """Layers with `delta_l1` < 0, in %."""
        return _percent((self.delta_l1 < 0).sum(), len(self.layers))

    @property
    def below_zero_l2(self) -> float:
        """Layers with `delta_l2` < 0, in %."""
        return _percent((self.delta_l2 < 0).sum(), len(self.layers))

    def __str__(self) -> str:
        lines = [
            f"before   {self.before}",
            f"after    {self.after}",
            f"weights  {self.weights:,} in {self.tensors} tensors, {len(self.layers)} attention layers",
            "",
            f"{'Q (%)':>8}{'K (%)':>8}{'total (%)':>11}{'mean Δ_L1':>14}{'< 0 (%)':>9}{'mean Δ_L2':>14}{'< 0 (%)':>9}",
        ]
        if self.layers:
            lines.append(
                f"{self.query_percent:8.2f}{self.key_percent:8.2f}{self.total_percent:11.2f}{self.mean_delta_l1:14.6g}"
                f"{self.below_zero_l1:9.3g}{self.mean_delta_l2:14.6g}{self.below_zero_l2:9.3g}"
            )
        else:
            lines.append(f"{'-':>8}{'-':>8}{self.total_percent:11.2f}{'-':>14}{'-':>9}{'-':>14}{'-':>9}")
            lines += ["", "no query and key matrices are known by their names: pass pairs"]
        notes = {
            "not finite": [f"{name}: {b:,} before, {a:,} after" for name, (b, a) in self.non_finite.items()],
            "not compared": [f"{name}: {reason}" for name, reason in self.skipped.items()],
            "no pair: the order of queries and keys inside is not known": self.unpaired,
        }
        for heading, names in notes.items():
            if names:
                lines += ["", heading, *(f"  {name}" for name in names)]
        return "\n".join(lines)


def compare_checkpoints(
    before: str | PathLike[str],
    after: str | PathLike[str],
    pairs: str | Sequence[tuple[str, str]] = "auto",
    *,
    pickled: bool = False,
    progress: bool = True,
) -> CheckpointComparison:
    """Sign flips between two checkpoints of a model, and whether its queries and keys came closer to balance.

    Files are read once, in pieces, by torch.get_num_threads() threads: models may be larger than memory. Tensors are compared
    by name in the dtypes they are stored in; where these differ, in one that holds both.

    Args:
        before: a .safetensors file, the .json index of a checkpoint in shards, or a folder with one of them.
        after: the same, of the model as it was fine-tuned.
        pairs: (name of a query matrix, name of its key matrix) for each layer; "auto" goes by the names that Llama, GPT-2,
            BERT and their like use. Grouped queries, with a smaller key matrix, are fine.
        pickled: also read .bin, .pt, .pth and .ckpt files of tensors by name, by torch.load(weights_only=True), which runs
            nothing of what is in them. Files of the format that torch wrote before 1.6 are held in memory whole.
        progress: whether to show a bar.

    Returns:
        What was found. Tensors that only one checkpoint has, of two shapes, or of other dtypes than float16, bfloat16, float32
        and float64, without numbers (on the meta device) and expanded from fewer numbers are left out and listed there.

    Raises:
        FileNotFoundError, ValueError: no checkpoint is there, or it is damaged or pickled; no weight could be compared; a pair
            names no matrix of both checkpoints.

    Source: Appendix H and Table 3 of "Never Saddle for Reparameterized Steepest Descent as Mirror Flow" (ICLR 2026).
    """
    old, new = (open_checkpoint(name, path, pickled=pickled) for name, path in (("before", before), ("after", after)))
    skipped = _skipped(old, new)
    shared = {name: (stored, new.tensors[name]) for name, stored in old.tensors.items() if name not in skipped}
    shapes = {name: stored.shape for name, (stored, _) in shared.items()}
    if not any(map(prod, shapes.values())):
        allowed = "before and after must share weights of one name and shape"
        if both := [name for name in (*old.tensors, *old.others) if name in new.tensors or name in new.others]:
            reasons = ", ".join(f"{name}: {skipped.get(name, 'no numbers')}" for name in both[:2])
            dtypes = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS.values())
            raise ValueError(f"{allowed} in {dtypes}; none of the {len(both)} in both is compared: {reasons}")
        first, second = (", ".join([*found.tensors, *found.others][:2]) or "nothing" for found in (old, new))
        raise ValueError(f"{allowed}; they begin with {first} and {second}")
    chosen = attention_pairs(shapes) if pairs == "auto" else _checked(pairs, shapes, skipped)
    parts = {part for pair in chosen for part in (pair.query, pair.key)}
    pieces = [piece for name, shape in shapes.items() for piece in _pieces(name, shape, parts)]
    of_part = dict.fromkeys(parts, Tally())
    flips, non_finite = 0, dict[str, tuple[int, int]]()
    for piece, measured in zip(pieces, _measure_all(pieces, shared, progress), strict=True):
        for part, found in measured:
            flips += found.flips
            if part is not None:
                of_part[part] = of_part[part].plus(found)
            if found.non_finite_before or found.non_finite_after:
                b, a = non_finite.get(piece.name, (0, 0))
                non_finite[piece.name] = b + found.non_finite_before, a + found.non_finite_after
    queries, keys = [of_part[pair.query] for pair in chosen], [of_part[pair.key] for pair in chosen]
    deltas = np.array([_deltas(query, key) for query, key in zip(queries, keys, strict=True)]).reshape(-1, 2)
    return CheckpointComparison(
        before=fspath(before),
        after=fspath(after),
        layers=tuple(pair.layer for pair in chosen),
        delta_l1=deltas[:, 0],
        delta_l2=deltas[:, 1],
        query_flips=np.array([q.flips for q in queries], np.int64),
        key_flips=np.array([k.flips for k in keys], np.int64),
        query_weights=np.array([_size(pair.query, shapes) for pair in chosen], np.int64),
        key_weights=np.array([_size(pair.key, shapes) for pair in chosen], np.int64),
        flips=flips,
        weights=sum(map(prod, shapes.values())),
        tensors=len(shapes),
        non_finite=non_finite,
        skipped=skipped,
        unpaired=tuple(fused_without_pair(shapes)) if pairs == "auto" else (),
    )


# ---- what to compare ---------------------------------------------------------------------------------------------------------


def _skipped(before: Checkpoint, after: Checkpoint) -> dict[str, str]:
    """Why tensors by these names are not compared."""
    reasons = {}
    for name in dict.fromkeys([*before.tensors, *before.others, *after.tensors, *after.others]):
        first, second = before.tensors.get(name), after.tensors.get(name)
        others = [checkpoint.others[name] for checkpoint in (before, after) if name in checkpoint.others]
        if others:
            reasons[name] = " and ".join(dict.fromkeys(others))
        elif first is None or second is None:
            reasons[name] = "only in after" if first is None else "only in before"
        elif first.shape != second.shape:
            reasons[name] = f"shape {list(first.shape)} before, {list(second.shape)} after"
    return reasons


def _checked(pairs: str | Sequence[tuple[str, str]], shapes: dict[str, tuple[int, ...]], skipped: dict[str, str]) -> list[Pair]:
    """The pairs that were asked for."""
    if isinstance(pairs, str):
        raise ValueError(f'pairs must be "auto" or (query, key) tuples of names; got {pairs!r}')
    result = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"pairs must be (query, key) tuples of names; got {pair!r}")
        for name in pair:
            if name not in shapes:
                raise ValueError(f"pairs must name tensors of both checkpoints; {name!r} is {skipped.get(name, 'in neither')}")
            if len(shapes[name]) < 2:
                raise ValueError(f"pairs must name matrices; {name!r} has shape {list(shapes[name])}")
        query, key = pair
        layer = query.removesuffix(".weight").rpartition(".")[0] or query
        result.append(Pair(layer, whole(query, shapes[query]), whole(key, shapes[key])))
    return result


def _size(part: Part, shapes: dict[str, tuple[int, ...]]) -> int:
    shape = shapes[part.name]
    return (part.end - part.begin) * prod(shape) // max(1, shape[part.dim])


# ---- comparing ---------------------------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Numbers `begin` to `end` of a tensor: rows of `period` numbers, of which each part has some columns."""

    name: str
    begin: int
    end: int
    period: int
    columns: tuple[tuple[int, int, Part | None], ...]


def _pieces(name: str, shape: tuple[int, ...], parts: set[Part]) -> list[Piece]:
    """A tensor in pieces for the threads. A part along the first dimension lies in one stretch and so has pieces of its own."""
    own = sorted(part for part in parts if part.name == name)
    dim = own[0].dim if own else 0
    length, inner = (shape or (1,))[dim], prod(shape[dim + 1 :])
    cuts: list[tuple[int, int, Part | None]] = []
    done = 0
    for part in own:
        cuts += [(done * inner, part.begin * inner, None), (part.begin * inner, part.end * inner, part)]
        done = part.end
    cuts.append((done * inner, length * inner, None))
    if dim > 0:
        stretches = [(0, prod(shape), length * inner, tuple(cuts))]
    else:
        stretches = [(begin, end, 1, ((0, 1, part),)) for begin, end, part in cuts]
    return [
        Piece(name, at, min(at + step, end), period, columns)
        for begin, end, period, columns in stretches
        for step in [max(1, PIECE // period) * period]
        for at in range(begin, end, step)
    ]


def _measure_all(
    pieces: list[Piece], shared: dict[str, tuple[Stored, Stored]], progress: bool
) -> list[list[tuple[Part | None, Tally]]]:
    """For each piece in turn, whatever the number of threads, what is in its parts and outside of them."""
    from tqdm import tqdm

    results: list[list[tuple[Part | None, Tally]]] = []
    sizes = [sum(stored.dtype.itemsize for stored in shared[piece.name]) * (piece.end - piece.begin) for piece in pieces]
    with (
        tqdm(total=sum(sizes), unit="B", unit_scale=True, disable=not progress) as bar,
        ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="pysteep") as threads,
    ):
        try:
            measured = threads.map(lambda piece: _measure(piece, *shared[piece.name]), pieces)
            for size, found in zip(sizes, measured, strict=True):
                results.append(found)
                bar.update(size)
        except BaseException:  # Ctrl-C above all: no thread begins another piece
            threads.shutdown(wait=False, cancel_futures=True)
            raise
    return results


def _measure(piece: Piece, before: Stored, after: Stored) -> list[tuple[Part | None, Tally]]:
    dtype = torch.promote_types(before.dtype, after.dtype)
    first, second = (
        _widened(stored.read(piece.begin, piece.end), stored.dtype, dtype).reshape(-1, piece.period)
        for stored in (before, after)
    )
    return [
        (part, tally(first[:, low:high].reshape(-1), second[:, low:high].reshape(-1), dtype, norms=part is not None))
        for low, high, part in piece.columns
    ]


def _widened(numbers: Array, dtype: torch.dtype, wider: torch.dtype) -> Array:
    """The same numbers in a dtype that holds all of `dtype`."""
    if dtype == wider:
        return numbers
    unsigned = getattr(torch, f"uint{8 * wider.itemsize}")
    return torch.from_numpy(numbers.copy()).view(dtype).to(wider).view(unsigned).numpy()


def _deltas(query: Tally, key: Tally) -> tuple[float, float]:
    """Delta for q = 1 and 2."""
    return (
        abs(query.l1_after - key.l1_after) - abs(query.l1_before - key.l1_before),
        abs(query.l2_after - key.l2_after) - abs(query.l2_before - key.l2_before),
    )


def _mean(values: Array) -> float:
    with np.errstate(invalid="ignore"):  # of infinities of both signs, NaN
        return float(values.mean()) if len(values) else nan


def _percent(count: int, of: int) -> float:
    return 100 * float(count) / float(of) if of else nan
