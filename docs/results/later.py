"""The lines of later.jsonl and settled.jsonl.

The first has leads that no study names, and the paper's mode by its start; the second, schedules
that differ in when zeros settle.

python docs/results/later.py 0     # those of seed 0 that are not there yet
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from torch_adapmtl import _density
from torch_adapmtl.layers.sampling import positions, take
from torch_adapmtl.methods import Magnitude, Taylor
from torch_adapmtl.methods.magnitude import MagnitudeMasks
from torch_adapmtl.methods._masks import Masked, lowest
from examples.benchmark import find_problem, read, run, runs
from examples.benchmark.runs import machine
from examples.benchmark.studies import end_line
from torch_adapmtl.budget.solver import SparsitySchedule
from torch_adapmtl.allocation.lamp import LAMPAllocation
from torch_adapmtl.methods.paper import PaperMode
from torch_adapmtl.pruner import AdapMTL
from torch_adapmtl.allocation.sensitivity import Sensitivity, SensitivityAllocation

OUT = Path(__file__).with_name("later.jsonl")
WHEN = Path(__file__).with_name("settled.jsonl")
PROBLEMS = ("rooms3", "digits", "words")

Patch = Callable[[], AbstractContextManager[Any]]


def decay(value: float) -> Patch:
    """Another weight decay of the prunable weights."""

    def optimizer(
        problem: Any, model: nn.Module, pruner: AdapMTL, threshold_lr: float
    ) -> torch.optim.Optimizer:
        own = {id(layer.weight) for layer in pruner._layers}
        parameters = list(model.parameters())
        return torch.optim.Adam(
            [
                {"params": [p for p in parameters if id(p) in own], "weight_decay": value},
                {"params": [p for p in parameters if id(p) not in own]},
            ],
            lr=problem.lr,
            weight_decay=problem.weight_decay,
        )

    return lambda: patch.object(runs, "_optimizer", optimizer)


def batch_norm_anew() -> AbstractContextManager[Any]:
    """BatchNorm's statistics taken anew at the end, from 100 batches of the training set."""
    evaluate = runs.evaluate

    def anew(model: nn.Module, problem: Any, test: Any, autocast: Any) -> Any:
        train, _ = runs._data(problem.load, "cpu")
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.reset_running_stats()
                module.momentum = None
        model.train()
        with torch.no_grad():
            for _, (inputs, _) in zip(
                range(100), train.shuffled(problem.batch, 12345), strict=False
            ):
                model(inputs)
        return evaluate(model, problem, test, autocast)

    return patch.object(runs, "evaluate", anew)


def higher_floors() -> AbstractContextManager[Any]:
    """Layers keep three tenths of the average density, not one."""
    return patch.object(_density, "_LAYER_FLOOR", 0.3)


@contextmanager
def floors() -> Iterator[None]:
    """A baseline's masks with the floors that AdapMTL has."""

    def choose(self: Masked, zeros: int) -> list[Tensor]:
        scores = [score.clone() for score in self.scores()]
        none = [0] * len(scores)
        bounds = _density.DensityBounds(self.layers, none, self.target, None, None)
        for score, most in zip(scores, bounds._layer_max, strict=True):
            score[score.topk(score.numel() - most).indices] = torch.inf
        return lowest(scores, zeros)

    with patch.object(Masked, "choose", choose), patch.object(MagnitudeMasks, "choose", choose):
        yield


@contextmanager
def by_task() -> Iterator[None]:
    """The saliency of each task normalised before they are added (DiSparse's idea)."""
    gradients: list[list[Tensor | None]] = []
    weighted = AdapMTL.loss

    def loss(self: AdapMTL, losses: Mapping[str, Tensor]) -> Tensor:
        allocator = self.budget.allocator
        if isinstance(allocator, Sensitivity) and allocator._hooks._listening and self.training:
            weights = [layer.weight for layer in allocator.layers]
            gradients.clear()
            for task in losses.values():
                found = torch.autograd.grad(task, weights, retain_graph=True, allow_unused=True)
                gradients.append([_sampled(g, allocator._total) for g in found])
        return weighted(self, losses)

    def collect(self: Sensitivity, sample: Any, thresholds: Tensor) -> Tensor:
        self._gradients = {}
        found = torch.zeros_like(self.saliency)
        alpha = thresholds[sample.layer]
        band = (sample.values > alpha) & (sample.values <= 2 * alpha)
        for own in gradients:
            gradient = torch.zeros_like(sample.values)
            for part, values in zip(gradient.split(sample.lengths), own, strict=True):
                if values is not None:
                    part.copy_(values.flatten())
            saliency = (sample.values * gradient).square().masked_fill(~band, 0.0)
            if saliency.sum() > 0:
                found[0].index_add_(0, sample.layer, saliency / saliency.sum() * band.sum())
        if gradients:
            found[1].index_add_(0, sample.layer, band.to(found.dtype))
        gradients.clear()
        return torch.where(found.isfinite().all(), found, 0.0)

    with patch.object(AdapMTL, "loss", loss), patch.object(Sensitivity, "_collect", collect):
        yield


def _sampled(gradient: Tensor | None, total: int) -> Tensor | None:
    if gradient is None:
        return None
    return take(gradient, positions(gradient.numel(), total, gradient.device)).clone()


# The default of then.
EARLIER = SparsitySchedule(settled=0.7, regrow_until=0.7)


