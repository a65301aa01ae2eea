"""Tables show what they are given, to the letter."""

from openmoe.platform.commands import tables


def test_cells_and_title_are_text_and_never_markup(capsys):
    tables.show("run [red]", ("job", "reason"), [("a", "KeyError: [/b] and [bold]x[/bold]")])
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "run [red]",
        "job  reason",
        "a    KeyError: [/b] and [bold]x[/bold]",
        "",
    ]
