"""Rows on disk, rows of a continued run, and the line that says how a run goes."""

import io
import sys

import pytest

from rlbook.harness.log import Progress, RunLog, read_rows

ROWS = [{"env_steps": 10 * k, "loss": float(k)} for k in range(1, 5)]


def test_rows_are_on_disk_at_once(tmp_path):
    log = RunLog(tmp_path)
    for count, row in enumerate(ROWS, 1):
        log.add(row)
        assert read_rows(tmp_path / "metrics.jsonl") == ROWS[:count]
    log.close()


def test_a_continued_run_drops_rows_that_the_checkpoint_does_not_know(tmp_path):
    log = RunLog(tmp_path)
    for row in ROWS:
        log.add(row)
    log.close()
    again = RunLog(tmp_path, kept_rows=2)
    again.add({"env_steps": 99, "loss": 0.0})
    again.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [*ROWS[:2], {"env_steps": 99, "loss": 0.0}]


def test_fewer_rows_than_the_checkpoint_knows_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"env_steps": 1}\n')
    with pytest.raises(ValueError, match="rows are missing"):
        RunLog(tmp_path, kept_rows=2)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_silent_without_a_terminal(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)  # pytest's plugins bring it
    progress = Progress("title", 10, shown=True)
    progress.update(5, loss=1.0)
    progress.say("3 MB when full")
    progress.close()
    assert capsys.readouterr() == ("", "")


def test_progress_on_a_terminal_says_steps_and_values(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress("title", 10, shown=True)
    progress.say("3 MB when full")
    progress.update(5, **{"return": 3.25})
    progress.update(10, **{"return": 4.5})
    progress.close()
    text = terminal.getvalue()
    assert "title" in text and "10.0/10.0" in text and "return=4.5" in text
    assert text.count("3 MB when full\n") == 1
    quiet = Terminal()
    monkeypatch.setattr(sys, "stderr", quiet)
    Progress("title", 10, shown=False).update(5)
    Progress("title", 10, shown=False).say("3 MB when full")
    assert quiet.getvalue() == ""


def test_progress_in_a_notebook_prints_plain_lines(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    progress = Progress("title", 10, shown=True)
    progress.say("3 MB when full")
    assert capsys.readouterr().out == "3 MB when full\n"
    progress.update(1)
    progress._last -= 11.0
    progress.update(5, loss=1.0)
    assert capsys.readouterr().out.startswith("title: 5 of 10, loss 1, at most ")
