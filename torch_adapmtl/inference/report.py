"""What accelerate() chose, and why."""

from __future__ import annotations

from dataclasses import dataclass

from torch_adapmtl._tables import html_table, text_table

__all__ = ["AccelerationReport", "LayerChoice"]


@dataclass(frozen=True)
class LayerChoice:
    """What was chosen for one layer.

    Attributes:
        name: The layer's name in the model that was given.
        kind: Its class.
        weights: Number of its weights.
        nonzeros: Number of those that are not zero.
        positions: How often each weight was used on the example inputs.
        dense_seconds: What the layer took dense.
        sparse_seconds: What it took with kernels that skip zeros; None if that was not tried.
        choice: `"sparse"` or `"dense"`.
    """

    name: str
    kind: str
    weights: int
    nonzeros: int
    positions: int
    dense_seconds: float
    sparse_seconds: float | None
    choice: str

    @property
    def sparsity(self) -> float:
        """Zeros as a fraction of the weights."""
        return 1 - self.nonzeros / self.weights if self.weights else 0.0

    @property
    def macs(self) -> int:
        """Multiply-adds with weights that are not zero, on the example inputs."""
        return self.nonzeros * self.positions


@dataclass(frozen=True)
class AccelerationReport:
    """What [accelerate][torch_adapmtl.accelerate] chose; printed, it is a table.

    All times are the shortest of several runs on the example inputs, in seconds; of one run if all
    choices were given.

    Attributes:
        layers: The layers, in the order of the model.
        original_seconds: What the model took as it was given.
        dense_seconds: What it took with its batch norms folded, and no layer sparse.
        accelerated_seconds: What it takes accelerated.
        threads: The number of threads that torch had.

    Example:
        >>> row = LayerChoice("body", "Linear", 100, 10, 196, 0.002, 0.001, "sparse")
        >>> report = AccelerationReport((row,), 0.004, 0.003, 0.002, 1)
        >>> row.sparsity, row.macs, report.speedup
        (0.9, 1960, 2.0)
    """

    layers: tuple[LayerChoice, ...]
    original_seconds: float
    dense_seconds: float
    accelerated_seconds: float
    threads: int

    @property
    def speedup(self) -> float:
        """How many times as fast as the model that was given."""
        return self.original_seconds / self.accelerated_seconds

    def __str__(self) -> str:
        return "\n".join([*text_table(self._rows(), left=2), self.summary])

    def _repr_html_(self) -> str:
        return html_table(self._rows(), left=2, caption=self.summary)

    @property
    def summary(self) -> str:
        """The last line of the table: the model as a whole."""
        weights = sum(row.weights for row in self.layers)
        macs = sum(row.weights * row.positions for row in self.layers)
        zeros = 1 - sum(row.nonzeros for row in self.layers) / weights if weights else 0.0
        left = sum(row.macs for row in self.layers) / macs if macs else 1.0
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"{100 * zeros:.1f} % of the weights are zero, {100 * left:.1f} % of the multiply-adds "
            f"are left; {threads}: {_ms(self.original_seconds)} ms as given, "
            f"{_ms(self.dense_seconds)} ms fused, {_ms(self.accelerated_seconds)} ms accelerated, "
            f"{self.speedup:.2f} times as fast"
        )

    def _rows(self) -> list[list[str]]:
        rows = [["layer", "kind", "zeros", "multiply-adds", "dense ms", "sparse ms", "choice"]]
        for row in self.layers:
            sparse = "" if row.sparse_seconds is None else _ms(row.sparse_seconds)
            rows.append(
                [
                    row.name,
                    row.kind,
                    f"{100 * row.sparsity:.1f} %",
                    f"{row.macs:,}",
                    _ms(row.dense_seconds),
                    sparse,
                    row.choice,
                ]
            )
        return rows


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.2f}"
