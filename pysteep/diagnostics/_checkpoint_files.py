"""Checkpoints on disk: which tensors they hold, and parts of them as they lie in the file."""

from __future__ import annotations

import json
import mmap
from collections.abc import Callable, Mapping
from functools import partial
from math import prod
from os import PathLike
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

Array = np.ndarray[Any, np.dtype[Any]]

FLOATS = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
"""The dtypes that are compared, by their names in safetensors."""

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
NAMES = ("model.safetensors", "model.safetensors.index.json", "*.safetensors.index.json", "*.safetensors")
PICKLED_NAMES = ("pytorch_model.bin", "pytorch_model.bin.index.json", *(f"*{suffix}" for suffix in PICKLED))
"""What a folder is searched for, in this order."""

HINT = "pass pickled=True (--pickled) to read pickled tensors, by torch.load(weights_only=True)"


class Stored(NamedTuple):
    """A tensor of a checkpoint.

    Attributes:
        shape: its sizes.
        dtype: one of FLOATS.
        read: read(begin, end) gives the bits of these of its numbers, one at least, in C order, as unsigned integers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[int, int], Array]


class Checkpoint(NamedTuple):
    """What is stored by name: tensors of FLOATS, and what else there is that is not compared."""

    tensors: dict[str, Stored]
    others: dict[str, str]


def open_checkpoint(argument: str, path: str | PathLike[str], *, pickled: bool) -> Checkpoint:
    """What a checkpoint holds; the numbers stay on the disk until they are read.

    Args:
        argument: what errors call `path`.
        path: a file of tensors, an index of such files, or a folder with either.
        pickled: whether files of PICKLED may be opened, by torch.load(weights_only=True).

    Raises:
        FileNotFoundError, ValueError: there is no checkpoint at `path`, or it is damaged or not allowed.
    """
    file = _file_of(argument, Path(path), pickled)
    if file.suffix != ".json":
        return _read_header(argument, file, pickled)
    shards: dict[str, Checkpoint] = {}
    whole = Checkpoint({}, {})
    for name, shard in _weight_map(argument, file).items():
        if shard not in shards:
            shards[shard] = _read_header(argument, file.parent / shard, pickled)
        tensors, others = shards[shard]
        if name in tensors:
            whole.tensors[name] = tensors[name]
        elif name in others:
            whole.others[name] = others[name]
        else:
            raise ValueError(f"{file.parent / shard} must hold {name}, which {file.name} places there")
    return whole


def _file_of(argument: str, path: Path, pickled: bool) -> Path:
    if not path.is_dir():
        return path
    for pattern in (*NAMES, *(PICKLED_NAMES if pickled else ())):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{argument} must be one checkpoint; {path} holds several, name one of {names}")
        if found:
            return found[0]
    others = [file.name for pattern in PICKLED_NAMES for file in path.glob(pattern)]
    if others:
        raise ValueError(f"{argument} must be safetensors; {path} holds {others[0]}: {HINT}")
    raise FileNotFoundError(f"{argument} must be a folder with a checkpoint; {path} has no file of the kind {', '.join(NAMES)}")


def _weight_map(argument: str, index: Path) -> dict[str, str]:
    if not index.is_file():
        raise FileNotFoundError(f"{argument} must be a checkpoint; there is no file {index}")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_without_repeats)["weight_map"]
        valid = all(isinstance(shard, str) for shard in weight_map.values())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        valid = False
    if not valid:
        raise ValueError(f'{index} must be an index of shards: JSON with {{"weight_map": {{tensor: file}}}}, each name once')
    for shard in dict.fromkeys(weight_map.values()):
        path = PureWindowsPath(shard)  # knows both kinds of slashes, and drives
        if not path.parts or path.anchor or ".." in path.parts or "\0" in shard or path.suffix == ".json":
            raise ValueError(f"{index} must name files of tensors inside its own folder; got {shard[:200]!r}")
    return dict(weight_map)


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("a name twice")
    return result


def _read_header(argument: str, file: Path, pickled: bool) -> Checkpoint:
    if not file.is_file():
        raise FileNotFoundError(f"{argument} must be a checkpoint; there is no file {file}")
    if file.suffix == ".safetensors":
        return _safetensors(file)
    if file.suffix not in PICKLED:
        raise ValueError(f"{argument} must end in .safetensors, .json or, if pickled, {', '.join(PICKLED)}; got {file}")
    if not pickled:
        raise ValueError(f"{argument} must be safetensors; got {file}: {HINT}")
    return _unpickled(file)


def _safetensors(file: Path) -> Checkpoint:
    try:
        with safe_open(file, framework="numpy"):  # checks the header and that every tensor is there in full
            pass
    except SafetensorError as error:
        raise ValueError(f"{file} must be a whole safetensors file; {error}") from error
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        try:
            header = json.loads(opened.read(length), object_pairs_hook=_without_repeats)
        except ValueError as error:
            raise ValueError(f"{file} must be a whole safetensors file; its header has {error}") from error
    result = Checkpoint({}, {})
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if (dtype := FLOATS.get(entry["dtype"])) is None:
            result.others[name] = f"dtype {entry['dtype']}"
        else:
            read = partial(_mapped, file, 8 + length + entry["data_offsets"][0], dtype)
            result.tensors[name] = Stored(tuple(entry["shape"]), dtype, read)
    return result


def _mapped(file: Path, offset: int, dtype: torch.dtype, begin: int, end: int) -> Array:
    """Only this much of the file is mapped: what has been read does not stay in the process."""
    count, first = end - begin, offset + begin * dtype.itemsize
    skipped = first % mmap.ALLOCATIONGRANULARITY
    with file.open("rb", buffering=0) as opened:
        memory = mmap.mmap(opened.fileno(), skipped + count * dtype.itemsize, access=mmap.ACCESS_READ, offset=first - skipped)
    if hasattr(mmap, "MADV_WILLNEED"):  # a disk then reads far ahead of the page faults
        memory.madvise(mmap.MADV_WILLNEED)
    return np.frombuffer(memory, f"u{dtype.itemsize}", count, skipped)


def _unpickled(file: Path) -> Checkpoint:
    with file.open("rb") as opened:
        zipped = opened.read(4) == b"PK\3\4"  # torch's format since 1.6; the older one cannot be mapped, only read whole
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # whatever torch's reader makes of a damaged or foreign file
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{file} must be tensors saved by torch.save; torch.load(weights_only=True) says: {reason}") from error
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{file} must be a state dict, tensors by name; got a {type(loaded).__name__}")
    result = Checkpoint({}, {})
    first_of: dict[tuple[Any, ...], str] = {}
    for key, value in loaded.items():
        if not isinstance(key, (str, int)):
            raise ValueError(f"{file} must be a state dict, tensors by name; got a name that is a {type(key).__name__}")
        name = str(key)
        if (lacks := _not_compared(value)) is not None:
            result.others[name] = lacks
            continue
        place = value.data_ptr(), value.shape, value.stride(), value.is_neg()
        if (first := first_of.setdefault(place, name)) != name and value.numel():
            result.others[name] = f"the same memory as {first}"  # tied, and so counted once as in safetensors
        else:
            result.tensors[name] = Stored(tuple(value.shape), value.dtype, partial(_copied, value.detach()))
    return result


def _not_compared(value: Any) -> str | None:
    """Why a value of a state dict is not compared, None if it is."""
    if not isinstance(value, torch.Tensor):
        return f"no tensor but {type(value).__name__}"
    if value.is_nested:
        return f"nested, {value.dtype}".replace("torch.", "")
    if value.layout != torch.strided or value.dtype not in FLOATS.values():
        return f"{value.layout}, {value.dtype}".replace("torch.", "")
    if value.device.type != "cpu":
        return f"no numbers, on device {value.device}"
    kept = value.untyped_storage().nbytes() // value.dtype.itemsize
    if value.numel() > kept:  # a few bytes may stand for terabytes
        return f"expanded, {kept:,} numbers stand for {value.numel():,}"
    return None


def _copied(tensor: torch.Tensor, begin: int, end: int) -> Array:
    """Only this much of a view is copied, and nothing of what lies in C order already."""
    unsigned = getattr(torch, f"uint{8 * tensor.dtype.itemsize}")
    return _in_order(tensor, begin, end).resolve_neg().view(unsigned).numpy()


def _in_order(tensor: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Numbers `begin` to `end` of a tensor in C order, contiguous."""
    if tensor.is_contiguous():
        return tensor.view(-1)[begin:end]
    if tensor.dim() == 1:
        return tensor[begin:end].contiguous()
    inner = prod(tensor.shape[1:])
    first, last = -(-begin // inner), end // inner  # rows that are wanted whole
    if first > last:
        return _in_order(tensor[last], begin - last * inner, end - last * inner)
    parts = [tensor[first:last].reshape(-1)]
    if begin < first * inner:
        parts.insert(0, _in_order(tensor[first - 1], begin - (first - 1) * inner, inner))
    if end > last * inner:
        parts.append(_in_order(tensor[last], 0, end - last * inner))
    return torch.cat(parts)
