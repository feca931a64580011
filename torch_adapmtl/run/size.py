"""Figures to judge a pruned model by: relative performance, sparsity and size."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from torch_adapmtl.components._prunable import prunable_by_default

__all__ = ["ModelSize", "RelativePerformance", "relative_performance", "size", "sparsity"]


@dataclass(frozen=True)
class RelativePerformance:
    """Relative performance of a multi-task model; everything in percent, higher is better.

    Attributes:
        delta: Delta_T, the mean of `tasks`.
        tasks: Delta_Tt of each task, the sum of its `metrics`.
        metrics: Change of each metric of each task, its sign turned where lower is better.
    """

    delta: float
    tasks: Mapping[str, float]
    metrics: Mapping[str, Mapping[str, float]]

    def __str__(self) -> str:
        width = max(map(len, [*self.tasks, "overall"]))
        rows = [f"{task:<{width}}  {delta:+8.2f} %" for task, delta in self.tasks.items()]
        return "\n".join([*rows, f"{'overall':<{width}}  {self.delta:+8.2f} %"])


def relative_performance(
    metrics: Mapping[str, Mapping[str, float]],
    baseline: Mapping[str, Mapping[str, float]],
    *,
    lower_is_better: Collection[str | tuple[str, str]],
) -> RelativePerformance:
    r"""Compares a multi-task model with a baseline: Delta_T of AdapMTL (arXiv 2408.03913).

    With \(M_j\) and \(B_j\) the value of metric j of task t for the model and the baseline, and
    \(l_j = 1\) where lower is better, else 0:

    $$\Delta_{T_t} = 100 \sum_j (-1)^{l_j} \frac{M_j - B_j}{|B_j|}, \qquad
    \Delta_T = \frac1T \sum_t \Delta_{T_t}$$

    The metrics of a task are *summed*, so a task with many metrics moves further. The paper
    divides by \(B_j\); its magnitude is the same for the positive metrics there, and keeps
    "better" positive for negative ones.

    Args:
        metrics: The model's metrics, ``{task: {metric: value}}``, in any unit (each its own).
        baseline: The same metrics of the baseline; in the paper the dense multi-task model.
        lower_is_better: The metrics of which less is better: a name, for every task that has
            it, or a pair ``(task, name)``. Pass ``()`` if there are none.

    Returns:
        The figures per metric, per task and overall, in percent.

    Raises:
        ValueError: If tasks or metrics differ, a value is not finite, a baseline is 0, or an
            entry of `lower_is_better` matches nothing.
        TypeError: If an argument is of the wrong kind.

    Example:
        >>> found = relative_performance(
        ...     {"seg": {"miou": 0.42}, "depth": {"abs_err": 0.66}},
        ...     {"seg": {"miou": 0.40}, "depth": {"abs_err": 0.60}},
        ...     lower_is_better=["abs_err"],
        ... )
        >>> print(found)
        seg         +5.00 %
        depth      -10.00 %
        overall     -2.50 %
    """
    if isinstance(lower_is_better, str):
        raise TypeError(
            f"lower_is_better must be a collection of metrics, got the string "
            f"{lower_is_better!r}; pass [{lower_is_better!r}]"
        )
    _check_same("tasks", metrics, baseline)
    known: set[str | tuple[str, str]] = set()
    changes: dict[str, dict[str, float]] = {}
    for task, values in metrics.items():
        _check_same(f"metrics of task {task!r}", values, baseline[task])
        changes[task] = {}
        for name in values:
            known |= {name, (task, name)}
            value = _number(f"metrics[{task!r}][{name!r}]", values[name])
            base = _number(f"baseline[{task!r}][{name!r}]", baseline[task][name])
            if base == 0:
                raise ValueError(
                    f"baseline[{task!r}][{name!r}] is 0, so no change is relative to it; leave "
                    "this metric out of both"
                )
            sign = -1 if name in lower_is_better or (task, name) in lower_is_better else 1
            changes[task][name] = sign * 100 * (value - base) / abs(base)
    if unmatched := [entry for entry in lower_is_better if entry not in known]:
        raise ValueError(
            f"lower_is_better has {unmatched}, which no task has; the metrics are "
            f"{ {task: list(values) for task, values in metrics.items()} }"
        )
    tasks = {task: sum(values.values()) for task, values in changes.items()}
    return RelativePerformance(sum(tasks.values()) / len(tasks), tasks, changes)


def sparsity(model_or_tensors: nn.Module | Tensor | Iterable[Tensor]) -> float:
    """Returns the fraction of weights that are exactly zero, in [0, 1].

    Of a model, the weights are those that are prunable by default: the weights (not the biases)
    of convolutions, transposed convolutions and linear layers, and the projections of
    `torch.nn.MultiheadAttention`; tied weights count once, and a weight under a parametrization
    or a pruning mask counts as what the forward pass uses. Parts that no task needs and frozen
    ones, which `AdapMTL.sparsity` leaves out, are included.

    Args:
        model_or_tensors: A model, a tensor, or any number of tensors (each counted once).

    Raises:
        ValueError: If there is no weight to count.
        TypeError: If something else than tensors is given.

    Example:
        >>> sparsity(torch.tensor([0.0, 1.0, 0.0, 2.0]))
        0.5
    """
    if isinstance(model_or_tensors, nn.Module):
        tensors = list(_weights(model_or_tensors, _is_prunable))
    elif isinstance(model_or_tensors, Tensor):
        tensors = [model_or_tensors]
    else:
        tensors = []
        given: Iterable[object] = model_or_tensors
        for tensor in {id(tensor): tensor for tensor in given}.values():
            if not isinstance(tensor, Tensor):
                raise TypeError(
                    f"model_or_tensors must be a model, a tensor or tensors, got {tensor!r} among "
                    "them; of a state dict pass .values()"
                )
            tensors.append(tensor)
    count = sum(tensor.numel() for tensor in tensors)
    if count == 0:
        raise ValueError(
            "there is no weight to count: model_or_tensors has no convolution, linear or "
            "attention weights, or no tensors with elements"
        )
    return sum(map(_zeros, tensors)) / count


@dataclass(frozen=True)
class ModelSize:
    """Size of a model's parameters, dense and with the zeros left out.

    For a tensor of n elements of b bytes each, of which v are not zero:

    - dense: ``n * b``;
    - as bitmap and values: ``ceil(n / 8) + v * b``;
    - as CSR with 4-byte indices, the first dimension as rows (one row for vectors and
      scalars): ``v * b + 4 * v + 4 * (rows + 1)``.

    In both sparse formats a tensor that would not get smaller stays dense.

    Attributes:
        parameters: Number of parameters, biases and normalisation layers included.
        zeros: Number of those that are exactly zero.
        dense_bytes: Bytes of all parameters, dense.
        bitmap_bytes: Bytes as bitmap and values.
        csr_bytes: Bytes as CSR.
    """

    parameters: int
    zeros: int
    dense_bytes: int
    bitmap_bytes: int
    csr_bytes: int

    @property
    def sparsity(self) -> float:
        """Fraction of *all* parameters that are zero (not only of the prunable weights)."""
        return self.zeros / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {100 * self.sparsity:.2f} % zero: "
            f"{_megabytes(self.dense_bytes)} dense, {_megabytes(self.bitmap_bytes)} as bitmap "
            f"and values, {_megabytes(self.csr_bytes)} as CSR"
        )


def size(model: nn.Module) -> ModelSize:
    """Measures a model's parameters, dense and as they could be stored without their zeros.

    Tied parameters count once; buffers do not count. Meant for plain models: under a
    parametrization or a pruning mask a weight counts as what the forward pass uses, and
    parameters of the parametrization itself, such as thresholds, count too.

    Example:
        >>> layer = torch.nn.Linear(500, 500, bias=False)
        >>> _ = torch.nn.init.eye_(layer.weight)
        >>> print(size(layer))
        250,000 parameters, 99.80 % zero:
        1.000 MB dense, 0.033 MB as bitmap and values, 0.006 MB as CSR
    """
    parameters = zeros = dense = bitmap = csr = 0
    for tensor in _weights(model):
        count, empty, item = tensor.numel(), _zeros(tensor), tensor.element_size()
        rows = tensor.shape[0] if tensor.ndim > 1 else 1
        values = (count - empty) * item
        parameters += count
        zeros += empty
        dense += count * item
        bitmap += min(count * item, -(-count // 8) + values)
        csr += min(count * item, values + 4 * (count - empty) + 4 * (rows + 1))
    return ModelSize(parameters, zeros, dense, bitmap, csr)


def _is_prunable(module: nn.Module, name: str) -> bool:
    return name in prunable_by_default(module)


def _weights(
    model: nn.Module, chosen: Callable[[nn.Module, str], bool] = lambda module, name: True
) -> Iterator[Tensor]:
    """Every parameter that is chosen by a module holding it, once, as the forward pass uses it."""
    seen: set[int] = set()
    for module in model.modules():
        sources = {name: [p] for name, p in module._parameters.items() if p is not None}
        if isinstance(module, parametrize.ParametrizationList):
            # its originals are what the parametrized module stands for
            sources = {n: p for n, p in sources.items() if not n.startswith("original")}
        if parametrize.is_parametrized(module):
            chains: Any = module.parametrizations
            for name, chain in chains.items():
                sources[name] = [
                    p for n, p in chain._parameters.items() if n.startswith("original")
                ]
        for name, parameters in sources.items():
            plain = name.removesuffix("_orig")
            mask = module._buffers.get(f"{plain}_mask") if plain != name else None
            if mask is None:
                plain = name
            if seen.issuperset(map(id, parameters)) or not chosen(module, plain):
                continue
            seen.update(map(id, parameters))
            with torch.no_grad():
                tensor = getattr(module, name)
                if mask is not None:  # the plain attribute is stale until the next forward
                    tensor = tensor * mask
            yield tensor


def _zeros(tensor: Tensor) -> int:
    return tensor.numel() - int(torch.count_nonzero(tensor.detach()))


def _check_same(what: str, metrics: Mapping[str, Any], baseline: Mapping[str, Any]) -> None:
    for name, given in (("metrics", metrics), ("baseline", baseline)):
        if not isinstance(given, Mapping):
            raise TypeError(
                f"{name} must be a mapping {{task: {{metric: value}}}}; for the {what} it holds "
                f"{given!r}"
            )
    missing = [name for name in baseline if name not in metrics]
    extra = [name for name in metrics if name not in baseline]
    if missing or extra:
        raise ValueError(
            f"{what} differ: metrics lacks {missing}, baseline lacks {extra}; compare the same "
            "ones, or leave them out of both"
        )
    if not metrics:
        raise ValueError(f"there are no {what} to compare")


def _number(name: str, value: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{name} must be a number, got {value!r}") from None
    if not isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")
    return number


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.3f} MB"
