"""A student as a self-contained folder: weights, code, processor, card, recipe."""

import importlib.metadata
import json
from functools import partial
from pathlib import Path

import yaml
from huggingface_hub import ModelCard

from mmkd.data.generation import end_tokens
from mmkd.modeling.loading import load_pretrained_processor
from mmkd.recipe import ReleaseConfig
from mmkd.redact import redact
from mmkd.release.dtype import Rounded, stored_dtype, write_rounded
from mmkd.release.scrub import scrub
from mmkd.release.secrets import refuse_secrets
from mmkd.release.source import Source
from mmkd.runtime.files import link_file, write_folder
from mmkd.runtime.shapes import read_settings
from mmkd.students.write import ADAPTER

Files = dict[str, Path | str | Rounded]
"""Name in the release -> a file to copy, text to write, or weights to write in another dtype."""
SETTINGS = "generation_config.json"
INDEX = "model.safetensors.index.json"
OUTPUT_DIR = "runs"


def release_files(source: Source, settings: ReleaseConfig, card: ModelCard) -> Files:
    """The files of a release; nothing is written.

    Adapters that a stage has kept are left out: they are merged into the weights already, and fit
    the weights before that only.
    """
    files: Files = {
        path.relative_to(source.student).as_posix(): path
        for path in sorted(source.student.rglob("*"))
        if path.is_file() and ADAPTER not in path.relative_to(source.student).parts
    }
    for path in files.values():
        assert isinstance(path, Path)
        refuse_secrets(path, source.student)
    own = {"output_dir": OUTPUT_DIR, "report_to": []}  # for others to choose
    if SETTINGS in files:
        files[SETTINGS] = settings_text(source)
    if settings.dtype is not None and settings.dtype != stored_dtype(source.student):
        files.pop(INDEX, None)
        for name in [n for n in files if n.endswith(".safetensors")]:
            files[name] = Rounded(source.student / name, settings.dtype)
    recipe = scrub(source.recipe.model_dump(mode="json") | own)
    provenance = scrub(source.run.provenance)
    return files | {
        "README.md": redact(f"{str(card).rstrip()}\n"),
        "LICENSE": license_note(settings, source.needs_code),
        "recipe.yaml": yaml.safe_dump(recipe, sort_keys=False),
        "provenance.json": json.dumps(provenance, indent=1, ensure_ascii=False) + "\n",
    }


def license_note(settings: ReleaseConfig, code: bool) -> str:
    """The license of the weights, and of the code if there is code among the files."""
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


def settings_text(source: Source) -> str:
    """The student's generation settings with all tokens that end an answer. Older versions of mmkd
    left out the chat template's end of turn."""
    held = read_settings(source.student, SETTINGS)
    processor = load_pretrained_processor(str(source.student))
    ends = end_tokens(processor, held.get("eos_token_id"))
    if ends:
        held["eos_token_id"] = ends if len(ends) > 1 else ends[0]
    return json.dumps(held, indent=2, sort_keys=True) + "\n"


def size_of(content: Path | str | Rounded) -> int:
    """Bytes of a file of a release."""
    if isinstance(content, Rounded):
        return content.size
    return len(content.encode()) if isinstance(content, str) else content.stat().st_size


def write_release(files: Files, out: Path, *, new: bool = False) -> None:
    """Write the folder. It gets its name only when it is complete.

    Weights are hard links to the run's own files if the disk allows it.

    Args:
        files: the result of `release_files`.
        out: folder to write.
        new: refuse to replace a folder that is there.

    Raises:
        CheckpointError: the folder cannot be written, or its weights are not the student's. Nothing
            of it is left.
    """
    write_folder(out, partial(_write, files), new=new)


def _write(files: Files, folder: Path) -> None:
    rounded = next((c for c in files.values() if isinstance(c, Rounded)), None)
    if rounded is not None:
        student = rounded.source.parent
        write_rounded(student, folder, rounded.dtype)
    for name, content in files.items():
        if isinstance(content, Rounded) or (rounded is not None and name == "config.json"):
            continue
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, str):
            path.write_text(content, encoding="utf-8")
        elif path.suffix == ".safetensors":
            link_file(content, path)
        else:
            path.write_bytes(content.read_bytes())
