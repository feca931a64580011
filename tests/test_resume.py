"""A process that is killed at any moment, again and again, ends as one that never was."""

from __future__ import annotations

import importlib.util
import os
import random
import signal
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from processes import context

from torch_adapmtl import ACDC, Adaptive, DiSparse, GraNet, Paper, RigL, Taylor, TopKAST

STEPS, EVERY = 50, 3  # an update at every step
RUNS: dict[str, dict[str, Any]] = {
    "adaptive": {},
    "sensitivity": {"method": Adaptive(allocation="sensitivity")},
    "gradient": {"method": Adaptive(allocation="gradient", granularity="component")},
    "paper": {"method": Paper(start=-4.0, weight_decay=0.1), "target_sparsity": 0.5},
    "Taylor": {"method": Taylor()},
    "DiSparse": {"method": DiSparse(dynamic=True)},
    "AC/DC": {"method": ACDC()},
    "GraNet": {"method": GraNet(interval=2)},
    "Top-KAST": {"method": TopKAST(interval=2)},
    "RigL": {"method": RigL(interval=2)},
}
# Kills of each run; the moments are drawn anew for each.
KILLS = 4


def _example() -> ModuleType:
    """The script of examples/resume.py as a module."""
    spec = importlib.util.spec_from_file_location(
        "example_resume", Path(__file__).parents[1] / "examples" / "resume.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _live(name: str, folder: str, death: tuple[int, str] | None) -> None:
    """One life of the process, which ends at a moment of a step or with the run."""
    torch.set_num_threads(1)
    example = _example()
    os.environ["TQDM_DISABLE"] = "1"

    def watch(step: int, moment: str) -> None:
        if death is not None and step >= death[0] and moment == death[1]:
            if moment == "saving":  # half a file beside the whole one
                (Path(folder) / "checkpoint.new").write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the paper's mode misses its target
        model = example.train(Path(folder), STEPS, EVERY, watch, **RUNS[name])
    torch.save(model.state_dict(), Path(folder) / "sparse.pt")


def _run(name: str, folder: Path, deaths: list[tuple[int, str]]) -> tuple[Any, Any]:
    """The last checkpoint and the final model of a run that dies so often."""
    pytest.importorskip("sklearn")
    folder.mkdir()
    for death in [*deaths, None]:
        process = context().Process(target=_live, args=(name, str(folder), death))
        process.start()
        process.join()
        assert process.exitcode == (0 if death is None else -signal.SIGKILL)
    return torch.load(folder / "checkpoint.pt"), torch.load(folder / "sparse.pt")


def _assert_same(mine: Any, theirs: Any, where: str) -> None:
    if isinstance(mine, torch.Tensor):
        assert torch.equal(mine, theirs), where
    elif isinstance(mine, dict):
        assert list(mine) == list(theirs), where
        for key, value in mine.items():
            _assert_same(value, theirs[key], f"{where}.{key}")
    elif isinstance(mine, list | tuple):
        assert len(mine) == len(theirs), where
        for index, value in enumerate(mine):
            _assert_same(value, theirs[index], f"{where}.{index}")
    else:
        assert mine == theirs, where


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
@pytest.mark.parametrize("name", RUNS)
def test_killed_and_resumed_is_bit_for_bit_the_same(name: str, tmp_path: Path) -> None:
    draw = random.Random(name)
    moments = sorted(draw.sample(range(1, STEPS - EVERY), KILLS))
    deaths = [(step, draw.choice(["before", "between", "saving"])) for step in moments]
    killed = _run(name, tmp_path / "killed", deaths)
    whole = _run(name, tmp_path / "whole", [])
    _assert_same(killed, whole, f"{name} killed at {deaths}")
