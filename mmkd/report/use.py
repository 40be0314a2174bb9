"""Folders of a run's students, and Python code that asks a model about an image."""

import json
from pathlib import Path

from mmkd.modeling.foreign_models import read_settings
from mmkd.report.rundata import Run

SNIPPET = """\
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {name}
processor = AutoProcessor.from_pretrained(name{trust})
model = AutoModelForImageTextToText.from_pretrained(name{trust})
content = [
    {{"type": "image", "path": "picture.png"}},
    {{"type": "text", "text": "What is in the image?"}},
]
inputs = processor.apply_chat_template(
    [{{"role": "user", "content": content}}],
    add_generation_prompt=True,
    tokenize=True,
    return_dict=True,
    return_tensors="pt",
).to(model.device, model.dtype)
output = model.generate(**inputs, max_new_tokens=64)
answer = output[0, inputs["input_ids"].shape[1] :]
print(processor.decode(answer, skip_special_tokens=True))
"""


def how_to_use(run: Run) -> str | None:
    """The folders of the finished students, and Python code that asks the first of them about an
    image; None if no student is finished."""
    finished = {m.label: m.finished_student for m in run.members if m.finished_student is not None}
    if not finished:
        return None
    listed = [f"student {label}: {folder}" for label, folder in finished.items()]
    folder = next(iter(finished.values()))
    lines = snippet(str(folder), needs_code=needs_code(folder)).splitlines()
    code = [f"    {line}" if line else "" for line in lines]
    return "\n".join([*listed, "", "try it in Python:", "", *code])


def needs_code(folder: Path) -> bool:
    """Whether a student's classes are not in transformers. Their code is then in its folder."""
    return "auto_map" in read_settings(folder / "config.json")


def snippet(name: str, *, needs_code: bool) -> str:
    """Python code that asks a model about an image.

    Args:
        name: folder or Hub id of the model.
        needs_code: transformers must run code from its folder.
    """
    trust = ", trust_remote_code=True" if needs_code else ""
    return SNIPPET.format(name=json.dumps(name, ensure_ascii=False), trust=trust)
