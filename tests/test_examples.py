"""Every script in examples/ runs in its short setting, and prints the right figures."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.stem for path in (ROOT / "examples").glob("[!_]*.py"))
TRAINING = ("quickstart", "rooms")
ALONE = ("resume", "several_gpus")  # in processes of their own


@pytest.fixture
def run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a script prints in its short setting, run from another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")

    def printed(script: str, *options: str) -> str:
        # In this process, which has imported what takes the time.
        path = str(ROOT / "examples" / f"{script}.py")
        monkeypatch.setattr(sys, "argv", [path, "--quick", *options])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return printed


# Matplotlib takes tensors in a way that numpy will not allow for ever.
@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept:DeprecationWarning")
@pytest.mark.parametrize("script", TRAINING)
def test_prints_the_exact_sparsity_and_draws(
    script: str, run: Callable[..., str], tmp_path: Path
) -> None:
    picture = tmp_path / "picture.png"
    printed = run(script, "--sparsity", "0.85", "--output", str(picture))

    overall = re.search(
        r"^overall +\d+ +([\d,]+) +([\d,]+) +85\.00 %(?: +[\d.]+ %)?$", printed, re.MULTILINE
    )
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


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in (*TRAINING, *ALONE)])
def test_runs(script: str, run: Callable[..., str]) -> None:
    assert run(script).strip()


def command(folder: Path, *words: str) -> str:
    """What a command of Python prints, run in another folder."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, *words, "--quick"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        capture_output=True,
        encoding="utf-8",
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_runs_as_a_command(tmp_path: Path) -> None:
    printed = command(tmp_path, str(ROOT / "examples" / "resume.py"))
    assert "run/sparse.pt" in printed.replace("\\", "/")


def test_trains_in_two_processes(tmp_path: Path) -> None:
    script = str(ROOT / "examples" / "several_gpus.py")
    together = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    printed = command(tmp_path, *together, script)
    assert printed.startswith("2 processes, 90.00% zeros\nmodel.safetensors: ")
