"""`import mmkd`: quick, and every name is there and has a type."""

import ast
import importlib
import subprocess
import sys
from importlib.resources import files

import pytest

import mmkd

SLOW = ("torch", "transformers", "datasets", "pydantic", "numpy", "rich")


def test_importing_it_imports_nothing_slow():
    code = "import sys, mmkd; print(*(n for n in sys.argv[1:] if n in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code, *SLOW], capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, [])


def test_a_recipe_is_read_without_torch():
    code = "import sys, mmkd; mmkd.load_recipe; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False"]


def test_every_name_is_there():
    for name in mmkd.__all__:
        assert getattr(mmkd, name) is not None
    assert set(mmkd.__all__) <= set(dir(mmkd))
    for name, module in mmkd._MODULE_OF.items():
        assert getattr(mmkd, name) is getattr(importlib.import_module(module), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = mmkd.nothing


def test_types_are_known_of_every_name():
    """What type checkers read, and what Python imports at the first use, are the same."""
    tree = ast.parse(files("mmkd").joinpath("__init__.py").read_text())
    checked = next(n for n in tree.body if isinstance(n, ast.If) and "TYPE" in ast.dump(n.test))
    typed = {
        alias.name: node.module
        for node in checked.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed.pop("ops") == "mmkd"
    assert typed == mmkd._MODULE_OF
    assert {*typed, "ops", "__version__"} == {*mmkd.__all__}
    assert files("mmkd").joinpath("py.typed").is_file()
