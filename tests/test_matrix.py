"""The conformance matrix, cell by cell; `docs/compatibility.md` shows what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matrix import COMMON, STAGES, check
from matrix_processes import PROCESSES, in_two_processes
from matrix_rows import ROWS

from examples.benchmark import read


def place(name: str, stage: str) -> list[int]:
    """Where a cell stands on the page."""
    return [[*ROWS, *PROCESSES].index(name), STAGES.index(stage)]


stages = pytest.mark.parametrize("stage", STAGES)


# Rows train beyond the end, some of them attached, and one of them freezes layers in turn.
@pytest.mark.filterwarnings(
    "ignore:.*was called more than total_steps", "ignore:'body.weight' is pruned, but has"
)
@stages
@pytest.mark.parametrize("name", ROWS)
def test_cell(name: str, stage: str, record: Callable[..., None]) -> None:
    row = ROWS[name]
    line = {"row": name, "stage": stage, "place": place(name, stage)}
    if name == "to another device" and not torch.cuda.is_available():
        record("matrix", **line, result="skipped")
        pytest.skip("needs CUDA")
    if row.needs is not None:
        pytest.importorskip(row.needs)
    if stage in row.raises:
        error, text = row.raises[stage]
        with pytest.raises(error, match=text) as caught:
            check(row, stage)
        kind = type(caught.value).__name__
        record("matrix", **line, result="raises", error=f"`{kind}`: {caught.value}")
        return
    check(row, stage)
    record("matrix", **line, result="works")


# Other positions than one, of which the measured ones of `spectral_norm` are no integers.
MACS = {"heads.a": 3, "heads.b": 2.5}


@pytest.mark.filterwarnings(
    "ignore:.*was called more than total_steps", "ignore:'body.weight' is pruned, but has"
)
@pytest.mark.parametrize("name", ROWS)
def test_a_budget_of_multiply_adds_in_the_middle_of_a_run(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = ROWS[name]
    if name == "to another device" and not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    if row.needs is not None:
        pytest.importorskip(row.needs)
    monkeypatch.setitem(COMMON, "count", MACS)
    if "mid-run" in row.raises:
        error, text = row.raises["mid-run"]
        with pytest.raises(error, match=text):
            check(row, "mid-run")
    else:
        check(row, "mid-run")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("name", PROCESSES)
def test_processes(name: str, tmp_path: Path, record: Callable[..., None]) -> None:
    """All stages of a run, in the same two processes."""
    found = in_two_processes(PROCESSES[name], tmp_path)
    for stage in STAGES:
        first, second = found[stage]
        assert list(first) == list(second), stage
        assert all(torch.equal(value, second[key]) for key, value in first.items()), stage
        record("matrix", row=name, stage=stage, place=place(name, stage), result="works")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@pytest.mark.parametrize("kind", ["ddp", "dcp"])
def test_processes_share_a_budget_of_multiply_adds(kind: str, tmp_path: Path) -> None:
    for first, second in in_two_processes(kind, tmp_path, {"count": MACS}).values():
        assert all(torch.equal(value, second[key]) for key, value in first.items())


def test_the_committed_lines_are_those_of_the_matrix(request: pytest.FixtureRequest) -> None:
    if request.config.getoption("--record"):
        pytest.skip("they are being made")
    lines = read(Path(__file__).parents[1] / "docs" / "compatibility" / "matrix.jsonl")
    wanted = {(name, stage): place(name, stage) for name in (*ROWS, *PROCESSES) for stage in STAGES}
    assert {(line["row"], line["stage"]): line["place"] for line in lines} == wanted
    assert len(lines) == len(wanted)
    for line in lines:  # in the order in which they were made, which is any
        name, stage = line["row"], line["stage"]
        raises = name in ROWS and stage in ROWS[name].raises
        skipped = name == "to another device"
        assert line["result"] == ("raises" if raises else "skipped" if skipped else "works")
