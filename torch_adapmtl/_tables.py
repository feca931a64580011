"""Tables as aligned text and as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["details", "html_table", "text_table"]


def text_table(rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Return aligned lines: the first `left` columns are left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = (
            f"{cell:<{width}}" if index < left else f"{cell:>{width}}"
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(cells).rstrip())
    return lines


def html_table(rows: Sequence[Sequence[str]], *, left: int, caption: str = "") -> str:
    """Return an HTML table with the first row as its head, `left` columns left-aligned."""

    def line(row: Iterable[str], tag: str) -> str:
        cells = []
        for index, cell in enumerate(row):
            side = "left" if index < left else "right"
            cells.append(f'<{tag} style="text-align:{side}">{escape(cell)}</{tag}>')
        return f"<tr>{''.join(cells)}</tr>"

    head, *body = rows
    title = f"<caption>{escape(caption)}</caption>" if caption else ""
    lines = "".join(line(row, "td") for row in body)
    return f"<table>{title}<thead>{line(head, 'th')}</thead><tbody>{lines}</tbody></table>"


def details(summary: str, body: str) -> str:
    """Return HTML that shows a summary and can be unfolded to show the body."""
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"
