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
from ._program import flat, record
from ._repeatable import is_repeatable
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

    writes = writes_to_inputs(plain, args, kwargs)

    def call(part: nn.Module) -> Any:
        return call_once(part, args, kwargs) if writes else part(*args, **kwargs)

    programs = repeats and not writes and is_repeatable(module)

    def candidate(choices: Mapping[str, str]) -> Candidate:
        apply(choices)
        call(module)  # the layers plan
        program = record(module, *flat(args, kwargs)) if programs else None
        if program is None:
            return Candidate(lambda: call(module), lambda: apply(choices))
        return Candidate(lambda: program(flat(args, kwargs)[0]), lambda: None, program)

    chosen = {layer.name: forced.get(layer.name, "sparse") for layer in tried}
    apply(chosen)
    _calibrate(module, lambda: call(module))
    original, dense = Candidate(lambda: call(plain), lambda: None), candidate({})
    Candidate(lambda: call(module), lambda: apply({})).once(layers)  # notes positions
    measured = [layer for layer in tried if layer.name not in forced]
    tries = [(dict(chosen), candidate(chosen))]
    sparse_seconds: dict[str, float] = {}
    for _ in range(3 if measured else 0):  # a dense layer changes what its neighbours read
        _, sparse = tries[-1]
        measure([dense, sparse], layers)
        sparse_seconds |= {name: sparse.layers[name] for name in chosen if chosen[name] == "sparse"}
        slower = [
            layer.name
            for layer in measured
            if chosen[layer.name] == "sparse"
            and sparse_seconds[layer.name] > GAIN * dense.layers[layer.name]
        ]
        if not slower:
            break
        chosen |= dict.fromkeys(slower, "dense")
        tries.append((dict(chosen), candidate(chosen)))
    if measured:
        tries.append((forced, candidate(forced)) if forced else ({}, dense))
    rounds = MOST if measured or not forced else 1  # nothing is decided by the times
    measure(list(dict.fromkeys([original, dense, *(part for _, part in tries)])), layers, rounds)
    chosen, best = min(tries, key=lambda item: item[1].total)
    for name, choice in chosen.items():
        if choice == "sparse":
            sparse_seconds.setdefault(name, best.layers[name])
    as_given = not forced and WORTH * original.total < best.total
    if as_given:
        chosen, best = {}, original
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
    report = AccelerationReport(
        tuple(rows), original.total, dense.total, best.total, torch.get_num_threads()
    )
    return plain if as_given else module, report


def _calibrate(module: nn.Module, run: Any) -> None:
    """Let the layers agree on the zeros around their maps."""
    convolutions = [part for part in module.modules() if isinstance(part, SparseConv2d)]
    for part in convolutions:
        part.calibrating = True
    for _ in range(3):
        run()
    for part in convolutions:
        part.calibrating = False
