"""Many runs, each a line of JSON: what is there already is not run again."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from torch_adapmtl.benchmark.methods import (
    BASELINES,
    DENSE,
    OURS,
    SETTINGS,
    UNAIMED,
    VARIANTS,
)
from torch_adapmtl.benchmark.paper_scale import ENCODERS
from torch_adapmtl.benchmark.problem import Problem
from torch_adapmtl.benchmark.problems import COMPARISON, OTHERS, PROBLEMS, find_problem
from torch_adapmtl.benchmark.runs import run, settings

__all__ = ["STUDIES", "read", "study"]

Key = tuple[str, str, float, int]

Call = tuple[str, str, float, int, int | None, str, bool]

_SETTINGS = (
    *("problem", "method", "sparsity", "seed", "options", "steps", "batch", "lr"),
    *("weight_decay", "threshold_lr", "device", "bf16"),
)

_SPARSITIES = (0.9, 0.97, 0.8, 0.95)  # those that matter most first
_PAIRS = tuple(name for name in PROBLEMS if name.startswith("rooms: "))
_PARTS = (
    OURS,
    "AdapMTL, common threshold",
    "AdapMTL, equal weights",
    "AdapMTL, common threshold, equal weights",
)

#: The studies of the results page: problems, methods and sparsities, and the file of lines.
STUDIES: Mapping[str, Mapping[str, Any]] = {
    "comparison": {
        "problems": COMPARISON,
        "methods": (DENSE, *BASELINES, OURS),
        "sparsities": _SPARSITIES,
        "out": "docs/results/comparison.jsonl",
    },
    "others": {
        "problems": OTHERS,
        "methods": (DENSE, "global magnitude", "IMP", "Taylor", OURS, "AdapMTL, equal weights"),
        "sparsities": (0.9, 0.97),
        "out": "docs/results/others.jsonl",
    },
    "variants": {
        "problems": COMPARISON,
        "methods": (DENSE, *VARIANTS),
        "sparsities": (0.9, 0.97),
        "out": "docs/results/comparison.jsonl",
    },
    "settings": {
        "problems": ("rooms3", "words"),
        "methods": (DENSE, OURS, "AdapMTL, strength 0.5", *SETTINGS),
        "sparsities": (0.95,),
        "out": "docs/results/settings.jsonl",
    },
    "ablation": {
        "problems": _PAIRS,
        "methods": (DENSE, *_PARTS),
        "sparsities": (0.95,),
        "out": "docs/results/ablation.jsonl",
    },
    "sensitivities": {
        "problems": ("teachers",),
        "methods": (DENSE, "uniform magnitude", "global magnitude", "Taylor", *VARIANTS),
        "sparsities": (0.9, 0.97),
        "out": "docs/results/sensitivities.jsonl",
    },
    "paper": {
        "problems": [f"paper/{encoder}/rooms" for encoder in ENCODERS],
        "methods": (DENSE, "global magnitude", "DiSparse", "AdapMTL, paper mode", "AdapMTL"),
        "sparsities": (0.9,),
        "out": "docs/results/paper.jsonl",
    },
}


def read(path: str | Path) -> list[dict[str, Any]]:
    """The runs in a file of JSON lines; none if there is no such file.

    A last line that a killed process left unfinished is not among them.

    Example:
        >>> read("no such file")
        []
    """
    file = Path(path)
    lines = file.read_text().split("\n") if file.exists() else []
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline is unfinished


def study(
    *,
    problems: Sequence[str],
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    out: str | Path,
    steps: int | None = None,
    jobs: int = 1,
    device: str = "cpu",
    bf16: bool = False,
) -> None:
    """Run every method at every sparsity and seed on every problem, and add a line for each run.

    Args:
        problems: Names from `PROBLEMS`, or `paper/ENCODER/DATA`.
        methods: Names from `METHODS`; those that no target steers (the dense model, the paper's
            mode) are run at the first sparsity only.
        sparsities: Zeros among the prunable weights, as fractions.
        seeds: Seeds.
        out: The file of lines; runs that are in it with the same settings are left out.
        steps: Optimiser steps, in place of the problem's own.
        jobs: How many runs at a time, each with one thread.
        device: Where to train.
        bf16: Whether the forward pass runs under autocast to bfloat16.
    """
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    _cut_unfinished(path)
    chosen = {name: _shortened(find_problem(name), steps) for name in problems}
    missing = _missing(read(path), list(chosen.values()), methods, sparsities, seeds, device, bf16)
    calls = [(*key, steps, device, bf16) for key in missing]
    with tqdm(total=len(calls), unit="run", smoothing=0.1) as bar:
        for line in _lines(calls, jobs):
            _write(path, line, bar)


def _missing(
    done: Sequence[dict[str, Any]],
    problems: Sequence[Problem],
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    device: str,
    bf16: bool,
) -> Iterable[Key]:
    """The runs that are not done yet, or failed; all methods of one seed before the next seed."""
    known = {_identity(line) for line in done if "failed" not in line}
    for seed in seeds:
        for problem in problems:
            for sparsity in sparsities:
                for method in methods:
                    if method in UNAIMED and sparsity != sparsities[0]:
                        continue
                    wanted = settings(problem, method, sparsity, seed, device=device, bf16=bf16)
                    if _identity(wanted) not in known:
                        yield problem.name, method, sparsity, seed


def _identity(line: dict[str, Any]) -> str:
    """What makes two runs the same: all that `settings` names."""
    return json.dumps([line[name] for name in _SETTINGS], sort_keys=True)


def _shortened(problem: Problem, steps: int | None) -> Problem:
    return problem if steps is None else replace(problem, steps=steps)


def _one(call: Call) -> str:
    """Run a call, and say in its line if it fails: the others are not to wait for it."""
    name, method, sparsity, seed, steps, device, bf16 = call
    problem = _shortened(find_problem(name), steps)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with any number of jobs: threads change the order of sums
    try:
        line = run(problem, method, sparsity, seed, device=device, bf16=bf16)
    except RuntimeError as error:
        known = settings(problem, method, sparsity, seed, device=device, bf16=bf16)
        line = {**known, "failed": str(error)}
    finally:
        torch.set_num_threads(threads)
    return json.dumps(line)


def _lines(calls: Sequence[Call], jobs: int) -> Iterator[str]:
    """The lines of the calls, as they come."""
    if jobs == 1:
        yield from map(_one, calls)
        return
    # Not a Pool: its processes may have none of their own, which read data.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(_one, call) for call in calls]):
                yield done.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Have this process end if its parent is killed, rather than train on for nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _write(path: Path, line: str, bar: Any) -> None:
    with open(path, "a") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    bar.update()


def _cut_unfinished(path: Path) -> None:
    """Take off what a killed process wrote after the last whole line."""
    if path.exists():
        whole = path.read_bytes().rpartition(b"\n")
        if whole[2]:
            path.write_bytes(whole[0] + whole[1])
