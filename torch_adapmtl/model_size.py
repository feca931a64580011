"""The size of a model: weights, multiply-adds, files and time, dense and sparse."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torch_adapmtl._tables import details, html_table, text_table
from torch_adapmtl.components import Components, find_components
from torch_adapmtl.components._outputs import OutputError
from torch_adapmtl.components._unwrap import unwrap
from torch_adapmtl.inference import AccelerationReport, accelerate
from torch_adapmtl.run import Report
from torch_adapmtl.run.report import total_macs
from torch_adapmtl.run.zeros import used_weights, zeros_in
from torch_adapmtl.storage import SparseFile, save_sparse
from torch_adapmtl.storage.save import plain_tensors

__all__ = ["LayerSize", "ModelSize", "size"]

OTHER = "other"  # what is in no component: biases, norms, buffers


@dataclass(frozen=True)
class LayerSize:
    """The size of one tensor, or of several.

    Attributes:
        name: The tensor's name in the model, or that of the component.
        component: The component: `shared`, a task, tasks joined by `+`; `other` for what is not
            prunable; `model` if components are not known.
        weights: Number of its elements.
        nonzeros: Number of those that are not zero.
        dense_bytes: Bytes in memory, and in a file of `torch.save`.
        bytes: Bytes in a file of [save_sparse][torch_adapmtl.save_sparse].
        macs: Multiply-adds of all its weights for one example; None if they are not known.
        macs_left: Multiply-adds of those that are not zero.
        dense_ms: Milliseconds that the layer takes dense; None if they were not measured.
        accelerated_ms: Milliseconds that it takes in the accelerated model.
    """

    name: str
    component: str
    weights: int
    nonzeros: int
    dense_bytes: int
    bytes: int
    macs: float | None = None
    macs_left: float | None = None
    dense_ms: float | None = None
    accelerated_ms: float | None = None


@dataclass(frozen=True)
class ModelSize:
    """What a model takes dense, and what its zeros save.

    It prints as a table of the whole and one of the components; in a notebook it also shows the
    tensors. [size][torch_adapmtl.size] makes it.

    Attributes:
        parameters: Number of parameters, biases and normalisation layers included.
        zeros: Number of those that are exactly zero.
        files: Bytes of files, by format: of `torch.save`, of `save_sparse`, and of `save_sparse`
            with values in fewer bits, if that was asked for.
        layers: The tensors of the model.
        latency: Milliseconds of the model as it is, with its batch norms folded, and accelerated,
            on the example inputs; empty if they were not measured.
        threads: Number of threads that they were measured with.
    """

    parameters: int
    zeros: int
    files: Mapping[str, int]
    layers: tuple[LayerSize, ...]
    latency: Mapping[str, float] = field(default_factory=dict)
    threads: int = 1

    @property
    def sparsity(self) -> float:
        """Fraction of *all* parameters that are zero (not only of the prunable weights)."""
        return self.zeros / self.parameters if self.parameters else 0.0

    @property
    def macs(self) -> float | None:
        """Multiply-adds of the prunable weights for one example; None if they are not known."""
        return total_macs(row.macs for row in self.layers if row.component != OTHER)

    @property
    def macs_left(self) -> float | None:
        """Multiply-adds of those that are not zero, for one example; None if they are not known."""
        return total_macs(row.macs_left for row in self.layers if row.component != OTHER)

    @property
    def components(self) -> tuple[LayerSize, ...]:
        """The sums over the tensors of each component."""
        names = dict.fromkeys(row.component for row in self.layers)
        order = [*(n for n in names if n != OTHER), *(n for n in names if n == OTHER)]
        return tuple(
            _sum(name, [row for row in self.layers if row.component == name]) for name in order
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures as dicts, lists, strings and numbers, which JSON can hold."""
        return {
            "parameters": self.parameters,
            "zeros": self.zeros,
            "sparsity": self.sparsity,
            "macs": self.macs,
            "macs_left": self.macs_left,
            "files": dict(self.files),
            "latency": dict(self.latency),
            "threads": self.threads,
            "components": [asdict(row) for row in self.components],
            "layers": [asdict(row) for row in self.layers],
        }

    def model_card(self, file: str = "model.safetensors") -> str:
        """Return a section of a model card in Markdown: the tables, and how to load the file.

        Args:
            file: The name of the file of `save_sparse` that is shipped.

        Example:
            >>> print(size(torch.nn.Linear(100, 100)).model_card().splitlines()[0])
            ## Size and speed
        """
        lines = ["## Size and speed", ""]
        lines += [f"{100 * self.sparsity:.2f} % of the parameters are zero.", ""]
        lines += [*_markdown(self._whole()), "", *_markdown(self._by_component()), ""]
        lines += ["Load it into the model's class, and run it faster on a CPU:", "", "```python"]
        lines += ["from torch_adapmtl import accelerate, load_sparse", ""]
        lines += [
            f'model = load_sparse("{file}", model)',
            "fast = accelerate(model, example_inputs)",
        ]
        return "\n".join([*lines, "```", ""])

    def __str__(self) -> str:
        head = f"{self.parameters:,} parameters, {100 * self.sparsity:.2f} % zero"
        parts = self._by_component()
        return "\n".join([head, *text_table(self._whole(), left=1), "", *text_table(parts, left=1)])

    def _repr_html_(self) -> str:
        caption = f"{self.parameters:,} parameters, {100 * self.sparsity:.2f} % zero"
        rows = [_titles("tensor", self.layers), *(_cells(row, self.layers) for row in self.layers)]
        return (
            f"<div>{html_table(self._whole(), left=1, caption=caption)}"
            f"{html_table(self._by_component(), left=1)}"
            f"{details(f'{len(self.layers)} tensors', html_table(rows, left=1))}</div>"
        )

    def _whole(self) -> list[list[str]]:
        rows = [["", "dense", "sparse", "ratio"]]

        def add(name: str, dense: float, sparse: float, form: str, scale: float = 1) -> None:
            ratio = f"{dense / sparse:.1f}" if sparse else ""
            rows.append([name, f"{dense / scale:{form}}", f"{sparse / scale:{form}}", ratio])

        add("nonzero parameters", self.parameters, self.parameters - self.zeros, ",.0f")
        if self.macs is not None and self.macs_left is not None:
            add("MACs of prunable weights, M", self.macs, self.macs_left, ",.2f", 1e6)
        (_, dense), *others = self.files.items()
        for name, count in others:
            title = f"file, MB ({name.removeprefix('save_sparse, ')})"
            add(title if "," in name else "file, MB", dense, count, ",.3f", 1e6)
        if self.latency:
            threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
            before, after = self.latency["as it is"], self.latency["accelerated"]
            add(f"time, ms ({threads})", before, after, ",.2f")
        return rows

    def _by_component(self) -> list[list[str]]:
        components = self.components
        rows = [_titles("component", components), *(_cells(row, components) for row in components)]
        header = self.files["save_sparse"] - sum(row.bytes for row in components)
        last = ["" if title != "bytes" else f"{header:,}" for title in rows[0]]
        return [*rows, ["(header)", *last[1:]]]


