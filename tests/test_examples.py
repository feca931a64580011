"""Every script in examples/ runs in its short setting, and prints the right figures."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))
TRAINING = ("quickstart", "rooms")


def run(script: str, folder: Path, *options: str) -> str:
    """What the script prints in its short setting, run from another folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--quick", *options],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def load(script: str) -> ModuleType:
    """The script as a module."""
    path = ROOT / "examples" / f"{script}.py"
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", TRAINING)
def test_prints_the_exact_sparsity_and_draws(script: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    printed = run(script, tmp_path, "--sparsity", "0.85", "--output", str(picture))

    overall = re.search(r"^overall +\d+ +([\d,]+) +([\d,]+) +85\.00 %$", printed, re.MULTILINE)
    assert overall is not None, printed
    weights, zeros = (int(count.replace(",", "")) for count in overall.groups())
    assert zeros == round(0.85 * weights)
    # The finalized model has those zeros among its parameters, and no others to speak of.
    size = re.search(r"^([\d,]+) parameters, ([\d.]+) % zero", printed, re.MULTILINE)
    assert size is not None, printed
    parameters = int(size[1].replace(",", ""))
    assert float(size[2]) == pytest.approx(100 * zeros / parameters, abs=0.05)
    assert "relative performance Delta_T" in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.parametrize(
    "script", [name for name in SCRIPTS if name not in (*TRAINING, "benchmark")]
)
def test_runs(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path).strip()


def test_both_trainings_are_covered() -> None:
    assert set(TRAINING) <= set(SCRIPTS)


def test_the_pages_say_what_the_lines_say() -> None:
    report = load("report")
    made = report.blocks(report.committed())
    for path in report.PAGES:
        page = path.read_text(encoding="utf-8")
        assert "<!-- comparison: margin -->" in page
        assert report.fill(page, made) == page, "run python examples/report.py"


def test_the_lines_are_those_of_the_studies_as_they_are_now() -> None:
    from examples.benchmark import STUDIES, find_problem, read, studies
    from examples.benchmark.runs import settings

    wanted: dict[str, set[str]] = {}
    for name, parts in STUDIES.items():
        if name == "paper":  # for a GPU
            continue
        chosen = [find_problem(problem) for problem in parts["problems"]]
        keys = studies._missing(
            [], chosen, parts["methods"], parts["sparsities"], [3, 4, 5], "cpu", False
        )
        wanted.setdefault(parts["out"], set()).update(
            studies._identity(settings(find_problem(problem), *key)) for problem, *key in keys
        )
    for out, own in wanted.items():
        lines = read(ROOT / out)
        assert {studies._identity(line) for line in lines} == own, f"run the studies of {out}"


def test_lines_of_others_get_all_tables_and_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    report = load("report")

    def printed(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        report.main()
        return capsys.readouterr().out

    mine = tmp_path / "mine.jsonl"
    kept = [  # the tables are also those of the page, but for the order
        line
        for line in (report.FOLDER / "comparison.jsonl").read_text().splitlines()
        if '"problem": "digits"' in line and '"sparsity": 0.8' not in line
    ]
    mine.write_text("\n".join(kept) + "\n")
    found = printed("--lines", str(mine), "--figures")
    page = report.PAGES[0].read_text(encoding="utf-8")
    table = page[page.index('??? note "digits, 90 %"') :].split("\n\n")[1]
    assert table.replace("\n    ", "\n").strip() in found
    pictures = {path.name for path in tmp_path.glob("*.png")}
    assert pictures == {
        "tradeoff.png",
        "allocation90.png",
        "allocation95.png",
        "allocation97.png",
    }
    for wrong, said in (("no such", "no such file"), ("dense", "compared with dense ones")):
        mine.write_text("\n".join(line for line in kept if '"method": "dense"' in line) + "\n")
        with pytest.raises(SystemExit):
            printed("--lines", str(mine if wrong == "dense" else tmp_path / wrong))
        assert said in capsys.readouterr().err


def test_quick_runs_stay_out_of_the_committed_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = load("benchmark")

    def out(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
        return str(benchmark.wanted(benchmark.arguments())["out"])

    committed = str(benchmark.ROOT / "docs" / "results" / "settings.jsonl")  # wherever it is called
    assert out("--study", "settings") == committed
    assert out("--study", "settings", "--methods", "dense") == committed
    for options in (
        ["--quick"],
        [],
        ["--preset", "paper", "--device", "cpu"],
        ["--study", "settings", "--quick"],
    ):
        assert out(*options) == "runs.jsonl"
    for options in (["--steps", "3"], ["--steps", "0"], ["--bf16"], ["--device", "cuda"]):
        assert out("--study", "comparison", *options) == "runs.jsonl"
    assert out("--study", "comparison", "--problems", "digits") == "runs.jsonl"
    assert out("--quick", "--out", "mine.jsonl") == "mine.jsonl"


def test_the_paper_preset_is_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("benchmark")

    def found(cuda: bool, *options: str) -> tuple[str, bool]:
        monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        args = benchmark.arguments()
        return args.device, args.bf16

    assert found(True) == ("cpu", False)
    assert found(True, "--preset", "paper") == ("cuda", True)
    assert found(True, "--study", "paper", "--no-bf16") == ("cuda", False)
    assert found(False, "--preset", "paper", "--device", "cpu") == ("cpu", True)
    with pytest.raises(SystemExit):
        found(False, "--preset", "paper")
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
def test_benchmark_says_what_is_wrong_before_the_first_run(
    options: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *options])
    with pytest.raises(SystemExit) as refused:
        load("benchmark").main()
    assert said in str(refused.value) + capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_the_leads_of_the_results_page_can_be_run_again() -> None:
    from examples.benchmark import find_problem, read, summarize

    later = load("../docs/results/later")
    names = [name for name, _, _ in later.LEADS]
    assert len(set(names)) == len(names)
    names += [later.named(mode) for mode in later.STARTS]
    lines = read(later.OUT)
    assert {line["method"] for line in lines} <= set(names)
    rows = [row for row in summarize(lines) if row.method.startswith("paper mode")]
    for problem in later.STARTED:  # the best of those that end within two points of 90 %
        own = {row.method: row for row in rows if row.problem == problem}
        assert own.keys() == {later.named(mode) for mode in later.STARTS}
        near = [row for row in own.values() if abs(row.reached.mean - 0.9) <= 0.02]
        best = max(near, key=lambda row: row.delta.mean)
        assert later.named(find_problem(problem).paper) == best.method
    for _, _, patched in later.LEADS:
        with patched():  # an AttributeError if what it patches is gone
            pass


def test_benchmark_writes_a_line_a_run_and_runs_none_twice(tmp_path: Path) -> None:
    from examples.benchmark import read

    out = tmp_path / "runs.jsonl"
    for _ in range(2):
        assert run("benchmark", tmp_path, "--out", str(out)) == f"3 runs in {out}\n"
        lines = read(out)
        assert [line["method"] for line in lines] == ["dense", "AdapMTL", "Taylor"]
        assert all(line["steps"] == 3 and line["metrics"] for line in lines)
        assert all(line["zeros"] == round(0.9 * line["weights"]) for line in lines)
