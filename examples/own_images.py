"""Distil on a folder of your own images, which need no text.

    python examples/own_images.py PHOTOS --teacher ID --student ID --out runs/photos

It writes a recipe in which the teacher makes the data (`make`), runs it, and shows what teacher and
student say about images that were held out. After a stop, the same command goes on.

    OUT/recipe.yaml      written once; edit it and run `mmkd run OUT/recipe.yaml` to train otherwise
    OUT/train.jsonl      the teacher's answers as records; OUT/train.jsonl.answers: all of them
    OUT/photos/          the run: report.html, 01-mimic/student
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

import mmkd
from mmkd.data.images import SUFFIXES
from mmkd.errors import AGAIN, DataError, MmkdError, StoppedError
from mmkd.modeling.loading import load_model, load_processor
from mmkd.recipe import ModelConfig
from mmkd.runtime import distributed, interrupt
from mmkd.runtime.files import write_text
from mmkd.runtime.progress import console, log_to_console

PROMPTS = [
    "Describe this image in detail.",
    "List the objects that you can see, separated by commas.",
]
RECIPE = """\
name: photos
output_dir: {out}
teacher: {{model: {teacher}, dtype: {dtype}}}
student: {{model: {student}}}
make:
  photos:
    pictures: {photos}
    limit: {limit}  # the first images by name; the others are held out
    prompts: {prompts}
    sampling: {{max_new_tokens: {longest}}}  # greedy decoding
    checks: [empty, {{kind: repeats, ngram: 4, most: 3}}]
    out: {data}
data: {{train: "made:photos"}}
stages:
  - name: mimic
    train: [connector, language_model]
    objectives:
      - {{kind: ce}}  # what the teacher said
      - {{kind: kl}}  # its distributions over that
      - {{kind: kl, name: kl_vision, region: vision}}  # and over the image's tokens
    epochs: 1
    batch: {{size: 4, accumulate: 4}}
    precision: auto
    optimizer: {{lr: 2.0e-5}}
"""


def images_in(photos: Path) -> list[str]:
    """Paths of the images below a folder, in a fixed order."""
    found = (p for p in photos.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(str(path.relative_to(photos)) for path in found)


def show(models: dict[str, str], photos: Path, names: list[str], prompt: str, longest: int) -> None:
    """Print what models say about images.

    Args:
        models: folders or Hub ids by name.
        photos: folder of the images.
        names: paths of the images below it.
        prompt: the question.
        longest: tokens of an answer.
    """
    said: dict[str, dict[str, str]] = {}
    for label, model in models.items():
        source = ModelConfig(model=model)
        loaded, processor = load_model(source), load_processor(source)
        loaded.to(distributed.choose_device("auto"))  # type: ignore[arg-type]
        for name in names:
            reply = mmkd.generate(
                loaded, prompt, photos / name, processor=processor, max_new_tokens=longest
            )
            said.setdefault(name, {})[label] = reply.text
    for name, answers in said.items():
        lines = [f"\n{name}: {prompt}", *(f"  {label}: {a}" for label, a in answers.items())]
        console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


def main(
    photos: Annotated[Path, typer.Argument(help="folder of images, in any depth")],
    teacher: Annotated[str, typer.Option(help="folder or Hub id")],
    student: Annotated[str, typer.Option(help="folder or Hub id, of the teacher's tokenizer")],
    out: Annotated[Path, typer.Option(help="folder to write")],
    prompt: Annotated[list[str], typer.Option(help="repeat for several")] = PROMPTS,
    held_out: Annotated[int, typer.Option(min=1, help="images, the last by name")] = 3,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="longest answer")] = 128,
) -> None:
    """Distil a teacher into a student on images of your own."""
    photos, out = photos.resolve(), out.resolve()
    if len(names := images_in(photos)) <= held_out:
        raise DataError(f"{len(names)} images", where=str(photos), hint="add some")
    if not (file := out / "recipe.yaml").exists():
        on_gpu = distributed.choose_device("auto").type == "cuda"
        values = {
            "out": str(out), "teacher": teacher, "student": student, "photos": str(photos),
            "dtype": "bfloat16" if on_gpu else "float32", "limit": len(names) - held_out,
            "prompts": prompt, "longest": max_new_tokens, "data": str(out / "train.jsonl"),
        }  # fmt: skip
        quoted = {key: json.dumps(value) for key, value in values.items()}
        write_text(file, RECIPE.format(**quoted))
    if code := interrupt.call([sys.executable, "-m", "mmkd.cli", "run", str(file)]):
        raise typer.Exit(code)
    interrupt.stop_here()
    models = {"teacher": teacher, "student": str(out / "photos" / "01-mimic" / "student")}
    show(models, photos, names[-held_out:], prompt[0], max_new_tokens)


if __name__ == "__main__":
    log_to_console()
    with interrupt.listening(AGAIN):
        try:
            typer.run(main)
        except StoppedError as end:
            print(end)
            sys.exit(interrupt.status())
        except MmkdError as error:
            sys.exit(f"error: {error}")
