"""The choice of what runs sparse, by measuring."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ._copy_model import call_once, writes_to_inputs
from ._fuse import link
from ._fused_layer import FusedLayer
from ._measure import MOST, Candidate, measure
from ._windows import SparseConv2d
from .report import AccelerationReport, LayerChoice

FEWEST_ZEROS = 0.4  # a layer with a smaller share of zeros is not tried
GAIN = 0.95  # a layer is sparse if that takes at most so much of the dense time
WORTH = 0.9  # and so is a model: where caches are cold, the kernels lose more than torch


def checked(choices: Mapping[str, str], layers: Iterable[FusedLayer]) -> dict[str, str]:
    """The choices that the user forces, if they are choices for these layers."""
    names = {layer.name for layer in layers}
    for name, choice in choices.items():
        if name not in names:
            raise ValueError(
                f"choices names {name!r}, which is no convolution or linear layer of the model: "
                f"the names are {', '.join(sorted(names)) or 'none'}"
            )
        if choice not in ("sparse", "dense"):
            raise ValueError(f'choices[{name!r}] must be "sparse" or "dense", found {choice!r}')
    return dict(choices)


def choose(
    plain: nn.Module,
    module: nn.Module,
    layers: list[FusedLayer],
    tried: list[FusedLayer],
    forced: dict[str, str],
    args: Any,
    kwargs: Any,
    repeats: bool,
) -> tuple[nn.Module, AccelerationReport]:
    """Measure, and keep what is fastest."""
    fresh = None if repeats else copy.deepcopy((plain, module))  # as no call has left them

    def apply(choices: Mapping[str, str]) -> None:
        for layer in layers:
            layer.choice = choices.get(layer.name, "dense")
        link(module)

    call = (
        call_once
        if writes_to_inputs(plain, args, kwargs)
        else lambda part, *_: part(*args, **kwargs)
    )

    def run() -> None:
        call(module, args, kwargs)

    chosen = {layer.name: forced.get(layer.name, "sparse") for layer in tried}
    apply(chosen)
    _calibrate(module, run)
    dense = Candidate(run, lambda: apply({}))
    sparse_seconds: dict[str, float] = {}
    measured = [layer for layer in tried if layer.name not in forced]
    changed = bool(measured)
    for _ in range(3):  # a layer that becomes dense changes what its neighbours read
        if not changed:
            break
        sparse = Candidate(run, lambda: apply(chosen))
        measure([dense, sparse], layers)
        sparse_seconds |= {name: sparse.layers[name] for name in chosen if chosen[name] == "sparse"}
        changed = False
        for layer in measured:
            name = layer.name
            if chosen[name] == "sparse" and sparse_seconds[name] > GAIN * dense.layers[name]:
                chosen[name], changed = "dense", True
    original = Candidate(lambda: call(plain, args, kwargs), lambda: None)
    sparse = Candidate(run, lambda: apply(chosen))
    least = Candidate(run, lambda: apply(forced)) if measured and forced else dense
    rounds = MOST if measured or not forced else 1  # nothing is decided by the times
    measure(list(dict.fromkeys([original, dense, least, sparse])), layers, rounds)
    for name in chosen:
        if chosen[name] == "sparse":
            sparse_seconds.setdefault(name, sparse.layers[name])
    fastest, as_given = sparse.total, False
    if measured and least.total < sparse.total:
        chosen, fastest = dict(forced), least.total
    if not forced and WORTH * original.total < fastest:
        as_given, chosen, fastest = True, {}, original.total
    apply(chosen)
    rows = [
        LayerChoice(
            layer.name,
            layer.kind,
            layer.weights,
            layer.nonzeros,
            layer.positions,
            dense.layers[layer.name],
            sparse_seconds.get(layer.name),
            layer.choice,
        )
        for layer in layers
    ]
    if fresh is not None:
        plain, module = fresh
        own = [part for part in module.modules() if isinstance(part, FusedLayer)]
        for part, layer in zip(own, layers, strict=True):
            part.choice, part.is_read = layer.choice, layer.is_read
        layers = own
    for layer in layers:
        layer.settle()
    best = plain if as_given else module
    report = AccelerationReport(
        tuple(rows), original.total, dense.total, fastest, torch.get_num_threads()
    )
    return best, report


def _calibrate(module: nn.Module, run: Any) -> None:
    """Let the layers agree on the zeros around their maps."""
    convolutions = [part for part in module.modules() if isinstance(part, SparseConv2d)]
    for part in convolutions:
        part.calibrating = True
    for _ in range(3):
        run()
    for part in convolutions:
        part.calibrating = False
