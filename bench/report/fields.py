"""Fields of a JSON file, read with the type that each must have: an error names the file, the field and the value."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class ResultsError(ValueError):
    """A file of results that cannot be read."""


@dataclass(frozen=True)
class Fields:
    """One JSON object of `file`; `where` is the way to it, as `benchmarks[3].stats`."""

    file: Path
    where: str
    values: dict[str, Any]

    @classmethod
    def of_file(cls, file: Path) -> Fields:
        """The file's outermost object."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise ResultsError(f"{file}: {error.strerror}") from None
        except ValueError as error:
            raise ResultsError(f"{file}: is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise ResultsError(f"{file}: must hold a JSON object, got {_shown(values)}")
        return cls(file, "", values)

    def path(self, name: str) -> str:
        return f"{self.where}.{name}" if self.where else name

    def wrong(self, name: str, must: str) -> ResultsError:
        got = _shown(self.values[name]) if name in self.values else "nothing"
        return ResultsError(f"{self.file}: {self.path(name)} must be {must}, got {got}")

    def text(self, name: str) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or not value:
            raise self.wrong(name, "a text")
        return value

    def one_of(self, name: str, allowed: tuple[str, ...]) -> str:
        value = self.values.get(name)
        if not isinstance(value, str) or value not in allowed:
            raise self.wrong(name, f"one of {', '.join(map(repr, allowed))}")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name)
        if not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.wrong(name, "a finite number")
        return float(value)

    def positive(self, name: str) -> float:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not (0 < value < math.inf):
            raise self.wrong(name, "a finite number above 0")
        return float(value)

    def whole(self, name: str) -> int:
        value = self.values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.wrong(name, "a whole number from 0 up")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def object(self, name: str) -> Fields:
        value = self.values.get(name)
        if not isinstance(value, dict):
            raise self.wrong(name, "an object")
        return Fields(self.file, self.path(name), value)

    def objects(self, name: str) -> list[Fields]:
        value = self.values.get(name)
        if not isinstance(value, list):
            raise self.wrong(name, "an array of objects")
        for k, one in enumerate(value):
            if not isinstance(one, dict):
                raise ResultsError(f"{self.file}: {self.path(name)}[{k}] must be an object, got {_shown(one)}")
        return [Fields(self.file, f"{self.path(name)}[{k}]", one) for k, one in enumerate(value)]

    def texts(self, name: str) -> tuple[str, ...]:
        value = self.values.get(name)
        if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
            raise self.wrong(name, "an array of texts")
        return tuple(value)


def _shown(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
