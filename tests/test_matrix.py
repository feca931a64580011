"""The conformance matrix, cell by cell; `docs/compatibility.md` shows what comes of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from matrix import PROCESSES, ROWS, STAGES, check, in_two_processes

stages = pytest.mark.parametrize("stage", STAGES)


@stages
@pytest.mark.parametrize("name", ROWS)
def test_cell(name: str, stage: str, record: Callable[..., None]) -> None:
    row = ROWS[name]
    if row.needs is not None:
        pytest.importorskip(row.needs)
    if stage in row.raises:
        error, text = row.raises[stage]
        with pytest.raises(error, match=text) as caught:
            check(row, stage)
        record("matrix", row=name, stage=stage, result="raises", error=str(caught.value))
        return
    check(row, stage)
    record("matrix", row=name, stage=stage, result="works")


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """What becomes of the stages in two processes, worked out once for each kind."""
    found: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in found:
            found[kind] = in_two_processes(kind, tmp_path_factory.mktemp("processes"))
        return found[kind]

    return get


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
@stages
@pytest.mark.parametrize("name", PROCESSES)
def test_processes(
    name: str, stage: str, processes: Callable[[str], Any], record: Callable[..., None]
) -> None:
    first, second = processes(PROCESSES[name])[stage]
    assert list(first) == list(second)
    assert all(torch.equal(value, second[key]) for key, value in first.items())
    record("matrix", row=name, stage=stage, result="works")
