"""Every script in examples/ runs in its short setting, and prints the right figures."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in TRAINING])
def test_runs(script: str, tmp_path: Path) -> None:
    assert run(script, tmp_path).strip()
