"""No kernel reads or writes past a buffer."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs mmap with flags of Linux")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    script = Path(__file__).with_name("guarded.py")
    return subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, env=os.environ
    )


def test_nothing_beside_a_buffer_is_touched() -> None:
    done = run("4", "8", "16")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("nothing was touched") == 3


def test_it_would_be_seen() -> None:
    assert run("8", "--beyond").returncode == -signal.SIGSEGV
