"""A student as a folder that needs nothing else: weights, code, processor, card, recipe."""

import importlib.metadata
import json
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from mmkd.files import link_file, write_folder
from mmkd.recipe import ReleaseConfig
from mmkd.release.scrub import scrub
from mmkd.release.source import Source
from mmkd.students.write import ADAPTER

Files = dict[str, Path | str]  # name in the release -> the file, or a new one's text
OUTPUT_DIR = "runs"


def release_files(source: Source, settings: ReleaseConfig, card: ModelCard) -> Files:
    """What a release holds; nothing is written. Adapters that a stage has kept are part of the
    weights already, and fit what is not released: they stay behind."""
    files: Files = {
        path.relative_to(source.student).as_posix(): path
        for path in sorted(source.student.rglob("*"))
        if path.is_file() and ADAPTER not in path.relative_to(source.student).parts
    }
    own = {"output_dir": OUTPUT_DIR, "report_to": []}  # what is of whoever trains it again
    recipe = scrub(source.recipe.model_dump(mode="json") | own)
    provenance = scrub(source.run.provenance)
    return files | {
        "README.md": f"{str(card).rstrip()}\n",
        "LICENSE": license_note(settings, source.needs_code),
        "recipe.yaml": yaml.safe_dump(recipe, sort_keys=False),
        "provenance.json": json.dumps(provenance, indent=1, ensure_ascii=False) + "\n",
    }


def license_note(settings: ReleaseConfig, code: bool) -> str:
    """Which license is whose; with the code's own where code is among the files."""
    weights = settings.license_name or settings.license or "not stated by who released them"
    link = f" ({settings.license_link})" if settings.license_link else ""
    note = (
        f"Weights: {weights}{link}.\n"
        "The licenses of the models and of the data that they were made from still hold.\n"
    )
    if code:
        note += "\nPython files: mmkd, under the license below.\n\n"
        note += importlib.metadata.distribution("mmkd").read_text("licenses/LICENSE") or ""
    return note


def size_of(content: Path | str) -> int:
    """Bytes of one of a release's files."""
    return len(content.encode()) if isinstance(content, str) else content.stat().st_size


def write_release(files: Files, out: Path) -> None:
    """Write the folder, replacing what is there; it takes its name only when it is complete.

    Weights are links to the run's own where the disk allows it.

    Raises:
        CheckpointError: it cannot be written; nothing is left of it.
    """
    write_folder(out, partial(_write, files))


def _write(files: Files, folder: Path) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".safetensors":
            link_file(content, path)
        else:
            path.write_bytes(content.read_bytes())
