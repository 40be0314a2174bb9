"""Code from outside of mmkd: the command line in this process, an installed package, and how mmkd
refuses code that is broken."""

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


def changed(code, old, new):
    """Code with other words."""
    assert old in code
    return code.replace(old, new)


def error_line(capsys):
    """What a refused command printed on standard error: one line."""
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def broken_packages(code, entry, what):
    """Parameters for `check_broken_package`: code of a package, and why it cannot be used.

    Args:
        code: of a package that can be used.
        entry: its entry point, as `install` takes it.
        what: "objective" or "conversion".
    """
    _, kind, name = entry
    return [
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        (f"class {name}: pass", f"TypeError: it is not a subclass of {what.title()}"),
        (changed(code, kind, "other"), f"it is not of the kind '{kind}'"),
    ]


def check_broken_package(folder, monkeypatch, capsys, recipe, code, entry, said):
    """A run whose recipe names the kind of a broken package is refused in one line.

    Args:
        recipe: of the run.
        said: why the package cannot be used.
        folder, code, entry: as in `install`.
    """
    install(folder, monkeypatch, code, entry)
    assert mmkd(monkeypatch, "run", recipe) == 2
    error = error_line(capsys)
    assert f"the entry point outside_mmkd:{entry[2]} cannot be used (" in error
    assert said in error
    assert error.endswith(" -- fix its package, or uninstall it\n")
