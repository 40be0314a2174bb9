"""Progress: a bar on a terminal, few and plain lines elsewhere."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from mmkd.runtime import progress


class Terminal(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self):
        return True


def shown(monkeypatch, file, *, seconds=1.0, quiet=False, **settings):
    """What 100 steps of so many seconds print, when a third of them is done already."""
    now = iter(x * seconds for x in range(1000))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(progress, "console", Console(file=file, **settings))
    with progress.Bar("mimic", 150, done=50, quiet=quiet) as bar:
        for _ in range(100):
            bar.advance("loss 0.5000, 12,345 supervised tokens/s, and more than 80 columns hold")
    return file.getvalue()


@pytest.mark.parametrize("settings", [{}, {"force_terminal": True}, {"color_system": "truecolor"}])
def test_a_log_gets_a_plain_line_now_and_then(settings, monkeypatch):
    text = shown(monkeypatch, io.StringIO(), **settings)
    lines = text.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "mimic 51/150", "mimic 82/150", "mimic 113/150", "mimic 144/150", "mimic 150/150",
    ]  # fmt: skip
    assert lines[1].startswith("mimic 82/150, eta 0:01:08  loss 0.5000")
    assert text.isascii()
    assert all(c == "\n" or c.isprintable() for c in text)


def test_names_are_shown_as_they_are(monkeypatch):
    """A data file may be called so; in rich's markup a word in brackets is a style."""
    for settings in ({}, {"force_terminal": True, "width": 120}):
        monkeypatch.setenv("TERM", "xterm")
        file = Terminal() if settings else io.StringIO()
        monkeypatch.setattr(progress, "console", Console(file=file, **settings))
        with progress.Bar("train[bold].json", 1) as bar:
            bar.advance("[red]")
        assert "train[bold].json" in file.getvalue()
        assert "[red]" in file.getvalue()


def test_the_time_left_counts_from_where_the_bar_begins(monkeypatch):
    now = iter([1000.0, 1010.0])  # entered, first step
    file = io.StringIO()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(progress, "console", Console(file=file))
    with progress.Bar("mimic", 20_000) as bar:
        bar.advance()
    assert file.getvalue() == "mimic 1/20000, eta 2 days, 7:33:10\n"


def test_force_color_makes_no_terminal_of_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert "\x1b" not in shown(monkeypatch, io.StringIO())


def test_other_ranks_say_nothing(monkeypatch):
    assert shown(monkeypatch, io.StringIO(), quiet=True) == ""


def test_a_terminal_gets_a_bar_with_the_time_left(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    text = shown(monkeypatch, Terminal(), seconds=0.0, force_terminal=True, width=120)
    assert "150/150" in text
    assert "eta" in text
    assert "\x1b[" in text


def test_a_dumb_terminal_gets_lines(monkeypatch):
    monkeypatch.setenv("TERM", "dumb")
    assert "\x1b" not in shown(monkeypatch, Terminal())


@pytest.mark.parametrize(("width", "names"), [(80, "a_rather_long_stage_name"), (60, "mimic")])
def test_a_narrow_terminal_shortens_the_note_and_not_the_name(monkeypatch, width, names):
    monkeypatch.setenv("TERM", "xterm")
    file = Terminal()
    settings = {"force_terminal": True, "width": width, "color_system": None}
    monkeypatch.setattr(progress, "console", Console(file=file, **settings))
    with progress.Bar(names, 12_345) as bar:
        for _ in range(3):
            bar.advance("loss 0.5000, 12,345 supervised tokens/s, and more than 80 columns hold")
    last = file.getvalue().split("\x1b[2K")[-1].splitlines()[0]
    assert last.startswith(f"{names} ")
    assert "3/12345" in last
    assert "loss 0." in last
    assert len(last) <= width


def course():
    """Two students of two stages each, of which the second ones are slower."""
    steps = {"a/1": 100, "a/2": 50, "b/1": 100, "b/2": 50}
    return progress.Course(steps, {name: name[-1] for name in steps})


def test_a_part_shows_its_place_and_the_time_left_for_all_parts(monkeypatch):
    whole = course()
    with whole.part("a/1", "stage 1 of 2"):
        text = part(monkeypatch, 100, 2.0)
    assert text.startswith("mimic 1/100, stage 1 of 2, eta 0:03:18, 0:09:58 for all stages")
    with whole.part("a/2", "stage 2 of 2"):
        text = part(monkeypatch, 50, 5.0)
    # After it: 100 steps as a/1's, 2 s each, and 50 as its own, 5 s each.
    assert text.startswith("mimic 1/50, stage 2 of 2, eta 0:04:05, 0:11:35 for all stages")
    with whole.part("b/2", "stage 2 of 2"):
        text = part(monkeypatch, 50, 5.0)
    assert text.startswith("mimic 1/50, stage 2 of 2, eta 0:04:05  ")  # it is the last


def part(monkeypatch, total, seconds):
    now = iter(x * seconds for x in range(1000))
    file = io.StringIO()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(now)))
    monkeypatch.setattr(progress, "console", Console(file=file))
    with progress.Bar("mimic", total, part=True) as bar:
        bar.advance("loss 0.5000")
    with progress.Bar("other", 2) as bar:  # inside of the part, and none of its own
        bar.advance()
    assert "stage" not in file.getvalue().splitlines()[-1]
    return file.getvalue()


def test_without_the_steps_of_a_later_part_only_this_one_is_told(monkeypatch):
    whole = progress.Course({"a/1": 100, "a/2": None}, {})
    with whole.part("a/1", "stage 1 of 2"):
        text = part(monkeypatch, 100, 2.0)
    assert text.startswith("mimic 1/100, stage 1 of 2, eta 0:03:18  loss")
