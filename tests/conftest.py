"""Shared fixtures: a small scene data set and a tiny model."""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("OMP_NUM_THREADS", "1")  # OpenMP's threads hang in a process that is forked


LONGEST = (
    *("engines/test_deepspeed", "faults/test_peers", "documents/test_python_page"),
    *("release/test_upload", "cli/test_launch", "attacks/test_damage", "faults/test_kills"),
    *("runs/test_pipeline", "training/test_validation_processes", "faults/test_interrupt"),
)
"""Files that take a minute or more. They start first, so that no worker ends long after others."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get("/".join(item.path.parts[-2:]), len(order)))


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """DeepSpeed says there that this process is one of one; what a test starts must not read it."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(autouse=True)
def reports() -> None:
    """What mmkd reports is printed, as by its command."""
    from mmkd.runtime.progress import log_to_console

    log_to_console()


@pytest.fixture
def datasets_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """`datasets` keeps an Arrow copy of what it reads; these go with the test."""
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    from mmkd.evaluation.hub import _find

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    remembered = (_resolve_hf_datasets_cache_dir, _find)
    for found in remembered:
        found.cache_clear()
    yield
    for found in remembered:
        found.cache_clear()


@pytest.fixture(scope="session")
def scenes_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scene data set: 64 training images, 16 for validation, 6 behind each evaluation file."""
    from mmkd.data.scenes.build import build_scenes

    out = tmp_path_factory.mktemp("data") / "scenes"
    build_scenes(out, seed=0, train=64, validation=16, evaluation=6)
    return out


@pytest.fixture(scope="session")
def tiny_model_dir(scenes_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random LLaVA model (0.1 M weights, float32) and the scenes' processor."""
    from tests.support.tiny import write_tiny_model

    out = tmp_path_factory.mktemp("models") / "tiny"
    write_tiny_model(scenes_dir / "processor", out)
    return out


@pytest.fixture(scope="session")
def given(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Good worlds for `tests.support.bad_inputs.world_in`, each made at its first use."""
    from tests.support.bad_inputs import Given

    return Given(tmp_path_factory.mktemp("given"), tiny_model_dir)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished study: two students, three seeds, a teacher, scores and samples."""
    from tests.support.written_runs import put_study

    return put_study(tmp_path)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A console that records, wide enough for models as rows."""
    from rich.console import Console

    from mmkd.report import tables

    console = Console(record=True, width=220, file=io.StringIO())
    monkeypatch.setattr(tables, "console", console)
    return console
