"""A journal of what a command has done so far."""

import pytest

from mmkd.data.journal import Journal
from mmkd.errors import DataError


def test_a_journal_goes_on_behind_a_line_that_was_cut(tmp_path):
    path = tmp_path / "out" / "answers.jsonl"
    journal = Journal(path, {"model": "m", "pair": (1, 2)})
    journal.add({"n": 1}, {"n": 2})
    with open(path, "ab") as file:
        file.write(b'{"n": 3, "tex')
    again = Journal(path, {"model": "m", "pair": (1, 2)})
    assert again.entries == [{"n": 1}, {"n": 2}]
    again.add({"n": 4})
    assert Journal(path, {"model": "m", "pair": [1, 2]}).entries == [{"n": n} for n in (1, 2, 4)]
    with pytest.raises(DataError, match=r"answers\.jsonl: it has answers to another request"):
        Journal(path, {"model": "other"})
    path.write_bytes(b'{"mod')
    assert Journal(path, {"model": "m"}).entries == []
    again.delete()
    assert not path.exists()


def test_a_damaged_journal_is_named(tmp_path):
    path = tmp_path / "a.jsonl"
    Journal(path, {"teacher": "a"}).add({"text": "two"})
    path.write_bytes(path.read_bytes().replace(b'"two"', b'"t\x00'))
    with pytest.raises(DataError, match=r"a\.jsonl: damaged \(.*\) -- delete it"):
        Journal(path, {"teacher": "a"})
