"""Pairs of sentences that say the same or not: made here from a small grammar, or read from the files of MRPC."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Pair:
    """`same`: whether the two say the same."""

    first: str
    second: str
    same: bool


SYNONYMS = [
    *(("big", "large"), ("small", "little"), ("quick", "fast"), ("old", "ancient"), ("happy", "glad"), ("angry", "furious")),
    *(("doctor", "physician"), ("thief", "robber"), ("child", "kid"), ("lawyer", "attorney"), ("dog", "hound")),
    *(("teacher", "tutor"), ("guest", "visitor"), ("soldier", "fighter"), ("king", "ruler"), ("farmer", "grower")),
    *(("noticed", "spotted"), ("helped", "aided"), ("chased", "pursued"), ("met", "encountered"), ("liked", "enjoyed")),
    *(("in the house", "inside the home"), ("near the road", "beside the street"), ("in the wood", "inside the forest")),
]
ADJECTIVES, NOUNS, VERBS, PLACES = SYNONYMS[:6], SYNONYMS[6:16], SYNONYMS[16:21], SYNONYMS[21:]
Meaning = tuple[int, int, int, int, int, int]


def _meaning(draw: random.Random) -> Meaning:
    """Subject's adjective and noun, verb, object's adjective and noun, place."""
    subject, thing = draw.sample(range(len(NOUNS)), 2)
    adjectives = draw.randrange(len(ADJECTIVES)), draw.randrange(len(ADJECTIVES))
    return adjectives[0], subject, draw.randrange(len(VERBS)), adjectives[1], thing, draw.randrange(len(PLACES))


def _sentence(meaning: Meaning, draw: random.Random) -> str:
    """The meaning, in words of either choice."""
    kinds = (ADJECTIVES, NOUNS, VERBS, ADJECTIVES, NOUNS, PLACES)
    return "the {} {} {} the {} {} {}".format(*(draw.choice(kind[i]) for kind, i in zip(kinds, meaning, strict=True)))


def _changed(meaning: Meaning, changes: int, draw: random.Random) -> Meaning:
    """With `changes` of its six parts different."""
    new = list(meaning)
    for i in draw.sample(range(6), changes):
        while new[i] == meaning[i] or new[1] == new[4]:
            new[i] = _meaning(draw)[i]
    return (*new,)


def made(count: int, seed: int, changes: int = 2) -> list[Pair]:
    """`count` pairs: half say the same, and in the other half `changes` parts of six differ: adjectives, nouns, verb, place."""
    draw = random.Random(seed)
    pairs = []
    for i in range(count):
        same, meaning = i % 2 == 0, _meaning(draw)
        other = meaning if same else _changed(meaning, changes, draw)
        pairs.append(Pair(_sentence(meaning, draw), _sentence(other, draw), same))
    draw.shuffle(pairs)
    return pairs


def words() -> list[str]:
    """All words that `made` uses."""
    return sorted({word for pair in SYNONYMS for words in pair for word in words.split()} | {"the"})


def mrpc(folder: Path) -> tuple[list[Pair], list[Pair]]:
    """Training and validation pairs of train.tsv and dev.tsv (GLUE), or of msr_paraphrase_train.txt and _test.txt.

    Raises:
        SystemExit: `folder` has neither.
    """
    for names in (("train.tsv", "dev.tsv"), ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")):
        files = [folder / name for name in names]
        if all(file.is_file() for file in files):
            train, validation = (_read(file) for file in files)
            return train, validation
    raise SystemExit(f"--data must be a folder with MRPC's train.tsv and dev.tsv, or its msr_paraphrase files; got {folder}")


def _read(file: Path) -> list[Pair]:
    with file.open(encoding="utf-8-sig", newline="") as text:
        rows = csv.DictReader(text, delimiter="\t", quoting=csv.QUOTE_NONE)
        return [Pair(row["#1 String"], row["#2 String"], row["Quality"] == "1") for row in rows]
