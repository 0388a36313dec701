"""A file of an operator's products, from which an interrupted run of Lanczos' method goes on."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

MAGIC = b"pysteep Hessian-vector products 1 "
DIGEST = 16

Array = np.ndarray[Any, np.dtype[Any]]


class ProductFile:
    """The operator `product` with a file of all that it has given: another run with the same vectors reads them from there.

    A record is a checksum of the vector, the product in the operator's dtype, and a checksum of both. A last record that was
    cut off in the middle is computed anew.

    Args:
        path: a file that this class has written, or none.
        fingerprint: what the operator is made of.
        loss: of the data, which the fingerprint does not cover, up to rounding `rtol`.
        product: H v of a v.
        n: its dimension.
        dtype: of its results.

    Raises:
        ValueError: the file is of something else; it is left as it is.
    """

    def __init__(
        self,
        path: Path,
        fingerprint: str,
        loss: float,
        product: Callable[[Array], Array],
        n: int,
        dtype: np.dtype[Any],
        *,
        rtol: float,
    ) -> None:
        self._path, self._product, self._dtype, self._size = path, product, dtype, n * dtype.itemsize
        self._file = path.open("r+b" if path.exists() else "w+b")
        try:
            self._begin(fingerprint, loss, rtol)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> ProductFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def _begin(self, fingerprint: str, loss: float, rtol: float) -> None:
        line = self._file.readline(1 << 12)
        if not line.endswith(b"\n") and MAGIC.startswith(line[: len(MAGIC)]):
            self._file.seek(0)
            self._file.truncate()
            self._file.write(MAGIC + json.dumps({"fingerprint": fingerprint, "loss": loss}).encode() + b"\n")
            self._file.flush()
        elif not line.startswith(MAGIC):
            raise ValueError(f"resume must be a file of hessian_spectrum or a new one; {self._path} is something else")
        else:
            head = json.loads(line[len(MAGIC) :])
            if head["fingerprint"] != fingerprint:
                raise ValueError(f"resume must be a file of the same arguments and parameters; {self._path} is of others")
            if not math.isclose(head["loss"], loss, rel_tol=rtol):
                raise ValueError(
                    f"resume must be a file of the same data and loss_fn; {self._path} is of a loss of {head['loss']:.9g}, not "
                    f"{loss:.9g}"
                )
        self._reading = True

    def __call__(self, vector: Array) -> Array:
        digest = _digest(np.ascontiguousarray(vector).tobytes())
        recorded = self._read(digest) if self._reading else None
        if recorded is not None:
            return recorded
        self._reading = False
        result = self._product(vector)
        payload = digest + np.asarray(result, self._dtype).tobytes()
        self._file.write(payload + _digest(payload))
        self._file.flush()
        return result

    def _read(self, digest: bytes) -> Array | None:
        """The next record; None at the file's end or at a torn one, which is written anew."""
        begin = self._file.tell()
        payload, check = self._file.read(DIGEST + self._size), self._file.read(DIGEST)
        if check != _digest(payload):
            self._file.seek(begin)
            return None
        if payload[:DIGEST] != digest:
            raise ValueError(
                f"resume must be a file of this machine's NumPy and number of threads; the products in {self._path} are of "
                "other vectors: finish it where it was begun, or take another path"
            )
        return np.frombuffer(payload, self._dtype, offset=DIGEST)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST).digest()
