"""Distil on a folder of your own pictures, which need no text.

    python examples/own_images.py PHOTOS --teacher ID --student ID --out runs/photos

The teacher answers a few prompts on every picture; its answers become the data of a recipe, which
`mmkd run` trains. At the end teacher and student answer on pictures that were held out.

    OUT/train.jsonl      what the teacher said, chat messages; delete it to ask again
    OUT/recipe.yaml      written once; edit it, delete OUT/photos and run again to train otherwise
    OUT/photos/          the run: report.html, 01-mimic/student
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from mmkd import distributed
from mmkd.data.answers import sample
from mmkd.data.encoder import Encoder
from mmkd.data.images import FORMATS, load_image
from mmkd.data.records import Records
from mmkd.data.schema import Record
from mmkd.errors import DataError, MmkdError
from mmkd.files import write_text
from mmkd.loading import load_model, load_processor
from mmkd.progress import console, track
from mmkd.recipe import DataConfig, ModelConfig, SamplingConfig

PROMPTS = [
    "Describe this image in detail.",
    "List the objects that you can see, separated by commas.",
]
RECIPE = """\
name: photos
output_dir: %s
teacher: {model: %s, dtype: %s}
student: {model: %s}
data: {train: %s, images: %s}
stages:
  - name: mimic
    train: [connector, language_model]
    objectives:
      - {kind: ce}  # what the teacher said
      - {kind: kl}  # its distributions over that
      - {kind: kl, name: kl_vision, region: vision}  # and over the picture's tokens
    epochs: 1
    batch: {size: 4, accumulate: 4}
    precision: auto
    optimizer: {lr: 2.0e-5}
"""
AT_ONCE = 8  # questions


class Given(Records):
    """Records that are given one by one, and not read from anywhere."""

    def __init__(self, folder: Path):
        self.folder = folder

    def where(self, index: int) -> str:
        return str(self.folder)


def readable(photos: Path) -> list[str]:
    """Paths of the pictures that can be decoded, in a fixed order."""
    known = {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
    files = [f for f in sorted(photos.rglob("*")) if f.suffix.lower() in known]
    names = []
    for file in track(files, "pictures", len(files)):
        try:
            load_image(name := str(file.relative_to(photos)), photos)
            names.append(name)
        except DataError as error:
            console.print(f"left out: {error}", markup=False, highlight=False)
    return names


def ask(model: ModelConfig, photos: Path, pairs: list[tuple[str, str]], longest: int) -> list[str]:
    """A model's likeliest answer to each (picture's path, prompt)."""
    device = distributed.choose_device("auto")
    answering: Any = load_model(model)
    answering.to(device)
    encoder = Encoder(Given(photos), load_processor(model), DataConfig(train="-"))  # not read
    settings = SamplingConfig(max_new_tokens=longest, temperature=0)
    ends = answering.generation_config.eos_token_id

    def generate(inputs: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        return answering.generate(**inputs, **options)

    def record(name: str, prompt: str) -> Record:
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        return Record(name, [{"role": "user", "content": content}], [name], root=photos)

    parts = [pairs[i : i + AT_ONCE] for i in range(0, len(pairs), AT_ONCE)]
    answers: list[str] = []
    for part in track(parts, f"{model.model} answers", len(parts)):
        asked = [record(*pair) for pair in part]
        answers += sample(generate, encoder, asked, settings, seed=0, device=device, ends=ends)
    answering.cpu()
    torch.cuda.empty_cache()  # what trains next needs the memory
    return answers


def main(
    photos: Annotated[Path, typer.Argument(help="folder of pictures, in any depth")],
    teacher: Annotated[str, typer.Option(help="folder or Hub id")],
    student: Annotated[str, typer.Option(help="folder or Hub id, of the teacher's tokenizer")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    prompt: Annotated[list[str], typer.Option(help="repeat for several")] = PROMPTS,
    held_out: Annotated[int, typer.Option(min=1, help="pictures, the last by name")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
) -> None:
    """Distil a teacher into a student on pictures of your own."""
    photos, out = photos.resolve(), out.resolve()
    if len(names := readable(photos)) <= held_out:
        raise DataError(f"{len(names)} readable pictures", where=str(photos), mend="add some")
    dtype = "bfloat16" if distributed.choose_device("auto").type == "cuda" else "float32"
    asked = ModelConfig(model=teacher, dtype=dtype)
    data, file = out / "train.jsonl", out / "recipe.yaml"
    if not data.exists():
        questions = [(name, p) for name in names[:-held_out] for p in prompt]
        answers = ask(asked, photos, questions, max_new_tokens)
        lines = []
        for (name, p), a in zip(questions, answers, strict=True):
            turns = [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
            lines += [json.dumps({"images": [name], "messages": turns}) + "\n"] if a else []
        write_text(data, "".join(lines))
    if not file.exists():
        words = (out, teacher, dtype, student, data, photos)
        write_text(file, RECIPE % tuple(json.dumps(str(word)) for word in words))
    if code := subprocess.run([sys.executable, "-m", "mmkd.cli", "run", str(file)]).returncode:
        raise typer.Exit(code)
    made = ModelConfig(model=str(out / "photos" / "01-mimic" / "student"))
    questions = [(name, prompt[0]) for name in names[-held_out:]]
    said = [ask(model, photos, questions, max_new_tokens) for model in (asked, made)]
    for (name, question), one, other in zip(questions, *said, strict=True):
        text = f"\n{name}: {question}\n  teacher: {one}\n  student: {other}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except MmkdError as error:
        sys.exit(f"error: {error}")
