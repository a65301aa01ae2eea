"""Tables for people: what every command that lists something prints."""

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from openmoe.platform.commands.facts import Section


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Prints a table; piped output is as wide as its content, so that no path is cut."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console() if sys.stdout.isatty() else Console(width=240)
    table = Table(box=None, show_header=any(columns), pad_edge=False)
    if title:
        table.title, table.title_justify = Text(title), "left"
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))  # as text: a reason may hold what rich takes for markup
    console.print(table, highlight=False)
    console.print()


def show_sections(sections: "Sequence[Section]", *, as_json: bool) -> None:
    """Prints derived numbers: as JSON by title and key, or as tables with how each came about."""
    if as_json:
        print(json.dumps({s.title: {fact.key: fact.value for fact in s.facts} for s in sections}, indent=2))
        return
    for section in sections:
        show(section.title, ("", "", ""), [(fact.key, fact.text, fact.note) for fact in section.facts])
