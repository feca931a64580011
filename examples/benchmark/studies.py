"""Studies: many runs, each a line of JSON; a run that is in the file is not repeated."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from examples.benchmark.lines import append, mend, read
from examples.benchmark.methods import (
    BASELINES,
    DENSE,
    FIRM,
    METHODS,
    OURS,
    PAIRS,
    PUBLISHED,
    STABLE,
    WEIGHTED,
)
from examples.benchmark.paper_scale import ENCODERS
from examples.benchmark.problem import Problem
from examples.benchmark.problems import CHOOSING, REPORTED, find_problem
from examples.benchmark.runs import machine, run, settings

__all__ = ["ABLATION", "REPORTED_FILES", "ROOT", "STUDIES", "check_release", "study"]

#: The repository's root.
ROOT = Path(__file__).resolve().parents[2]

# A problem, a method, a sparsity and a seed; and the same with steps, device and bf16.
Key = tuple[str, str, float, int]
Call = tuple[str, str, float, int, int | None, str, bool]

# The fields of a line that identify a run.
_SETTINGS = (
    *("problem", "method", "sparsity", "seed", "config", "steps", "batch", "lr"),
    *("weight_decay", "threshold_lr", "device", "bf16", "pretraining"),
)

_SPARSITIES = (0.9, 0.98, 0.95)  # the most important first

#: The lines of the reported half, relative to `ROOT`: the table of the claim, and 90 % again with
#: all baselines and both task weightings, which are compared within one machine.
REPORTED_FILES = ("docs/results/reported.jsonl", "docs/results/weighting.jsonl")

#: The baselines that are run at every sparsity; the others are run at 90 % only (weighting).
STRONG = (
    *("Taylor", "ST-3", "Feather", "GraNet", "RigL", "AC/DC", "Top-KAST", "STR", "IMP", "SNIP"),
    "global magnitude",
)
#: Those with the best ranks in the first run of the reported half; they are run on the problems to
#: choose on, too.
BEST = ("Taylor", "ST-3", "Feather", "RigL", "GraNet")
_OWN = (OURS, PUBLISHED)
#: The default with one part changed.
ABLATION = (
    *(FIRM, "adaptive, soft", "adaptive, common threshold", "adaptive, by component"),
    *("adaptive, masked gradient", "adaptive, fixed at 50 %", STABLE, "adaptive, code's weighting"),
)


_COMMON: Mapping[str, Any] = {"sparsities": _SPARSITIES, "seeds": (3, 4, 5)}
_REPORTED: Mapping[str, Any] = {
    **_COMMON,
    "problems": REPORTED,
    "methods": (DENSE, *_OWN, *STRONG),
    "out": REPORTED_FILES[0],
}
_CHOOSING: Mapping[str, Any] = {
    **_COMMON,
    "problems": tuple(name for name in CHOOSING if name != "rooms5"),  # as rooms3, and takes twice
    "methods": (DENSE, *_OWN, *BEST),
    "out": "docs/results/choosing.jsonl",
}

#: The studies of the results page: problems, methods, sparsities, seeds, and the file of lines,
#: whose path is relative to `ROOT`.
STUDIES: Mapping[str, Mapping[str, Any]] = {
    "choosing": _CHOOSING,
    "reported": _REPORTED,
    "weighting": {
        **_REPORTED,
        "methods": (DENSE, OURS, STABLE, *BASELINES, *WEIGHTED),
        "sparsities": (0.9,),
        "out": REPORTED_FILES[1],
    },
    "reported, ends": {
        **_REPORTED,
        "methods": (DENSE, OURS, "Taylor", "ST-3", "Feather"),
        "sparsities": (0.8, 0.99),
    },
    "ablation": {
        **_CHOOSING,
        "problems": ("rooms3", "digits", "words", "teachers"),
        "methods": (DENSE, OURS, *ABLATION),
        "sparsities": (0.9, 0.98),
    },
    "published": {
        "problems": CHOOSING,
        "methods": (DENSE, *PAIRS),
        "sparsities": (0.9,),
        "seeds": (0,),
        "out": "docs/results/published.jsonl",
    },
    "paper": {
        "problems": [f"paper/{encoder}/rooms" for encoder in ENCODERS],
        "methods": (
            DENSE,
            "global magnitude",
            "DiSparse",
            PUBLISHED,
            OURS,
        ),
        "sparsities": (0.9,),
        "seeds": (3, 4, 5),
        "out": "docs/results/paper.jsonl",
    },
}


def check_release(lines: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Refuse to add to a file that has runs of other defaults than those of the library now.

    The reported half is run once for each release of the defaults: were it run again after each
    change, defaults would be chosen on it.

    Args:
        lines: The lines of the file.
        path: The file, for the error.

    Raises:
        ValueError: If a line of the default method has other settings.

    Example:
        >>> from examples.benchmark.studies import check_release
        >>> check_release([], "docs/results/reported.jsonl")
    """
    for line in lines:
        if line["method"] == OURS:
            now = settings(find_problem(line["problem"]), OURS, line["sparsity"], line["seed"])
            if line["config"] != now["config"]:
                raise ValueError(
                    f"{path} has runs of other defaults: {line['config']}, now {now['config']}. "
                    "The reported half is run once for each release of the defaults: move the file "
                    "to docs/results/earlier/, and tell in examples/benchmark/LOG.md what changed"
                )


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

    A run that fails adds a line with its error; the others go on, and it is tried again the next
    time. A bar on standard error counts the steps.

    Args:
        problems: Names from `PROBLEMS`, or `paper/ENCODER/DATA`.
        methods: Names from `METHODS`; the dense model is run once.
        sparsities: Zeros among the prunable weights, as fractions.
        seeds: Seeds of the initial weights and of the order of batches.
        out: The file of lines; a run that is in it with the same settings is not repeated. If this
            machine adds runs of a seed, it also makes its own dense run of that seed.
        steps: Optimiser steps; None for the problem's.
        jobs: How many runs at a time, each with one thread.
        device: Where to train.
        bf16: Whether the forward pass runs under autocast to bfloat16.

    Raises:
        ValueError: Before the first run, if a problem, method, sparsity or the number of jobs or
            steps is not valid, or a line of the file is damaged.
        RuntimeError: If one of several processes is killed, for example for lack of memory.

    Example:
        >>> from examples.benchmark import study
        >>> study(
        ...     problems=["digits"],
        ...     methods=["SNAP"],
        ...     sparsities=[0.9],
        ...     seeds=[0],
        ...     out="x.jsonl",
        ... )
        Traceback (most recent call last):
        ValueError: methods must be some of ['dense', 'uniform magnitude', ...], got 'SNAP'
    """
    chosen = {name: _shortened(find_problem(name), steps) for name in problems}
    for method in methods:
        if method not in METHODS:
            raise ValueError(f"methods must be some of {list(METHODS)}, got {method!r}")
    for sparsity in sparsities:
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsities must be fractions between 0 and 1, got {sparsity!r}")
    for name, count in (("jobs", jobs), ("steps", steps)):
        if count is not None and count < 1:
            raise ValueError(f"{name} must be at least 1, got {count!r}")
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    mend(path)
    missing = _missing(read(path), list(chosen.values()), methods, sparsities, seeds, device, bf16)
    calls = [(*key, steps, device, bf16) for key in missing]
    lengths = [chosen[name].steps for name, *_ in calls]
    with tqdm(total=sum(lengths), unit="step", smoothing=0.1) as bar:
        for done, line in enumerate(_lines(calls, jobs, bar.update), 1):
            append(path, line)
            bar.set_postfix_str(f"{done} of {len(calls)} runs")


def _missing(
    done: Sequence[dict[str, Any]],
    problems: Sequence[Problem],
    methods: Sequence[str],
    sparsities: Sequence[float],
    seeds: Sequence[int],
    device: str,
    bf16: bool,
) -> Iterable[Key]:
    """The runs that are not in the file or failed, seed by seed.

    If runs of a seed are missing and its dense run was made on another machine, the dense run of
    this machine is missing, too.
    """
    here = machine(device)
    known = {_identity(line) for line in done if "failed" not in line}
    known_here = {
        _identity(line) for line in done if "failed" not in line and line.get("machine") == here
    }

    def missing(problem: Problem, method: str, sparsity: float, seed: int, known: set[str]) -> bool:
        wanted = settings(problem, method, sparsity, seed, device=device, bf16=bf16)
        return _identity(wanted) not in known

    for seed in dict.fromkeys(seeds):
        for problem in problems:
            keys = [
                (problem.name, method, sparsity, seed)
                for sparsity in dict.fromkeys(sparsities)
                for method in dict.fromkeys(methods)
                if (method != DENSE or sparsity == sparsities[0])
                and missing(problem, method, sparsity, seed, known)
            ]
            dense = problem, DENSE, 0.0, seed
            if keys and missing(*dense, known_here) and not missing(*dense, known):
                yield problem.name, DENSE, sparsities[0], seed
            yield from keys


def _identity(line: dict[str, Any]) -> str:
    """A key that is equal for runs of equal settings."""
    named = [line.get(name, 0) if name == "pretraining" else line[name] for name in _SETTINGS]
    return json.dumps(named, sort_keys=True)


def _shortened(problem: Problem, steps: int | None) -> Problem:
    return problem if steps is None else replace(problem, steps=steps)


def _one(call: Call, advance: Callable[[int], object] = lambda steps: None) -> str:
    """Make a run; if it fails, its line has the error, so that the other runs go on."""
    name, method, sparsity, seed, steps, device, bf16 = call
    problem = _shortened(find_problem(name), steps)
    known = settings(problem, method, sparsity, seed, device=device, bf16=bf16)
    taken = 0

    def progress(step: int) -> None:
        nonlocal taken
        advance(step - taken)
        taken = step

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with any number of jobs: threads change the order of sums
    try:
        line = run(problem, method, sparsity, seed, device=device, bf16=bf16, progress=progress)
    except Exception as error:
        line = {**known, "failed": f"{type(error).__name__}: {error}"}
    finally:
        torch.set_num_threads(threads)
    progress(problem.steps)  # count the steps that a failed run did not take
    return json.dumps(line)


def _lines(calls: Sequence[Call], jobs: int, advance: Callable[[int], object]) -> Iterator[str]:
    """The lines of the runs, in the order in which they end; calls `advance` with steps taken."""
    if jobs == 1:
        for call in calls:
            yield _one(call, advance)
        return
    # Not a Pool: its processes are daemons, which cannot start processes that read data.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_end_with_parent) as pool:
        try:
            for done in as_completed([pool.submit(_one, call) for call in calls]):
                line = done.result()
                advance(json.loads(line)["steps"])
                yield line
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of the {jobs} processes was killed, perhaps for lack of memory; finished "
                "runs are in the file: go on with fewer jobs"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this process when its parent is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
