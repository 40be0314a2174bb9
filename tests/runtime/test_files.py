"""Files and folders are written in one step."""

import errno
import os

import pytest

from mmkd.errors import CheckpointError
from mmkd.runtime import files


def write_text(path):
    files.write_text(path, "new")


def write_file(path):
    with files.writing(path) as partial:
        partial.write_text("new")


def write_folder(path):
    files.write_folder(path, lambda folder: (folder / "a").write_text("new"))


WAYS = [write_text, write_file, write_folder]


@pytest.fixture
def flushed(monkeypatch):
    """The paths that were flushed to the disk."""
    paths: list[str] = []
    real = os.fsync

    def fsync(handle):
        paths.append(os.readlink(f"/proc/self/fd/{handle}"))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    return paths


@pytest.mark.parametrize("write", WAYS)
def test_content_and_name_are_flushed_in_this_order(tmp_path, flushed, write):
    write(tmp_path / "out")
    assert len(flushed) == 2
    assert ".out.mmkd.partial" in flushed[0]
    assert flushed[1] == str(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("write", WAYS)
@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EIO])
def test_a_disk_that_cannot_flush_names(tmp_path, monkeypatch, write, number):
    real = os.fsync

    def fsync(handle):
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            raise OSError(number, os.strerror(number))
        real(handle)

    monkeypatch.setattr(files.os, "fsync", fsync)
    if number == errno.EIO:
        with pytest.raises((OSError, CheckpointError), match="Input/output error"):
            write(tmp_path / "out")
    else:
        write(tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
