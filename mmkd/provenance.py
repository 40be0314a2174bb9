"""Where a run's numbers come from: versions, code, machine, data."""

import hashlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmkd.files import sha256
from mmkd.plugins import plugin_files
from mmkd.recipe import Recipe

PACKAGES = ("mmkd", "torch", "transformers", "tokenizers", "datasets", "safetensors", "lmms-eval",
            "deepspeed", "numpy", "pillow")  # fmt: skip


def collect(recipe: Recipe) -> dict[str, Any]:
    """Everything that decides the run's losses, as JSON."""
    data = {recipe.data.train, *(s.data.train for s in recipe.stages if s.data)}
    models = {m.model for m in (recipe.teacher, recipe.student) if m and m.model}
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "seeds": recipe.seeds or [recipe.seed],
        "versions": {"python": platform.python_version(), **_versions()},
        "git": _git(),
        "machine": {
            "system": platform.platform(),
            "processor": processor_name(),
            "cpus": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
        },
        "models": {m: "folder" if Path(m).is_dir() else "Hub" for m in sorted(models)},
        "plugins": plugin_files(),
        "data": {name: sha256(Path(name)) for name in sorted(data) if Path(name).is_file()},
    }


def weights_hash(folder: Path) -> str | None:
    """One hash over a model folder's weight files; None for what is not a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        return None
    return hashlib.sha256("".join(sha256(f) for f in files).encode()).hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git() -> dict[str, Any] | None:
    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "changed": bool(changes)}


def processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((s.split(":", 1)[1].strip() for s in lines if s.startswith("model name")), "")
