"""The plain way to choose which weights go: sort them all, and prune one after the other."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import torch
from torch import Tensor

from torch_adapmtl.budget.solver import Bounds

_LARGEST = torch.finfo(torch.float32).max


class Limits:
    """Random components of the layers, random bounds, and a number of zeros that they allow.

    Attributes:
        component: For each layer the index of its component.
        layer_max: Most zeros of each layer.
        least: Fewest zeros of each component.
        most: Most zeros of each component.
        zeros: How many weights to prune.
    """

    def __init__(self, rng: random.Random, sizes: Sequence[int], *, bounded: bool = True) -> None:
        kinds = rng.randint(1, min(3, len(sizes)))
        drawn = [*range(kinds), *(rng.randrange(kinds) for _ in range(len(sizes) - kinds))]
        # Components are numbered in the order of their first layer, as in a model.
        rng.shuffle(drawn)
        names = list(dict.fromkeys(drawn))
        self.component = [names.index(c) for c in drawn]
        self.layer_max = [rng.randint(n // 2, n) if bounded else n for n in sizes]
        room = [0] * kinds
        for n, c in zip(self.layer_max, self.component, strict=True):
            room[c] += n
        self.most = [rng.randint(n // 2, n) if bounded else n for n in room]
        self.least = [rng.randint(0, n) if bounded and rng.random() < 0.4 else 0 for n in self.most]
        self.zeros = rng.randint(sum(self.least), sum(self.most))

    @property
    def bounds(self) -> Bounds:
        """The same in tensors."""
        counts = (self.layer_max, self.least, self.most)
        return Bounds(
            torch.tensor(self.component),
            *(torch.tensor(k, dtype=torch.float64) for k in counts),
        )

    def prune(self, scores: Sequence[Tensor]) -> list[list[bool]]:
        """Prune the lowest scores (float32, by layer) that no bound forbids, `zeros` in all.

        Equal ones go in the order of components, layers and places. Negative scores are equal and
        go first; those that are not finite are equal to the largest number.
        """
        gone = [[False] * len(own) for own in scores]
        in_layer, in_component = [0] * len(scores), [0] * len(self.most)
        order = sorted(
            (_place(score), self.component[i], i, j)
            for i, own in enumerate(scores)
            for j, score in enumerate(own.tolist())
        )

        def sweep(limit: Sequence[int], budget: int) -> None:
            left = budget - sum(in_component)
            for _, c, i, j in order:
                if left == 0:
                    return
                open_layer = in_layer[i] < self.layer_max[i]
                if not gone[i][j] and open_layer and in_component[c] < limit[c]:
                    gone[i][j] = True
                    in_layer[i] += 1
                    in_component[c] += 1
                    left -= 1

        sweep(self.least, sum(self.least))  # what each component has to lose in any case
        sweep(self.most, self.zeros)
        return gone


def _place(score: float) -> float:
    if not math.isfinite(score):
        return _LARGEST
    return -1.0 if score < 0 else score
