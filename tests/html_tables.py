"""The tables in the HTML that notebooks show."""

from __future__ import annotations

from html.parser import HTMLParser
from typing import Any


class Cells(HTMLParser):
    """Collects the text of the cells of each table, and checks that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tables: list[list[list[str]]] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


def tables_of(shown: Any) -> list[list[list[str]]]:
    """The rows of each table in the HTML of an object, as the texts of their cells."""
    parser = Cells()
    parser.feed(shown._repr_html_())
    parser.close()
    assert not parser.open
    return parser.tables
