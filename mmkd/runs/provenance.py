"""Provenance of a run: versions, code, machine, data."""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from mmkd.data.records import Source
from mmkd.data.sources import find_files
from mmkd.errors import DataError
from mmkd.making.used import made_before, with_stage_data
from mmkd.recipe import HUB, Recipe, SourceConfig, to_yaml
from mmkd.redact import redact_all
from mmkd.runs.members import Member, members, run_folder
from mmkd.runtime import consent, distributed
from mmkd.runtime.files import write_json, write_text
from mmkd.runtime.hashes import file_hash
from mmkd.runtime.plugins import plugin_files
from mmkd.runtime.progress import say
from mmkd.runtime.shapes import Provenance, read_if

PACKAGES = ("mmkd", "torch", "transformers", "tokenizers", "datasets", "safetensors", "lmms-eval",
            "deepspeed", "numpy", "pillow")  # fmt: skip


def collect(recipe: Recipe) -> dict[str, Any]:
    """Everything that determines the run's losses, as JSON."""
    first = recipe.assistant
    stages = [*(first.stages if first else []), *recipe.stages]
    data = [recipe.data, *([first.data] if first and first.data else [])]
    data += [s.data for s in stages if s.data]
    later = _made_later(recipe)
    program = Path(sys.argv[0]).name
    sources = [*recipe.teachers, recipe.student, *([first.student] if first else [])]
    models = {m.model for m in sources if m.model}
    return {
        "command": ["mmkd" if program == "__main__.py" else program, *sys.argv[1:]],
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
        "trusted": consent.record(),
        "data": {
            part.train: source_facts(part)
            for config in data
            for part in [*config.parts, *config.validation_parts]
            if part.train not in later
        },
        **_left_out(recipe),
        **_selections(recipe),
    }


def _made_later(recipe: Recipe) -> set[str]:
    """Files that are not written, because what they would hold is made in the folders of stages.
    Notes of it are in inputs.json of these stages."""
    files = {file for config in recipe.make.values() for file in config.files}
    before = [made_before(member.recipe) for member in members(recipe)]
    return files - {f for entries in before for config in entries.values() for f in config.files}


def _parts(recipe: Recipe) -> list[tuple[SourceConfig, float | None, int]]:
    """Each different source that a stage of a member trains on, with the share that is held out and
    the number of records that `data.sampling` does not train on."""
    data = []
    for member in members(recipe):
        for index, folder in enumerate(member.stages):
            own = with_stage_data(member.recipe, index, folder.made)
            data.append(own.stage_data(own.stages[index]))
    found = {
        (part.model_dump_json(), config.held_out_share, config.records_apart): part
        for config in data
        for part in config.parts
    }
    return [(part, share, apart) for (_, share, apart), part in found.items()]


def _left_out(recipe: Recipe) -> dict[str, Any]:
    """For each source with `leave_out` the files, their hashes, and the numbers of records that are
    not trained on for this reason."""
    found: dict[str, Any] = {}
    for part, share, apart in _parts(recipe):
        if part.leave_out is None:
            continue
        try:
            source = Source(part.model_copy(update={"select": None}), share=share, apart=apart)
            sha256 = file_hash(Path(part.leave_out))
        except (DataError, OSError):  # of a student that is trained already
            continue
        facts = {"file": part.leave_out, "sha256": sha256, "records": source.left_out}
        if facts not in (known := found.setdefault(part.train, [])):
            known.append(facts)
    return {"left_out": found} if found else {}


def _selections(recipe: Recipe) -> dict[str, Any]:
    """What `select` has chosen, by source, for each different choice; nothing without it."""
    found: dict[str, list[dict[str, Any]]] = {}
    for part, share, apart in _parts(recipe):
        if part.select is None:
            continue
        scores = getattr(part.select, "scores", None)
        try:
            chosen = Source(part, share=share, apart=apart).selection
            sha256 = None if scores is None else file_hash(Path(scores))
        except (DataError, OSError):  # of a student that is trained already
            continue
        assert chosen is not None
        facts = {**chosen.facts(), "settings": part.select.model_dump(mode="json")}
        if sha256 is not None:
            facts["scores"] = f"sha256 {sha256}"
        found.setdefault(part.label, []).append(facts)
    return {"selections": found} if found else {}


CONTINUED, REPLACED = "continued", "replaced"


def describe(member: Member, recipe: Recipe) -> None:
    """Write recipe and provenance of a member; `recipe` is that of the whole run."""
    if distributed.rank() == 0:
        folder = run_folder(recipe)
        write_text(folder.recipe, to_yaml(recipe))
        write(folder.provenance, recipe)
        write_text(member.folder.training, to_yaml(member.recipe))


def write(path: Path, recipe: Recipe) -> None:
    """Write the provenance of a run.

    Existing content is kept. If a run continues under other conditions, such as another version or
    machine, the keys that differ are added to `continued`. Plugins that differ are also logged.
    """
    found = read_if(Provenance, path) or {}
    now = redact_all(collect(recipe))
    if "command" not in found:
        kept = {REPLACED: found[REPLACED]} if REPLACED in found else {}
        write_json(path, now | kept)
        return
    now = json.loads(json.dumps(now))
    before = found.get(CONTINUED, [])
    differing = {key: value for key, value in now.items() if found.get(key) != value}
    if "plugins" in differing:
        first, later = found.get("plugins", {}), now["plugins"]
        other = [n for n in sorted({*first, *later}) if first.get(n) != later.get(n)]
        say(f"{', '.join(other)}: changed since the run began; {path} has both checksums")
    if differing and differing not in before:
        write_json(path, {**found, CONTINUED: [*before, differing]})


def source_facts(config: SourceConfig) -> str:
    """A description of a source's content with a checksum."""
    if config.train.startswith(HUB):
        told = {k: getattr(config, k) for k in ("subset", "split", "revision", "stream")}
        return ", ".join(f"{k} {v}" for k, v in told.items() if v is not None)
    try:
        files = find_files(config.train)
    except DataError:
        return "not there"
    if len(files) == 1 and files[0].suffix != ".tar":
        return f"sha256 {file_hash(files[0])}"
    # Shards contain images: hashing them would take longer than many stages.
    shards = files[0].suffix == ".tar"
    seen = hashlib.sha256()
    for file in files:
        content = file.stat().st_size if shards else file_hash(file)
        seen.update(f"{file.name} {content}\n".encode())
    what = "names and sizes" if shards else "names and sha256"
    return f"{len(files):,} files, sha256 of their {what} {seen.hexdigest()}"


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
        # The git settings of a project could name programs that git runs.
        command = ["git", "-c", "core.fsmonitor=false", *words]
        return subprocess.run(
            command, cwd=here, capture_output=True, text=True, check=True, timeout=20
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
