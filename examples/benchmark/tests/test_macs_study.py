"""The study of multiply-adds: its runs, and its table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("sklearn")

from examples.benchmark import macs, read
from examples.benchmark.methods import DENSE, MACS, OURS


def test_each_run_is_made_once_and_meets_its_own_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(macs, "WEIGHTS", {"digits convnext": (0.97, 0.9)})
    for _ in range(2):
        macs.main(["--steps", "2", "--seeds", "0"])
    lines = read("macs.jsonl")
    runs = [(line["method"], line["sparsity"]) for line in lines]
    assert runs == [(DENSE, 0.0), (MACS, 0.9), (OURS, 0.97), (OURS, 0.9)]
    for line in lines:
        left = line["macs_left"]
        if line["method"] == MACS:
            assert line["config"]["count"] == "macs"
            assert left == pytest.approx(0.1, abs=1e-3)
            assert line["reached"] == pytest.approx(1 - left)
        elif line["method"] == OURS:
            assert line["reached"] == line["zeros"] / line["weights"]
            assert 0 < left < 1
    table = capsys.readouterr().out.strip().splitlines()
    assert table[: len(table) // 2] == table[len(table) // 2 :]
    assert macs.equal_work_table(lines) == "\n".join(table[: len(table) // 2])


def test_the_table_averages_the_seeds_of_a_row() -> None:
    def line(method: str, seed: int, accuracy: float, left: float) -> dict[str, Any]:
        return {
            "problem": "digits", "method": method, "sparsity": 0.9 if method == OURS else 0.0,
            "seed": seed, "config": {}, "steps": 1, "batch": 1, "lr": 1.0, "weight_decay": 0.0,
            "device": "cpu", "bf16": False, "machine": "one", "macs_left": left, "zeros": 3,
            "weights": 4, "metrics": {"left": {"accuracy": accuracy}}, "lower_is_better": [],
            "components": {}, "reached": 0.75,
        }  # fmt: skip

    lines = [line(DENSE, seed, 80.0, 1.0) for seed in (3, 4)]
    lines += [line(OURS, 3, 76.0, 0.2), line(OURS, 4, 80.0, 0.3)]
    assert macs.equal_work_table(lines).splitlines()[2:] == [
        f"| digits | {OURS} | 25.0 | 25.0 | -2.5 ± 2.5 |"
    ]
