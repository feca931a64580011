"""A problem on text: how English words are pronounced."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from examples.benchmark.data import Samples
from examples.benchmark.problem import Problem
from torch_adapmtl.datasets import Words
from torch_adapmtl.tasks import Classification

__all__ = ["WordModel", "words"]


class WordModel(nn.Module):
    """A small transformer over letters, with a two-layer head for each task.

    Args:
        classes: The number of classes of each task.
        width: Width of the transformer.
        layers: Number of its layers.
        length: Most letters in a word.
    """

    def __init__(
        self, classes: Mapping[str, int], *, width: int = 96, layers: int = 2, length: int = 16
    ) -> None:
        super().__init__()
        self.letters = nn.Embedding(28, width, padding_idx=0)
        self.places = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.heads = nn.ModuleDict(
            {
                task: nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, count))
                for task, count in classes.items()
            }
        )

    def forward(self, letters: Tensor) -> dict[str, Tensor]:
        """Take letters `(B, L)`, 0 where there is none; return logits by task."""
        empty = letters == 0
        x = self.letters(letters) + self.places
        x = self.norm(self.encoder(x, src_key_padding_mask=empty))
        x = x.masked_fill(empty[..., None], 0.0)
        last = x[torch.arange(len(x), device=x.device), (~empty).sum(1) - 1]
        pooled = torch.cat([x.sum(1) / (~empty).sum(1, keepdim=True), last], dim=1)
        return {task: head(pooled) for task, head in self.heads.items()}


def words() -> Problem:
    """Three classifications of words, for a small transformer."""

    def load() -> tuple[Samples, Samples]:
        train, test = Words("train"), Words("test")
        return Samples(*train.tensors()), Samples(*test.tensors())

    classes = {"syllables": 6, "stress": 6, "last": 39}
    return Problem(
        "words",
        load,
        lambda: WordModel(classes),
        lambda: {task: Classification(count) for task, count in classes.items()},
        steps=500,
        batch=64,
        lr=1e-3,
    )
