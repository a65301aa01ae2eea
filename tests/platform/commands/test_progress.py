"""In a log, long work shows a line now and then; on a terminal, a bar with rate and time left."""

import io

from openmoe.platform.commands import progress
from openmoe.platform.commands.progress import ProgressReport


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_the_first_and_the_last_line_of_a_stage_and_few_between():
    log = io.StringIO()
    with ProgressReport(log) as report:
        for done in range(1, 101):
            report("train", done, 100, "steps", f"loss {9 - done / 100:.2f}")
    assert log.getvalue().splitlines() == [
        "train: 1 of 100 steps  loss 8.99",
        "train: 100 of 100 steps  loss 8.00",
    ]


def test_a_log_line_has_rate_and_time_left(monkeypatch):
    now_s = iter([0.0, 0.0, 0.0, 20.0, 20.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now_s))
    log = io.StringIO()
    report = ProgressReport(log)
    report("pack", 0, 100, "groups")
    report("pack", 40, 100, "groups")
    assert log.getvalue().splitlines()[-1] == "pack: 40 of 100 groups, 2.0 groups/s, 30 s left"


def test_a_stage_that_starts_over_is_a_new_stage():
    log = io.StringIO()
    report = ProgressReport(log)
    for done in (50, 51, 20, 21):
        report("train", done, 100, "steps")
    assert log.getvalue().splitlines() == ["train: 50 of 100 steps", "train: 20 of 100 steps"]


def test_a_terminal_gets_a_bar(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with ProgressReport(terminal) as report:
        report("train", 100, 100, "steps", "loss 5.00")
    assert "100/100" in terminal.getvalue()
    assert "loss 5.00" in terminal.getvalue()
