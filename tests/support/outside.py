"""Code from outside of mmkd: the command line in this process, and an installed package."""

import sys

import pytest

from mmkd.cli import main


def mmkd(monkeypatch, *words):
    """The exit status of a command."""
    monkeypatch.setattr(sys, "argv", ["mmkd", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


def install(folder, monkeypatch, code, entry):
    """A package with one module and an entry point, on the path of modules.

    Args:
        folder: to write it to.
        code: of its module, `outside_mmkd`.
        entry: (group, kind, name in the module).
    """
    monkeypatch.delitem(sys.modules, "outside_mmkd", raising=False)
    (folder / "outside_mmkd.py").write_text(code)
    info = folder / "outside_mmkd-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: outside-mmkd\nVersion: 1\n")
    group, kind, name = entry
    (info / "entry_points.txt").write_text(f"[{group}]\n{kind} = outside_mmkd:{name}\n")
    monkeypatch.syspath_prepend(str(folder))
