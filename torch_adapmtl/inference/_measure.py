"""How long a model and its layers take, several candidates in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ._call import clock
from ._fused_layer import FusedLayer

SECONDS = 3.0  # that one comparison may take, once each candidate has run `FEWEST` times
FEWEST, MOST = 5, 15


class Candidate:
    """A way to run a model, and the shortest times that it took.

    Attributes:
        total: Seconds for the model.
        layers: Seconds for each layer, by its name.
    """

    def __init__(self, run: Callable[[], None], prepare: Callable[[], None]) -> None:
        self.run, self.prepare = run, prepare
        self.total = float("inf")
        self.layers: dict[str, float] = {}

    def once(self, layers: Sequence[FusedLayer]) -> None:
        """Run it, and note the times."""
        self.prepare()
        for layer in layers:
            layer.seconds = []
        begin = clock()
        self.run()
        self.total = min(self.total, clock() - begin)
        for layer in layers:
            seconds = sum(layer.seconds or [])
            self.layers[layer.name] = min(self.layers.get(layer.name, seconds), seconds)
            layer.seconds = None


def measure(
    candidates: Sequence[Candidate], layers: Sequence[FusedLayer], rounds: int = MOST
) -> None:
    """Run the candidates in turn. What other programs do only ever adds to a time."""
    begin = time.perf_counter()
    for i in range(rounds):
        for candidate in candidates:
            candidate.once(layers)
        if i + 1 >= FEWEST and time.perf_counter() - begin > SECONDS:
            break
