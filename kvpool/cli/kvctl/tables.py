"""Tables of what clients named: shown as it is, whatever it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.markup import escape

from kvpool.cli import output


def plain(cell: Any) -> str:
    """Text that a terminal and rich show and do not obey: names are their owners' affair, escape codes among them."""
    return escape("".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(cell)))


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """As `output.table`."""
    output.table(plain(title), columns, [[plain(cell) for cell in row] for row in rows])


def facts(title: str, values: Mapping[str, Any]) -> None:
    """As `output.facts`."""
    output.facts(plain(title), {name: plain(value) for name, value in values.items()})
