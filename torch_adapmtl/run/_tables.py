"""Tables as aligned text and as HTML."""

from __future__ import annotations

from torch_adapmtl._tables import details, html_table, text_table

__all__ = ["details", "html_table", "text_table"]