def _lamp(strength: float, schedule: SparsitySchedule = EARLIER) -> dict[str, Any]:
    allocation = LAMPAllocation(strength=strength)
    return {"weighting": "stability", "allocation": allocation, "schedule": schedule}


LATE = SparsitySchedule(end=0.7)
SENSITIVITY = {**_lamp(0.75), "allocation": SensitivityAllocation(bound=0.35)}
STRENGTHS: Sequence[tuple[str, dict[str, Any], Patch]] = [
    (f"LAMP {strength:g}, firm 1.1{said}", _lamp(strength), nullcontext)
    for strength, said in ((0.5, ""), (0.75, " (the defaults then)"), (1.0, ""))
]
SETTLED: Sequence[tuple[str, dict[str, Any], Patch]] = [
    *(
        (
            f"LAMP 0.75, settled at {100 * at:g} %",
            _lamp(0.75, SparsitySchedule(settled=at, regrow_until=at)),
            nullcontext,
        )
        for at in (0.8, 0.9, 1.0)
    ),
    ("the defaults", _lamp(0.75, SparsitySchedule()), nullcontext),
]
LEADS: Sequence[tuple[str, dict[str, Any] | None, Patch]] = [
    ("dense", None, nullcontext),
    ("global magnitude", {"mode": Magnitude()}, nullcontext),
    ("global magnitude, AdapMTL's floors", {"mode": Magnitude()}, floors),
    ("Taylor", {"mode": Taylor()}, nullcontext),
    ("Taylor, AdapMTL's floors", {"mode": Taylor()}, floors),
    ("Taylor, pruned by 70 %", {"mode": Taylor(schedule=LATE)}, nullcontext),
    ("Taylor, stability weighting", {"mode": Taylor(), "weighting": "stability"}, nullcontext),
    ("Taylor, ten times the decay of prunable weights", {"mode": Taylor()}, decay(1e-3)),
    *STRENGTHS,
    ("LAMP 0.75, prunable weights without decay", _lamp(0.75), decay(0.0)),
    ("LAMP 0.75, ten times the decay of prunable weights", _lamp(0.75), decay(1e-3)),
    ("LAMP 0.75, BatchNorm estimated anew", _lamp(0.75), batch_norm_anew),
    ("LAMP 0.75, floors of 0.3", _lamp(0.75), higher_floors),
    ("sensitivity (0.35), firm 1.1", SENSITIVITY, nullcontext),
    ("sensitivity (0.35) of each task, firm 1.1", SENSITIVITY, by_task),
]
MOBILENET = [lead for lead in LEADS if lead[0] in ("dense", "Taylor") or lead in STRENGTHS]
SETTLED_ON = (("teachers", 0.97), ("rooms3", 0.97), ("digits", 0.97), ("digits", 0.9))
STARTED = ("rooms3", "rooms5", "digits", "words", "teachers")
STARTS = [
    *(PaperMode(start=start) for start in (-3.5, -3.25, -3.0, -2.75, -2.5)),
    *(PaperMode(start=-8.0, weight_decay=decay) for decay in (1e-3, 1e-2, 1e-1, 1.0)),
    *(PaperMode(start=-6.0, weight_decay=decay) for decay in (1e-3, 1e-2, 1e-1, 1.0)),
    *(PaperMode(start=-5.0, weight_decay=decay) for decay in (1e-1, 1.0)),
    *(PaperMode(start=-4.0, weight_decay=decay) for decay in (1e-1, 1.0)),
]


def main(seed: int) -> None:
    """Add the lines of a seed."""
    problems = dict.fromkeys(PROBLEMS, LEADS) | {"rooms3 mobilenet": MOBILENET}
    for problem, leads in problems.items():
        for name, options, patched in leads:
            if problem == "words" and patched is batch_norm_anew:
                continue  # it has none
            with patched():
                add(problem, name, options, 0.97, seed)
    for problem in STARTED:
        starts(problem, seed)
    settles(seed)


def starts(problem: str, seed: int) -> None:
    """Add the lines of the paper's mode with each pair of start and decay."""
    add(problem, "dense", None, 0.97, seed)
    for mode in STARTS:
        add(problem, named(mode), {"mode": mode, "weighting": "stability"}, 0.9, seed)


def settles(seed: int) -> None:
    """Add the lines of the schedules that differ in when zeros settle."""
    for problem, sparsity in SETTLED_ON:
        for name, options, _ in (LEADS[0], STRENGTHS[1], *SETTLED):
            add(problem, name, options, sparsity, seed, WHEN)


def named(mode: PaperMode) -> str:
    """What the lines of a pair are called."""
    return f"paper mode, start {mode.start:g}, decay {mode.weight_decay:g}"


def add(
    problem: str,
    name: str,
    options: dict[str, Any] | None,
    sparsity: float,
    seed: int,
    out: Path = OUT,
) -> None:
    """Add the line of a run that is not there yet."""
    if options is None:
        sparsity = 0.0
    lines = [line for line in read(out) if options is not None or line["machine"] == machine("cpu")]
    key = ("problem", "method", "sparsity", "seed")
    if (problem, name, sparsity, seed) in {tuple(line[part] for part in key) for line in lines}:
        return
    torch.set_num_threads(1)
    method = "dense" if options is None else "AdapMTL"
    line = run(find_problem(problem), method, sparsity, seed, options=options)
    end_line(out)
    with out.open("a") as file:
        file.write(json.dumps({**line, "method": name}) + "\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
