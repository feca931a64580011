"""Fill the tables of the compatibility page from the lines that the tests have recorded.

    python -m docs.tables

The page's blocks, between `<!-- NAME -->` and `<!-- end -->`, are replaced; its text is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from examples.benchmark import fill, read

PAGE = Path(__file__).resolve().parent / "compatibility.md"
NOT_PRUNED = ("unused", "frozen")
Lines = Sequence[Mapping[str, Any]]


def blocks(folder: Path | None = None) -> dict[str, Callable[[], str]]:
    """What makes each block of the page, from the lines in `folder`."""
    folder = folder or PAGE.with_suffix("")
    return {
        "matrix": lambda: matrix(read(folder / "matrix.jsonl")),
        "zoo": lambda: zoo(read(folder / "zoo.jsonl")),
    }


def matrix(lines: Lines) -> str:
    """A row for each thing that is done, a column for each stage; errors are listed below."""
    stages = list(
        dict.fromkeys(line["stage"] for line in sorted(lines, key=_place))
    )
    rows: dict[str, dict[str, str]] = {}
    errors: list[str] = []
    for line in sorted(lines, key=_place):
        cell = {"works": "yes", "skipped": "not run"}.get(
            line["result"], ""
        )
        if line["result"] == "raises":
            if line["error"] not in errors:
                errors.append(line["error"])
            cell = f"error {errors.index(line['error']) + 1}"
        rows.setdefault(line["row"], {})[line["stage"]] = cell
    body = [
        [row, *(cells.get(stage, "") for stage in stages)]
        for row, cells in rows.items()
    ]
    listed = "\n".join(
        f"{number}. {error}" for number, error in enumerate(errors, 1)
    )
    return "\n\n".join(
        [_table("l" * (1 + len(stages)), ["", *stages], body), listed]
    )


def _place(line: Mapping[str, Any]) -> tuple[int, int]:
    return line["place"][0], line["place"][1]


def zoo(lines: Lines) -> str:
    """A row for each family, a folded table of the models in each, and what it was made with."""
    families: dict[str, list[Mapping[str, Any]]] = {}
    for line in sorted(
        lines, key=lambda line: (line["family"], line["name"].lower())
    ):
        families.setdefault(line["family"], []).append(line)
    header = [
        "family",
        "models",
        "covered, %",
        "seconds to apply, median (most)",
    ]
    body = [_summary(name, own) for name, own in families.items()]
    parts = [_table("lrrr", header, [*body, _summary("**all**", lines)])]
    for name, own in families.items():
        table = _models(own).replace("\n", "\n    ")
        parts.append(f'??? note "{name}: {len(own)} models"\n\n    {table}')
    return "\n\n".join([*parts, _versions(lines)])


def _summary(name: str, lines: Lines) -> list[str]:
    covered = [100 * line["covered"] for line in lines]
    seconds = [line["seconds_apply"] for line in lines]
    return [
        name,
        f"{len(lines)}",
        f"{min(covered):.0f} to {max(covered):.0f}",
        f"{median(seconds):.2f} ({max(seconds):.1f})",
    ]


def _models(lines: Lines) -> str:
    header = [
        "model",
        "tasks",
        "shared",
        "of tasks",
        "not pruned",
        "covered, %",
        "seconds",
    ]
    body = []
    for line in lines:
        weights = {
            name: count for name, (_, count) in line["components"].items()
        }
        rest = {
            name: n
            for name, n in weights.items()
            if name not in ("shared", *NOT_PRUNED)
        }
        left = {
            name: weights[name] for name in NOT_PRUNED if name in weights
        }
        body.append(
            [
                line["name"],
                ", ".join(line["tasks"]),
                _count(weights.get("shared", 0)),
                _counts(rest),
                _counts(left),
                f"{100 * line['covered']:.1f}",
                f"{line['seconds_apply']:.2f}",
            ]
        )
    return _table("llrllrr", header, body)


def _versions(lines: Lines) -> str:
    found: dict[str, set[str]] = {}
    for line in lines:
        for package, version in line["versions"].items():
            found.setdefault(package, set()).add(version)
    names = sorted(found, key=lambda name: (name != "torch", name))
    return f"With {', '.join(' '.join([name, *sorted(found[name])]) for name in names)}."


def _counts(weights: Mapping[str, int]) -> str:
    return ", ".join(
        f"{name} {_count(count)}" for name, count in weights.items()
    )


def _count(weights: int) -> str:
    """Three digits of a number of weights."""
    for size, unit in ((1e6, " M"), (1e3, " k")):
        if weights >= size:
            return f"{weights / size:.3g}{unit}"
    return f"{weights}"


def _table(
    sides: str, header: Sequence[str], body: Iterable[Sequence[str]]
) -> str:
    """A table whose columns keep to the left or the right, a letter each."""
    rule = [{"l": "---", "r": "---:"}[side] for side in sides]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [header, rule, *body]
    )


def main() -> None:
    """Fill the page."""
    PAGE.write_text(
        fill(PAGE.read_text(encoding="utf-8"), blocks()), encoding="utf-8"
    )


if __name__ == "__main__":
    main()