@torch.no_grad()
def size(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    components: Components | Report | None = None,
    dtypes: torch.dtype | Iterable[torch.dtype] = (),
    latency: bool = False,
) -> ModelSize:
    """Measure what a model takes dense, and what its zeros save.

    Files are written to a temporary folder and looked at; nothing is estimated. Of a model under
    parametrizations or pruning masks, the weights count that its forward pass uses, as
    [save_sparse][torch_adapmtl.save_sparse] writes them. Tied parameters count once.

    Args:
        model: Any model: in training, finalised or loaded from a file. It is not changed.
        example_inputs: What the model is called with: a tensor, a tuple of positional arguments or
            a dict of keyword arguments. They show the components and the multiply-adds, as
            [find_components][torch_adapmtl.find_components] finds them. A model that returns one
            tensor is one component, `model`. If none can be found, there is a warning, and the
            rest is measured. Only multiply-adds of prunable weights are counted: not those of
            recurrent layers, or of attention between activations.
        components: The components instead, if they were found otherwise: a result of
            `find_components`, or of `Pruner.report`, which also know the multiply-adds.
        dtypes: A type, or types, of fewer bits to write files in, too; as for `save_sparse`.
        latency: Whether to measure the time, dense and accelerated. It takes the time of
            [accelerate][torch_adapmtl.accelerate], needs `example_inputs`, and the extra `fast`.

    Raises:
        TypeError: If the model holds tensors that files cannot hold.
        ValueError: If `latency` is true without `example_inputs`, or the components are those of
            another model.

    Example:
        >>> layer = torch.nn.Linear(500, 500, bias=False)
        >>> _ = torch.nn.init.eye_(layer.weight)
        >>> print(size(layer, torch.zeros(1, 500)))
        250,000 parameters, 99.80 % zero
                                   dense  sparse   ratio
        nonzero parameters       250,000     500   500.0
        MACs of prunable weights, M     0.25    0.00   500.0
        file, MB                   1.00...
        <BLANKLINE>
        component  nonzero  of dense  MACs left  bytes  of dense
        model          500    0.20 %     0.20 %  ...
    """
    if latency and example_inputs is None:
        raise ValueError("latency=True needs example_inputs, found None: pass what the model takes")
    model, dtypes = unwrap(model), [dtypes] if isinstance(dtypes, torch.dtype) else dtypes
    tensors = plain_tensors(model)
    known = _known(model, example_inputs, components)
    if missing := known.keys() - tensors.keys():
        if components is not None:
            raise ValueError(
                f"components has {min(missing)!r}, which the model has not: pass those of this "
                "model"
            )
        _warn(f"{min(missing)!r} is computed from other parameters")
    times = accelerate(model, example_inputs).report() if latency else None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        torch.save({name: _compact(x) for name, x in tensors.items()}, path)
        files = {"torch.save": path.stat().st_size}
        stored = save_sparse(model, path)
        files["save_sparse"] = stored.size
        for dtype in dtypes:
            name = str(dtype).removeprefix("torch.")
            files[f"save_sparse, {name}"] = save_sparse(model, path, dtype=dtype).size
    used = list(used_weights(model))
    return ModelSize(
        sum(x.numel() for x in used),
        sum(map(zeros_in, used)),
        files,
        _layers(stored, tensors, known, times),
        {}
        if times is None
        else {
            "as it is": 1e3 * times.original_seconds,
            "folded": 1e3 * times.dense_seconds,
            "accelerated": 1e3 * times.accelerated_seconds,
        },
        torch.get_num_threads(),
    )


