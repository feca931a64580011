"""Files of JSON lines, one for each run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["append", "mend", "provenance", "read"]


def read(path: str | Path) -> list[dict[str, Any]]:
    """Read the runs of a file of JSON lines; an empty list if there is no such file.

    A last line that a killed process left unfinished is skipped.

    Args:
        path: The file.

    Raises:
        ValueError: If a line, other than an unfinished last one, is not JSON.

    Example:
        >>> read("no such file")
        []
    """
    file = Path(path)
    runs = []
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(
                    f"{path}, line {number} is not the JSON of a run: {error}; take it out"
                ) from error
    return runs


def append(path: Path, line: str) -> None:
    """Add a line, and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def mend(path: Path) -> None:
    """Make a file end with a whole line, so that lines can be appended.

    A last line that a killed process left unfinished is removed; a complete one without its newline
    gets it.
    """
    whole, newline, last = path.read_bytes().rpartition(b"\n") if path.exists() else (b"",) * 3
    if not last:
        return
    try:
        json.loads(last)
    except ValueError:
        path.write_bytes(whole + newline)
    else:
        path.write_bytes(whole + newline + last + b"\n")


def provenance(runs: Sequence[Mapping[str, Any]]) -> str:
    """How many runs there are, how long they took, and where and with what they were made."""
    hours = sum(run.get("seconds", 0.0) for run in runs) / 3600
    seeds = sorted({run["seed"] for run in runs})
    parts = [f"{len(runs)} runs, {hours:.1f} hours of training in all; seeds {seeds}"]
    if failed := [run for run in runs if "failed" in run]:
        parts[0] += f", {len(failed)} of which failed"
    for key in ("machine", "threads"):
        parts.append(f"{key}: {', '.join(sorted({str(r[key]) for r in runs if key in r}))}")
    versions = [run.get("versions", {}) for run in runs if "failed" not in run]
    for name in dict.fromkeys(name for packages in versions for name in packages):
        known = [packages[name] for packages in versions if name in packages]
        said = "" if len(known) == len(versions) else f" (as {len(known)} of the lines say)"
        parts.append(f"{name} {', '.join(sorted(set(known)))}{said}")
    return "; ".join(parts) + "."
