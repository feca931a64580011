"""How long a model and its layers take, several candidates in turn."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from ._call import clock
from ._fused_layer import FusedLayer
from ._program import Program

SECONDS = 3.0  # that one comparison may take, once each candidate has run `FEWEST` times
FEWEST, MOST = 5, 15


class Candidate:
    """A way to run a model, and the shortest times that it took.

    Args:
        run: Runs the model, or its program.
        prepare: Makes the model run this way.
        program: What the model does then, if it can be repeated: its layers are measured.

    Attributes:
        total: Seconds for the model.
        layers: Seconds for each layer, by its name.
    """

    def __init__(
        self, run: Callable[[], Any], prepare: Callable[[], None], program: Program | None = None
    ) -> None:
        self.program = program
        self.total = float("inf")
        self.layers: dict[str, float] = {}
        self._run, self._prepare = run, prepare

    def once(self, layers: Sequence[FusedLayer]) -> None:
        """Run it, and note the times."""
        if self.program is None:
            self._prepare()
            for layer in layers:
                layer.seconds = []
            total = _seconds(self._run)
            seconds = {layer.name: sum(layer.seconds or []) for layer in layers}
            for layer in layers:
                layer.seconds = None
        else:
            total, seconds = _seconds(self._run), self.program.seconds()
        self.total = min(self.total, total)
        for layer in layers:
            taken = seconds.get(layer.name, 0.0)
            self.layers[layer.name] = min(self.layers.get(layer.name, taken), taken)


def _seconds(run: Callable[[], Any]) -> float:
    begin = clock()
    run()
    return clock() - begin


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