def _compact(x: torch.Tensor) -> torch.Tensor:
    """A tensor of its own if it is a small part of a storage, which `torch.save` writes whole."""
    return x if x.untyped_storage().nbytes() <= x.nbytes else x.clone()


def _known(
    model: nn.Module, example_inputs: Any, components: Components | Report | None
) -> dict[str, tuple[str, float | None]]:
    """The component of each tensor that has one, and the positions of its weights."""
    if isinstance(components, Report):
        return {row.name: (row.component, row.positions) for row in components.layers}
    if components is None and example_inputs is not None:
        try:
            components = _found(model, example_inputs)
        except ValueError as error:
            _warn(error)
    if components is None:
        return {}
    return {x.name: (x.component, x.positions) for x in components.tensors}


def _warn(why: object) -> None:
    warnings.warn(f"not all components and multiply-adds are known: {why}", stacklevel=4)


def _found(model: nn.Module, example_inputs: Any) -> Components:
    try:
        return find_components(model, example_inputs)
    except OutputError:
        return find_components(model, example_inputs, groups={"model": ["*"]})


def _layers(
    stored: SparseFile,
    tensors: Mapping[str, torch.Tensor],
    known: Mapping[str, tuple[str, float | None]],
    times: AccelerationReport | None,
) -> tuple[LayerSize, ...]:
    measured = {} if times is None else {row.name: row for row in times.layers}
    rows = []
    for x in stored.tensors:
        component, positions = known.get(x.name, (OTHER if known else "model", None))
        left = x.elements - zeros_in(tensors[x.name])
        row = measured.get(x.name.rpartition(".")[0]) if x.name in known else None
        chosen = None
        if row is not None:
            chosen = row.sparse_seconds if row.choice == "sparse" else row.dense_seconds
        rows.append(
            LayerSize(
                x.name,
                component,
                x.elements,
                left,
                x.dense_size,
                x.size,
                None if positions is None else positions * x.elements,
                None if positions is None else positions * left,
                None if row is None else 1e3 * row.dense_seconds,
                None if chosen is None else 1e3 * chosen,
            )
        )
    return tuple(rows)


def _sum(name: str, rows: Sequence[LayerSize]) -> LayerSize:
    def total(values: Iterable[float | None]) -> float | None:
        some = [value for value in values if value is not None]
        return sum(some) if some else None

    return LayerSize(
        name,
        name,
        sum(row.weights for row in rows),
        sum(row.nonzeros for row in rows),
        sum(row.dense_bytes for row in rows),
        sum(row.bytes for row in rows),
        total_macs(row.macs for row in rows),
        total_macs(row.macs_left for row in rows),
        total(row.dense_ms for row in rows),
        total(row.accelerated_ms for row in rows),
    )


def _titles(first: str, rows: Sequence[LayerSize]) -> list[str]:
    has_macs, has_times = _columns(rows)
    macs, times = ["MACs left"] * has_macs, ["dense ms", "sparse ms"] * has_times
    return [first, "nonzero", "of dense", *macs, "bytes", "of dense", *times]


def _cells(row: LayerSize, rows: Sequence[LayerSize]) -> list[str]:
    has_macs, has_times = _columns(rows)
    macs = [_share(row.macs_left, row.macs)] * has_macs
    times = [_ms(row.dense_ms), _ms(row.accelerated_ms)] * has_times
    weights = [f"{row.nonzeros:,}", _share(row.nonzeros, row.weights)]
    return [row.name, *weights, *macs, f"{row.bytes:,}", _share(row.bytes, row.dense_bytes), *times]


def _columns(rows: Sequence[LayerSize]) -> tuple[bool, bool]:
    """Whether multiply-adds and times are known."""
    return (
        any(row.macs is not None for row in rows),
        any(row.dense_ms is not None for row in rows),
    )


def _share(part: float | None, whole: float | None) -> str:
    return f"{100 * part / whole:.2f} %" if part is not None and whole else ""


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = [f"| {' | '.join(x.replace('|', chr(92) + '|') for x in row)} |" for row in rows]
    return [head, "|" + " --- |" + " ---: |" * (len(rows[0]) - 1), *body]
