"""Files of JSON lines that a killed command has left."""

import os

import pytest

from mmkd.runtime.json_lines import JsonLines, complete_lines


@pytest.mark.parametrize("sync", [True, False])
def test_an_incomplete_line_is_overwritten(tmp_path, monkeypatch, sync):
    synced = []
    monkeypatch.setattr(os, "fsync", synced.append)
    path = tmp_path / "new" / "a.jsonl"
    assert complete_lines(path) == []
    JsonLines(path, sync=sync).add({"n": 1}, [2])
    assert path.read_bytes() == b'{"n": 1}\n[2]\n'
    path.write_bytes(path.read_bytes() + b'{"a long line that was cut')
    file = JsonLines(path, sync=sync)
    assert complete_lines(path) == [b'{"n": 1}', b"[2]"]  # another process may still write it
    file.add("b")
    file.add("c")
    assert complete_lines(path) == [b'{"n": 1}', b"[2]", b'"b"', b'"c"']
    assert path.read_bytes().endswith(b'"b"\n"c"\n')
    assert len(synced) == (3 if sync else 0)


def test_a_line_that_could_not_be_written_whole_is_overwritten(tmp_path, monkeypatch):
    file = JsonLines(tmp_path / "a.jsonl", sync=True)
    file.add("one")

    def full(handle):
        raise OSError("no space left")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            file.add("two, which is long")
    file.add("3")
    assert complete_lines(tmp_path / "a.jsonl") == [b'"one"', b'"3"']
